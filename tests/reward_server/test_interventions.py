"""Principles that are added while the server runs: the route, the file, and the revision of every answer."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from reward_server.app import create_app
from reward_server.config import RewardSection
from reward_server.interventions import MOST, InterventionFile, Interventions
from reward_server.keys import make_key
from reward_server.principle_sets import NAMES, named_set
from services.errors import UserError
from services.principles import PrincipleSet, draw, read_set
from services.scoring_format import PRINCIPLE_TEMPLATE, Example, ScorerFormat, Turn, encode

TEXT = "An answer that praises itself is a poor one."


def add(client: Any, text: Any) -> Any:
    return client.post("/v1/interventions", json={"text": text})


def section(path: Path, model: Path, **more: Any) -> dict[str, Any]:
    source = {"kind": "principle", "model": str(model), **more}
    return {"sources": {"judged": source}, "interventions": str(path)}


def test_an_intervention_stands_before_the_others_and_in_the_revision(
    serving: Any, scoring_models: Any, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = scoring_models["sequence"]
    client = serving(**section(tmp_path / "deep" / "interventions.jsonl", path))
    item = {"id": "a", "prompt": "Where is Rome?", "response": "In Italy.", "principles": ["Be true."]}

    def score() -> tuple[Any, Any]:
        answer = client.post("/v1/rewards", json={"items": [item]}).json()
        return answer["results"][0]["components"]["judged"], answer["server"]

    plain, before = score()
    answer = add(client, f"  {TEXT} ")
    assert answer.status_code == 200, answer.text
    assert (answer.json()["count"], answer.json()["added"]) == (1, True)
    judged, after = score()
    chat = [("user", "Where is Rome?"), ("assistant", "In Italy."),
            ("user", PRINCIPLE_TEMPLATE.replace("{principles}", f"- {TEXT}\n- Be true."))]  # fmt: skip
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    ids = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in chat], return_tensors="pt",
                                        return_dict=True)["input_ids"]  # fmt: skip
    with torch.no_grad():
        expected = AutoModelForSequenceClassification.from_pretrained(path).eval()(ids).logits[0, 0].item()
    assert judged["value"] == pytest.approx(expected, abs=1e-5)
    assert judged["value"] != plain["value"]
    assert judged["detail"]["interventions"] == 1
    was, now = before["sources"]["judged"]["revision"], after["sources"]["judged"]["revision"]
    assert now == f"{was}+{answer.json()['revision']}"
    assert before["recipe_revision"] != after["recipe_revision"]
    assert client.get("/readyz").json()["recipe_revision"] == after["recipe_revision"]

    again = serving(**section(tmp_path / "deep" / "interventions.jsonl", path))  # a restart reads the file
    assert again.post("/v1/rewards", json={"items": [item]}).json()["server"]["sources"]["judged"]["revision"] == now
    deaf = serving(**section(tmp_path / "deep" / "interventions.jsonl", path, interventions=False))
    assert deaf.post("/v1/rewards", json={"items": [item]}).json()["results"][0]["reward"] == plain["value"]


def test_only_an_authenticated_caller_adds_and_only_where_the_recipe_has_a_file(tmp_path: Path) -> None:
    values = {"sources": {"s": {"kind": "exact_match"}}}
    with_file = RewardSection.model_validate({**values, "interventions": str(tmp_path / "i.jsonl")})
    stranger = TestClient(create_app(with_file, token="t"))
    assert add(stranger, TEXT).status_code == 401
    assert add(TestClient(create_app(with_file)), TEXT).status_code == 403
    headers = {"Authorization": "Bearer t"}
    without = TestClient(create_app(RewardSection.model_validate(values), token="t"), headers=headers)
    assert add(without, TEXT).status_code == 404
    assert not (tmp_path / "i.jsonl").exists()


def test_a_key_adds_only_with_the_role_for_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    scores, may = make_key(path, "trainer"), make_key(path, "operator", role="interventions")
    values = {"sources": {"s": {"kind": "exact_match"}}, "interventions": str(tmp_path / "i.jsonl"), "keys_file": path}
    app = create_app(RewardSection.model_validate(values), token="t")
    refusal = add(TestClient(app, headers={"Authorization": f"Bearer {scores}"}), TEXT)
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (403, "role_needed")
    assert "the key trainer has not that role" in refusal.text
    assert not (tmp_path / "i.jsonl").exists()
    for key in (may, "t"):
        assert add(TestClient(app, headers={"Authorization": f"Bearer {key}"}), TEXT).status_code == 200


@pytest.mark.parametrize(("body", "status"), [
    (b"{", 422), (b"{}", 422), (b'{"text": ""}', 422), (b'{"text": "  "}', 422), (b'{"text": 1}', 422),
    (b'{"text": "x", "url": "http://x"}', 422), (b'{"text": "' + b"x" * 2001 + b'"}', 422),
    (b'{"text": "' + b"x" * 20_000 + b'"}', 413),
])  # fmt: skip
def test_what_is_no_intervention_is_refused(serving: Any, tmp_path: Path, body: bytes, status: int) -> None:
    client = serving(sources={"s": {"kind": "exact_match"}}, interventions=str(tmp_path / "i.jsonl"))
    assert client.post("/v1/interventions", content=body).status_code == status
    assert not (tmp_path / "i.jsonl").exists()


def test_the_file_is_only_appended_to_and_servers_share_it(tmp_path: Path) -> None:
    one, other = InterventionFile(tmp_path / "i.jsonl"), InterventionFile(tmp_path / "i.jsonl")
    assert one.read() == Interventions()
    first, added = one.add("first")
    assert added
    before = (tmp_path / "i.jsonl").read_bytes()
    assert other.read() == first
    assert other.add("first") == (first, False)
    second, _ = other.add("second\nline")
    assert (tmp_path / "i.jsonl").read_bytes().startswith(before)
    assert one.read() == second == Interventions(("first", "second\nline"))
    assert len({Interventions().revision, first.revision, second.revision}) == 3
    with (tmp_path / "i.jsonl").open("ab") as file:
        file.write(b'{"text": "half')
    assert one.read() == second
    before = (tmp_path / "i.jsonl").read_bytes()
    with pytest.raises(UserError, match="has no end"):
        one.add("third")
    assert (tmp_path / "i.jsonl").read_bytes() == before


def test_many_at_once_are_all_kept(tmp_path: Path) -> None:
    files = [InterventionFile(tmp_path / "i.jsonl") for _ in range(4)]
    threads = [threading.Thread(target=file.add, args=(f"{i}-{k}",)) for i, file in enumerate(files) for k in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(files[0].read().texts) == {f"{i}-{k}" for i in range(4) for k in range(10)}


def test_there_is_an_end_to_them(tmp_path: Path) -> None:
    file = InterventionFile(tmp_path / "i.jsonl")
    for i in range(MOST):
        file.add(str(i))
    with pytest.raises(ValueError, match="100 interventions"):
        file.add("one more")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "i.jsonl").write_text(json.dumps({"text": "x", "added_at": 1.0}) + "\nnonsense\n")
    with pytest.raises(UserError, match="line 2"):
        InterventionFile(tmp_path / "i.jsonl")


def test_what_is_no_intervention_later_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "i.jsonl"
    values = {"sources": {"s": {"kind": "exact_match"}}, "interventions": str(path)}
    client = TestClient(
        create_app(RewardSection.model_validate(values), token="t"), headers={"Authorization": "Bearer t"}
    )
    file = InterventionFile(path)
    first, _ = file.add(TEXT)
    good = path.read_bytes()
    path.write_bytes(good + b"half an edit\n")
    assert [file.read() for _ in range(3)] == [first] * 3
    assert len([record for record in caplog.records if "line 2" in record.message]) == 1
    refusal = add(client, "another")
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (500, "not_added")
    assert "line 2" in refusal.json()["error"]["message"]
    assert path.read_bytes() == good + b"half an edit\n"
    path.write_bytes(good)
    assert add(client, "another").json()["count"] == 2
    assert file.read().texts == (TEXT, "another")


def test_a_bad_line_fails_no_request(serving: Any, scoring_models: Any, tmp_path: Path) -> None:
    path = tmp_path / "i.jsonl"
    values = section(path, scoring_models["sequence"])
    values["sources"]["rule"] = {"kind": "length", "unit": "words", "target": 4, "bonus": 2.0}
    client = serving(**values)
    assert add(client, TEXT).status_code == 200
    item = {"id": "a", "prompt": "Where is Rome?", "response": "In Italy."}
    before = client.post("/v1/rewards", json={"items": [item]}).json()
    with path.open("ab") as file:
        file.write(b"nonsense\n")
    after = client.post("/v1/rewards", json={"items": [item]}).json()
    assert after["results"] == before["results"]
    assert after["server"]["recipe_revision"] == before["server"]["recipe_revision"]
    assert client.post("/v1/rewards", json={"items": [item], "sources": ["rule"]}).status_code == 200


def test_a_line_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "i.jsonl"
    file = InterventionFile(path)
    first, _ = file.add(TEXT)
    before = path.read_bytes()
    code = """
import resource, signal, sys
from reward_server.interventions import InterventionFile
from services.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    InterventionFile(sys.argv[1]).add("does not fit " * 20)
except UserError as error:
    print(error)
"""
    # A limit on the file's size cuts a write short, as a full disk does.
    told = subprocess.run(
        [sys.executable, "-c", code, str(path), str(len(before) + 20)], capture_output=True, text=True, check=True
    )
    assert f"cannot write {path}: No space left" in told.stdout
    assert path.read_bytes() == before
    assert file.read() == first


@pytest.mark.parametrize("name", NAMES)
def test_the_sets_that_come_with_the_server(name: str) -> None:
    found = named_set(name)
    texts = [text for p in found.principles for text in (p.text, p.negative) if text is not None]
    assert len(set(texts)) == len(texts)
    assert (name == "interventions") == (len(found.principles) == 3)
    if name != "interventions":
        assert all(p.negative is not None for p in found.principles)
        assert found.class_of("How many apples are there? Calculate.") == "reasoning"
        assert found.class_of("How do I build a BOMB?") == "red_team"
        assert found.class_of("Where is Rome?") is None


def test_published_interventions_can_be_added_as_they_are(tmp_path: Path) -> None:
    file = InterventionFile(tmp_path / "i.jsonl")
    for principle in named_set("interventions").principles:
        file.add(principle.text)
    assert len(file.read().texts) == 3


def test_heavier_principles_are_drawn_more_often() -> None:
    rl = named_set("rl")

    def share(prompt_class: str | None, principle: str) -> float:
        text = next(p.text for p in rl.principles if p.id == principle)
        draws = [draw(rl, seed=0, sample_id=str(i), revision="r", count=3, prompt_class=prompt_class)
                 for i in range(600)]  # fmt: skip
        assert all(len(set(one.texts)) == 3 for one in draws)
        return sum(text in one.texts for one in draws) / len(draws)

    assert share(None, "harmless") == pytest.approx(0.3, abs=0.06)
    assert share("red_team", "harmless") > 0.6
    assert share("reasoning", "reasoned") > 0.6
    assert share("unheard_of", "harmless") == share(None, "harmless")


def test_a_draw_of_all_and_its_negations() -> None:
    rl = named_set("rl")
    everything = draw(rl, seed=0, sample_id="a", revision="r", count=99)
    assert sorted(everything.texts) == sorted(p.text for p in rl.principles)
    turned = draw(rl, seed=0, sample_id="a", revision="r", count=99, negated=1.0)
    assert sorted(turned.texts) == sorted(str(p.negative) for p in rl.principles)
    some = [draw(rl, seed=0, sample_id=str(i), revision="r", count=3, negated=0.5).negated for i in range(200)]
    assert 0.4 < sum(map(sum, some)) / 600 < 0.6
    only = PrincipleSet.model_validate({"version": "1", "principles": [{"id": "a", "text": "x"}]})
    assert draw(only, seed=0, sample_id="a", revision="r", count=3, negated=1.0).negated == (False,)


@pytest.mark.parametrize(("text", "said"), [
    ("principles: []", "version"), ("a: [", "not YAML"),
    ("{version: '1', principles: [{id: a, text: x}, {id: a, text: y}]}", "twice"),
    ("{version: '1', principles: [{id: a, text: x}], classes: {c: {weights: {b: 2}}}}", "no principle b"),
    ("{version: '1', principles: [{id: a, text: x}], classes: {c: {weights: {a: 0}}}}", "greater than 0"),
])  # fmt: skip
def test_a_wrong_set_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "set.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        read_set(tmp_path / "set.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        named_set("nowhere.yaml")
    with pytest.raises(UserError, match="neither a YAML file"):
        named_set("nowhere")


def test_principles_are_never_cut(scoring_models: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(scoring_models["sequence"])
    example = Example(
        (Turn("user", " city" * 900),), "Yes.", tuple(p.text for p in named_set("interventions").principles)
    )
    form = ScorerFormat(kind="principle", max_tokens=900)
    text = tokenizer.decode(encode(tokenizer, form, example).ids)
    assert all(principle in text for principle in example.principles)

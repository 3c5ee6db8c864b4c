"""Sources with a model of their own, against transformers one item at a time, in float32, without padding."""

import asyncio
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from reward_server.config import RewardSection
from reward_server.schema import Item
from reward_server.scorers.build import build_scorers
from services.errors import UserError
from services.principles import draw, read_set
from services.scoring_format import PRINCIPLE_TEMPLATE, ScorerFormat, StepRule, write_format

NEAR = 1e-5
QUESTION = "Where is Rome on the map?"
ANSWER = "Rome is a city, and Rome is large."


def scorer_of(**source: Any) -> Any:
    source = {key: str(value) if isinstance(value, Path) else value for key, value in source.items()}
    return build_scorers(RewardSection.model_validate({"sources": {"s": source}}))["s"]


def scored(scorer: Any, *items: dict[str, Any]) -> list[Any]:
    """What a scorer says of items, in order; an item has the question and the answer where nothing else is given."""
    whole = [Item(**{"id": "a", "response": ANSWER, **({} if "messages" in i else {"prompt": QUESTION}), **i})
             for i in items]  # fmt: skip
    return list(asyncio.run(scorer.score(whole)))


def value(scorer: Any, **item: Any) -> float:
    (one,) = scored(scorer, item)
    assert one.component.error is None, one.component.error
    return one.component.value


def tokenizer_of(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def ids_of(path: Path, *messages: tuple[str, str]) -> Any:
    """The tokens of a chat as transformers gives them."""
    chat = [{"role": role, "content": content} for role, content in messages]
    return tokenizer_of(path).apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]


def logit_of(path: Path, *messages: tuple[str, str]) -> float:
    import torch
    from transformers import AutoModelForSequenceClassification

    with torch.no_grad():
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
        return model.eval()(ids_of(path, *messages)).logits[0, 0].item()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("kind", ["preference", "absolute"])
def test_the_raw_logit_or_its_sigmoid(scoring_models: Any, kind: str) -> None:
    path = scoring_models["sequence"]
    logit = logit_of(path, ("user", QUESTION), ("assistant", ANSWER))
    assert value(scorer_of(kind=kind, model=path)) == pytest.approx(logit, abs=NEAR)
    probability = value(scorer_of(kind=kind, model=path, output="probability"))
    assert probability == pytest.approx(sigmoid(logit), abs=NEAR)


def test_a_causal_trunk_with_a_scalar_head(scoring_models: Any) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel

    path = scoring_models["trunk"]
    tensors = load_file(path / "model.safetensors")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(path).eval()(ids_of(path, ("user", QUESTION), ("assistant", ANSWER)))
        expected = hidden.last_hidden_state[0, -1] @ tensors["v_head.weight"][0] + tensors["v_head.bias"][0]
    assert value(scorer_of(kind="preference", model=path)) == pytest.approx(expected.item(), abs=NEAR)


def test_a_conversation_and_a_template_of_the_recipe(scoring_models: Any) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    path = scoring_models["sequence"]
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", QUESTION)]
    messages = tuple({"role": role, "content": content} for role, content in turns)
    assert value(scorer_of(kind="preference", model=path), messages=messages) == pytest.approx(
        logit_of(path, *turns, ("assistant", ANSWER)), abs=NEAR
    )
    plain = scorer_of(kind="preference", model=path, input_template="Q {prompt} A {response}")
    ids = tokenizer_of(path)(f"Q {QUESTION} A {ANSWER}", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = AutoModelForSequenceClassification.from_pretrained(path).eval()(ids).logits[0, 0].item()
    assert value(plain) == pytest.approx(expected, abs=NEAR)


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(["Rome", "city", "is", "large", "map", "Oslo", "river"]) for _ in range(count))


@pytest.mark.parametrize("source", [
    {"kind": "preference", "model": "sequence"}, {"kind": "process", "model": "token", "aggregate": "log_sum"},
    {"kind": "process", "model": "two"}, {"kind": "perplexity", "model": "causal"},
    {"kind": "judge", "model": "causal", "min_mass": 0.0},
])  # fmt: skip
def test_a_score_does_not_depend_on_its_company(scoring_models: Any, source: dict[str, Any]) -> None:
    source = {**source, "model": scoring_models[source["model"]]}
    rng = random.Random(source["kind"])
    items = [
        {"id": str(i), "prompt": words(rng, rng.randint(1, 30)), "reference": words(rng, 4),
         "response": "\n".join(words(rng, rng.randint(1, 12)) for _ in range(rng.randint(1, 4)))}
        for i in range(12)
    ]  # fmt: skip
    together = scorer_of(**source, batch_tokens=300)
    one_by_one = scorer_of(**source, batch_tokens=1, batch_wait_ms=0)
    alone = {item["id"]: value(one_by_one, **item) for item in items}
    for _ in range(3):
        rng.shuffle(items)
        company = items[: rng.randint(2, len(items))]
        for item, one in zip(company, scored(together, *company), strict=True):
            assert one.component.value == pytest.approx(alone[item["id"]], abs=NEAR)


def test_a_held_out_logit_is_fed_as_scorer_json_says(scoring_models: Any, tmp_path: Path) -> None:
    path = shutil.copytree(scoring_models["sequence"], tmp_path / "trained")
    form = ScorerFormat(kind="absolute", output="probability", label_range=(1, 5),
                        input_template="{prompt}\n=>\n{response}")  # fmt: skip
    revision = write_format(path, form).revision
    trained = scorer_of(kind="absolute", model=path)
    spelled = scorer_of(kind="absolute", model=scoring_models["sequence"], output="probability",
                        input_template="{prompt}\n=>\n{response}")  # fmt: skip
    assert value(trained) == value(spelled)
    assert 0 < value(trained) < 1
    write_format(path, form.model_copy(update={"revision": "another"}))
    assert revision != "another"
    assert scorer_of(kind="absolute", model=path).revision != trained.revision
    with pytest.raises(UserError, match="kind absolute"):
        scorer_of(kind="preference", model=path)


def test_a_text_that_the_client_rendered_is_scored_as_it_is(scoring_models: Any) -> None:
    path = scoring_models["sequence"]
    chat = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    text = tokenizer_of(path).apply_chat_template(chat, tokenize=False)
    scorer = scorer_of(kind="preference", model=path)
    (rendered,) = asyncio.run(scorer.score([Item(id="a", text=text)]))
    assert rendered.component.value == pytest.approx(value(scorer), abs=NEAR)
    (long,) = asyncio.run(scorer.score([Item(id="a", text=" city" * 800)]))
    assert long.component.error.code == "input_too_long"


def test_facts_stand_before_the_question_and_a_wrong_answer_costs(scoring_models: Any) -> None:
    path = scoring_models["sequence"]
    scorer = scorer_of(kind="facts", model=path, correctness_penalty=2.0)
    asked = f"Known facts:\n- Rome is old.\n- It has hills.\n\n{QUESTION}"
    logit = logit_of(path, ("user", asked), ("assistant", ANSWER))
    facts = ("Rome is old.", "It has hills.")
    assert value(scorer, facts=facts) == pytest.approx(logit, abs=NEAR)
    assert value(scorer, facts=facts, reference="a City") == pytest.approx(logit, abs=NEAR)
    assert value(scorer, facts=facts, reference="city large") == pytest.approx(logit - 2, abs=NEAR)
    assert scored(scorer, {})[0].component.error.code == "missing_facts"


def test_principles_stand_after_the_response(scoring_models: Any) -> None:
    path = scoring_models["sequence"]
    scorer = scorer_of(kind="principle", model=path)
    own = ("Be brief.", "Be true.")
    block = PRINCIPLE_TEMPLATE.replace("{principles}", "- Be brief.\n- Be true.")
    expected = logit_of(path, ("user", QUESTION), ("assistant", ANSWER), ("user", block))
    assert value(scorer, principles=own) == pytest.approx(expected, abs=NEAR)
    none = scorer_of(kind="principle", model=path, principles=None)
    assert scored(none, {})[0].component.error.code == "missing_principles"
    assert value(none, principles=own) == pytest.approx(expected, abs=NEAR)


def test_drawn_principles_are_a_function_of_seed_item_and_revision(scoring_models: Any) -> None:
    path = scoring_models["sequence"]
    scorer = scorer_of(kind="principle", model=path, seed=3)
    rl = read_set("reward_server/principles/rl.yaml")
    for name, prompt_class in (("x", None), ("y", None), ("z", "reasoning")):
        drawn = draw(rl, seed=3, sample_id=name, revision=scorer.revision, count=3, prompt_class=prompt_class)
        block = PRINCIPLE_TEMPLATE.replace("{principles}", "\n".join(f"- {text}" for text in drawn.texts))
        expected = logit_of(path, ("user", QUESTION), ("assistant", ANSWER), ("user", block))
        (found,) = scored(scorer, {"id": name, "prompt_class": prompt_class})
        assert found.component.value == pytest.approx(expected, abs=NEAR)
        assert found.component.principles == drawn.texts
    again = scorer_of(kind="principle", model=path, seed=3)
    other = scorer_of(kind="principle", model=path, seed=4)
    values = [[value(one, id=str(i)) for i in range(4)] for one in (scorer, again, other)]
    assert values[0] == values[1]
    assert values[0] != values[2]
    assert scored(scorer_of(kind="principle", model=path, negated=1.0), {})[0].component.detail["negated"] == 3


STEPS = "Rome is a city.\nCities are large.\nSo Rome is large."


def step_probabilities(path: Path, neutral: float) -> list[float]:
    """P(correct) + neutral * P(neutral) at the last token of each line, with the tokens found by hand."""
    import torch
    from transformers import AutoModelForTokenClassification

    ids = ids_of(path, ("user", QUESTION), ("assistant", STEPS))
    ends, seen = [], ""
    for i in range(ids.shape[1]):
        seen = tokenizer_of(path).decode(ids[0, : i + 1])
        if any(seen.endswith(line) for line in STEPS.split("\n")):
            ends.append(i)
    assert len(ends) == 3
    with torch.no_grad():
        model = AutoModelForTokenClassification.from_pretrained(path)
        shares = model.eval()(ids).logits[0, ends].softmax(-1)
    return (shares[:, 2] + neutral * shares[:, 1]).tolist()


@pytest.mark.parametrize(("aggregate", "expected"), [
    ("min", min), ("product", math.prod), ("last", lambda p: p[-1]), ("log_sum", lambda p: sum(map(math.log, p))),
    ("correct_steps", lambda p: sum(x >= 0.4 for x in p)),
    ("outcome_and_process", lambda p: 0.25 * p[-1] + 0.75 * min(p)),
])  # fmt: skip
def test_steps_of_a_token_model(scoring_models: Any, aggregate: str, expected: Any) -> None:
    path = scoring_models["token"]
    scorer = scorer_of(kind="process", model=path, aggregate=aggregate, neutral=0.5, outcome_weight=0.25, threshold=0.4)
    (one,) = scored(scorer, {"response": STEPS})
    steps = step_probabilities(path, 0.5)
    assert one.component.value == pytest.approx(expected(steps), abs=NEAR)
    assert [one.component.detail[f"step_{i}"] for i in range(3)] == pytest.approx(steps, abs=NEAR)
    assert one.component.detail["correct_steps"] == sum(p >= 0.4 for p in steps)


def test_steps_of_a_sequence_model(scoring_models: Any) -> None:
    lines = STEPS.split("\n")
    parts = ["\n".join(lines[: i + 1]) for i in range(3)]
    path = scoring_models["sequence"]
    steps = [sigmoid(logit_of(path, ("user", QUESTION), ("assistant", part))) for part in parts]
    scorer = scorer_of(kind="process", model=path, aggregate="product")
    assert value(scorer, response=STEPS) == pytest.approx(math.prod(steps), abs=NEAR)
    marked = scorer_of(kind="process", model=path, step_rule=StepRule(by="marker", marker="large.").model_dump())
    assert scored(marked, {"response": STEPS})[0].component.detail["steps"] == 2


def test_mean_negative_log_likelihood(scoring_models: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path = scoring_models["causal"]
    tokenizer = tokenizer_of(path)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    response = tokenizer(ANSWER)["input_ids"]
    ids = torch.tensor([prompt + response])
    labels = torch.tensor([[-100] * len(prompt) + response])
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(path).eval()(ids, labels=labels).loss.item()
    (one,) = scored(scorer_of(kind="perplexity", model=path), {})
    assert one.component.value == pytest.approx(loss, abs=NEAR)
    assert one.component.detail["tokens"] == len(response)
    assert RewardSection.model_validate(
        {"sources": {"s": {"kind": "perplexity", "model": "m"}}}
    ).sources["s"].weight == -1  # fmt: skip


def test_a_long_prompt_is_cut_and_a_long_response_fails(scoring_models: Any) -> None:
    scorer = scorer_of(kind="preference", model=scoring_models["sequence"])
    long, fits, too_long = scored(scorer, {"prompt": " city" * 900}, {}, {"response": " city" * 690})
    assert long.flags == ("prompt_truncated",)
    assert fits.flags == ()
    assert math.isfinite(long.component.value)
    assert (too_long.component.error.code, too_long.component.error.kind) == ("input_too_long", "data")
    short = scorer_of(kind="preference", model=scoring_models["sequence"], max_tokens=20)
    assert scored(short, {})[0].component.error.code == "input_too_long"


@pytest.mark.parametrize(("item", "code"), [
    ({"prompt": None}, "missing_prompt"), ({"response": None}, "missing_response"),
    ({"response": " "}, "empty_response"),
    ({"messages": ({"role": "alien", "content": "x"},)}, "template_refused"),
])  # fmt: skip
def test_what_is_wrong_with_an_item_fails_that_item(scoring_models: Any, item: Any, code: str) -> None:
    bad, good = scored(scorer_of(kind="preference", model=scoring_models["sequence"]), item, {})
    assert bad.component.error.code == code
    assert good.component.status == "ok"


@pytest.mark.parametrize(("kind", "item"), [
    ("preference", {"prompt": "", "response": "\u200b\u200b"}), ("perplexity", {"prompt": "", "response": "x"}),
    ("process", {"response": "\u200b"}),
])  # fmt: skip
def test_an_input_that_comes_to_nothing_fails_alone(scoring_models: Any, kind: str, item: Any, tmp_path: Path) -> None:
    """A tokenizer that leaves nothing of some texts, and a template that adds nothing."""
    from tokenizers.normalizers import Replace, Sequence
    from transformers import AutoTokenizer

    model = {"preference": "sequence", "perplexity": "causal", "process": "token"}[kind]
    path = shutil.copytree(scoring_models[model], tmp_path / "bare")
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    tokenizer.backend_tokenizer.normalizer = Sequence([Replace("\u200b", "")])
    tokenizer.save_pretrained(path)
    scorer = scorer_of(kind=kind, model=path, input_template="{prompt}{response}")
    bad, good = scored(scorer, item, {})
    assert bad.component.error.code in ("empty_response", "template_refused")
    assert good.component.status == "ok"


def test_a_tokenizer_without_a_chat_template_needs_a_template(scoring_models: Any, tmp_path: Path) -> None:
    path = shutil.copytree(scoring_models["sequence"], tmp_path / "bare")
    (path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="input_template"):
        scorer_of(kind="preference", model=path)
    assert math.isfinite(value(scorer_of(kind="preference", model=path, input_template="{prompt} {response}")))


def test_a_number_that_is_none_fails_the_item(scoring_models: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path = shutil.copytree(scoring_models["sequence"], tmp_path / "broken")
    tensors = load_file(path / "model.safetensors")
    tensors["score.weight"] = torch.full_like(tensors["score.weight"], torch.inf)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert scored(scorer_of(kind="preference", model=path), {})[0].component.error.code == "non_finite_score"


@pytest.mark.parametrize(("model", "kind", "said"), [
    ("two", "preference", "2 labels"), ("causal", "preference", "no scalar head"),
    ("token", "perplexity", "lacks"), ("absent", "preference", "no model"),
])  # fmt: skip
def test_a_model_that_cannot_score_is_refused(
    scoring_models: Any, model: str, kind: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        scorer_of(kind=kind, model=scoring_models.get(model, tmp_path / "nothing"))


def test_weights_that_are_no_safetensors_are_not_read(scoring_models: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    path = shutil.copytree(scoring_models["sequence"], tmp_path / "pickled")
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        scorer_of(kind="preference", model=path)
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    config["model_type"] = "evil"
    (path / "config.json").write_text(json.dumps(config))
    (path / "evil.py").write_text("raise SystemExit('code of the model ran')")
    with pytest.raises(UserError, match="no model"):
        scorer_of(kind="preference", model=path)


def test_every_source_with_a_model_scores_over_http_side_by_side(serving: Any, scoring_models: Any) -> None:
    models = {name: str(path) for name, path in scoring_models.items()}
    judge = {"kind": "judge", "model": models["causal"], "min_mass": 0.0}
    client = serving(
        sources={
            "preference": {"kind": "preference", "model": models["sequence"]},
            "absolute": {"kind": "absolute", "model": models["other"]},
            "principle": {"kind": "principle", "model": models["sequence"]},
            "facts": {"kind": "facts", "model": models["trunk"]},
            "process": {"kind": "process", "model": models["token"]},
            "perplexity": {"kind": "perplexity", "model": models["causal"]},
            "judge": judge,
            "rating": {**judge, "mode": "rate"},
        }
    )
    assert client.get("/readyz").status_code == 200, client.get("/readyz").text
    item = {"id": "a", "prompt": QUESTION, "response": ANSWER, "reference": "Rome", "facts": ["Rome is old."]}
    cut = {**item, "id": "b", "prompt": " city" * 900}
    answer = client.post("/v1/rewards", json={"items": [item, cut]}).json()
    whole, shorter = answer["results"]
    values = {name: component["value"] for name, component in whole["components"].items()}
    assert len(set(values.values())) == len(values) == 8
    assert whole["reward"] == pytest.approx(sum(values.values()) - 2 * values["perplexity"])
    assert "prompt_truncated" not in whole["flags"]
    assert shorter["status"] == "ok", shorter
    assert "prompt_truncated" in shorter["flags"]
    revisions = {name: source["revision"] for name, source in answer["server"]["sources"].items()}
    assert len(set(revisions.values())) == 8


def test_an_encoder_decoder_scores_items_of_any_company(tiny_encoder_decoder: Path, tmp_path: Path) -> None:
    """T5 reads its score at the end of sequence, and refuses rows with unlike numbers of it: they run apart."""
    import torch
    from transformers import AutoModelForSequenceClassification

    path = shutil.copytree(tiny_encoder_decoder, tmp_path / "t5")
    torch.manual_seed(3)
    loader: Any = AutoModelForSequenceClassification
    model = loader.from_pretrained(path, num_labels=1).eval()
    model.save_pretrained(path)
    tokenizer = tokenizer_of(path)
    responses = ["Rome is large.", f"Rome{tokenizer.eos_token} is a city.", "A city.", f"So{tokenizer.eos_token}"]
    scorer = scorer_of(kind="preference", model=path, input_template="{prompt} {response}")
    found = [one.component.value for one in scored(scorer, *({"response": text} for text in responses))]
    with torch.no_grad():
        ids = [tokenizer(f"{QUESTION} {text}", return_tensors="pt")["input_ids"] for text in responses]
        expected = [model(input_ids=each).logits[0, 0].item() for each in ids]
    assert [int((each == tokenizer.eos_token_id).sum()) for each in ids] == [1, 2, 1, 2]
    assert found == pytest.approx(expected, abs=NEAR)
    assert len(set(found)) == 4

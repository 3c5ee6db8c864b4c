"""The judge: a local model against transformers, and an OpenAI-compatible endpoint over real HTTP."""

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pydantic import ValidationError

from reward_server.config import RewardSection
from reward_server.model_sources_config import COMPARE, RATE
from reward_server.schema import Item
from reward_server.scorers.build import build_scorers
from services.errors import UserError

ITEM = Item(
    id="a", prompt="Where is Rome?", response="In Italy.", reference="In {first} Norway.", principles=("Be true.",)
)
NEAR = 1e-5


def scorer_of(**source: Any) -> Any:
    source = {"kind": "judge", "min_mass": 0.0, **source, "model": str(source["model"])}
    return build_scorers(RewardSection.model_validate({"sources": {"s": source}}))["s"]


def scored(scorer: Any, *items: Item) -> list[Any]:
    return list(asyncio.run(scorer.score(items or [ITEM])))


def filled(rubric: str, **places: str) -> str:
    for name, text in places.items():
        rubric = rubric.replace(f"{{{name}}}", text)
    return rubric


PRINCIPLES = "Principles:\n- Be true.\n"


def next_log_probs(path: Any, question: str, answers: str) -> list[float]:
    """Log-probabilities of the answers after "(", in float32, without batch or padding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    whole = [tokenizer(text + "(" + answer)["input_ids"] for answer in answers]
    assert len({tuple(ids[:-1]) for ids in whole}) == 1, "the answers are one token each"
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(path).eval()(torch.tensor([whole[0][:-1]])).logits[0, -1]
    return [logits.log_softmax(-1)[ids[-1]].item() for ids in whole]


def orders(path: Any) -> list[list[float]]:
    texts = ("In Italy.", "In {first} Norway.")
    # The reference is put in last: its {first} is a text like any other.
    first = filled(COMPARE, prompt="Where is Rome?", principles=PRINCIPLES, first=texts[0], second=texts[1])
    second = filled(COMPARE, prompt="Where is Rome?", principles=PRINCIPLES, second=texts[0]).replace(
        "{first}", texts[1]
    )
    return [next_log_probs(path, question, "AB") for question in (first, second)]


def test_log_odds_over_both_orders(scoring_models: Any) -> None:
    path = scoring_models["causal"]
    one, two = orders(path)
    expected = ((one[0] - one[1]) + (two[1] - two[0])) / 2
    (judged,) = scored(scorer_of(model=path))
    component = judged.component
    assert component.value == pytest.approx(expected, abs=NEAR)
    assert component.principles == ("Be true.",)
    consistent = (one[0] > one[1]) == (two[1] > two[0])
    assert component.detail["consistent"] == consistent
    assert ("judge_inconsistent" in judged.flags) == (not consistent)
    (chance,) = scored(scorer_of(model=path, output="probability"))
    assert chance.component.value == pytest.approx(1 / (1 + math.exp(-expected)), abs=NEAR)


def test_the_order_of_the_two_answers_does_not_count(scoring_models: Any) -> None:
    scorer = scorer_of(model=scoring_models["causal"])
    swapped = ITEM.model_copy(update={"response": ITEM.reference, "reference": ITEM.response})
    there, back = scored(scorer, ITEM, swapped)
    assert there.component.value == pytest.approx(-back.component.value, abs=NEAR)


def test_expected_value_of_the_scale(scoring_models: Any) -> None:
    path = scoring_models["causal"]
    question = filled(
        RATE, prompt="Where is Rome?", principles=PRINCIPLES, response="In Italy.", lowest="2", highest="7"
    )
    shares = [math.exp(log) for log in next_log_probs(path, question, "234567")]
    (judged,) = scored(scorer_of(model=path, mode="rate", lowest=2, highest=7))
    expected = sum(digit * share for digit, share in zip(range(2, 8), shares, strict=True)) / sum(shares)
    assert judged.component.value == pytest.approx(expected, abs=NEAR)
    assert judged.component.detail["mass"] == pytest.approx(sum(shares), abs=NEAR)


def test_a_judge_that_gives_no_answer_fails_the_item(scoring_models: Any) -> None:
    scorer = scorer_of(model=scoring_models["causal"], min_mass=0.999)
    assert scored(scorer)[0].component.error.code == "judge_unclear"
    bare = ITEM.model_copy(update={"reference": None})
    assert scored(scorer, bare)[0].component.error.code == "missing_reference"


def test_a_long_conversation_is_cut_for_the_judge(scoring_models: Any) -> None:
    scorer = scorer_of(model=scoring_models["causal"], rubric="{prompt} - {first} - {second}")
    long, whole = scored(scorer, ITEM.model_copy(update={"prompt": " city" * 900}), ITEM)
    assert "prompt_truncated" in long.flags
    assert "prompt_truncated" not in whole.flags
    too_long = ITEM.model_copy(update={"response": " city" * 700})
    assert scored(scorer, too_long)[0].component.error.code == "input_too_long"


@pytest.mark.parametrize(("values", "named"), [
    ({"rubric": "{prompt} {first}"}, "second"), ({"mode": "rate", "rubric": "x"}, "response"),
    ({"lowest": 5, "highest": 5}, "lowest"), ({"url": "http://u:p@host"}, "url"), ({"highest": 10}, "highest"),
    ({"engine": "vllm", "url": "http://host/v1"}, "engine"), ({"engine": "vllm", "device": "cpu"}, "device"),
])  # fmt: skip
def test_a_wrong_judge_is_refused(values: Any, named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        RewardSection.model_validate({"sources": {"s": {"kind": "judge", "model": "m", **values}}})


Answers = Callable[[dict[str, Any]], tuple[int, Any]]


class Endpoint(ThreadingHTTPServer):
    """Answers with what `answer` gives; keeps the requests."""

    def __init__(self, answer: Answers) -> None:
        self.answer = answer
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append({"path": self.path, **body})
        self.server.keys.append(self.headers.get("authorization"))
        status, answer = self.server.answer(body)
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Callable[[Answers], Endpoint]]:
    servers: list[Endpoint] = []

    def serve(answer: Answers) -> Endpoint:
        servers.append(Endpoint(answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def url_of(server: Endpoint) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def listed(*positions: tuple[str, dict[str, float]]) -> dict[str, Any]:
    """A chat completion with the log-probabilities of each position's listed tokens."""
    content = [
        {"token": token, "logprob": 0.0, "top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in top.items()]}
        for token, top in positions
    ]
    return {"choices": [{"message": {"role": "assistant"}, "logprobs": {"content": content}}]}


def test_an_endpoint_judges(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        question = body["messages"][0]["content"]
        response_first = question.index("In Italy.") < question.index("Norway")
        good, bad = (0.6, 0.2) if response_first else (0.1, 0.8)
        return 200, listed(("(", {"(": 0.9, "A": 0.05}), ("A", {"A": good, " (A": 0.1, "B": bad, "x": 0.001}))

    server = endpoint(answer)
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    (judged,) = scored(scorer_of(model="big", url=f"{url_of(server)}/v1/", key_env="JUDGE_KEY"))
    expected = (math.log(0.7 / 0.2) + math.log(0.8 / 0.2)) / 2
    assert judged.component.value == pytest.approx(expected)
    assert judged.component.detail["consistent"] == 1
    assert {(asked["path"], asked["model"], asked["logprobs"]) for asked in server.asked} == {
        ("/v1/chat/completions", "big", True)
    }
    assert set(server.keys) == {"Bearer sesame"}


def test_an_unlisted_answer_is_bounded_and_said(endpoint: Any) -> None:
    server = endpoint(lambda _: (200, listed(("3", {"3": 0.7, "4": 0.2, "x": 0.01}))))
    (judged,) = scored(scorer_of(model="m", mode="rate", url=url_of(server)))
    assert judged.flags == ("judge_bounded",)
    shares = {1: 0.01, 2: 0.01, 3: 0.7, 4: 0.2, 5: 0.01}
    expected = sum(digit * share for digit, share in shares.items()) / sum(shares.values())
    assert judged.component.value == pytest.approx(expected)


@pytest.mark.parametrize(("status", "answer", "code", "tries"), [
    (200, listed(("I", {"I": 0.9})), "judge_unclear", 1), (200, {"choices": []}, "upstream_unavailable", 2),
    (503, {}, "upstream_unavailable", 2), (400, {}, "upstream_failed", 1), (401, {}, "upstream_unavailable", 2),
])  # fmt: skip
def test_an_endpoint_that_does_not_judge(endpoint: Any, status: int, answer: Any, code: str, tries: int) -> None:
    server = endpoint(lambda _: (status, answer))
    scorer = scorer_of(model="m", mode="rate", url=url_of(server), retries=1)
    error = scored(scorer)[0].component.error
    assert (error.code, error.kind) == (code, "infra" if code == "upstream_unavailable" else "data")
    assert "Italy" not in error.message
    assert len(server.asked) == tries


def test_a_key_that_is_not_set_is_said_at_the_start() -> None:
    with pytest.raises(UserError, match="NO_SUCH_KEY"):
        scorer_of(model="m", url="http://127.0.0.1:9", key_env="NO_SUCH_KEY")


def external(server: Endpoint, **source: Any) -> Any:
    source = {"kind": "external", "url": url_of(server), "retries": 0, **source}
    return build_scorers(RewardSection.model_validate({"sources": {"s": source}}))["s"]


OTHER = ITEM.model_copy(update={"id": "b", "prompt": "Hi", "response": "Hello", "reference": None})


def test_remote_rm_of_openrlhf(endpoint: Any) -> None:
    server = endpoint(lambda body: (200, {"rewards": [float(len(q)) for q in body["query"]], "scores": []}))
    values = [one.component.value for one in scored(external(server, format="openrlhf"), ITEM, OTHER)]
    assert values == [len("Where is Rome?In Italy."), len("HiHello")]
    (asked,) = server.asked
    assert asked["prompts"] == ["Where is Rome?", "Hi"]
    assert asked["labels"] == ["In {first} Norway.", None]


def test_scores_of_vllm_are_put_in_order(endpoint: Any) -> None:
    server = endpoint(lambda _: (200, {"data": [{"index": 1, "score": 0.2}, {"index": 0, "score": None}]}))
    first, second = scored(external(server, format="vllm", model="rm"), ITEM, OTHER)
    assert first.component.error.code == "upstream_failed"
    assert second.component.value == 0.2
    assert server.asked[0] == {"path": "/score", "model": "rm", "text_1": ["Where is Rome?", "Hi"],
                               "text_2": ["In Italy.", "Hello"]}  # fmt: skip


def test_a_refused_item_does_not_fail_its_company(endpoint: Any) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        return (413, {}) if "Hi" in body["text_1"] else (200, {"data": [{"index": 0, "score": 1.5}]})

    first, second = scored(external(endpoint(answer), format="vllm", model="rm"), ITEM, OTHER)
    assert first.component.value == 1.5
    assert second.component.error.code == "upstream_failed"


def test_a_service_that_gives_too_few_answers_is_no_answer(endpoint: Any) -> None:
    server = endpoint(lambda _: (200, {"rewards": [1.0]}))
    for one in scored(external(server, format="openrlhf"), ITEM, OTHER):
        assert one.component.error.code == "upstream_unavailable"


def test_a_service_that_is_not_there_is_down() -> None:
    nowhere = {"url": "http://127.0.0.1:9", "retries": 0}
    section = RewardSection.model_validate({"sources": {"s": {"kind": "external", **nowhere}}})
    for scorer in (scorer_of(model="m", **nowhere), build_scorers(section)["s"]):
        error = scored(scorer)[0].component.error
        assert (error.code, error.kind) == ("source_down", "infra")


def test_another_server_of_this_kind() -> None:
    from reward_server.serve import RewardServer

    async def go() -> Any:
        sources = {"match": {"kind": "exact_match"}, "length": {"kind": "length", "unit": "words"}}
        other = RewardServer(RewardSection.model_validate({"sources": sources}), token=None)
        url = await other.start()
        try:
            source = {"kind": "external", "url": url, "sources": ["match"]}
            return await build_scorers(RewardSection.model_validate({"sources": {"s": source}}))["s"].score(
                [ITEM.model_copy(update={"reference": "in Italy"}), OTHER]
            )
        finally:
            await other.stop()

    matched, failed = asyncio.run(go())
    assert matched.component.value == 1.0
    assert (failed.component.error.code, failed.component.error.kind) == ("upstream_failed", "data")
    assert failed.component.error.message.startswith("missing_reference")

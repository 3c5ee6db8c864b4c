"""Other trainers' clients against the adapters: what they send, how they read the answer, what makes them try again.

The clients here are written after the published ones: the same requests, the same tries, the same reading.
"""

import asyncio
import base64
import math
import struct
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_server.adapters.common import without_end
from reward_server.config import AdaptersSection, RewardSection
from reward_server.schema import Component, ErrorCode, Item, failed_component
from reward_server.scorers.base import Scored
from reward_server.serve import RewardServer

KEY = "attune-key"
SOURCES = {
    "words": {"kind": "length", "unit": "words", "target": 4, "bonus": 2.0},
    "match": {"kind": "exact_match", "required": False, "weight": 10.0},
}
"""Half a point a word up to four words, and ten for the reference."""


class Unwell:
    """A source that fails as infra the first `failures` times, and then scores everything with 1."""

    revision = "1"

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.asked = 0

    async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
        self.asked += 1
        if self.asked <= self.failures:
            return [Scored(failed_component(ErrorCode.SOURCE_TIMEOUT, "late"))] * len(items)
        return [Scored(Component(status="ok", value=1.0))] * len(items)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """host:port of a server with `SOURCES`."""
    section = RewardSection.model_validate({"sources": SOURCES, "adapters": {"split_at": "<|assistant|>"}})
    server = RewardServer(section, token=KEY)
    yield asyncio.run(server.start()).removeprefix("http://")
    asyncio.run(server.stop())


Client = Callable[[str], Awaitable[Any]]


def with_unwell(failures: int, client: Client) -> tuple[Any, int]:
    """A client's outcome at a server whose source is unwell, and how often that was asked."""

    async def go() -> tuple[Any, int]:
        source = Unwell(failures)
        server = RewardServer(RewardSection(), token=KEY, scorers={"attention": source})
        address = (await server.start()).removeprefix("http://")
        try:
            return await client(address), source.asked
        finally:
            await server.stop()

    return asyncio.run(go())


async def post(address: str, path: str, body: Any) -> tuple[int, Any, Any]:
    headers = {"Authorization": f"Bearer {KEY}"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://{address}/{path}", json=body, headers=headers) as answer,
    ):
        return answer.status, await answer.json(), answer.headers


def said(address: str, path: str, body: Any) -> Any:
    status, answer, _ = asyncio.run(post(address, path, body))
    assert status == 200, answer
    return answer


def refused(address: str, path: str, body: Any) -> dict[str, str]:
    """The fields that a 422 names, with what is wrong."""
    status, answer, _ = asyncio.run(post(address, path, body))
    assert status == 422, answer
    assert not {"rewards", "scores", "data", "results", "reward"} & set(answer)
    return {problem["path"]: problem["type"] for problem in answer["detail"]}


# OpenRLHF: no headers of its own (the key is in the URL), five tries on any error, then no reward


async def openrlhf(address: str, queries: list[str], prompts: list[str], labels: list[Any]) -> dict[str, Any] | None:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=180)) as session:
        for _ in range(5):
            try:
                body = {"query": queries, "prompts": prompts, "labels": labels}
                async with session.post(f"http://x:{KEY}@{address}/openrlhf", json=body) as answer:
                    answer.raise_for_status()
                    return await answer.json()
            except aiohttp.ClientError:
                await asyncio.sleep(0.01)
    return None


def test_openrlhf(address: str) -> None:
    prompts = ["<s>user: Capital of Peru?\n", "Capital of Chile?"]
    queries = [prompts[0] + "Lima it is</s>", "<bos>" + prompts[1] + " Santiago<|im_end|>\n"]
    answer = asyncio.run(openrlhf(address, queries, prompts, ["Lima", "santiago"]))
    assert answer == {
        "rewards": [1.5, 10.5],
        "scores": [1.5, 10.5],
        "extra_logs": {"words": [1.5, 0.5], "match": [0.0, 1.0]},
    }


def test_openrlhf_sends_empty_lists_and_labels_that_are_none(address: str) -> None:
    assert asyncio.run(openrlhf(address, [], [], [])) == {"rewards": [], "scores": [], "extra_logs": {}}
    answer = asyncio.run(openrlhf(address, ["a b", "a 7"], ["a", "a"], [None, 7]))
    assert answer == {"rewards": [0.5, 10.5], "scores": [0.5, 10.5], "extra_logs": {"words": [0.5, 0.5]}}


def test_openrlhf_gets_a_reward_once_the_source_is_well_and_none_where_it_stays_unwell() -> None:
    answer, asked = with_unwell(3, lambda address: openrlhf(address, ["ab"], ["a"], [None]))
    assert (answer["rewards"], asked) == ([1.0], 4)
    assert with_unwell(9, lambda address: openrlhf(address, ["ab"], ["a"], [None])) == (None, 5)


def test_openrlhf_is_told_which_query_has_no_score(address: str) -> None:
    assert asyncio.run(openrlhf(address, ["a b", "a </s>"], ["a", "a"], ["", ""])) is None
    body = {"query": ["a b", "a </s>"], "prompts": ["a", "a"], "labels": ["b", "b"]}
    assert refused(address, "openrlhf", body) == {"query[1]": "empty_response"}
    assert refused(address, "openrlhf", {**body, "prompts": ["a", "z"]}) == {"query[1]": "value_error"}
    assert refused(address, "openrlhf", {**body, "prompts": ["a"]}) == {"prompts": "length_mismatch"}
    assert refused(address, "openrlhf", {"query": ["a b"]}) == {"prompts": "missing"}


# verl: tries 5xx again, raises on any 4xx, reads the last number


async def verl(address: str, endpoint: str, body: dict[str, Any]) -> float:
    url = f"http://x:{KEY}@{address}/{endpoint}"  # it sends no headers of its own: the key is in the address
    for attempt in range(16):
        try:
            async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
                answer.raise_for_status()
                output = await answer.json()
        except aiohttp.ClientResponseError as error:
            if 400 <= error.status < 500 or attempt == 15:
                raise
            await asyncio.sleep(0.01)
        else:
            return output["data"][-1]["probs" if endpoint == "classify" else "embedding"][-1]
    raise AssertionError


CHAT = "<|user|>Capital of Peru?<|assistant|>Lima of course"
CLASSIFY = {"model": "skywork", "input": CHAT, "use_activation": False}


def test_verl(address: str) -> None:
    assert asyncio.run(verl(address, "classify", CLASSIFY)) == 1.5
    assert asyncio.run(verl(address, "classify", {"model": "skywork", "input": CHAT, "activation": False})) == 1.5
    assert asyncio.run(verl(address, "v1/embeddings", {"model": "skywork", "input": CHAT})) == 1.5


def test_verl_tries_an_unwell_source_again_and_raises_on_what_no_try_mends(address: str) -> None:
    assert with_unwell(4, lambda at: verl(at, "classify", CLASSIFY)) == (1.0, 5)
    with pytest.raises(aiohttp.ClientResponseError) as error:
        with_unwell(99, lambda at: verl(at, "v1/embeddings", CLASSIFY))
    assert error.value.status == 503
    with pytest.raises(aiohttp.ClientResponseError) as error:
        asyncio.run(verl(address, "classify", {"model": "skywork", "input": "<|user|>x<|assistant|> "}))
    assert error.value.status == 422


def test_a_text_that_is_not_split_is_scored_by_sources_that_take_one_and_by_no_other(address: str) -> None:
    assert refused(address, "classify", {"input": ["one text", CHAT]}) == {"input[0]": "missing_response"}

    class Whole:
        revision = "1"

        async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
            return [Scored(Component(status="ok", value=float(len(item.text or "")))) for item in items]

    async def go() -> float:
        server = RewardServer(RewardSection(), token=KEY, scorers={"attention": Whole()})
        at = (await server.start()).removeprefix("http://")
        value = await verl(at, "classify", {"input": "one text"})
        await server.stop()
        return value

    assert asyncio.run(go()) == 8.0


def test_activation_dimensions_and_base64(address: str) -> None:
    active = said(address, "classify", {**CLASSIFY, "use_activation": True})["data"][0]["probs"]
    assert active == [1 / (1 + math.exp(-1.5))]
    packed = said(address, "v1/embeddings", {"input": [CHAT], "encoding_format": "base64"})["data"][0]["embedding"]
    assert struct.unpack("<f", base64.b64decode(packed)) == (1.5,)
    assert refused(address, "v1/embeddings", {"input": CHAT, "dimensions": 256}) == {"dimensions": "literal_error"}
    assert refused(address, "classify", {"input": CHAT, "truncate_prompt_tokens": 5}) == {
        "truncate_prompt_tokens": "none_required"
    }


# slime: one sample at a time, the answer itself is the reward, or has it under the run's reward key


def test_slime(address: str) -> None:
    sample = {"prompt": "Capital of Peru?", "response": "Lima", "label": "lima"}
    assert said(address, "slime", sample) == 10.5
    keyed = said(address, "slime?reward_key=score", sample)
    assert keyed == {"words": 0.5, "match": 1.0, "score": 10.5}
    assert said(address, "slime?sources=words", {**sample, "prompt": [{"role": "user", "content": "x"}]}) == 0.5
    assert refused(address, "slime", {**sample, "response": ""}) == {"response": "empty_response"}
    assert refused(address, "slime?sources=nonsense", sample) == {"query.sources": "value_error"}


def test_slime_gets_a_number_or_an_error() -> None:
    async def client(address: str) -> Any:
        for _ in range(10):
            status, answer, headers = await post(address, "slime", {"prompt": "p", "response": "r", "label": None})
            if status == 200:
                return answer
            assert (status, headers["Retry-After"]) == (503, "1")
        return None

    assert with_unwell(2, client) == (1.0, 3)


# vLLM and TEI


@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents"), ("queries", "items")])
def test_vllm_score(address: str, names: tuple[str, str]) -> None:
    first, second = names
    one_to_many = said(address, "score", {"model": "m", first: "p", second: ["a b", "a b c"]})
    assert [(entry["index"], entry["score"]) for entry in one_to_many["data"]] == [(0, 1.0), (1, 1.5)]
    assert [
        entry["score"] for entry in said(address, "v1/score", {first: ["p", "q"], second: ["a", "b c"]})["data"]
    ] == [
        0.5,
        1.0,
    ]
    assert said(address, "score", {first: "p", second: "a"})["data"][0]["score"] == 0.5
    assert said(address, "score", {first: "p", second: []})["data"] == []
    assert refused(address, "score", {first: "p", second: ["a", " "]}) == {f"{second}[1]": "empty_response"}
    assert refused(address, "score", {first: ["p", "q", "r"], second: ["a", "b"]}) == {"body": "value_error"}
    assert refused(address, "score", {first: "p"}) == {"body": "value_error"}


def test_vllm_rerank(address: str) -> None:
    body = {"model": "m", "query": "p", "documents": ["a", "a b c", "a b"]}
    results = said(address, "rerank", body)["results"]
    assert [(entry["index"], entry["relevance_score"]) for entry in results] == [(1, 1.5), (2, 1.0), (0, 0.5)]
    assert results[0]["document"] == {"text": "a b c"}
    assert [entry["index"] for entry in said(address, "v2/rerank", {**body, "top_n": 1})["results"]] == [1]
    assert refused(address, "rerank", {**body, "documents": ["a", ""]}) == {"documents[1]": "empty_response"}


def test_what_would_have_to_be_fetched_is_refused(address: str) -> None:
    image = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}
    assert "documents[1]" in refused(address, "rerank", {"query": "p", "documents": ["a", {"content": [image]}]})
    assert "text_2" in refused(address, "score", {"text_1": "p", "text_2": {"content": [image]}})
    seen = nemo_gym("a b")
    seen["responses_create_params"]["input"].append({"role": "user", "content": [{**image, "type": "input_image"}]})
    assert said(address, "verify", seen)["reward"] == 1.0  # no text, and nobody looks at it


def test_vllm_reads_its_own_formats(address: str) -> None:
    """The answers have every field that vLLM's own have and its clients may read."""
    classify = said(address, "classify", CLASSIFY)
    assert set(classify["data"][0]) == {"index", "label", "probs", "num_classes"}
    score = said(address, "score", {"text_1": "p", "text_2": "a"})
    assert {"object", "model", "data", "usage"} <= set(classify) & set(score)
    assert {"prompt_tokens", "total_tokens"} <= set(score["usage"])


def test_tei(address: str) -> None:
    def sigmoid(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    raw = {"raw_scores": True}
    assert said(address, "predict", {"inputs": ["p", "a b"], **raw}) == [{"score": 1.0, "label": "reward"}]
    assert said(address, "predict", {"inputs": CHAT, **raw})[0]["score"] == 1.5
    batch = said(address, "predict", {"inputs": [["p", "a"], [CHAT]]})
    assert [[entry["score"] for entry in entries] for entries in batch] == [[sigmoid(0.5)], [sigmoid(1.5)]]
    assert said(address, "predict", {"inputs": []}) == []
    assert refused(address, "predict", {"inputs": [["p", "a"], ["p", ""]]}) == {"inputs[1]": "empty_response"}
    ranks = said(address, "rerank", {"query": "p", "texts": ["a", "a b"], "return_text": True, **raw})
    assert ranks == [{"index": 1, "score": 1.0, "text": "a b"}, {"index": 0, "score": 0.5, "text": "a"}]
    assert said(address, "rerank", {"query": "p", "texts": []}) == []
    assert refused(address, "rerank", {"query": "p", "texts": [], "documents": []}) == {"body": "value_error"}


def test_a_wrong_entry_of_a_list_is_named(address: str) -> None:
    assert set(refused(address, "classify", {"input": ["a", 3]})) == {"input[1]"}
    assert set(refused(address, "predict", {"inputs": [["a", "b"], ["a", "b", "c"]]})) == {"inputs[1]"}
    assert set(refused(address, "predict", {"inputs": ["a", "b", "c"]})) == {"inputs"}
    assert set(refused(address, "slime", {"prompt": [{"role": "user"}], "response": "r"})) == {"prompt[0].content"}
    wrong = nemo_gym("a")
    wrong["response"]["output"][2]["content"][0]["text"] = 7
    assert set(refused(address, "verify", wrong)) == {"response.output[2].content[0].text"}


# texts of end-of-sequence tokens


def without_end_simply(text: str, ends: Sequence[str]) -> str:
    while ended := next((end for end in ends if text.rstrip().endswith(end)), None):
        text = text.rstrip()[: -len(ended)]
    return text


PIECES = st.sampled_from(["</s>", "<eos>", " ", "\n", "\u3000", "s>", "a", "</s", "<eos> "])


@given(pieces=st.lists(PIECES, max_size=12), ends=st.lists(PIECES, max_size=4))
def test_end_texts_are_taken_off_with_the_white_space_between_them(pieces: list[str], ends: list[str]) -> None:
    text = "".join(pieces)
    assert without_end(text, AdaptersSection(end_texts=tuple(ends))) == without_end_simply(text, ends)


def test_end_texts_by_the_hundred_thousand_are_taken_off_at_once() -> None:
    began = time.process_time()
    assert without_end("It is." + "</s> " * 200_000, AdaptersSection()) == "It is."
    assert time.process_time() - began < 5  # a copy for each would take minutes


# NeMo Gym: the rollout in OpenAI's form of responses; the answer has what was sent, and the reward


def nemo_gym(text: str, **more: Any) -> dict[str, Any]:
    return {
        "responses_create_params": {
            "input": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "type": "message", "content": [{"type": "input_text", "text": "Capital of Peru?"}]},
            ],
            "temperature": 1.0,
        },
        "response": {
            "id": "resp_1",
            "output": [
                {"type": "reasoning", "id": "rs_1", "summary": []},
                {"type": "function_call", "name": "look_up", "arguments": "{}", "call_id": "c"},
                {"type": "message", "role": "assistant", "status": "completed",
                 "content": [{"type": "output_text", "text": text, "annotations": []}]},
            ],
        },
        **more,
    }  # fmt: skip


def test_nemo_gym(address: str) -> None:
    assert said(address, "seed_session", {}) == {}
    rollout = nemo_gym("Lima", expected_answer="lima", _ng_rollout_id="r7", task={"level": 3})
    answer = said(address, "verify", rollout)
    assert answer == {**rollout, "reward": 10.5, "reward_components": {"words": 0.5, "match": 1.0}}
    assert refused(address, "verify", nemo_gym("")) == {"response.output": "empty_response"}
    no_prompt = {**nemo_gym("x"), "responses_create_params": {"input": []}}
    assert refused(address, "verify", no_prompt) == {"responses_create_params.input": "missing"}


def test_an_adapter_says_503_where_the_contract_says_429() -> None:
    async def go() -> list[tuple[int, str]]:
        section = RewardSection(max_requests=1, queue_timeout_s=5)
        waits = asyncio.Event()

        class Slow(Unwell):
            async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
                while not waits.is_set():
                    await asyncio.sleep(0.01)
                return await super().score(items)

        server = RewardServer(section, token=KEY, scorers={"attention": Slow(0)})
        at = (await server.start()).removeprefix("http://")
        first = asyncio.create_task(post(at, "v1/rewards", {"items": [{"id": "a"}]}))
        await asyncio.sleep(0.2)
        found = []
        for path, body in (("v1/rewards", {"items": []}), ("classify", CLASSIFY), ("openrlhf", {"query": []})):
            status, _, headers = await post(at, path, body)
            found.append((status, headers["Retry-After"]))
        waits.set()
        assert (await first)[0] == 200
        await server.stop()
        return found

    assert asyncio.run(go()) == [(429, "1"), (503, "1"), (503, "1")]

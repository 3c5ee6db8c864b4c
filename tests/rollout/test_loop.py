"""A rollout actor's loop: a real ledger on a real Redis, a real engine with a tiny policy."""

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
import redis
import torch

from rollout.actor import RolloutLoop
from rollout.config import RolloutSection, VllmSection
from rollout.engine import Completion, GenerationRequest
from rollout.prepare import Preparation, group_seed, prepare, request_of, sampling_of
from rollout.transformers_engine import TransformersEngine
from services.attention.config import CaptureSection
from services.models import load_policy_model, load_tokenizer
from services.models_config import PolicySection
from services.records import Group, Lease, PolicyVersion, Prompt
from services.stream.connect import connect
from services.stream.embedded import EmbeddedRedis
from services.stream.ledger import Ledger, LoadWeights, Wait
from services.text.config import DataSection, SalienceSection
from services.text.render import Renderer
from services.text.salience import fit_idf
from services.transfer.packing import TensorMeta
from services.transfer.sender import Sender
from services.weights import Corrupt, write_bucket, write_manifest

SEED = 11
TEXTS = ("Where is Paris on the map?", "Tell me about the old town of Rome.", "Which river runs through Oslo?")
LONG = "Which river runs through the old town of Tokyo and where is Quito on the map? " * 4


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    with EmbeddedRedis(Path(tmp_path_factory.mktemp("redis"))) as server:
        connection = connect(server.url)
        yield connection
        connection.close()


@pytest.fixture
def ledger(client: redis.Redis) -> Ledger:
    return Ledger(client, f"run-{uuid4().hex[:8]}")


@pytest.fixture
def policy(tiny_decoder: Path) -> PolicySection:
    return PolicySection(model=str(tiny_decoder))


@pytest.fixture
def engine(policy: PolicySection) -> TransformersEngine:
    return TransformersEngine(policy, CaptureSection())


class Held(TransformersEngine):
    """Generates nothing until it may."""

    def __init__(self, policy: PolicySection) -> None:
        super().__init__(policy, CaptureSection())
        self.may = threading.Event()

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        while not self.may.is_set():
            await asyncio.sleep(0.01)
        return await super().generate(requests)


@pytest.fixture
def held(policy: PolicySection) -> Held:
    return Held(policy)


@pytest.fixture
def preparation(policy: PolicySection) -> Preparation:
    renderer = Renderer(load_tokenizer(policy), DataSection())
    salience = SalienceSection(content="user", top_k=2)
    return Preparation(renderer, salience, fit_idf([prompt_of(text) for text in TEXTS], renderer, salience))


def prompt_of(text: str) -> Prompt:
    return Prompt(prompt_id="long" if text == LONG else f"p{TEXTS.index(text)}", source="tests", text=text)


def section(**settings: float) -> RolloutSection:
    return RolloutSection(**({"samples": 3, "max_tokens": 8, "poll_s": 0.01} | settings))  # type: ignore[arg-type]


def fill(ledger: Ledger, *texts: str, epoch: int = 0) -> list[str]:
    """Registers a group for each text, with its prompt; returns their ids."""
    prompts = {f"{epoch}:{prompt_of(text).prompt_id}": prompt_of(text) for text in texts}
    ledger.register(epoch, [(group_id, 100 * epoch + place) for place, group_id in enumerate(prompts)])
    ledger.attach(prompts)
    return list(prompts)


class ToldBefore(Ledger):
    """The same ledger, whose first answer was given a while ago."""

    def __init__(self, ledger: Ledger, told: LoadWeights) -> None:
        self.__dict__.update(ledger.__dict__)
        self._told: list[LoadWeights] = [told]

    def lease(self, owner: str, loaded: PolicyVersion | None, ttl_s: float) -> Lease | LoadWeights | Wait:
        return self._told.pop() if self._told else super().lease(owner, loaded, ttl_s)


@dataclass
class Publisher:
    """What a learner does with its weights: version after version, each a little further from the policy's."""

    policy: PolicySection
    root: Path

    def __call__(self, version: PolicyVersion, shift: float) -> str:
        model = load_policy_model(self.policy)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(shift * torch.randn(parameter.shape, generator=generator))
        directory = self.root / f"v{version.incarnation}_{version.step}"
        directory.mkdir()
        bucket = write_bucket(directory, 0, dict(model.named_parameters()))
        return str(write_manifest(directory, version, [bucket]))


@pytest.fixture
def publish(policy: PolicySection, tmp_path: Path) -> Publisher:
    return Publisher(policy, tmp_path)


async def until(condition: Callable[[], bool], loop: "asyncio.Task[None]", seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        if loop.done():
            loop.result()
            raise AssertionError("the loop ended")
        assert time.monotonic() < end, "nothing happened"
        await asyncio.sleep(0.01)


def work(loop: RolloutLoop, *steps: Callable[[], bool]) -> None:
    """Runs the loop until each of the conditions has come true in turn; a condition may act on what it sees."""

    async def run() -> None:
        task = asyncio.create_task(loop.run())
        try:
            for step in steps:
                await until(step, task)
        finally:
            loop.stop()
        await asyncio.wait_for(task, 30)

    asyncio.run(run())


def generated(ledger: Ledger, count: int) -> Callable[[], bool]:
    """So many and no more: there have to be so many groups in all, or places for so many."""
    return lambda: ledger.counts()["generated"] == count


def groups(ledger: Ledger) -> list[Group]:
    return [group for _, group in ledger.read_generated("tests", 100, 1, 60_000)]


def same_text(first: Group, second: Group) -> bool:
    return [s.response_ids for s in first.samples] == [s.response_ids for s in second.samples]


# ---- what a group is


def test_a_group_is_what_its_lease_its_version_and_its_seed_say(
    ledger: Ledger, engine: TransformersEngine, preparation: Preparation, publish: Publisher
) -> None:
    version = PolicyVersion(2, 7)
    ids = fill(ledger, *TEXTS, epoch=1)
    ledger.open_gate(version, publish(version, 0.02), 10)
    rollout = section(samples=3, keep_maps=1)
    loop = RolloutLoop(engine, ledger, preparation, rollout, owner="actor", seed=SEED)
    work(loop, generated(ledger, 3))
    found = groups(ledger)
    assert [group.group_id for group in found] == ids
    assert engine.version == version
    for place, group in enumerate(found):
        prompt = prompt_of(TEXTS[place])
        assert (group.attempt, group.epoch, group.order, group.version) == (1, 1, 100 + place, version)
        assert group.prompt == prompt
        assert group.eos_ids == engine.eos_ids
        prepared = prepare(prompt, preparation)
        seed = group_seed(SEED, 1, prompt.prompt_id, 7)
        (expected,) = asyncio.run(engine.generate([request_of(prepared, sampling_of(rollout), seed, 1)]))
        assert len(group.samples) == len(expected) == 3
        for index, (sample, completion) in enumerate(zip(group.samples, expected, strict=True)):
            assert sample.sample_id == f"{group.group_id}:{index}"
            assert (sample.group_id, sample.prompt_id, sample.attempt) == (group.group_id, prompt.prompt_id, 1)
            assert sample.policy_versions == ((2, 7, len(sample.response_ids)),)
            # Bit for bit: one call, a generator of its own.
            assert sample.response_ids == completion.response_ids
            assert sample.logprobs == tuple(completion.logprobs.tolist())
            assert sample.sampling_logprobs is None
            assert sample.prompt == prepared.rendered.text
            assert sample.prompt_ids == prepared.rendered.ids
            assert sample.response == preparation.tokenizer.decode(sample.response_ids, skip_special_tokens=True)
            assert sample.flags == ()
            attention = sample.attention
            assert attention is not None
            assert attention.layers == engine.layers
            assert attention.content == prepared.keys.content
            assert attention.salient == prepared.keys.salient != ()
            assert attention.mass == tuple(completion.attention.mass.tolist())
            assert len(attention.mass) == len(sample.response_ids)
            assert (attention.map is not None) == (index == 0)
        assert len({sample.response_ids for sample in group.samples}) > 1
    assert (loop.counters.groups, loop.counters.samples) == (3, 9)
    assert loop.counters.tokens == sum(len(sample.response_ids) for group in found for sample in group.samples)
    assert loop.counters.prompt_tokens == sum(len(group.samples[0].prompt_ids) for group in found)
    figures = loop.figures()
    assert figures.busy_s == loop.counters.busy_s > figures.load_s > 0
    assert 0 < figures.capture_s < figures.busy_s


def test_another_actor_at_another_attempt_generates_the_same_and_another_step_does_not(
    ledger: Ledger, engine: TransformersEngine, policy: PolicySection, preparation: Preparation, publish: Publisher
) -> None:
    (group_id,) = fill(ledger, TEXTS[0])
    version = PolicyVersion(1, 0)
    ledger.open_gate(version, publish(version, 0.0), 10)
    assert isinstance(ledger.lease("dead actor", version, 60.0), Lease)
    assert ledger.release("dead actor") == [group_id]
    loop = RolloutLoop(engine, ledger, preparation, section(), owner="a", seed=SEED)
    work(loop, generated(ledger, 1))
    (second,) = groups(ledger)
    assert second.attempt == 2

    def again(owner: str, at: PolicyVersion, manifest: str) -> Group:
        """The driver was restarted, the group is generated once more by a new actor."""
        ledger.flush()
        assert fill(ledger, TEXTS[0]) == [group_id]
        ledger.open_gate(at, manifest, 10)
        fresh = TransformersEngine(policy, CaptureSection())
        work(RolloutLoop(fresh, ledger, preparation, section(), owner=owner, seed=SEED), generated(ledger, 1))
        (group,) = groups(ledger)
        return group

    manifest = str(publish.root / "v1_0" / "weights.json")
    third = again("b", version, manifest)
    assert [s.logprobs for s in third.samples] == [s.logprobs for s in second.samples]
    assert same_text(third, second)
    # The same weights as the version of a later step: another seed.
    later = PolicyVersion(1, 3)
    assert not same_text(again("c", later, publish(later, 0.0)), second)


def test_truncated_sampling_records_both_distributions(
    ledger: Ledger, engine: TransformersEngine, preparation: Preparation, publish: Publisher
) -> None:
    fill(ledger, TEXTS[0])
    version = PolicyVersion(1, 0)
    ledger.open_gate(version, publish(version, 0.0), 10)
    rollout = RolloutSection(samples=2, max_tokens=6, top_p=0.9, top_k=5, truncation="replay", temperature=0.7)
    work(RolloutLoop(engine, ledger, preparation, rollout, owner="a", seed=SEED), generated(ledger, 1))
    for sample in groups(ledger)[0].samples:
        assert sample.sampling_logprobs is not None
        assert sample.kept_ids is not None
        assert len(sample.sampling_logprobs) == len(sample.kept_ids) == len(sample.logprobs)
        assert all(
            token in kept and len(kept) <= 5 for token, kept in zip(sample.response_ids, sample.kept_ids, strict=True)
        )


def test_an_actor_with_its_hands_full_takes_new_weights_in_mid_generation(
    ledger: Ledger, policy: PolicySection, preparation: Preparation, publish: Publisher
) -> None:
    first, second = PolicyVersion(1, 0), PolicyVersion(1, 1)

    class Long(TransformersEngine):
        """Its responses take until there are newer weights."""

        async def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
            while self.version < second:
                await asyncio.sleep(0.01)
            return await super().generate(requests)

    fill(ledger, TEXTS[0])
    ledger.open_gate(first, publish(first, 0.0), 3)
    keeps = RolloutSection(
        engine="vllm", vllm=VllmSection(weight_sync="keep"), groups_in_flight=1, samples=2, max_tokens=8, poll_s=0.01
    )
    loop = RolloutLoop(Long(policy, CaptureSection()), ledger, preparation, keeps, owner="a", seed=SEED)

    def leased() -> bool:
        if ledger.counts()["leased"] == 0:
            return False
        ledger.open_gate(second, publish(second, 0.1), 3)
        return True

    work(loop, leased, generated(ledger, 1))
    assert loop.counters.loads == 2


# ---- prompts that cannot be generated for, or kill their actors


def test_groups_at_their_last_chance_are_generated_one_at_a_time_and_the_loop_goes_on(
    client: redis.Redis, policy: PolicySection, preparation: Preparation, publish: Publisher
) -> None:
    ledger = Ledger(client, f"run-{uuid4().hex[:8]}", lease_losses=1)
    leased: list[int] = []

    class Counting(TransformersEngine):
        """Notes how many groups are leased while one is in hand."""

        async def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
            await asyncio.sleep(0.1)  # ten times what the loop waits before it asks for another
            leased.append(ledger.counts()["leased"])
            return await super().generate(requests)

    ids = fill(ledger, *TEXTS)
    version = PolicyVersion(1, 0)
    ledger.open_gate(version, publish(version, 0.0), 3)
    for _ in ids[:2]:
        assert isinstance(ledger.lease("dies", version, 60.0), Lease)
    assert ledger.release("dies") == ids[:2]
    counting = Counting(policy, CaptureSection())
    loop = RolloutLoop(counting, ledger, preparation, section(groups_in_flight=3), owner="a", seed=SEED)
    work(loop, generated(ledger, 3))
    assert leased == [1, 1, 1]
    assert [group.group_id for group in groups(ledger)] == ids


def test_a_prompt_too_long_for_the_context_fails_as_data_and_the_next_takes_its_place(
    ledger: Ledger, engine: TransformersEngine, preparation: Preparation, publish: Publisher
) -> None:
    ids = fill(ledger, TEXTS[0], LONG, TEXTS[1])
    version = PolicyVersion(1, 0)
    ledger.open_gate(version, publish(version, 0.0), 2)
    loop = RolloutLoop(engine, ledger, preparation, section(), owner="a", seed=SEED)
    work(loop, generated(ledger, 2))
    assert [group.group_id for group in groups(ledger)] == [ids[0], ids[2]]
    (row,) = ledger.list("failed")
    assert row.group_id == ids[1]
    assert row.failure is not None
    assert (row.failure.kind, row.failure.code) == ("data", "prompt_refused")
    tokens = len(prepare(prompt_of(LONG), preparation).rendered.ids)
    assert tokens > 96
    expected = f"a prompt of {tokens} tokens and a response of 8 exceed the context of 96"
    assert row.failure.message == f"prompt {prompt_of(LONG).prompt_id}: {expected}"
    assert loop.counters.groups == 2
    assert "failures_infra" not in ledger.counters()


def test_the_renderers_own_limit_is_the_same_failure(
    ledger: Ledger, engine: TransformersEngine, preparation: Preparation, publish: Publisher
) -> None:
    fill(ledger, LONG, TEXTS[0])
    version = PolicyVersion(1, 0)
    ledger.open_gate(version, publish(version, 0.0), 1)
    limited = Preparation(Renderer(preparation.tokenizer, DataSection(), 96 - 8), preparation.salience, preparation.idf)
    work(RolloutLoop(engine, ledger, limited, section(), owner="a", seed=SEED), generated(ledger, 1))
    (row,) = ledger.list("failed")
    assert row.failure is not None
    assert (row.failure.kind, row.failure.code) == ("data", "prompt_refused")
    assert "allowed are 88" in row.failure.message


def test_a_prompt_that_is_cut_says_so(
    ledger: Ledger, engine: TransformersEngine, preparation: Preparation, publish: Publisher
) -> None:
    fill(ledger, LONG)
    version = PolicyVersion(1, 0)
    ledger.open_gate(version, publish(version, 0.0), 1)
    cutting = Renderer(preparation.tokenizer, DataSection(too_long="truncate"), 40)
    preparation = Preparation(cutting, preparation.salience, preparation.idf)
    work(RolloutLoop(engine, ledger, preparation, section(), owner="a", seed=SEED), generated(ledger, 1))
    for sample in groups(ledger)[0].samples:
        assert sample.flags == ("prompt_truncated",)
        assert len(sample.prompt_ids) <= 40


# ---- weights


def test_new_weights_are_taken_between_groups(
    ledger: Ledger, engine: TransformersEngine, policy: PolicySection, preparation: Preparation, publish: Publisher
) -> None:
    fill(ledger, *TEXTS)
    first, second = PolicyVersion(1, 0), PolicyVersion(1, 1)
    ledger.open_gate(first, publish(first, 0.0), 2)

    def next_step() -> bool:
        if ledger.counts()["generated"] < 2:
            return False
        ledger.open_gate(second, publish(second, 0.2), 3)
        return True

    work(RolloutLoop(engine, ledger, preparation, section(), owner="a", seed=SEED), next_step, generated(ledger, 3))
    found = groups(ledger)
    assert [group.version for group in found] == [first, first, second]
    assert [sample.policy_versions[0][:2] for sample in found[2].samples] == [(1, 1)] * 3
    # The last group is of the new weights, and not of the old ones.
    for version, agrees in ((second, True), (first, False)):
        other = TransformersEngine(policy, CaptureSection())
        asyncio.run(other.load_weights(str(publish.root / f"v1_{version.step}" / "weights.json")))
        sample = found[2].samples[0]
        prepared = prepare(found[2].prompt, preparation)
        oracle = asyncio.run(other.recompute(sample.prompt_ids, sample.response_ids, prepared.keys, temperature=1.0))
        assert (oracle.logprobs.tolist() == pytest.approx(sample.logprobs, abs=1e-5)) == agrees


def test_an_offer_is_joined_by_those_it_lists_and_after_a_broken_one_the_next(
    ledger: Ledger, engine: TransformersEngine, preparation: Preparation, policy: PolicySection
) -> None:
    """Until a whole version is there, nothing is leased, whatever the gate says."""
    fill(ledger, TEXTS[0])
    version = PolicyVersion(3, 2)
    named = {name: 1.01 * tensor.detach() for name, tensor in load_policy_model(policy).named_parameters()}
    plan = [[TensorMeta(name, tensor.dtype, tuple(tensor.shape))] for name, tensor in named.items()]

    def opened(owner: str) -> Sender:
        seconds = {"join_s": 20.0, "phase_s": 10.0, "whole_s": 30.0}
        sender = Sender(version, [f"{owner}/0"], name="l", host="127.0.0.1", device=torch.device("cpu"), **seconds)
        ledger.open_gate(version, sender.offer.model_dump_json(), 1)
        return sender

    def passed_over() -> bool:
        time.sleep(0.3)  # the actor asks every 10 ms
        return not other.finish().received

    def broken() -> bool:
        sender = opened("actor")
        assert sender.start(plan)
        assert sender.send(0, named)
        sender.stop("for no reason")
        return True

    def whole() -> bool:
        time.sleep(0.3)
        assert ledger.counts()["generated"] == ledger.counts()["leased"] == 0
        sender = opened("actor")
        assert sender.start(plan)
        assert all(sender.send(index, named) for index in range(len(plan)))
        return sender.finish().whole

    other = opened("another")
    loop = RolloutLoop(engine, ledger, preparation, section(), owner="actor", seed=SEED)
    work(loop, passed_over, broken, whole, generated(ledger, 1))
    assert groups(ledger)[0].version == engine.version == version


@pytest.mark.parametrize("left", ["nothing", "the manifest", "half a bucket"])
def test_weights_removed_because_newer_ones_are_there_are_ridden_out(
    ledger: Ledger, engine: TransformersEngine, preparation: Preparation, publish: Publisher, left: str
) -> None:
    """The actor was told of a version, and before it has read it all the driver is two versions further."""
    fill(ledger, TEXTS[0])
    old, new = PolicyVersion(1, 0), PolicyVersion(1, 2)
    stale, fresh = publish(old, 0.1), publish(new, 0.0)
    ledger.open_gate(old, stale, 1)
    told = ledger.lease("a", None, 60.0)
    assert isinstance(told, LoadWeights)
    ledger.open_gate(new, fresh, 1)
    directory = Path(stale).parent
    if left == "nothing":
        shutil.rmtree(directory)
    elif left == "the manifest":
        (directory / "bucket_00000.safetensors").unlink()
    else:
        bucket = directory / "bucket_00000.safetensors"
        bucket.write_bytes(bucket.read_bytes()[:1000])
    loop = RolloutLoop(engine, ToldBefore(ledger, told), preparation, section(), owner="a", seed=SEED)
    work(loop, generated(ledger, 1))
    assert groups(ledger)[0].version == new


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_weights_that_are_not_what_was_published_end_the_actor(
    ledger: Ledger, engine: TransformersEngine, preparation: Preparation, publish: Publisher, damage: str
) -> None:
    """The version is the one that all are to hold: without it there is nothing to do but to say which file it is."""
    fill(ledger, TEXTS[0])
    version = PolicyVersion(1, 0)
    manifest = publish(version, 0.0)
    ledger.open_gate(version, manifest, 1)
    bucket = Path(manifest).parent / "bucket_00000.safetensors"
    if damage == "missing":
        shutil.rmtree(bucket.parent)
    else:
        content = bytearray(bucket.read_bytes())
        content[-1] ^= 1
        bucket.write_bytes(content)
    loop = RolloutLoop(engine, ledger, preparation, section(), owner="a", seed=SEED)
    with pytest.raises(Corrupt, match="weights.json is missing" if damage == "missing" else "bucket_00000"):
        asyncio.run(asyncio.wait_for(loop.run(), 10))
    assert ledger.counts()["pending"] == 1
    assert engine.version == PolicyVersion(0, 0)


def test_weights_of_another_model_end_the_actor_before_it_leases(
    ledger: Ledger, engine: TransformersEngine, preparation: Preparation, tmp_path: Path
) -> None:
    fill(ledger, TEXTS[0])
    bucket = write_bucket(tmp_path, 0, {"other.weight": torch.zeros(2, 2)})
    version = PolicyVersion(1, 0)
    ledger.open_gate(version, str(write_manifest(tmp_path, version, [bucket])), 1)
    loop = RolloutLoop(engine, ledger, preparation, section(), owner="a", seed=SEED)
    with pytest.raises(ValueError, match=r"1 tensors that the model lacks, as other.weight"):
        asyncio.run(asyncio.wait_for(loop.run(), 10))
    assert ledger.counts()["pending"] == 1


# ---- leases


def test_a_lease_is_renewed_while_its_group_is_generated(
    ledger: Ledger, held: Held, preparation: Preparation, publish: Publisher
) -> None:
    fill(ledger, TEXTS[0])
    version = PolicyVersion(1, 0)
    ledger.open_gate(version, publish(version, 0.0), 1)
    expired: list[str] = []

    def watch() -> bool:
        expired.extend(ledger.expire_leases())
        if loop.counters.renewed >= 4:  # it would have expired after three
            held.may.set()
        return ledger.counts()["generated"] == 1

    loop = RolloutLoop(held, ledger, preparation, section(lease_s=1.0), owner="a", seed=SEED)
    work(loop, watch)
    assert expired == []
    assert groups(ledger)[0].attempt == 1


def test_a_renewal_that_fails_is_not_the_last(
    ledger: Ledger,
    client: redis.Redis,
    held: Held,
    preparation: Preparation,
    publish: Publisher,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Redis has no room for a moment, while the engine is at work."""
    fill(ledger, TEXTS[0])
    version = PolicyVersion(1, 0)
    ledger.open_gate(version, publish(version, 0.0), 1)
    before: list[int] = []

    def leased() -> bool:
        if ledger.counts()["leased"] == 0:
            return False
        client.config_set("maxmemory", "1")
        return True

    def refused() -> bool:
        if "a lease is not renewed" not in caplog.text:
            return False
        client.config_set("maxmemory", "0")
        before.append(loop.counters.renewed)
        return True

    def renewed() -> bool:
        if loop.counters.renewed > before[0]:
            held.may.set()
        return held.may.is_set()

    loop = RolloutLoop(held, ledger, preparation, section(lease_s=0.15), owner="a", seed=SEED)
    try:
        work(loop, leased, refused, renewed, generated(ledger, 1))
    finally:
        held.may.set()
        client.config_set("maxmemory", "0")


def test_an_answer_to_a_lease_that_passed_on_is_dropped(
    ledger: Ledger, held: Held, preparation: Preparation, publish: Publisher
) -> None:
    (group_id,) = fill(ledger, TEXTS[0])
    version = PolicyVersion(1, 0)
    ledger.open_gate(version, publish(version, 0.0), 1)

    def pass_on() -> bool:
        """The driver takes the actor for dead while it generates: the lease goes back, and to whoever asks next."""
        if ledger.release("a") != [group_id]:
            return False
        held.may.set()
        return True

    loop = RolloutLoop(held, ledger, preparation, section(), owner="a", seed=SEED)
    work(loop, pass_on, generated(ledger, 1))
    (group,) = groups(ledger)
    assert group.attempt == 2
    assert ledger.counters()["late"] == 1


def test_stop_ends_after_the_group_in_hand(
    ledger: Ledger, held: Held, preparation: Preparation, publish: Publisher
) -> None:
    fill(ledger, *TEXTS)
    version = PolicyVersion(1, 0)
    ledger.open_gate(version, publish(version, 0.0), 3)
    loop = RolloutLoop(held, ledger, preparation, section(), owner="a", seed=SEED)

    def in_hand() -> bool:
        if ledger.counts()["leased"] == 0:
            return False
        loop.stop()
        held.may.set()
        return True

    work(loop, in_hand)
    counts = ledger.counts()
    assert (counts["leased"], counts["generated"], counts["pending"]) == (0, 1, 2)

"""Weights from real ZeRO-3 ranks to real engines by a collective: the bits that files would bring, and deaths."""

import asyncio
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cluster.config import Config
from learner.worker import LearnerWorker
from rollout.config import RolloutSection, VllmSection
from rollout.engine import Completion, GenerationRequest, KeySets, Sampling
from rollout.worker import build_engine
from services.attention.config import CaptureSection
from services.models_config import PolicySection
from services.records import PolicyVersion
from services.transfer.offer import Broken, Report, read_offer
from services.transfer.packing import TensorMeta
from services.transfer.receiver import receiving
from services.transfer.sender import Sender

pytestmark = pytest.mark.slow  # test_collective.py sends weights to vLLM in the suite

BUCKET_MIB = 1.0
PHASE_S = 10.0
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory, tiny_decoder: Path) -> tuple[Path, Path]:
    """The policy that the engines start with, and the one that the learner has: 40 MiB, its output head tied."""
    root = tmp_path_factory.mktemp("transferred")
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_decoder)
    for seed, name in enumerate(("old", "new")):
        torch.manual_seed(seed)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=8192,
                hidden_size=512,
                intermediate_size=768,
                num_hidden_layers=3,
                num_attention_heads=8,
                num_key_value_heads=4,
                max_position_embeddings=96,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root / "old", root / "new"


class Rank(LearnerWorker):
    """A rank whose model stays partitioned between uses, small as it is."""

    def __init__(self, *arguments: Any) -> None:
        import learner.zero

        learner.zero.GATHER_ABOVE = learner.zero.SMALL_PARAMETER = 0
        super().__init__(*arguments)

    def partitioned(self) -> int:
        """Parameters of which this rank holds only its part at the moment."""
        from learner.publish import _partitioned

        return sum(_partitioned(parameter) for parameter in self.engine.lm.parameters())

    def metadata(self) -> list[Any]:
        from learner.publish import Zero3Source

        return [(meta.name, str(meta.dtype), meta.shape) for meta in Zero3Source(self.engine).metadata()]


def fingerprint(worker: Any) -> str:
    """Of every tensor of vLLM's model, as it lies there."""
    digest = hashlib.blake2b()
    for name, tensor in sorted(worker.model_runner.get_model().state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class EngineHost:
    """An engine in an actor, as a rollout actor holds it."""

    async def start(self, policy: PolicySection, engine: Any) -> None:
        section = RolloutSection(engine=engine, max_batch_rows=8, vllm=VllmSection(weight_sync="keep"))
        self.engine: Any = await build_engine(policy, CaptureSection(), section)

    async def load(self, published: str, owner: str) -> PolicyVersion:
        return await self.engine.load_weights(published, owner)

    async def generate(self, requests: list[GenerationRequest]) -> list[list[Completion]]:
        return await self.engine.generate(requests)

    async def fingerprint(self) -> str:
        return (await self.engine._rpc(fingerprint))[0]


class Actor:
    """The caller's side of a Ray actor."""

    def __init__(self, cls: type, *arguments: Any) -> None:
        import ray

        self._ray: Any = ray
        environment = {"env_vars": {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}}
        remote: Any = ray.remote(cls)
        self.handle = remote.options(num_cpus=0.5, runtime_env=environment).remote(*arguments)

    def begin(self, method: str, *arguments: Any) -> Any:
        return getattr(self.handle, method).remote(*arguments)

    def end(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference, timeout=120)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error

    def call(self, method: str, *arguments: Any) -> Any:
        return self.end(self.begin(method, *arguments))

    def kill(self) -> None:
        self._ray.kill(self.handle)


class Here:
    """The transformers engine in this process, called as an actor is: a process more would only take time to start."""

    def __init__(self, policy: PolicySection) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._host = EngineHost()
        self.end(self.begin("start", policy, "transformers"))

    def begin(self, method: str, *arguments: Any) -> Any:
        return self._pool.submit(lambda: asyncio.run(getattr(self._host, method)(*arguments)))

    def end(self, reference: Any) -> Any:
        return reference.result(120)

    def call(self, method: str, *arguments: Any) -> Any:
        return self.end(self.begin(method, *arguments))


@pytest.fixture(scope="module")
def parties(ray_session: str, policies: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two ranks with the new policy; a vLLM and a transformers engine with the old one."""
    del ray_session
    old, new = policies
    sections = {
        "data": {},
        "run": {"seed": 3},
        "policy": {"model": str(new)},
        "learner": {"device": "cpu", "ranks": 2},
        "cluster": {"bucket_mib": BUCKET_MIB, "transfer_s": PHASE_S, "rendezvous_s": 60.0},
    }
    config = Config.model_validate(sections).model_dump(mode="json")
    ranks = [Actor(Rank, config, rank, 2, str(tmp_path_factory.mktemp("learner"))) for rank in range(2)]
    vllm = Actor(EngineHost)
    starting = vllm.begin("start", PolicySection(model=str(old)), "vllm")
    address, port = ranks[0].call("address")
    setups = [rank.begin("setup", address, port) for rank in ranks]
    transformers = Here(PolicySection(model=str(old)))
    for actor, reference in zip([vllm, *ranks], [starting, *setups], strict=True):
        actor.end(reference)
    yield ranks, (vllm, transformers)
    for actor in (vllm, *ranks):
        actor.kill()


def request(samples: int = 1, max_tokens: int = 12) -> GenerationRequest:
    sampling = Sampling(samples=samples, max_tokens=max_tokens)
    return GenerationRequest((5, 6, 7, 8, 9), KeySets((0, 1, 2), (1,), (1.0,)), sampling, seed=4)


def offered(ranks: list[Actor], version: PolicyVersion, receivers: list[str]) -> tuple[str, list[Any]]:
    """The offer, and the ranks' calls that serve it."""
    offer = [rank.begin("offer_weights", tuple(version), receivers) for rank in ranks]
    published, _ = (rank.end(reference) for rank, reference in zip(ranks, offer, strict=True))
    return published, [rank.begin("send_weights") for rank in ranks]


def rows(completions: list[list[Completion]]) -> list[Any]:
    return [(c.response_ids, c.logprobs.tolist(), c.attention.mass.tolist()) for group in completions for c in group]


def test_what_engines_get_is_what_files_would_have_brought(
    parties: Any, policies: tuple[Path, Path], tmp_path: Path
) -> None:
    ranks, (vllm, transformers) = parties
    # What is announced is whole, known to each rank alone, and gathers nothing.
    model: Any = LlamaForCausalLM.from_pretrained(policies[1])
    announced = [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in model.named_parameters()]
    assert [rank.call("metadata") for rank in ranks] == [announced] * 2
    assert ranks[0].call("partitioned") > 20
    before = [rows(engine.call("generate", [request()])) for engine in (vllm, transformers)]
    old = vllm.call("fingerprint")

    published, sending = offered(ranks, PolicyVersion(1, 1), ["rollout-0/0", "rollout-1/0"])
    loading = [e.begin("load", published, f"rollout-{i}") for i, e in enumerate((vllm, transformers))]
    assert [e.end(reference) for e, reference in zip((vllm, transformers), loading, strict=True)] == [(1, 1)] * 2
    report, nothing = (rank.end(reference) for rank, reference in zip(ranks, sending, strict=True))
    assert nothing == {}
    assert Report(**report).whole
    assert report["bytes"] > 30 * 2**20
    by_transfer = [rows(engine.call("generate", [request()])) for engine in (vllm, transformers)]
    new = vllm.call("fingerprint")
    assert new != old
    assert all(ours != theirs for ours, theirs in zip(by_transfer, before, strict=True))

    writing = [rank.begin("publish", (1, 2), str(tmp_path / "files")) for rank in ranks]
    manifest, _ = (rank.end(reference) for rank, reference in zip(ranks, writing, strict=True))
    assert [engine.call("load", manifest, "") for engine in (vllm, transformers)] == [(1, 2)] * 2
    assert vllm.call("fingerprint") == new
    assert [rows(engine.call("generate", [request()])) for engine in (vllm, transformers)] == by_transfer


def test_a_learner_that_dies_leaves_engines_torn_until_the_next_whole_version(
    parties: Any, policies: tuple[Path, Path], ray_session: str
) -> None:
    """A third receiver, in this process, kills the sending rank when it has the first of 30 buckets. What vLLM was
    generating is held, and finished with the next version that is whole."""
    del ray_session
    ranks, (vllm, transformers) = parties
    good = vllm.call("fingerprint")
    generating = vllm.begin("generate", [request(samples=8, max_tokens=90)])
    published, _ = offered(ranks, PolicyVersion(1, 3), ["rollout-0/0", "rollout-1/0", "rollout-2/0"])
    loading = [e.begin("load", published, f"rollout-{i}") for i, e in enumerate((vllm, transformers))]
    took = 0

    def take() -> None:
        nonlocal took
        with receiving(read_offer(published), "rollout-2/0", CPU) as incoming:
            for _ in incoming.tensors:
                took += 1
                if took == 1:
                    ranks[0].kill()

    with pytest.raises(Broken, match="learner-0 is gone"):
        take()
    for engine, reference in zip((vllm, transformers), loading, strict=True):
        with pytest.raises(Broken, match=r"the transfer of version 1\.3.*learner-0 is gone"):
            engine.end(reference)
        with pytest.raises(RuntimeError, match=r"holds no policy: .*version 1\.3 failed halfway"):
            engine.call("generate", [request()])

    # A learner that came up again sends a version: nothing of the torn one is left.
    model: Any = LlamaForCausalLM.from_pretrained(policies[1])
    named = dict(model.named_parameters())
    plan = [[TensorMeta(name, tensor.dtype, tuple(tensor.shape))] for name, tensor in named.items()]
    sender = Sender(
        PolicyVersion(2, 3),
        ["rollout-0/0", "rollout-1/0"],
        name="learner-0",
        host="127.0.0.1",
        device=CPU,
        join_s=60.0,
        phase_s=PHASE_S,
        whole_s=60.0,
    )
    offer = sender.offer.model_dump_json()
    loading = [e.begin("load", offer, f"rollout-{i}") for i, e in enumerate((vllm, transformers))]
    assert sender.start(plan)
    assert all(sender.send(index, named) for index in range(len(plan)))
    assert sender.finish().whole
    assert [e.end(reference) for e, reference in zip((vllm, transformers), loading, strict=True)] == [(2, 3)] * 2
    assert vllm.call("fingerprint") == good
    (held,) = vllm.end(generating)
    assert len(held) == 8
    assert all(sum(span[2] for span in c.versions) == len(c.response_ids) == len(c.attention.mass) for c in held)
    assert {span[:2] for c in held for span in c.versions} == {(1, 2), (2, 3)}
    assert {span[:2] for c in vllm.call("generate", [request()])[0] for span in c.versions} == {(2, 3)}

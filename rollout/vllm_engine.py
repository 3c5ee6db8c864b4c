"""The engine that generates with vLLM, and captures attention in the same pass (rollout/vllm_capture).

vLLM runs in a process of its own behind `AsyncLLM`, or on a CPU in this one (rollout/vllm_in_process.py). Requests of
all groups share its batch, and a new one starts as soon as a slot is free. Every sample is a request of its own
(n = 1), so that each has its seed and its statistics.
"""

import asyncio
import hashlib
import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollout.cache_size import BLOCK_SIZE_CPU, cpu_cache_bytes
from rollout.config import RolloutSection
from rollout.engine import AttentionRows, Completion, Family, GenerationRequest
from rollout.places import Places
from rollout.prepare import sampling_of
from rollout.refusals import RequestRefused, check_fits, check_keys
from rollout.sampling import check_sampling, truncates
from rollout.vllm_capture.capture import UNCLAIMED
from rollout.vllm_capture.request import extra_args
from rollout.vllm_in_process import InProcessLLM
from rollout.vllm_plugin import BACKEND, own_processes
from services.attention.config import CaptureSection
from services.errors import Deadline, UserError
from services.models import eos_ids_of_policy, load_config, max_context_of
from services.models_config import PolicySection
from services.records import FinishReason, PolicyVersion
from services.transfer.offer import Broken, is_offer, name_of, read_offer
from services.weights import Corrupt

EXTENSION = "rollout.vllm_capture.extension.CaptureExtension"


class VllmEngine:
    """Implements `rollout.engine.Engine` for decoder-only models that vLLM runs. `start` must be awaited first.

    Raises UserError where vLLM is not installed, or the model's attention cannot be captured exactly.
    """

    def __init__(self, policy: PolicySection, capture: CaptureSection, rollout: RolloutSection) -> None:
        config = load_config(policy)
        self.family: Family = "decoder"
        self.max_context: int | None = rollout.context(max_context_of(config))
        self.eos_ids: tuple[int, ...] = eos_ids_of_policy(policy)
        self.layers: tuple[int, ...] = ()
        self._policy = policy
        self._capture = capture
        self._section = rollout
        self._version = PolicyVersion(0, 0)
        self._capture_s = 0.0
        self._torn: str | None = "the engine was not started"
        self._says_kept_sets = False
        self._numbers = itertools.count()
        self._calling = asyncio.Lock()
        # The capture holds so many samples' statistics until they are fetched, which is when the last of them is there.
        self._places = Places(UNCLAIMED * rollout.max_batch_rows)
        self._llm: Any = None

    @property
    def version(self) -> PolicyVersion:
        return self._version

    @property
    def capture_s(self) -> float:
        return self._capture_s

    async def start(self) -> None:
        """Starts vLLM with the policy's starting weights, and the capture in its workers.

        Raises UserError where it does not start, the model's attention cannot be captured, or the recipe truncates and
        this vLLM does not say what it kept: else every prompt would be refused, one by one, to the end of the run.
        """
        self._llm = await asyncio.to_thread(_start_llm, self._policy, self._section, self.max_context)
        answers = await self._rpc("attune_capture_start", self._capture.model_dump(mode="json"))
        if refused := [answer for answer in answers if "refused" in answer]:
            await self.close()
            why = next((answer["refused"] for answer in refused if answer["here"]), refused[0]["refused"])
            raise UserError(f"policy.model {self._policy.model}: {why}")
        started = answers[0]
        self.layers = tuple(started["layers"])
        self._says_kept_sets = bool(started["kept_sets"])
        if truncates(sampling_of(self._section)) and not self._says_kept_sets:
            await self.close()
            raise UserError(
                f"rollout.top_p {self._section.top_p} and rollout.top_k {self._section.top_k} truncate, and this vLLM "
                "does not say which tokens it kept (model runner V2): set top_p to 1 and top_k to 0, or rollout.engine "
                "to 'transformers'"
            )
        self._torn = None
        await self._llm.update_weight_version(_label(self._version))

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        """Completions of each request, in order.

        Raises RequestRefused for a request that cannot be: an empty prompt, positions outside it, sampling out of
        bounds, or truncated where vLLM does not say what it kept (model runner V2), more tokens than the model has
        positions for.
        """
        self._ready()
        for request in requests:
            check_sampling(request.sampling)
            if truncates(request.sampling) and not self._says_kept_sets:
                raise RequestRefused(
                    f"top_p {request.sampling.top_p} and top_k {request.sampling.top_k} truncate, and this vLLM does "
                    "not say which tokens it kept; the transformers engine does"
                )
            check_fits(self.family, self.max_context, request.prompt_ids, request.sampling.max_tokens)
            check_keys(request.keys, len(request.prompt_ids))
        return list(await asyncio.gather(*(self._group(request) for request in requests)))

    async def load_weights(self, published: str, owner: str = "") -> PolicyVersion:
        """Takes published weights: the manifest's, or those of an offer that lists `owner`.

        Under `weight_sync: wait` what is being generated is finished with the old weights first; under `keep` it is
        held, its cache is computed again under the new weights, and it goes on with them. Where a transfer breaks off
        it stays held: the engine refuses to generate until it has a whole version, and then goes on.
        """
        mode = self._section.vllm.weight_sync
        await self._deadline(self._llm.pause_generation(mode=mode), "the pause before new weights")
        seconds = None
        if is_offer(published):
            offer = read_offer(published)
            seconds = offer.join_s + offer.whole_s + self._section.vllm.call_s
        answers = await self._rpc("attune_load_weights", published, owner, seconds=seconds)
        if refused := [answer for answer in answers if "refused" in answer]:
            answer = refused[0]
            # Where some ranks have the new weights and others do not, the policy is neither.
            if len(refused) < len(answers) or any(each["torn"] for each in refused):
                self._torn = f"loading {name_of(published)} failed halfway"
            elif self._torn is None:
                await self._llm.resume_generation()
            raise _ERRORS[answer["kind"]](answer["refused"])
        await self._llm.reset_prefix_cache(reset_running_requests=True)
        self._version = PolicyVersion(*answers[0]["version"])
        self._torn = None
        await self._llm.update_weight_version(_label(self._version))
        await self._llm.resume_generation()
        return self._version

    async def close(self) -> None:
        """Ends vLLM's processes."""
        self._torn = "the engine is closed"
        if self._llm is not None:
            await asyncio.to_thread(self._llm.shutdown)

    async def _group(self, request: GenerationRequest) -> list[Completion]:
        """A request's samples; where they are more than a full batch, one batch of them after the other."""
        completions: list[Completion] = []
        while (first := len(completions)) < request.sampling.samples:
            count = min(self._section.max_batch_rows, request.sampling.samples - first)
            async with self._places.taken(count):
                completions += await self._samples(request, range(first, first + count))
        return completions

    async def _samples(self, request: GenerationRequest, numbers: range) -> list[Completion]:
        keys = [f"{os.getpid()}-{next(self._numbers)}" for _ in numbers]
        outputs = await asyncio.gather(*(self._sample(request, k, key) for k, key in zip(numbers, keys, strict=True)))
        lengths = [len(output.token_ids) for output in outputs]
        fetched = (await self._rpc("attune_capture_pop", keys, lengths))[0]
        self._capture_s = fetched[-1]["capture_s"]
        return [
            self._completion(output, statistics, len(request.prompt_ids))
            for output, statistics in zip(outputs, fetched, strict=True)
        ]

    async def _sample(self, request: GenerationRequest, k: int, key: str) -> Any:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        parameters = SamplingParams(
            n=1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=_seed(request.seed, k),
            logprobs=0,
            ignore_eos=True,
            stop_token_ids=list(self.eos_ids),
            detokenize=False,
            skip_clone=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=extra_args(
                key,
                request.keys.content,
                request.keys.salient,
                request.keys.salient_weights,
                dense=k < request.keep_maps,
                kept_sets=truncates(sampling),
            ),
        )
        last: Any = None
        async for output in self._llm.generate(
            TokensPrompt(prompt_token_ids=list(request.prompt_ids)), parameters, key
        ):
            last = output
        if last is None or not last.finished or last.outputs[0].finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a request with {last and last.outputs[0].finish_reason!r}")
        return last.outputs[0]

    def _completion(self, output: Any, fetched: dict[str, Any], prompt: int) -> Completion:
        ids = tuple(int(token) for token in output.token_ids)
        statistics = np.frombuffer(fetched["statistics"], dtype=np.float32).reshape(-1, 4)
        dense: NDArray[np.float32] | None = None
        if fetched["dense"] is not None:
            dense = np.frombuffer(fetched["dense"], dtype=np.float32).reshape(-1, prompt)
        reason: FinishReason = "stop" if output.finish_reason == "stop" else "length"
        drawn = np.array(
            [step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)], dtype=np.float32
        )
        kept, log_mass = _unpacked(fetched["kept"]) if fetched["kept"] is not None else (None, 0.0)
        return Completion(
            response_ids=ids,
            finish_reason=reason,
            logprobs=(drawn + log_mass).astype(np.float32),
            sampling_logprobs=None if kept is None else drawn,
            kept_ids=kept,
            attention=AttentionRows(*np.ascontiguousarray(statistics.T), dense=dense),
            versions=tuple((*_unlabel(span.version), span.end - span.start) for span in output.weight_versions or ()),
        )

    async def _rpc(self, method: str, *arguments: Any, seconds: float | None = None) -> list[Any]:
        async with self._calling:  # a call's time begins when the one before it has ended: a transfer may take minutes
            return await self._deadline(self._llm.collective_rpc(method, args=arguments), method, seconds)

    async def _deadline(self, call: Any, what: str, seconds: float | None = None) -> Any:
        seconds = self._section.vllm.call_s if seconds is None else seconds
        try:
            return await asyncio.wait_for(call, seconds)
        except TimeoutError as error:
            raise Deadline(waited_for=what, who="vLLM", seconds=seconds) from error

    def _ready(self) -> None:
        if self._torn is not None:
            raise RuntimeError(f"the engine holds no policy: {self._torn}")


_ERRORS: dict[str, type[Exception]] = {
    "Broken": Broken,
    "Corrupt": Corrupt,
    "FileNotFoundError": FileNotFoundError,
    "ValueError": ValueError,
}


def _unpacked(kept: dict[str, bytes]) -> tuple[tuple[tuple[int, ...], ...], NDArray[np.float32]]:
    """The ids that each step kept, and the logarithm of their mass under the whole distribution."""
    ids = np.frombuffer(kept["ids"], dtype=np.int32)
    ends = np.frombuffer(kept["sizes"], dtype=np.int32).cumsum()
    sets = tuple(tuple(part.tolist()) for part in np.split(ids, ends[:-1]))
    return sets, np.frombuffer(kept["log_mass"], dtype=np.float32)


def _label(version: PolicyVersion) -> str:
    return f"{version.incarnation}.{version.step}"


def _unlabel(label: str) -> tuple[int, int]:
    incarnation, step = label.split(".")
    return int(incarnation), int(step)


def _seed(seed: int, k: int) -> int:
    """The seed of the k-th sample, 63 bits."""
    digest = hashlib.blake2b(f"{seed}:{k}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _start_llm(policy: PolicySection, section: RolloutSection, max_context: int | None) -> Any:
    own = section.vllm
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["OMP_NUM_THREADS"] = str(section.threads)
    own_processes()
    try:
        from vllm.config import WeightTransferConfig
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        if on_cpu and own.tensor_parallel == 1:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.llm_engine import LLMEngine
    except ImportError as error:
        raise UserError(
            "rollout.engine: 'vllm' is not installed: pip install 'attune[gpu]' (or 'attune[cpu]' without a GPU)"
        ) from error
    arguments: dict[str, Any] = {
        "model": policy.model,
        "revision": policy.revision,
        "skip_tokenizer_init": True,
        "dtype": policy.dtype,
        "max_model_len": max_context,
        "max_num_seqs": section.max_batch_rows,
        "tensor_parallel_size": own.tensor_parallel,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "enforce_eager": on_cpu,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": EXTENSION,
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
        "disable_log_stats": True,
        "trust_remote_code": False,
    }
    if own.max_batched_tokens is not None:
        arguments["max_num_batched_tokens"] = own.max_batched_tokens
    if own.kv_cache_mib is not None:
        arguments["kv_cache_memory_bytes"] = own.kv_cache_mib * 2**20
    if on_cpu:
        arguments["block_size"] = BLOCK_SIZE_CPU
        if own.kv_cache_mib is None:
            arguments["kv_cache_memory_bytes"] = _room_for(load_config(policy), policy.dtype, arguments)
    else:
        arguments["gpu_memory_utilization"] = own.gpu_memory
    try:
        if on_cpu and own.tensor_parallel == 1:
            return InProcessLLM(lambda: LLMEngine.from_engine_args(EngineArgs(**arguments)))
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"vLLM does not start with policy.model {policy.model}: {error}") from error


def _room_for(config: Any, dtype: str, arguments: dict[str, Any]) -> int:
    """Bytes of a KV cache that holds every sequence at its longest, within bounds."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = 2 * text.num_hidden_layers * heads * width * (4 if dtype == "float32" else 2)
    return cpu_cache_bytes(token, longest=arguments["max_model_len"], rows=arguments["max_num_seqs"])

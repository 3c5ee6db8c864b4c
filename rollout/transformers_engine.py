"""The engine that generates with transformers, and captures attention in the same pass.

Everything that touches the model runs in a worker thread under one lock, so that an actor's event loop stays free.
"""

import asyncio
from collections.abc import Sequence

import torch
from torch import Tensor

from rollout.capture_probe import verify_capture
from rollout.engine import AttentionRows, Completion, Family, GenerationRequest, KeySets, Recomputed
from rollout.generation import attention_rows, chunk_rows, draw_uniforms, generate_batch, key_masks
from rollout.policy_runner import PaddingSide, Runner, pad_prompts
from rollout.refusals import RequestRefused, check_fits, check_keys
from rollout.sampling import check_sampling
from rollout.weight_loading import lay_out_for_decoding, take_weights
from services.attention.capture import CAPTURE, attach, reduce_rows, register
from services.attention.config import CaptureSection, resolve_capture
from services.attention.modules import find_modules
from services.models import decoder_start_of, eos_ids_of, family_of, load_policy_model, max_context_of
from services.models_config import PolicySection
from services.records import PolicyVersion
from services.transfer.offer import name_of


class TransformersEngine:
    """Implements `rollout.engine.Engine` for decoder-only and encoder-decoder models that transformers loads.

    `threads` is the number of CPU threads of a forward, `max_batch_rows` the most samples decoded side by side;
    `device` is a torch device. Raises UserError where the policy cannot be loaded or its attention not captured.
    """

    def __init__(
        self,
        policy: PolicySection,
        capture: CaptureSection,
        *,
        threads: int = 1,
        max_batch_rows: int = 64,
        padding_side: PaddingSide = "left",
        device: str = "cpu",
        recompute_chunk: int = 256,
    ) -> None:
        torch.set_num_threads(threads)
        register()
        model = load_policy_model(policy, attention=CAPTURE).to(torch.device(device))  # pyright: ignore[reportArgumentType]
        model.requires_grad_(False)
        if model.device.type == "cpu":
            lay_out_for_decoding(model)
        self.family: Family = family_of(model.config)
        start = decoder_start_of(model) if self.family == "encoder-decoder" else None
        found = find_modules(model, self.family, start)
        captured = resolve_capture(capture, len(found.modules), found.heads)
        recorder = attach([found.modules[layer] for layer in captured.layers], captured, model.device)
        self._runner = Runner(
            model,
            self.family,
            recorder,
            layers=len(found.modules),
            decoder_start=start,
            padding_side=padding_side,
        )
        verify_capture(self._runner, captured)
        self.layers: tuple[int, ...] = captured.layers
        self.eos_ids: tuple[int, ...] = eos_ids_of(model)
        self.max_context: int | None = max_context_of(model.config)
        self._threads = threads
        self._max_batch_rows = max_batch_rows
        self._recompute_chunk = recompute_chunk
        self._version = PolicyVersion(0, 0)
        self._torn: str | None = None
        self._lock = asyncio.Lock()

    @property
    def version(self) -> PolicyVersion:
        return self._version

    @property
    def capture_s(self) -> float:
        return self._runner.recorder.time.seconds

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        """Completions of each request, in order.

        Raises RequestRefused for a request that cannot be: an empty prompt, positions outside it, sampling out of
        bounds, or more tokens than the model has positions for.
        """
        for request in requests:
            check_sampling(request.sampling)
            check_fits(self.family, self.max_context, request.prompt_ids, request.sampling.max_tokens)
            check_keys(request.keys, len(request.prompt_ids))
        async with self._lock:
            return await asyncio.to_thread(self._generate, requests)

    async def recompute(
        self,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        keys: KeySets,
        *,
        temperature: float,
        dense: bool = False,
    ) -> Recomputed:
        """A known response under the present weights. Raises RequestRefused as `generate` does."""
        if not response_ids:
            raise RequestRefused("a response to recompute has at least one token")
        if temperature < 0:
            raise RequestRefused(f"temperature is 0 (greedy) or positive, got {temperature}")
        check_fits(self.family, self.max_context, prompt_ids, len(response_ids))
        check_keys(keys, len(prompt_ids))
        async with self._lock:
            return await asyncio.to_thread(self._recompute, prompt_ids, response_ids, keys, temperature or 1.0, dense)

    async def load_weights(self, published: str, owner: str = "") -> PolicyVersion:
        """Takes published weights: the manifest's, or those of an offer that lists `owner`.

        Raises services.weights.Corrupt, services.transfer.offer.Broken, or ValueError where they are not this model's;
        if one raised after the first tensor was replaced, the engine refuses to generate until it has a whole version.
        """
        async with self._lock:
            return await asyncio.to_thread(self._load_weights, published, owner)

    async def close(self) -> None:
        """Waits for what is under way."""
        async with self._lock:
            self._torn = "the engine is closed"

    def _generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        self._ready()
        uniforms = [draw_uniforms(request) for request in requests]
        answers: list[list[Completion]] = [[] for _ in requests]
        for rows in chunk_rows(requests, self._max_batch_rows):
            done = generate_batch(self._runner, requests, uniforms, rows, self.eos_ids, self._version)
            for row, completion in zip(rows, done, strict=True):
                answers[row.request].append(completion)
        return answers

    @torch.inference_mode()
    def _recompute(
        self, prompt_ids: Sequence[int], response_ids: Sequence[int], keys: KeySets, temperature: float, dense: bool
    ) -> Recomputed:
        self._ready()
        device = self._runner.device
        content, salient = key_masks([keys], pad_prompts([prompt_ids], "right", device), device)
        targets = torch.tensor(response_ids, device=device)
        logprobs: list[Tensor] = []
        statistics: list[Tensor] = []
        rows_kept: list[Tensor] = []
        for t, logits, rows in self._runner.teacher_force(prompt_ids, response_ids, self._recompute_chunk):
            chosen = targets[t : t + len(logits)].unsqueeze(-1)
            logprobs.append(torch.log_softmax(logits.float() / temperature, dim=-1).gather(-1, chosen).squeeze(-1))
            statistics.append(reduce_rows(rows.unsqueeze(0), content, salient)[0])
            if dense:
                rows_kept.append(rows)
        attention: AttentionRows = attention_rows(
            torch.cat(statistics).cpu().numpy(), torch.cat(rows_kept) if dense else None
        )
        return Recomputed(torch.cat(logprobs).cpu().numpy(), attention)

    def _load_weights(self, published: str, owner: str) -> PolicyVersion:
        def tearing() -> None:
            self._torn = f"loading {name_of(published)} failed halfway"

        self._version = take_weights(self._runner.model, published, owner, before_first=tearing)
        self._torn = None
        return self._version

    def _ready(self) -> None:
        if self._torn is not None:
            raise RuntimeError(f"the engine holds no policy: {self._torn}")
        torch.set_num_threads(self._threads)  # a thread of its own has a setting of its own

"""The engine protocol: what a rollout actor asks of whatever generates, be it transformers or vLLM.

An engine turns token ids into completions and, in the same pass, into the attention statistics of the specification. It
knows token ids and sets of key positions; it knows no prompts, groups, rewards or streams.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from services.records import FinishReason, PolicyVersion

Family = Literal["decoder", "encoder-decoder"]


@dataclass(frozen=True)
class KeySets:
    """Positions of the context, and the salience weights (aligned to `salient`, scaled to mean 1)."""

    content: tuple[int, ...]
    salient: tuple[int, ...]
    salient_weights: tuple[float, ...]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: softmax(logits / temperature), truncated to `top_k` (0: off), then to `top_p` (1: off).

    `temperature` 0 is greedy decoding; its `logprobs` are of the softmax at temperature 1.
    """

    samples: int = 1
    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and its N samples; `seed` seeds the generator that draws this request's tokens and no other's.

    The first `keep_maps` samples keep their dense rows.
    """

    prompt_ids: tuple[int, ...]
    keys: KeySets
    sampling: Sampling
    seed: int
    keep_maps: int = 0


@dataclass(frozen=True)
class AttentionRows:
    """Statistics of T rows: float32 arrays of shape [T]; `dense` is [T, P] where it was kept."""

    mass: NDArray[np.float32]
    salient_mass: NDArray[np.float32]
    neg_entropy_sum: NDArray[np.float32]
    peak: NDArray[np.float32]
    dense: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Completion:
    """One response of T tokens. `logprobs` [T]; `sampling_logprobs` [T] and `kept_ids` only where sampling truncates.

    `versions` are spans (incarnation, step, tokens) that add up to T.
    """

    response_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: NDArray[np.float32]
    sampling_logprobs: NDArray[np.float32] | None
    kept_ids: tuple[tuple[int, ...], ...] | None
    attention: AttentionRows
    versions: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Recomputed:
    """A response under the engine's present weights, in one teacher-forced pass: the oracle of every capture."""

    logprobs: NDArray[np.float32]
    attention: AttentionRows


class Engine(Protocol):
    family: Family
    layers: tuple[int, ...]
    """The captured decoder layers, counted from 0."""
    eos_ids: tuple[int, ...]
    max_context: int | None
    """Longest prompt plus response the model's positions allow; None where nothing bounds it."""

    @property
    def version(self) -> PolicyVersion: ...

    @property
    def capture_s(self) -> float:
        """Seconds that taking attention took so far; on a GPU, what the host spent on it."""
        ...

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        """Completions of each request, in order. A request's result does not depend on the others'."""
        ...

    async def load_weights(self, published: str, owner: str = "") -> PolicyVersion:
        """Takes published weights: the path of a manifest, or an offer (services/transfer) that lists `owner`.

        Of files every bucket's checksum is verified before the first tensor is replaced; of a transfer, each bucket's
        before its first. An engine that got only a part refuses to generate until it has a whole version.

        Raises:
            Corrupt, Broken, ValueError: it did not get them.
        """
        ...

    async def close(self) -> None: ...


class Oracle(Engine, Protocol):
    """An engine that also says what a known response's rows are: the reference of every capture."""

    async def recompute(
        self,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        keys: KeySets,
        *,
        temperature: float,
        dense: bool = False,
    ) -> Recomputed: ...

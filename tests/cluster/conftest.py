import math
from collections.abc import Sequence

import numpy as np
import pytest

from cluster.evaluate import EvaluationPrompt
from rollout.engine import AttentionRows, Completion, GenerationRequest, KeySets, Recomputed
from services.records import PolicyVersion


class BigramEngine:
    """A language model small enough to check by hand: next token by a table, attention by distance to the last token.

    Token 0 ends the sequence. `sharpness` is what another policy of the same kind differs in.
    """

    family = "decoder"
    layers = (0,)
    eos_ids = (0,)

    def __init__(self, sharpness: float = 1.0, *, max_context: int | None = None, mute: bool = False):
        self.max_context = max_context
        self.requests: list[GenerationRequest] = []
        rng = np.random.default_rng(3)
        self._logits = sharpness * rng.normal(size=(12, 12))
        self._sharpness = sharpness
        self._mute = mute

    @property
    def version(self) -> PolicyVersion:
        return PolicyVersion(1, 0)

    @property
    def capture_s(self) -> float:
        return 0.0

    def _log_probabilities(self, token: int, temperature: float) -> np.ndarray:
        logits = self._logits[token] / (temperature or 1.0)
        return logits - math.log(np.exp(logits).sum())

    def _rows(self, prompt_ids: Sequence[int], ids: Sequence[int], keys: KeySets) -> AttentionRows:
        statistics = []
        for t in range(len(ids)):
            distance = len(prompt_ids) - 1 + t - np.arange(len(prompt_ids) + t)
            weights = np.exp(-self._sharpness * np.abs(distance) / 4)
            row = (weights / weights.sum())[: len(prompt_ids)] * (0 if self._mute else 1)
            content = row[list(keys.content)]
            entropy = float(sum(a * math.log(a) for a in content if a > 0))
            salient = float(row[list(keys.salient)] @ np.asarray(keys.salient_weights))
            statistics.append((content.sum(), salient, entropy, content.max()))
        columns = np.asarray(statistics, dtype=np.float32).reshape(-1, 4).T
        return AttentionRows(*columns)

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        self.requests.extend(requests)
        return [self._answer(request) for request in requests]

    def _answer(self, request: GenerationRequest) -> list[Completion]:
        rng = np.random.default_rng(request.seed)
        sampling = request.sampling
        completions = []
        for _ in range(sampling.samples):
            ids: list[int] = []
            logprobs: list[float] = []
            while len(ids) < sampling.max_tokens and (not ids or ids[-1] != 0):
                table = self._log_probabilities((ids or request.prompt_ids)[-1], sampling.temperature)
                token = int(table.argmax() if sampling.temperature == 0 else rng.choice(len(table), p=np.exp(table)))
                ids.append(token)
                logprobs.append(float(table[token]))
            completions.append(
                Completion(
                    response_ids=tuple(ids),
                    finish_reason="stop" if ids[-1] == 0 else "length",
                    logprobs=np.asarray(logprobs, dtype=np.float32),
                    sampling_logprobs=None,
                    kept_ids=None,
                    attention=self._rows(request.prompt_ids, ids, request.keys),
                    versions=((1, 0, len(ids)),),
                )
            )
        return completions

    async def recompute(
        self,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        keys: KeySets,
        *,
        temperature: float,
        dense: bool = False,
    ) -> Recomputed:
        assert not dense
        before = [prompt_ids[-1], *response_ids[:-1]]
        logprobs = [self._log_probabilities(a, temperature)[b] for a, b in zip(before, response_ids, strict=True)]
        return Recomputed(np.asarray(logprobs, dtype=np.float32), self._rows(prompt_ids, response_ids, keys))

    async def load_weights(self, manifest_path: str) -> PolicyVersion:
        raise FileNotFoundError(manifest_path)

    async def close(self) -> None:
        return None


def as_text(ids: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in ids if i != 0)


@pytest.fixture
def prompts() -> list[EvaluationPrompt]:
    found = []
    for index in range(12):
        ids = tuple(1 + (index * 5 + j * (index + 3)) % 11 for j in range(3 + index % 4))
        reference = (1 + index % 11, 2, 0)
        found.append(
            EvaluationPrompt(
                prompt_id=f"p{index}",
                text=as_text(ids),
                prompt_ids=ids,
                keys=KeySets(tuple(range(len(ids))), (0,), (1.0,)),
                reference=as_text(reference),
                reference_ids=reference,
            )
        )
    return found


@pytest.fixture
def bigram():
    return BigramEngine


@pytest.fixture
def decode():
    return as_text

"""From logits to tokens: temperature, then top-k, then top-p, and the log-probabilities of what was drawn.

A token is drawn by inverting the distribution function at a uniform number of its own, so that a row's tokens depend on
its numbers and its logits alone, not on the rows beside it. Float64 where probabilities are summed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rollout.engine import Sampling
from rollout.refusals import RequestRefused


@dataclass(frozen=True)
class SamplingRows:
    """Sampling settings of B rows. `truncates` and `greedy` are [B] bool; the flags say whether any row does."""

    temperature: Tensor  # [B, 1] float32, 1 for greedy rows
    top_k: Tensor  # [B, 1] int64, the vocabulary's size or more: off
    top_p: Tensor  # [B, 1] float64
    greedy: Tensor
    truncates: Tensor
    any_greedy: bool
    any_truncates: bool

    def select(self, index: Tensor) -> "SamplingRows":
        greedy, truncates = self.greedy[index], self.truncates[index]
        return SamplingRows(
            self.temperature[index],
            self.top_k[index],
            self.top_p[index],
            greedy,
            truncates,
            bool(greedy.any()),
            bool(truncates.any()),
        )


@dataclass(frozen=True)
class Drawn:
    """B tokens: [B] ids, their log-probability under softmax(logits / temperature), and under the truncated
    distribution they were drawn from (the same number in a row that does not truncate). `kept` [B, V] says which ids
    that distribution holds; None where no row truncates."""

    tokens: Tensor
    logprobs: Tensor
    sampling_logprobs: Tensor
    kept: Tensor | None


def check_sampling(sampling: Sampling) -> None:
    """Raises RequestRefused naming the field that is out of bounds."""
    if sampling.samples < 1 or sampling.max_tokens < 1:
        raise RequestRefused(f"samples {sampling.samples} and max_tokens {sampling.max_tokens} are at least 1")
    if not (0.0 <= sampling.temperature < float("inf")):
        raise RequestRefused(f"temperature is 0 (greedy) or positive, got {sampling.temperature}")
    if not 0.0 < sampling.top_p <= 1.0:
        raise RequestRefused(f"top_p is in (0, 1], got {sampling.top_p}")
    if sampling.top_k < 0:
        raise RequestRefused(f"top_k is 0 (off) or positive, got {sampling.top_k}")


def truncates(sampling: Sampling) -> bool:
    """Whether tokens come from a truncated distribution; greedy decoding draws nothing, so it does not truncate."""
    return sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1.0)


def sampling_rows(rows: Sequence[Sampling], device: torch.device) -> SamplingRows:
    """The settings of each row as tensors."""
    greedy = torch.tensor([row.temperature == 0 for row in rows], device=device)
    cut = torch.tensor([truncates(row) for row in rows], device=device)
    off = torch.iinfo(torch.int64).max
    return SamplingRows(
        temperature=torch.tensor([[row.temperature or 1.0] for row in rows], dtype=torch.float32, device=device),
        top_k=torch.tensor([[row.top_k or off] for row in rows], dtype=torch.int64, device=device),
        top_p=torch.tensor([[row.top_p] for row in rows], dtype=torch.float64, device=device),
        greedy=greedy,
        truncates=cut,
        any_greedy=bool(greedy.any()),
        any_truncates=bool(cut.any()),
    )


def draw(logits: Tensor, uniforms: Tensor, rows: SamplingRows) -> Drawn:
    """One token a row, from logits [B, V] and float64 uniforms [B] in [0, 1).

    Raises ArithmeticError where a row's logits are not finite (-inf forbids an id, and may stand).
    """
    logprobs = torch.log_softmax(logits.float() / rows.temperature, dim=-1)
    probabilities = logprobs.double().exp_()
    kept: Tensor | None = None
    if rows.any_truncates:
        kept = keep(probabilities, rows.top_k, rows.top_p)
        kept |= ~rows.truncates.unsqueeze(-1)
        probabilities = probabilities.masked_fill(~kept, 0.0)
    cumulated = probabilities.cumsum(-1)
    total = cumulated[:, -1:]
    if not bool(torch.isfinite(total).all()):
        raise ArithmeticError("the policy gives logits that are not finite")
    # Strictly below the total: the first id whose sum exceeds it then has a probability of its own.
    threshold = torch.minimum(uniforms.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulated, threshold, right=True)
    if rows.any_greedy:
        tokens = torch.where(rows.greedy.unsqueeze(-1), logits.argmax(-1, keepdim=True), tokens)
    chosen = logprobs.gather(-1, tokens).squeeze(-1)
    sampled = chosen
    if kept is not None:
        sampled = torch.where(rows.truncates, (chosen.double() - total.squeeze(-1).log()).float(), chosen)
    return Drawn(tokens.squeeze(-1), chosen, sampled, kept)


def keep(probabilities: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Which ids survive, [B, V] bool: the top_k likeliest (ties: lower ids first), of which the smallest set whose
    share of their mass is at least top_p; always one at least."""
    ordered, ids = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[-1], device=ordered.device)
    ordered = ordered.masked_fill(rank >= top_k, 0.0)
    before = ordered.cumsum(-1) - ordered
    # top_p 1 keeps all, whatever the rounding of the sums says.
    within = (before < top_p * ordered.sum(-1, keepdim=True)) | (top_p >= 1.0)
    surviving = within & (rank < top_k)
    surviving[:, 0] = True
    return torch.zeros_like(surviving).scatter(-1, ids, surviving)

"""The learner's model: a language model with a value function, one forward for log-probabilities, entropy and values.

Signatures are stable; the body follows.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelInput:
    """A right-padded micro-batch of B samples, P prompt and T response tokens at most.

    input_ids, attention_mask  int64 [B, L]   decoder: prompt and response (L = max P+T); encoder-decoder: the prompt
    decoder_input_ids          int64 [B, T+1] encoder-decoder: decoder start, then the response; None for a decoder
    rows                       int64 [B, T+1] where, in the (decoder's) sequence, the query stands that predicts y_t;
                                              entry T_i is the query after the last token; beyond it 0
    response_ids               int64 [B, T]   0 where padded
    response_mask              bool  [B, T]   tokens that exist
    kept_ids                   int64 [B, T, K] or None: the ids that truncated sampling kept, filled with -1;
                                              a row of -1 alone stands for the whole vocabulary
    """

    input_ids: Tensor
    attention_mask: Tensor
    decoder_input_ids: Tensor | None
    rows: Tensor
    response_ids: Tensor
    response_mask: Tensor
    kept_ids: Tensor | None = None

    def to(self, device: torch.device | str) -> "ModelInput":
        raise NotImplementedError


@dataclass(frozen=True)
class PolicyOutput:
    """float32, 0 where padded.

    logprobs     [B, T]   log pi(y_t | x, y_<t) of softmax(logits / temperature), over the kept set where one is given
    entropy      [B, T]   of the same distribution, nats; None unless asked for
    values       [B, T]   V at the query that predicts y_t; V(x) is column 0; None without a value function
    next_values  [B]      V after the last token, for bootstrapping; None without a value function
    """

    logprobs: Tensor
    entropy: Tensor | None
    values: Tensor | None
    next_values: Tensor | None


class PolicyWithValue(nn.Module):
    """Parameters are named `lm.*`, `value_head.*` and, with a separate value function, `value_trunk.*`."""

    def __init__(
        self,
        lm: nn.Module,
        *,
        value: Literal["none", "shared", "separate"],
        value_hidden: int | None = None,
        value_lm: nn.Module | None = None,
    ) -> None:
        """`value_lm`: for `separate`, a second copy of the language model, whose trunk is taken (its head is dropped)."""
        super().__init__()
        raise NotImplementedError

    def forward(
        self, batch: ModelInput, temperature: float = 1.0, *, chunks: int = 1, need_entropy: bool = False
    ) -> PolicyOutput:
        """Kept sets are taken from `batch.kept_ids`. The head is called exactly `chunks` times (and again in backward)."""
        raise NotImplementedError


def verify_head(policy: PolicyWithValue) -> None:
    """UserError unless the chunked logits equal the model's own on a probe. Call it on every rank, before or after sharding."""
    raise NotImplementedError


def parameter_groups(policy: PolicyWithValue) -> dict[Literal["policy", "value"], list[tuple[str, Any]]]:
    """Named parameters by learning rate: `lm.*` (tied ones once), and the value function's."""
    raise NotImplementedError

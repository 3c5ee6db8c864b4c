"""The learner's model: a language model with a value function; one forward gives log-probabilities, entropy and values.

Held here (design, "The learner's model"; invariant 7):

1. The policy is softmax(logits / temperature), not truncated. Where sampling truncated and the recipe replays it, the
   same distribution restricted to the kept ids and renormalised.
2. A parameter is touched only inside the forward of the module that owns it, and the head is called as a module exactly
   `chunks` times (once more each in the backward pass, where its logits are recomputed): ZeRO-3 gathers parameters in
   module hooks, collectively, so ranks must make the same calls.
3. float32 logits exist for one chunk at a time, never for all tokens.
4. The value of row t is read at the hidden state of the query that predicts y_t; V(x) is row 0.
5. Nothing is random: dropout is off in training too, so that the ratio of unchanged weights is 1.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from services.errors import UserError
from services.models import decoder_start_of

ValueKind = Literal["none", "shared", "separate", "from_reward_model"]
OWN_TRUNK: tuple[ValueKind, ...] = ("separate", "from_reward_model")
"""Value functions that read a trunk of their own, not the policy's."""


@dataclass(frozen=True)
class ModelInput:
    """A right-padded micro-batch of B samples, at most P prompt and T response tokens.

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
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)


Entropy = Literal["figure", "gradient"] | None
"""What is wanted of the entropy of each token's distribution: its value alone, or with the gradient through it."""


@dataclass(frozen=True)
class PolicyOutput:
    """float32, 0 where padded.

    logprobs     [B, T]   log pi(y_t | x, y_<t) of softmax(logits / temperature), over the kept set where one is given
    entropy      [B, T]   of the same distribution, nats; None unless asked for; without a gradient, as a figure
    values       [B, T]   V at the query that predicts y_t; V(x) is column 0; None without a value function
    next_values  [B]      V after the last token, for bootstrapping; None without a value function
    """

    logprobs: Tensor
    entropy: Tensor | None
    values: Tensor | None
    next_values: Tensor | None


@dataclass(frozen=True)
class HeadRule:
    """What a model does around its head: logits = cap(head(hidden * scale_in) * scale_out + bias).

    `softcap` c: cap(z) = c tanh(z / c) (Gemma 2, arXiv 2408.00118); `bias`: BART's buffer `final_logits_bias`;
    `scale_in`: T5's d_model^-1/2 (not in T5 1.1); `scale_out`: Cohere's `logit_scale`, Granite's 1/`logits_scaling`.
    """

    scale_in: float = 1.0
    scale_out: float = 1.0
    softcap: float | None = None
    bias: bool = False


class ValueHead(nn.Module):
    """A small feed-forward network, hidden state [..., d] -> value [...]. Its last layer starts at 0, so V does."""

    def __init__(self, size: int, width: int, seed: int) -> None:
        super().__init__()
        self.up = nn.Linear(size, width)
        self.down = nn.Linear(width, 1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.up.weight.copy_(torch.randn(width, size, generator=generator) * size**-0.5)
            self.up.bias.zero_()
            self.down.weight.zero_()
            self.down.bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        inner = torch.tanh(self.up(hidden.to(self.up.weight.dtype)))
        return _at_least_float32(self.down(inner)).squeeze(-1)


class ScoreHead(nn.Module):
    """A reward model's linear head, hidden state [..., d] -> value [...]: V starts as the reward model's score."""

    def __init__(self, score: nn.Linear) -> None:
        super().__init__()
        self.score = score

    def forward(self, hidden: Tensor) -> Tensor:
        return _at_least_float32(self.score(hidden.to(self.score.weight.dtype))).squeeze(-1)


class PolicyWithValue(nn.Module):
    """Parameters are named `lm.*`, `value_head.*` and, with a value function of its own trunk, `value_trunk.*`."""

    def __init__(
        self,
        lm: nn.Module,
        *,
        value: ValueKind,
        value_hidden: int | None = None,
        value_lm: nn.Module | None = None,
        value_score: nn.Linear | None = None,
        seed: int = 0,
    ) -> None:
        """`lm`: a transformers model with a language-model head, decoder-only or encoder-decoder.

        `value_lm`, for `separate`: a second copy of the model, of which the trunk is kept and the head dropped; for
        `from_reward_model`: a reward model of the policy's token ids, of any width, whose head is `value_score`.
        `seed`: of the value head's first layer.
        """
        super().__init__()
        self.lm = lm
        self.encoder_decoder = bool(_config(lm).is_encoder_decoder)
        self.rule = head_rule(lm)
        self.value = value
        if (value in OWN_TRUNK) != (value_lm is not None):
            raise ValueError(f"value_lm is for value={OWN_TRUNK} and needed there, got value={value!r}")
        if (value == "from_reward_model") != (value_score is not None):
            raise ValueError(f"value_score is for value='from_reward_model' and needed there, got value={value!r}")
        if value_lm is not None:
            if value == "separate":
                _drop_head(value_lm)
            self.value_trunk = value_lm
        if value_score is not None:
            self.value_head: nn.Module = ScoreHead(value_score)
        elif value != "none":
            size = int(_config(lm).hidden_size)
            self.value_head = ValueHead(size, value_hidden or size, seed)
        switch_off_dropout(self)

    def forward(
        self, batch: ModelInput, temperature: float = 1.0, *, chunks: int = 1, entropy: Entropy = None
    ) -> PolicyOutput:
        """Kept sets are taken from `batch.kept_ids`. The head is called exactly `chunks` times, and again in backward.

        `temperature` 0 (greedy decoding) means 1, as in the rollout's `logprobs`.
        """
        hidden = self._at_rows(self.lm, batch)
        logprobs, entropies = self._score(hidden[:, :-1], batch, temperature or 1.0, chunks, entropy)
        values = next_values = None
        if self.value != "none":
            hidden = self._at_rows(self.value_trunk, batch) if self.value in OWN_TRUNK else hidden
            every = self.value_head(hidden)
            values = every[:, :-1] * batch.response_mask
            next_values = every.gather(1, batch.response_mask.sum(1, keepdim=True)).squeeze(1)
        return PolicyOutput(logprobs, entropies, values, next_values)

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits, float32 [..., V], of hidden states [..., d]; one call of the head."""
        rule = self.rule
        head = _head(self.lm)
        logits = _at_least_float32(head(hidden * rule.scale_in if rule.scale_in != 1.0 else hidden))
        if rule.scale_out != 1.0:
            logits = logits * rule.scale_out
        if rule.bias:
            logits = logits + self.lm.get_buffer("final_logits_bias").to(logits.dtype)
        if rule.softcap is not None:
            logits = rule.softcap * torch.tanh(logits / rule.softcap)
        return logits

    def hidden_states(self, lm: nn.Module, batch: ModelInput) -> Tensor:
        """The last hidden states [B, L or T+1, d] of the decoder, as the head of `lm` would get them."""
        model: Any = lm
        if batch.decoder_input_ids is None:
            return model.base_model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state
        encoded = model.get_encoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        return model.get_decoder()(
            input_ids=batch.decoder_input_ids,
            encoder_hidden_states=encoded,
            encoder_attention_mask=batch.attention_mask,
            use_cache=False,
        ).last_hidden_state

    def _at_rows(self, lm: nn.Module, batch: ModelInput) -> Tensor:
        if (batch.decoder_input_ids is not None) != self.encoder_decoder:
            raise ValueError("decoder_input_ids are for an encoder-decoder, and needed there")
        hidden = self.hidden_states(lm, batch)
        index = batch.rows.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, index)  # [B, T+1, d]

    def _score(
        self, hidden: Tensor, batch: ModelInput, temperature: float, chunks: int, entropy: Entropy
    ) -> tuple[Tensor, Tensor | None]:
        mask = batch.response_mask
        count = int(mask.sum())
        size = max(1, -(-count // chunks))
        fill = (
            chunks * size - count
        )  # rows of zeros, so that every chunk has one: the head must be called `chunks` times
        rows = nn.functional.pad(hidden[mask], (0, 0, 0, fill))
        targets = nn.functional.pad(batch.response_ids[mask], (0, fill))
        kept = None
        if batch.kept_ids is not None:
            kept = nn.functional.pad(batch.kept_ids[mask], (0, 0, 0, fill), value=-1)
        scores: list[Tensor] = []
        for start in range(0, chunks * size, size):
            part = slice(start, start + size)
            arguments = (rows[part], targets[part], None if kept is None else kept[part], temperature, entropy)
            if torch.is_grad_enabled():
                # Nothing in a chunk draws random numbers, so there is no generator state to restore.
                scored = checkpoint(self._chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                scored = self._chunk(*arguments)
            scores.append(scored)  # pyright: ignore[reportArgumentType]
        flat = torch.cat(scores)[:count]  # [count, 1 or 2]
        padded = flat.new_zeros(*mask.shape, flat.shape[-1]).index_put(torch.nonzero(mask, as_tuple=True), flat)
        return padded[..., 0], padded[..., 1] if entropy else None

    def _chunk(
        self, hidden: Tensor, targets: Tensor, kept: Tensor | None, temperature: float, entropy: Entropy
    ) -> Tensor:
        logits = self.logits(hidden) / temperature
        chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        if kept is not None:
            logits = _restrict(logits, kept)
        total = torch.logsumexp(logits, dim=-1)
        if entropy is None:
            return (chosen - total).unsqueeze(-1)
        with torch.set_grad_enabled(entropy == "gradient" and torch.is_grad_enabled()):
            # H = log Z - E[logit]; 0 * -inf of a token outside the kept set is 0.
            probabilities = torch.exp(logits - total.unsqueeze(-1))
            mean = torch.where(probabilities > 0, logits, 0.0).mul(probabilities).sum(-1)
            entropies = total - mean
        return torch.stack([chosen - total, entropies], dim=-1)


def _restrict(logits: Tensor, kept: Tensor) -> Tensor:
    """-inf outside the kept ids [n, K] (filled with -1); rows that keep nothing are left whole."""
    inside = torch.zeros(logits.shape[0], logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    # -1 goes to a column beyond the vocabulary.
    inside = inside.scatter(1, torch.where(kept < 0, logits.shape[1], kept), True)[:, :-1]
    inside = inside | (kept < 0).all(1, keepdim=True)
    return logits.masked_fill(~inside, float("-inf"))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _config(lm: nn.Module) -> Any:
    return lm.config


def _head(lm: nn.Module) -> nn.Module:
    head = lm.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    if not isinstance(head, nn.Module):
        raise UserError(f"policy.model: {type(lm).__name__} has no language-model head that the learner can call")
    return head


def _drop_head(lm: nn.Module) -> None:
    head = _head(lm)
    name = next(name for name, module in lm.named_modules() if module is head)
    lm.set_submodule(name, nn.Identity())


def head_rule(lm: nn.Module) -> HeadRule:
    """Read from the configuration; `verify_head` holds it against the model's own logits."""
    config = _config(lm)
    scale_in = config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0
    scale_out = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    bias = any(name == "final_logits_bias" for name, _ in lm.named_buffers())
    return HeadRule(scale_in, scale_out, getattr(config, "final_logit_softcapping", None), bias)


def switch_off_dropout(module: nn.Module) -> None:
    """Sets every dropout rate (modules, and the attributes of transformers' layers) to 0."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name, value in vars(part).items():
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                setattr(part, name, 0.0)


def enable_gradient_checkpointing(policy: nn.Module) -> None:
    """Recomputes the trunks' layers in the backward pass (needs `policy.train()`)."""
    for lm in (getattr(policy, "lm", None), getattr(policy, "value_trunk", None)):
        if lm is not None:
            lm.gradient_checkpointing_enable({"use_reentrant": False})  # pyright: ignore[reportCallIssue]


def probe_of(policy: PolicyWithValue) -> ModelInput:
    """Two samples of different lengths, made of the vocabulary's first ids."""
    vocabulary = int(_config(policy.lm).vocab_size)
    ids = torch.arange(3, 3 + 14).reshape(2, 7) % vocabulary
    ones = torch.ones_like(ids)
    if not policy.encoder_decoder:
        rows = torch.tensor([[3, 4, 5, 6], [2, 3, 4, 0]])
        response = torch.stack([ids[0, 4:], ids[1, 3:6]])
        mask = torch.tensor([[True, True, True], [True, True, False]])
        ones[1, 5:] = 0
        return ModelInput(ids, ones, None, rows, response, mask)
    rows = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 0]])
    start = torch.full((2, 1), decoder_start_of(cast(PreTrainedModel, policy.lm)))
    response = ids[:, 2:5]
    ones[1, 5:] = 0
    mask = torch.tensor([[True, True, True], [True, True, False]])
    return ModelInput(ids, ones, torch.cat([start, response], 1), rows, response, mask)


@torch.no_grad()
def verify_head(policy: PolicyWithValue) -> None:
    """UserError unless the logits the learner builds equal the model's own on a probe.

    A model may scale, cap or shift its logits in its own forward; what `HeadRule` does not know is refused here rather
    than trained on. Run it on every rank, before or after sharding: it makes the same calls everywhere.
    """
    lm: Any = policy.lm
    batch = probe_of(policy).to(next(policy.parameters()).device)
    extra = {} if batch.decoder_input_ids is None else {"decoder_input_ids": batch.decoder_input_ids}
    own = _at_least_float32(
        lm(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **extra).logits
    )
    ours = policy.logits(policy.hidden_states(policy.lm, batch))
    seen = batch.attention_mask.bool() if batch.decoder_input_ids is None else torch.ones_like(own[..., 0]).bool()
    error = (own - ours)[seen].abs().max().item()
    scale = own[seen].abs().max().item()
    precision = 1e-4 if next(policy.parameters()).dtype in (torch.float32, torch.float64) else 2e-2
    if not error <= precision * max(1.0, scale):
        raise UserError(
            f"policy.model: {type(lm).__name__} changes its logits in a way that the learner does not know "
            f"(largest difference {error:.3g}, largest logit {scale:.3g}); choose another model"
        )


def parameter_groups(policy: nn.Module) -> dict[Literal["policy", "value"], list[tuple[str, nn.Parameter]]]:
    """Named parameters that are trained, by learning rate: `lm.*` (tied ones once), and the value function's."""
    groups: dict[Literal["policy", "value"], list[tuple[str, nn.Parameter]]] = {"policy": [], "value": []}
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad:
            continue
        groups["policy" if name.startswith("lm.") else "value"].append((name, parameter))
    return groups

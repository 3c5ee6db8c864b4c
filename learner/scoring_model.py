"""A model that scores, as the engine trains it: a transformers classifier over the policy's trunk.

What is trained here is what serving runs, the classifier's own forward: the score of a sequence is read where
transformers reads it, at the last token that is no padding. An encoder-decoder is given the sequence on both sides, and
is read at the end-of-sequence token, which every input has once. Dropout is off.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedTokenizerBase

from learner.lora import adapt
from learner.policy import switch_off_dropout
from learner.reward_model_config import RewardModelSection
from services.errors import UserError
from services.models import family_of, load_config
from services.models_config import PolicySection
from services.scoring_format import STEP_LABELS

HEADS = {"decoder": "score", "encoder-decoder": "classification_head"}
"""The new part of the classifier: a linear layer in every decoder of transformers, two in its encoder-decoders."""


@dataclass(frozen=True)
class ScoringInput:
    """A right-padded micro-batch. `input_ids`, `attention_mask` int64 [N, L]; `step_ends` int64 [N, S], 0 where a
    response has fewer steps, or None for a model that scores sequences."""

    input_ids: Tensor
    attention_mask: Tensor
    step_ends: Tensor | None = None

    def to(self, device: torch.device | str) -> "ScoringInput":
        ends = None if self.step_ends is None else self.step_ends.to(device)
        return ScoringInput(self.input_ids.to(device), self.attention_mask.to(device), ends)


class ScoringModel(nn.Module):
    """`lm` is the classifier; its parameters are named `lm.*`."""

    encoder_decoder = False

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm
        switch_off_dropout(self)

    @property
    def pad_id(self) -> int:
        return int(self.lm.config.pad_token_id)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]

    def forward(self, batch: ScoringInput) -> Tensor:
        """float32: a logit a sequence [N], or logits of `STEP_LABELS` a step [N, S, 3]."""
        logits = self.lm(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits.float()
        if batch.step_ends is None:
            return logits.squeeze(-1)
        return logits.gather(1, batch.step_ends.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))


def start_scoring_model(
    policy: PolicySection,
    section: RewardModelSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    seed: int,
) -> ScoringModel:
    """What training starts from: the policy under a new head, and adapters where the section asks for them."""
    lm = start_classifier(policy, tokenizer, steps=section.shape == "steps", dtype=dtype, seed=seed)
    if section.lora.rank:
        adapt(lm, section.lora, head=next(name for name in HEADS.values() if hasattr(lm, name)))
    return ScoringModel(lm)


def start_classifier(
    section: PolicySection, tokenizer: PreTrainedTokenizerBase, *, steps: bool, dtype: torch.dtype, seed: int
) -> nn.Module:
    """The policy's trunk under a new head: one label, or `STEP_LABELS` a token.

    Raises UserError for a family or an architecture without such a classifier, and for weights that are not there.
    """
    config: Any = load_config(section)
    family = family_of(config)
    if steps and family != "decoder":
        raise UserError(
            f"policy.model: {section.model} is an encoder-decoder; reward_model.kind process labels steps, and starts "
            "from a decoder"
        )
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if padding is None:
        raise UserError(f"policy.tokenizer: {section.model} has neither a padding nor an end-of-sequence token")
    config.pad_token_id = padding
    config.num_labels = len(STEP_LABELS) if steps else 1
    if steps:
        config.id2label = dict(enumerate(STEP_LABELS))
        config.label2id = {name: place for place, name in enumerate(STEP_LABELS)}
    loader: Any = AutoModelForTokenClassification if steps else AutoModelForSequenceClassification
    torch.manual_seed(seed)
    try:
        model, info = loader.from_pretrained(
            section.model,
            config=config,
            revision=section.revision or "main",
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"policy.model: {section.model} cannot be made a model that scores: {error}") from error
    head = HEADS[family]
    if not isinstance(getattr(model, head, None), nn.Linear if family == "decoder" else nn.Module):
        raise UserError(f"policy.model: a {config.model_type} model has no {head} that training knows")
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(f"{head}."))
    if missing:
        raise UserError(
            f"policy.model: {section.model} lacks {len(missing)} of the trunk's weights, first {missing[0]}"
        )
    return model.eval()

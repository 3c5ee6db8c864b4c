"""A value function that starts from a reward model: its trunk and its score head (as in arXiv 2009.01325).

The score head is of no use without its trunk: it reads hidden states that training has moved away from the policy's.
So the value function is a second trunk, as `value_function: separate`, and its head is the reward model's own linear
layer in place of the small network. Before the first update V after y_1 .. y_t is what the reward model scores the
prompt with y_1 .. y_t, and what it scores a finished response is V after its last token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from services.errors import UserError
from services.models import family_of, load_config, load_tokenizer, max_context_of
from services.models_config import PolicySection
from services.scoring_format import read_format

KINDS = ("preference", "absolute")
"""Kinds of reward models that score what a policy sees; the others read principles, or label steps."""


@dataclass(frozen=True)
class ValueModel:
    """`lm`: a transformers model without its score head; `score` [1, hidden size] is that head."""

    lm: nn.Module
    score: nn.Linear


def load_value_model(directory: str, policy: PolicySection, *, dtype: torch.dtype) -> ValueModel:
    """The reward model of `learner.value_model`, on the CPU. It must read the policy's token ids.

    Raises UserError: no directory of `attune reward-model`, one of another kind, without a score head of its trunk's
    width, of another tokenizer than the policy's, or with fewer positions.
    """
    form = read_format(directory)
    if form is None:
        raise UserError(
            f"learner.value_model: {directory} is no directory of a model that scores: it has no scorer.json "
            "(attune reward-model writes one)"
        )
    if form.kind not in KINDS:
        raise UserError(
            f"learner.value_model: {directory} is of kind {form.kind}; a value function starts from one of "
            f"{', '.join(KINDS)}, which score what the policy sees"
        )
    loader: Any = AutoConfig
    try:
        config = loader.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"learner.value_model: {directory} has no configuration that can be loaded") from error
    _check_reads_the_policys_ids(directory, config, policy)
    loader = AutoModelForSequenceClassification
    try:
        model, info = loader.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # RuntimeError: a tensor of another shape
        raise UserError(f"learner.value_model: {directory} cannot be loaded as a model that scores: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"learner.value_model: {directory} lacks {len(missing)} of the model's weights, the first is {missing[0]}; "
            "without them the value function would start partly at random"
        )
    score: Any = getattr(model, "score", None)
    if not isinstance(score, nn.Linear) or score.out_features != 1:
        raise UserError(f"learner.value_model: {directory} has no linear score head with one output")
    model.score = nn.Identity()
    return ValueModel(model.eval(), score)


def _check_reads_the_policys_ids(directory: str, config: Any, policy: PolicySection) -> None:
    own = load_config(policy)
    for source, each in ((directory, config), (policy.model, own)):
        if family_of(each) != "decoder":
            raise UserError(
                f"learner.value_model: {source} is an encoder-decoder; a value function starts from a reward model of "
                "decoders only"
            )
    if load_tokenizer(PolicySection(model=directory)).get_vocab() != load_tokenizer(policy).get_vocab():
        raise UserError(
            f"learner.value_model: {directory} has another tokenizer than the policy {policy.model}; train the reward "
            "model from the policy, or from a model with its tokenizer"
        )
    sizes = (
        ("vocab_size", config.vocab_size, own.vocab_size),
        ("positions", max_context_of(config), max_context_of(own)),
    )
    for name, theirs, needed in sizes:
        if theirs is not None and needed is not None and theirs < needed:
            raise UserError(f"learner.value_model: {directory} has {name} {theirs}, the policy {policy.model} {needed}")

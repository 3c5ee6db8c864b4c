"""Loading a policy: its configuration, tokenizer and weights, and saying what is wrong with them.

Models load without code of their own (`trust_remote_code=False`, invariant 9). Everything that a user can get wrong
raises `UserError`: nothing at that path, not a language model, weights or a tokenizer missing.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from services.errors import UserError
from services.models_config import PolicySection

Family = Literal["decoder", "encoder-decoder"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_config(section: PolicySection) -> PreTrainedConfig:
    """The model's configuration. Raises UserError where there is none, or it is not of a language model."""
    try:
        loader: Any = AutoConfig
        config: PreTrainedConfig = loader.from_pretrained(
            section.model, revision=_revision(section), trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(_absent(section.model, "model", error)) from error
    _check_language_model(section, config)
    family = family_of(config)
    if section.family not in ("auto", family):
        raise UserError(f"policy.family: {section.family}, but {section.model} is of the family {family}")
    return config


def family_of(config: PreTrainedConfig) -> Family:
    return "encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "decoder"


def load_tokenizer(section: PolicySection) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, as it was saved. Raises UserError where there is none."""
    source = section.tokenizer or section.model
    loader: Any = AutoTokenizer
    try:
        # A tokenizer of its own has its own revisions.
        revision = _revision(section) if section.tokenizer is None else "main"
        tokenizer = loader.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(_absent(source, "tokenizer", error)) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or len(tokenizer) == 0:
        raise UserError(f"policy.tokenizer: {source} has no tokenizer")
    return tokenizer


def load_policy_model(
    section: PolicySection, *, attention: str = "sdpa", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The policy's language model on the CPU, in evaluation mode.

    `attention` is "sdpa", "eager" or a name registered with transformers' AttentionInterface; `dtype` None is the
    section's. Raises UserError where the weights are absent or incomplete (a missing head would be random).
    """
    config = load_config(section)
    loader: Any = AutoModelForSeq2SeqLM if family_of(config) == "encoder-decoder" else AutoModelForCausalLM
    try:
        model, info = loader.from_pretrained(
            section.model,
            config=config,
            revision=_revision(section),
            dtype=dtype or DTYPES[section.dtype],
            attn_implementation=attention,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(_absent(section.model, "weights", error)) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"policy.model: {section.model} lacks {len(missing)} of the model's weights, the first is {missing[0]}; "
            "without them the policy would be partly random"
        )
    return model.eval()


def eos_ids_of(model: PreTrainedModel) -> tuple[int, ...]:
    """The ids that end a response, of the generation configuration and of the model's, in rising order.

    Raises UserError where the model has none: its responses would never end.
    """
    return _eos_ids(getattr(model, "generation_config", None), model.config)


def eos_ids_of_policy(policy: PolicySection) -> tuple[int, ...]:
    """`eos_ids_of` from the policy's configuration files alone, for engines that load the weights themselves."""
    try:
        loader: Any = GenerationConfig
        generation: GenerationConfig | None = loader.from_pretrained(policy.model, revision=policy.revision or "main")
    except OSError:  # a model without one: its own configuration says it
        generation = None
    return _eos_ids(generation, load_config(policy))


def _eos_ids(generation: GenerationConfig | None, config: PreTrainedConfig) -> tuple[int, ...]:
    found: set[int] = set()
    for value in (getattr(generation, "eos_token_id", None), getattr(config, "eos_token_id", None)):
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(int(v) for v in value)
    if not found:
        raise UserError("policy.model: its configuration has no eos_token_id, so no response would ever end")
    return tuple(sorted(found))


def max_context_of(config: PreTrainedConfig) -> int | None:
    """The number of positions of the model (of each side in an encoder-decoder); None where nothing bounds it."""
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def decoder_start_of(model: PreTrainedModel) -> int:
    """The id that starts an encoder-decoder's response. Raises UserError where its configuration has none."""
    generation: GenerationConfig | None = getattr(model, "generation_config", None)
    for source in (model.config, generation):
        value = getattr(source, "decoder_start_token_id", None)
        if isinstance(value, int):
            return value
    raise UserError("policy.model: its configuration has no decoder_start_token_id")


def _check_language_model(section: PolicySection, config: PreTrainedConfig) -> None:
    names: Any = (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        if family_of(config) == "encoder-decoder"
        else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    allowed: str | tuple[str, ...] | None = names.get(config.model_type)
    if allowed is None:
        raise UserError(
            f"policy.model: {section.model} is a {config.model_type} model; a policy is a "
            "causal or a sequence-to-sequence language model"
        )
    classes = {allowed} if isinstance(allowed, str) else set(allowed)
    saved: list[str] = list(getattr(config, "architectures", None) or [])
    if saved and not classes.intersection(saved):
        scores = saved[0].endswith("Classification")
        raise UserError(
            f"policy.model: {section.model} was saved as {saved[0]}, which is not a language model; "
            f"a {config.model_type} policy is a {' or '.join(sorted(classes))}"
            + (". A model that scores is a source of the reward, or a value function's start" if scores else "")
        )


def _revision(section: PolicySection) -> str:
    return section.revision or "main"


def _absent(source: str, what: str, error: Exception) -> str:
    key = "policy.tokenizer" if what == "tokenizer" else "policy.model"
    where = Path(source)
    if where.is_dir():
        said = str(error).strip().splitlines()
        return f"{key}: the directory {source} has no {what} that can be loaded ({said[0] if said else error!r})"
    if where.is_absolute() or source.startswith((".", "~")):
        return f"{key}: there is no directory {source}"
    return f"{key}: {source} is neither a directory here nor a {what} that the hub gives ({type(error).__name__})"

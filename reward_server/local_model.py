"""A model of this process: transformers, from safetensors, without code of the model's own. Needs torch.

Invariant (design, 4): a row's output does not depend on the rows it runs with. Rows are padded on the right, behind an
attention mask, and every output is read at the row's own positions.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from reward_server.runner import ModelFacts, ModelSpec, Output, Row
from services.errors import UserError
from services.models import DTYPES, max_context_of
from services.scoring_format import directory_revision, read_format

CLASSES: dict[str, Any] = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "likelihood": AutoModelForCausalLM,
    "choice": AutoModelForCausalLM,
}
SCALAR_HEADS = (
    "score",
    "value_head",
    "v_head",
    "v_head.summary",
    "reward_head",
    "regression_head",
    "value_head.summary",
)
"""Names of the head [1, hidden] that others save beside a causal trunk."""


class LocalModel:
    """A loaded model in evaluation mode. Raises UserError for what an operator can get wrong."""

    lanes = 1

    def __init__(self, spec: ModelSpec) -> None:
        if spec.task == "steps":
            spec = replace(spec, task="token" if saved_as(load_config(spec), "ForTokenClassification") else "sequence")
        self.spec = spec
        self.device = _device(spec)
        self.model: Any = _load(spec).eval()
        self.model.to(self.device)
        self._batched = spec.task != "sequence" or _pad_id(self.model.config) is not None
        self._keeps = "logits_to_keep" in signature(self.model.forward).parameters
        self.facts = ModelFacts(
            task=spec.task,
            revision=model_revision(spec, self.model.config),
            max_tokens=max_context_of(self.model.config),
            labels=_labels(self.model.config) if spec.task in ("sequence", "token") else (),
        )

    def living(self) -> int:
        return 1

    def run(self, rows: Sequence[Row]) -> list[Output]:
        if not self._batched:
            # transformers finds the last token by the padding's id: without one, rows run alone.
            return [self._forward([row])[0] for row in rows]
        return self._forward(rows) if rows else []

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Row]) -> list[Output]:
        longest = max(len(row.ids) for row in rows)
        filler = _pad_id(self.model.config) or 0
        ids = torch.full((len(rows), longest), filler, dtype=torch.long)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)] = torch.tensor(row.ids, dtype=torch.long)
            mask[i, : len(row.ids)] = 1
        given: dict[str, Any] = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        if self.spec.task in ("likelihood", "choice"):
            given["use_cache"] = False
        if self.spec.task == "sequence":
            logits = self.model(**given).logits.float().cpu()
            return [[vector] for vector in logits.tolist()]
        if self.spec.task == "token":
            logits = self.model(**given).logits.float().cpu()
            return [logits[i, list(row.at)].tolist() for i, row in enumerate(rows)]
        # Only the positions that predict what is asked for: a vocabulary of logits a token would fill the memory.
        first = min(min(row.at) - 1 if row.at else len(row.ids) - 1 for row in rows)
        if self._keeps:
            given["logits_to_keep"] = longest - first
        logits = self.model(**given).logits
        shift = first if self._keeps else 0
        return [_log_probs(logits[i], row, shift) for i, row in enumerate(rows)]


def _log_probs(logits: torch.Tensor, row: Row, shift: int) -> Output:
    """`logits` [positions, vocabulary], of which the first belongs to position `shift`."""
    if row.choices:
        predicted = torch.log_softmax(logits[len(row.ids) - 1 - shift].float(), dim=-1)
        return [[float(predicted[choice]) for choice in row.choices]]
    at = torch.tensor(row.at, device=logits.device)
    predicted = torch.log_softmax(logits[at - 1 - shift].float(), dim=-1)
    targets = torch.tensor([row.ids[i] for i in row.at], device=logits.device)
    return [[float(log) for log in predicted.gather(1, targets[:, None])[:, 0]]]


def _device(spec: ModelSpec) -> str:
    if spec.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if spec.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"{spec.field}.device: {spec.device}, and this machine has no GPU that torch sees")
    return spec.device


def _load(spec: ModelSpec) -> PreTrainedModel:
    config = load_config(spec)
    loader = CLASSES[spec.task]
    if getattr(config, "is_encoder_decoder", False) and spec.task != "sequence":
        raise UserError(f"{spec.field}.model: {spec.model} is an encoder-decoder; this source needs a causal model")
    trunk = spec.task == "sequence" and not saved_as(config, "ForSequenceClassification")
    if trunk:
        config.num_labels = 1
    transformers_logging.disable_progress_bar()  # a bar in a server's log is no line
    try:
        model, info = loader.from_pretrained(
            spec.model,
            config=config,
            revision=spec.revision or "main",
            dtype=DTYPES[spec.dtype],
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        said = str(error).strip().splitlines()
        raise UserError(
            f"{spec.field}.model: {spec.model} has no weights of this kind in safetensors that can be loaded "
            f"({said[0] if said else error!r})"
        ) from error
    missing = set(info["missing_keys"])
    if trunk:
        missing -= _scalar_head(spec, model)
    if missing:
        raise UserError(
            f"{spec.field}.model: {spec.model} lacks {len(missing)} of the model's weights, the first is "
            f"{min(missing)}; without them its scores would be partly random"
        )
    return model


def load_config(spec: ModelSpec) -> PreTrainedConfig:
    loader: Any = AutoConfig
    try:
        return loader.from_pretrained(spec.model, revision=spec.revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        here = Path(spec.model)
        absent = here.is_absolute() or spec.model.startswith((".", "~"))
        why = "there is no such directory" if absent and not here.is_dir() else type(error).__name__
        raise UserError(f"{spec.field}.model: {spec.model} is no model that can be loaded ({why})") from error


def saved_as(config: PreTrainedConfig, ending: str) -> bool:
    """Whether the model was saved as a class of this kind: `ForSequenceClassification`, `ForTokenClassification`."""
    saved: list[str] = list(getattr(config, "architectures", None) or [])
    return bool(saved) and saved[0].endswith(ending)


def _scalar_head(spec: ModelSpec, model: Any) -> set[str]:
    """Puts the scalar head of a causal trunk's directory into `score`; the names of what is no longer missing."""
    root = Path(spec.model)
    head: Any = getattr(model, "score", None)
    if not root.is_dir() or not isinstance(head, torch.nn.Linear):
        raise UserError(
            f"{spec.field}.model: {spec.model} was not saved as a model that classifies sequences; a causal trunk with "
            "a scalar head is loaded from a directory"
        )
    found = {name: root / file for file, names in _tensor_names(root).items() for name in names}
    for name in SCALAR_HEADS:
        if f"{name}.weight" not in found:
            continue
        weight = _tensor(found[f"{name}.weight"], f"{name}.weight")
        if tuple(weight.shape) != tuple(head.weight.shape):
            raise UserError(f"{spec.field}.model: {name}.weight of {spec.model} has the shape {tuple(weight.shape)}, "
                            f"a scalar head has {tuple(head.weight.shape)}")  # fmt: skip
        bias = _tensor(found[f"{name}.bias"], f"{name}.bias") if f"{name}.bias" in found else None
        scalar = torch.nn.Linear(head.in_features, 1, bias=bias is not None, dtype=head.weight.dtype)
        with torch.no_grad():
            scalar.weight.copy_(weight)
            if bias is not None:
                scalar.bias.copy_(bias)
        model.score = scalar
        return {"score.weight"}
    raise UserError(
        f"{spec.field}.model: {spec.model} has no scalar head; looked for {', '.join(SCALAR_HEADS)} (.weight)"
    )


def _tensor_names(root: Path) -> dict[str, list[str]]:
    """File -> names of its tensors, of a directory's safetensors."""
    names: dict[str, list[str]] = {}
    for path in sorted(root.glob("*.safetensors")):
        opened: Any = safe_open(path, framework="pt")
        with opened as file:
            names[path.name] = list(file.keys())
    return names


def _tensor(path: Path, name: str) -> torch.Tensor:
    opened: Any = safe_open(path, framework="pt")
    with opened as file:
        return file.get_tensor(name)


def _pad_id(config: Any) -> int | None:
    value = config.get_text_config().pad_token_id
    return value if isinstance(value, int) else None


def _labels(config: Any) -> tuple[str, ...]:
    return tuple(str(config.id2label[i]).lower() for i in range(config.num_labels))


def model_revision(spec: ModelSpec, config: Any) -> str:
    """Of a directory: the revision in scorer.json, else a digest of its files; of a hub model: its commit."""
    if Path(spec.model).is_dir():
        form = read_format(spec.model)
        return form.revision if form is not None and form.revision is not None else directory_revision(spec.model)
    commit = getattr(config, "_commit_hash", None)
    return str(commit or json.dumps([spec.model, spec.revision]))

"""`attune reward-model`: a model that scores, trained from the policy on labelled responses, on the learner's ranks.

OUT/  configuration, safetensors, tokenizer, scorer.json
OUT/training/  config.yaml (the recipe as resolved)  metrics.jsonl (an evaluation a line)  report.json
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from cluster.config import Config
from cluster.model_stage import refuse_existing, train_on_ranks
from cluster.recipe import save_resolved
from learner.reward_examples import encode_records, probes_of, with_paraphrases
from learner.reward_training import Data
from services.errors import UserError
from services.models import load_config, load_policy_model, load_tokenizer, max_context_of
from services.models_config import PolicySection
from services.scoring_format import ScorerFormat, write_format
from services.text.corpora.labelled import generate_labelled
from services.text.preference_data import Labelled, Shape, labelled_of, load_labelled, split_labelled


@dataclass(frozen=True)
class Prepared:
    """What the ranks train on, and `cut`: inputs whose conversation lost its beginning, to fit."""

    data: Data
    form: ScorerFormat
    cut: int


def train_reward_model(config: Config, out: Path, *, console: Console) -> dict[str, Any]:
    """Trains by the recipe's `reward_model` section, writes the model directory `out`, and returns its report.

    Raises:
        UserError: `out` is there already; no labelled data; a record that cannot be used.
    """
    refuse_existing(out)
    prepared = prepare(config)
    data, section = prepared.data, config.reward_model
    console.print(
        f"  {section.kind}: {len(data.train)} records, {len(data.held_out)} held out, on {config.learner.ranks} ranks",
        highlight=False,
    )
    if prepared.cut:
        console.print(
            f"  {prepared.cut} inputs are longer than the model takes: their prompts were cut", highlight=False
        )

    def finish(directory: Path, figures: Any) -> None:
        training = directory / "training"
        save_resolved(config, training / "config.yaml")
        report = {"kind": section.kind, "train": len(data.train), "held_out": len(data.held_out), **figures}
        (training / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        write_format(directory, prepared.form)

    arguments = (section.model_dump(mode="json"), data)
    return train_on_ranks(config, out, "reward_model", arguments, what="reward-model training", finish=finish)


def figures_line(report: Mapping[str, Any]) -> str:
    """The held-out figures of a report in one line."""
    names = ("loss", "accuracy", "rank_correlation", "calibration_error")
    known = [f"{name.replace('_', ' ')} {report[name]:.3f}" for name in names if report.get(name) is not None]
    if "probes" in report:
        known.append(f"{report['probes']['in_order']:.0%} of the probes in order")
    return "held-out " + ", ".join(known) if known else "nothing was held out"


def prepare(config: Config) -> Prepared:
    """Reads, splits and encodes the labelled data. UserError names the record, or the key, that is wrong."""
    section = config.reward_model
    if section.source is None:
        raise UserError("reward_model.source: is null; it names the labelled data (docs/reward-models.md)")
    tokenizer = load_tokenizer(config.policy)
    records = _read(config, section.source, section.limit)
    form = section.format(
        max_context_of(load_config(config.policy)), facts=any(record.asked.facts for record in records)
    )
    splits = split_labelled(records, section.held_out, config.data.seed)
    if not splits.train:
        raise UserError(f"reward_model.source: {section.source} leaves nothing to train on")
    cheap: Sequence[Labelled] = ()
    if section.pretrain.source is not None:
        held_out = {record.asked.turns for record in splits.held_out}
        cheap = _read(config, section.pretrain.source, section.pretrain.limit)
        cheap = [record for record in cheap if record.asked.turns not in held_out]

    def similarity(pairs: Sequence[tuple[str, str]]) -> list[float]:
        return embedding_similarity(config.policy, tokenizer, pairs)

    probes = probes_of(splits.held_out, section.probes, config.data.seed)
    parts = [
        encode_records(records, tokenizer, form, section)
        for records in (with_paraphrases(splits.train, section, similarity), cheap, splits.held_out, probes)
    ]
    data = Data(*(part.examples for part in parts))
    return Prepared(data, form, sum(part.cut for part in parts))


def _read(config: Config, source: str, limit: int | None) -> list[Labelled]:
    shape = cast(Shape, config.reward_model.shape)
    if source.startswith("generated:"):
        return [labelled_of(row, shape, source) for row in generate_labelled(source, config.data.seed)[:limit]]
    return load_labelled(source, shape, limit=limit)


def embedding_similarity(policy: PolicySection, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Cosines between the texts of each pair: means of the policy's last hidden states over a text's tokens."""
    import torch

    model: Any = load_policy_model(policy)

    @torch.no_grad()
    def embedding(text: str) -> Any:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0].float().mean(0)

    return [float(torch.cosine_similarity(embedding(a), embedding(b), dim=0)) for a, b in pairs]

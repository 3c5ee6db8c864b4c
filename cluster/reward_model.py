"""`attune reward-model`: a model that scores, trained from the policy on labelled responses, on the learner's ranks.

OUT/           configuration, safetensors, tokenizer, scorer.json
OUT/training/  config.yaml (the recipe as resolved)  metrics.jsonl (an evaluation a line)  report.json
OUT.training/  while it trains: checkpoints, the best weights so far, and what they are checkpoints of (started.json)
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from rich.console import Console

from cluster.config import Config
from cluster.files import write_atomically
from cluster.model_stage import refuse_existing, train_on_ranks
from cluster.recipe import save_resolved
from learner.commit import latest_committed, set_aside_after
from learner.reward_examples import encode_records, probes_of, with_paraphrases
from learner.reward_training import Data
from services.errors import UserError
from services.models import family_of, load_config, load_policy_model, load_tokenizer, max_context_of
from services.models_config import PolicySection
from services.scoring_format import ScorerFormat, directory_revision, write_format
from services.text.corpora.labelled import generate_labelled
from services.text.preference_data import Labelled, Shape, labelled_of, load_labelled, split_labelled


@dataclass(frozen=True)
class Prepared:
    """What the ranks train on, and `cut`: inputs whose conversation lost its beginning, to fit."""

    data: Data
    form: ScorerFormat
    cut: int


Resume = Literal["auto", "never"]


def train_reward_model(config: Config, out: Path, *, console: Console, resume: Resume = "auto") -> dict[str, Any]:
    """Trains by the recipe's `reward_model` section, writes the model directory `out`, and returns its report.

    `resume`: auto goes on from the last checkpoint of a training that did not come to its end; never begins anew.

    Raises:
        UserError: `out` is there already; no labelled data; a record that cannot be used; a checkpoint of another
            training.
    """
    refuse_existing(out)
    prepared = prepare(config)
    work = out.with_name(out.name + ".training")
    checkpoint = begin_or_go_on(work, started(config, prepared), resume, console)
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

    arguments = (section.model_dump(mode="json"), data, str(work.resolve()), checkpoint)
    report = train_on_ranks(
        config,
        out,
        "reward_model",
        arguments,
        what="an evaluation of reward-model training",
        finish=finish,
        progress=lambda: evaluated(work),
    )
    shutil.rmtree(work)
    return report


def evaluated(work: Path) -> int:
    """Bytes of the lines that evaluations have left: it changes with each."""
    lines = work / "metrics.jsonl"
    return lines.stat().st_size if lines.exists() else 0


def started(config: Config, prepared: Prepared) -> dict[str, Any]:
    """What decides how a training goes: one that goes on from a checkpoint must not change it. Plain values."""
    data = hashlib.blake2b(digest_size=16)
    for part in (prepared.data.train, prepared.data.pretrain, prepared.data.held_out, prepared.data.probes):
        for example in part:
            data.update(repr(example).encode())
        data.update(b"\0")
    model = config.policy.model
    return {
        "run.seed": config.run.seed,
        "policy": config.policy.model_dump(mode="json"),
        "policy.model's files": directory_revision(model) if Path(model).is_dir() else None,
        **{f"reward_model.{key}": value for key, value in config.reward_model.model_dump(mode="json").items()},
        **{f"learner.{key}": getattr(config.learner, key) for key in ("ranks", "dtype", "eps")},
        "the labelled data": data.hexdigest(),
    }


def begin_or_go_on(work: Path, this: Mapping[str, Any], resume: Resume, console: Console) -> str | None:
    """The checkpoint in `work` to go on from; None, and an empty `work`, to begin.

    UserError: it is of another training, or every checkpoint is damaged.
    """
    file = work / "started.json"
    if resume == "auto" and file.is_file():
        before: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        latest = latest_committed(work)
        for problem in latest.problems:
            console.print(f"  passed over: {problem}", highlight=False)
        if latest.commit is not None:
            changed = [key for key in this if before.get(key) != this[key]]
            if changed:
                raise UserError(
                    f"--resume auto: {work} is of a training with another {changed[0]} "
                    f"({before.get(changed[0])!r}, now {this[changed[0]]!r}); --resume never begins anew"
                )
            set_aside_after(work, latest.commit.step)  # left there, it would be kept in place of what follows
            console.print(f"  going on after {latest.commit.step} updates", highlight=False)
            return str(latest.commit.path.resolve())
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_atomically(file, json.dumps(this, indent=2) + "\n")
    return None


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
    model = load_config(config.policy)
    form = section.format(max_context_of(model), facts=any(record.asked.facts for record in records))
    end = model.eos_token_id if family_of(model) == "encoder-decoder" else None
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
        encode_records(records, tokenizer, form, section, end=end)
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

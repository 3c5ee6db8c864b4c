"""What a run knows of its prompts before it starts: the splits, and what the salience rule was fitted to."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from cluster.config import Config
from cluster.evaluation_config import NEED_REFERENCE
from cluster.files import read_jsonl, write_atomically
from cluster.run_dir import RunDir
from rollout.worker import build_renderer
from services.errors import UserError
from services.records import Prompt
from services.text.salience import Idf, fit_idf
from services.text.sources import Splits, load_prompts


@dataclass(frozen=True)
class TrainingData:
    splits: Splits
    idf: Idf | None

    @property
    def idf_text(self) -> str | None:
        """What salience.json holds, as it is handed to the rollout actors."""
        return None if self.idf is None else self.idf.to_json()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of the training prompts; every `start` event of the run has it."""
        return fingerprint_of(self.splits.train)


def load_training_data(config: Config, run: RunDir | None = None) -> TrainingData:
    """Loads the splits and fits the salience rule to the training prompts; salience.json keeps it for later readers.

    Raises:
        UserError: a source or a row that cannot be used, a training split without prompts, or one that is not the
            split that the run was started with; of a run, held-out prompts that its evaluations cannot use.
    """
    splits = load_prompts(config.data)
    if not splits.train:
        raise UserError(f"data.source {config.data.source!r}: the training split has no prompts")
    if run is not None:  # before anything of the run is written again by the wrong prompts
        _check_prompts(run, config.data.source, splits.train)
        _check_evaluation(config, splits)
    renderer = build_renderer(config.policy, config.data, config.rollout)
    if _uses_idf(config):
        idf = fit_idf(splits.train, renderer, config.salience)
    else:
        idf = None
        for prompt in splits.train:  # a prompt that is too long is met before the run starts, not in its middle
            renderer.render(prompt)
    data = TrainingData(splits, idf)
    if run is not None and data.idf_text is not None:
        write_atomically(run.salience, data.idf_text)
    return data


def fingerprint_of(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What group ids and lease order follow from, beside the seed: the prompts' ids, in their order."""
    ids = "\n".join(prompt.prompt_id for prompt in prompts)
    return {"count": len(prompts), "digest": blake2b(ids.encode(), digest_size=16).hexdigest()}


def _check_prompts(run: RunDir, source: str, prompts: Sequence[Prompt]) -> None:
    """Raises UserError where a start of the run had other prompts. Starts of older releases did not note theirs."""
    now = fingerprint_of(prompts)
    for event in read_jsonl(run.events):
        before = event.get("prompts") if event.get("event") == "start" else None
        if before is not None and before != now:
            raise UserError(
                f"data.source {source!r}: its training prompts are no longer those that the run in {run.path} was "
                f"started with ({before['count']} then, {now['count']} now; an edited, added, removed or moved row is "
                "enough); put the source back as it was to go on, or choose another run directory"
            )


def _check_evaluation(config: Config, splits: Splits) -> None:
    """Raises UserError where no evaluation of the run could have the figure that chooses the best policy."""
    section, source = config.evaluation, config.data.source
    if not section.every:
        return
    prompts = splits.named(section.split)[: section.prompts]
    if not prompts:
        raise UserError(
            f"evaluation.split {section.split!r}: data.source {source!r} leaves no prompts there, and evaluation.every "
            f"is {section.every}; set data.{section.split}_fraction, choose the other split, or set evaluation.every "
            "to 0"
        )
    if section.chooses_by.partition("/")[2] in NEED_REFERENCE and all(prompt.reference is None for prompt in prompts):
        raise UserError(
            f"evaluation.best_metric {section.best_metric!r}: needs a reference, and none of the {len(prompts)} "
            f"prompts of the {section.split} split has one; name their column in data.columns.response, or choose a "
            "metric that needs none"
        )


def _uses_idf(config: Config) -> bool:
    return config.salience.method == "idf" or config.salience.weights == "idf"

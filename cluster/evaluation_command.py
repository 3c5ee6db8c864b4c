"""`attune evaluate`, and the evaluations of the quickstart: in this process, without Ray."""

import asyncio
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from cluster.config import Config
from cluster.evaluate import EvaluationPrompt, evaluate, rescore
from cluster.evaluation_prompts import attention_options, evaluation_prompts
from cluster.evaluation_result import EvaluationResult, compare
from cluster.evaluation_table import comparison_table, summary_table
from cluster.training_data import load_training_data
from rollout.engine import Oracle
from rollout.worker import build_oracle
from services.errors import UserError
from services.models import load_tokenizer
from services.models_config import PolicySection
from services.text.sources import SplitName


def measure(
    config: Config, engine: Oracle, prompts: list[EvaluationPrompt], *, label: str, console: Console
) -> EvaluationResult:
    """Evaluates an engine's policy by the recipe's evaluation section, with a progress bar."""
    tokenizer: Any = load_tokenizer(config.policy)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"evaluating {label}", total=None)
        return asyncio.run(
            evaluate(
                engine,
                prompts,
                config.evaluation,
                attention_options(config),
                max_tokens=config.rollout.max_tokens,
                decode=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
                label=label,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        )


def with_model(config: Config, model: Path) -> Config:
    """The recipe with another model directory; its tokenizer comes along where the recipe names none."""
    return config.model_copy(update={"policy": config.policy.model_copy(update={"model": str(model)})})


def evaluate_models(
    config: Config, *, model: Path | None, baseline: Path | None, split: SplitName, console: Console
) -> dict[str, Any]:
    """Prints the figures of a model and returns them; with a baseline, the paired comparison under both attentions.

    Raises:
        UserError: a model that is not there, or a split without prompts.
    """
    config = config if model is None else with_model(config, model)
    section = config.evaluation.model_copy(update={"split": split})
    config = config.model_copy(update={"evaluation": section})
    if baseline is not None:
        _check_vocabularies(config.policy, with_model(config, baseline).policy)
    data = load_training_data(config)
    prompts = evaluation_prompts(config, data, split, config.evaluation.prompts)
    after = measure(config, _engine(config), prompts, label=config.policy.model, console=console)
    console.print(summary_table(after))
    figures: dict[str, Any] = {
        "model": config.policy.model,
        "split": split,
        "figures": after.model_dump(mode="json")["figures"],
    }
    if baseline is not None:
        start = with_model(config, baseline)
        engine = _engine(start)
        before = measure(start, engine, prompts, label=str(baseline), console=console)
        rescored = asyncio.run(rescore(engine, after))
        console.print(comparison_table(before, after, rescored))
        figures |= comparison(before, after, rescored)
    return figures


def comparison(before: EvaluationResult, after: EvaluationResult, rescored: EvaluationResult) -> dict[str, Any]:
    """Before against after as plain values, under the current and under the starting policy's attention."""
    return {
        "changes": [change.model_dump(mode="json") for change in compare(before, after)],
        "changes_under_starting_attention": [change.model_dump(mode="json") for change in compare(before, rescored)],
        "rescored_figures": rescored.model_dump(mode="json")["figures"],
    }


def _check_vocabularies(model: PolicySection, baseline: PolicySection) -> None:
    """Raises UserError where one's token ids are not the other's: prompts and responses are given as ids to both."""
    if load_tokenizer(model).get_vocab() != load_tokenizer(baseline).get_vocab():
        raise UserError(
            f"--baseline {baseline.model}: has another tokenizer than {model.model}, whose responses it would read as "
            "other words; evaluate each alone"
        )


def _engine(config: Config) -> Oracle:
    return build_oracle(config.policy, config.attention, config.rollout)

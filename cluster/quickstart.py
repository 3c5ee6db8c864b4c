"""`attune quickstart`: data -> small policy -> fine-tuning -> RL through the whole service -> evaluation -> a table.

Each stage leaves its result in the run directory and is passed over where that stands there already, so that a
quickstart that was stopped goes on when it is called again.
"""

import asyncio
import json
import shutil
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

from rich.console import Console

from cluster.config import Config
from cluster.driver import train
from cluster.evaluate import rescore
from cluster.evaluation_command import comparison, measure, with_model
from cluster.evaluation_prompts import evaluation_prompts
from cluster.evaluation_result import EvaluationResult, load_result
from cluster.evaluation_table import comparison_table
from cluster.files import write_atomically
from cluster.fine_tuning import fine_tune
from cluster.ray_runtime import ray_cluster
from cluster.recipe import apply_overrides, read_yaml, resolve
from cluster.small_model import build_small_policy
from cluster.training_data import load_training_data
from rollout.worker import build_oracle
from services.errors import UserError
from services.text.corpora.pairs import write_jsonl
from services.text.corpora.qa import generate_qa
from services.text.sources import load_prompts
from services.text.tokenizer import train_tokenizer

Family = Literal["decoder", "encoder-decoder"]
RECIPES = {"decoder": "cagsr-qa.yaml", "encoder-decoder": "cagsr-qa-t5.yaml"}
ENGINE_OVERRIDES = {
    "transformers": [],
    # One engine with both cores and one large batch, where the other engine has an actor a core.
    "vllm": ["rollout.actors=1", "rollout.threads=2", "rollout.max_batch_rows=128"],
}
QUESTIONS, TUNED = "data/questions.jsonl", "sft"
"""In the run directory: the data, and the policy that RL starts from."""
VOCABULARY = 4096
"""At most; the corpus gives some 1,600 tokens."""


def quickstart(run_dir: Path, *, steps: int | None, engine: str, family: str, console: Console) -> int:
    """Runs every stage that has not been run, prints the comparison and returns the exit code.

    Raises:
        UserError: an unknown family or engine.
    """
    if family not in RECIPES:
        raise UserError(f"--family {family}: allowed are {', '.join(RECIPES)}")
    if engine == "vllm" and family != "decoder":
        raise UserError(f"--engine vllm: captures decoder-only policies; --family {family} needs --engine transformers")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # its bars for models of a few MB say nothing
    began = time.monotonic()
    config = config_of(run_dir, steps=steps, engine=engine, family=cast(Family, family))
    tuned = run_dir / TUNED
    with ray_cluster(config.cluster):  # one cluster for both stages
        prepare(run_dir, config, cast(Family, family), console)
        prompts = evaluation_prompts(config, load_training_data(config), "test", config.evaluation.prompts)
        before = _evaluated(run_dir / "evaluation-before.json", config, tuned, prompts, "fine-tuned", console)
        console.print("[bold]Reinforcement learning[/bold] through the whole service ...", highlight=False)
        outcome = train(config, run_dir, resume="auto", console=console)
    if outcome.stopped:
        console.print(f"Stopped by {outcome.stopped}; call it again to go on.", highlight=False)
        return 4 if outcome.has_commit else 1
    after_file = run_dir / "evaluation-after.json"
    after = _evaluated(after_file, config, run_dir / "policy", prompts, "after RL", console)
    rescored = _rescored(run_dir / "evaluation-rescored.json", config, tuned, after, after_file)
    console.print(comparison_table(before, after, rescored))
    write_atomically(
        run_dir / "comparison.json", json.dumps(comparison(before, after, rescored), indent=1, allow_nan=False) + "\n"
    )
    console.print(
        f"Done in {time.monotonic() - began:.0f} s. Run directory: {run_dir}; the policy: {run_dir / 'policy'}",
        highlight=False,
    )
    return 0


def config_of(run_dir: Path, *, steps: int | None, engine: str, family: Family) -> Config:
    """The recipe that the quickstart in `run_dir` trains by."""
    recipe = find_recipe(RECIPES[family])
    overrides = [f"data.source={run_dir / QUESTIONS}", f"policy.model={run_dir / TUNED}", f"rollout.engine={engine}"]
    overrides += ENGINE_OVERRIDES[engine]
    overrides += [] if steps is None else [f"run.steps={steps}"]
    return resolve(apply_overrides(read_yaml(recipe), overrides), str(recipe))


def prepare(run_dir: Path, config: Config, family: Family, console: Console) -> None:
    """Questions, a small policy, and the same fine-tuned on them, each where it is not there yet. Needs Ray."""
    questions, base, tuned = run_dir / QUESTIONS, run_dir / "base", run_dir / TUNED

    def stage(name: str, result: Path, make: Callable[[Path], str]) -> None:
        if result.exists():
            console.print(f"[bold]{name}[/bold]: {result} is there already", highlight=False)
            return
        partial = result.with_name(result.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        started = time.monotonic()
        console.print(f"[bold]{name}[/bold] ...", highlight=False)
        done = make(partial)
        partial.rename(result)
        console.print(f"  {done} ({time.monotonic() - started:.0f} s)", highlight=False)

    questions.parent.mkdir(parents=True, exist_ok=True)
    stage("Generating questions and answers", questions, _generate)
    stage("Building a small policy", base, lambda out: _build(config, family, out))
    stage("Fine-tuning on the training questions", tuned, lambda out: _tune(config, base, out, console))


def find_recipe(name: str) -> Path:
    """A recipe of ours: beside the sources in a checkout, under share/attune of an installation.

    Raises:
        UserError: it is at neither place.
    """
    places = [
        Path(__file__).resolve().parent.parent / "recipes",
        Path(sysconfig.get_path("data")) / "share/attune/recipes",
    ]
    for place in places:
        if (place / name).exists():
            return place / name
    raise UserError(f"recipe {name}: not found in {' or '.join(str(place) for place in places)}")


def _generate(out: Path) -> str:
    return f"{write_jsonl(generate_qa(0), out)} pairs"


def _build(config: Config, family: Family, out: Path) -> str:
    texts = [
        text
        for prompt in load_prompts(config.data).train
        for text in (prompt.text, prompt.reference)
        if text is not None
    ]
    tokenizer = train_tokenizer(texts, VOCABULARY, family)
    parameters = build_small_policy(tokenizer, family, out, seed=config.run.seed)
    return f"{parameters / 1e6:.1f} million parameters, a vocabulary of {len(tokenizer)}"


def _tune(config: Config, base: Path, out: Path, console: Console) -> str:
    result = fine_tune(with_model(config, base), out, console=console)
    return f"validation loss {result.validation_loss:.3f} a token"


def _evaluated(
    file: Path, config: Config, model: Path, prompts: list[Any], label: str, console: Console
) -> EvaluationResult:
    if _stands(file, model):
        return load_result(file)
    console.print(f"[bold]Evaluating[/bold] {label} ...", highlight=False)
    own = with_model(config, model)
    result = measure(own, build_oracle(own.policy, own.attention, own.rollout), prompts, label=label, console=console)
    result.save(file)
    return result


def _stands(result: Path, made_from: Path) -> bool:
    """Whether a result is there and no older than what it was made from: training that went on makes a new policy."""
    return result.exists() and result.stat().st_mtime >= made_from.stat().st_mtime


def _rescored(file: Path, config: Config, start: Path, after: EvaluationResult, after_file: Path) -> EvaluationResult:
    if _stands(file, after_file):
        return load_result(file)
    own = with_model(config, start)
    result = asyncio.run(rescore(build_oracle(own.policy, own.attention, own.rollout), after))
    result.save(file)
    return result

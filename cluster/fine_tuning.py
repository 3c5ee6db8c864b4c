"""`attune sft`: the policy learns the reference responses, on the same ranks and engine as reinforcement learning."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.config import Config
from cluster.learners import learner_environment
from cluster.plan import nodes_of_ray, parts_of, place
from cluster.ray_runtime import ray_cluster, wait_all
from cluster.training_data import load_training_data
from learner.worker import LearnerWorker
from rollout.worker import build_renderer
from services.errors import UserError
from services.records import Prompt
from services.text.render import Renderer
from services.text.tokens import encode_response

Pair = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class FineTuned:
    """Losses in nats a response token, after the last epoch; `validation_loss` is NaN without validation pairs."""

    train_loss: float
    validation_loss: float


def fine_tune(config: Config, out: Path, *, console: Console) -> FineTuned:
    """Fine-tunes `policy.model` by the recipe's `sft` section and writes a model directory to `out`.

    Raises:
        UserError: `out` is there already, or no training prompt has a reference response.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: is there already and not empty; choose another")
    data = load_training_data(config)
    renderer = build_renderer(config.policy, config.data, config.rollout.max_tokens)
    train = pairs_of(data.splits.train, renderer)
    validation = pairs_of(data.splits.validation, renderer)
    if not train:
        raise UserError(f"data.source {config.data.source!r}: no training prompt has a reference response to learn")
    console.print(f"  {len(train)} pairs, {config.sft.epochs} epochs on {config.learner.ranks} ranks", highlight=False)
    reports = _on_ranks(config, train, validation, out)
    for report in reports:
        held_out = report["validation_loss"]
        console.print(
            f"  epoch {report['epoch'] + 1}: train loss {report['train_loss']:.3f}"
            + ("" if held_out is None else f", validation loss {held_out:.3f}"),
            highlight=False,
        )
    last = reports[-1]
    validation_loss = last["validation_loss"]
    return FineTuned(last["train_loss"], float("nan") if validation_loss is None else validation_loss)


def pairs_of(prompts: Sequence[Prompt], renderer: Renderer) -> list[Pair]:
    """(prompt ids, response ids) of the prompts that have a reference; a response ends with the end-of-sequence id."""
    return [
        (renderer.render(prompt).ids, encode_response(renderer.tokenizer, prompt.reference))
        for prompt in prompts
        if prompt.reference
    ]


def _on_ranks(config: Config, train: list[Pair], validation: list[Pair], out: Path) -> list[dict[str, Any]]:
    part = parts_of(config)["learner"]
    partial = out.with_name(out.name + ".writing")
    shutil.rmtree(partial, ignore_errors=True)
    tree = config.model_dump(mode="json")
    with ray_cluster(config.cluster) as ray:
        place([part], nodes_of_ray(ray.nodes()))
        options = {**part.options(), "runtime_env": {"env_vars": learner_environment(config)}, "max_restarts": 0}
        actor = ray.remote(LearnerWorker).options(**options)
        ranks = [actor.remote(tree, rank, part.count, str(out.parent)) for rank in range(part.count)]
        names = [f"learner-{rank}" for rank in range(part.count)]
        try:
            address, port = wait_all(
                ray,
                [ranks[0].address.remote()],
                seconds=config.cluster.start_s,
                what="the learner's address",
                who=names[:1],
            )[0]
            pairs = (ray.put(train), ray.put(validation))
            references = [
                rank.sft.remote(address, port, config.sft.model_dump(mode="json"), *pairs, str(partial.resolve()))
                for rank in ranks
            ]
            reports = wait_all(ray, references, seconds=config.cluster.step_s, what="fine-tuning", who=names)[0]
        finally:
            for rank in ranks:
                ray.kill(rank, no_restart=True)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return reports

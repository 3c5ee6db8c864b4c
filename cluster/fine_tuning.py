"""`attune sft`: the policy learns the reference responses, on the same ranks and engine as reinforcement learning."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from cluster.config import Config
from cluster.model_stage import refuse_existing, train_on_ranks
from cluster.training_data import load_training_data
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
    refuse_existing(out)
    data = load_training_data(config)
    renderer = build_renderer(config.policy, config.data, config.rollout)
    train = pairs_of(data.splits.train, renderer)
    validation = pairs_of(data.splits.validation, renderer)
    if not train:
        raise UserError(f"data.source {config.data.source!r}: no training prompt has a reference response to learn")
    console.print(f"  {len(train)} pairs, {config.sft.epochs} epochs on {config.learner.ranks} ranks", highlight=False)
    progress = out.with_name(f"{out.name}.progress").absolute()
    progress.parent.mkdir(parents=True, exist_ok=True)
    progress.write_bytes(b"")
    arguments = (config.sft.model_dump(mode="json"), train, validation, str(progress))
    try:
        reports = train_on_ranks(
            config,
            out,
            "sft",
            arguments,
            what="an update of fine-tuning, an evaluation or the model's files",
            progress=lambda: progress.stat().st_size,
        )
    finally:
        progress.unlink(missing_ok=True)
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

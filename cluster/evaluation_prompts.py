"""Held-out prompts, rendered for an evaluation as the rollout renders them for training."""

from collections.abc import Sequence

from cluster.config import Config
from cluster.evaluate import EvaluationPrompt
from cluster.training_data import TrainingData
from rollout.prepare import Preparation, prepare
from rollout.worker import build_renderer
from services.attention.options import AttentionOptions
from services.records import Prompt
from services.text.sources import SplitName
from services.text.tokens import encode_response


def evaluation_prompts(config: Config, data: TrainingData, split: SplitName, count: int) -> list[EvaluationPrompt]:
    """The first `count` prompts of a split; the references are encoded as fine-tuning teaches them.

    Raises:
        UserError: a prompt cannot be rendered.
    """
    preparation = Preparation(build_renderer(config.policy, config.data, config.rollout), config.salience, data.idf)
    prompts: Sequence[Prompt] = data.splits.named(split)[:count]
    result: list[EvaluationPrompt] = []
    for prompt in prompts:
        prepared = prepare(prompt, preparation)
        result.append(
            EvaluationPrompt(
                prompt_id=prompt.prompt_id,
                text=prepared.rendered.text,
                prompt_ids=prepared.rendered.ids,
                keys=prepared.keys,
                reference=prompt.reference,
                reference_ids=None
                if prompt.reference is None
                else encode_response(preparation.tokenizer, prompt.reference),
            )
        )
    return result


def attention_options(config: Config) -> AttentionOptions:
    """The options of the recipe's attention source; the specification's defaults where it has none."""
    for source in config.reward.sources.values():
        if source.kind == "attention":
            return source.resolved()
    return AttentionOptions()

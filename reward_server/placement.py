"""Which models a recipe's sources ask for. Pure: a plan of resources needs it before any model is loaded."""

from dataclasses import replace

from reward_server.config import RewardSection
from reward_server.model_sources_config import (
    JudgeSource,
    ModelSource,
    PerplexitySource,
    ProcessSource,
)
from reward_server.runner import ModelSpec, Task


def placed_models(section: RewardSection) -> dict[str, ModelSource | JudgeSource]:
    """The sources whose models a run places in actors, by name; a judge behind a URL has none here."""
    return {
        name: source
        for name, source in section.sources.items()
        if isinstance(source, ModelSource) or (isinstance(source, JudgeSource) and source.url is None)
    }


def model_spec(name: str, source: ModelSource | JudgeSource) -> ModelSpec:
    """The model that a source of this name asks for, and for what."""
    field = f"reward.sources.{name}"
    spec = ModelSpec(source.model, source.model_revision, _task(source), source.dtype, source.device, field)
    if isinstance(source, JudgeSource):
        return replace(spec, engine=source.engine, max_tokens=source.max_tokens, kv_cache_mib=source.kv_cache_mib)
    return spec


def _task(source: ModelSource | JudgeSource) -> Task:
    match source:
        case JudgeSource():
            return "choice"
        case ProcessSource():
            return "steps"
        case PerplexitySource():
            return "likelihood"
        case _:
            return "sequence"

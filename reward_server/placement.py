"""Which models a recipe's sources ask for. Pure: a plan of resources needs it before any model is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from reward_server.config import RewardSection
from reward_server.model_sources_config import (
    JudgeSource,
    ModelSource,
    PerplexitySource,
    ProcessSource,
)
from reward_server.runner import ModelSpec, Task
from services.errors import UserError


def placed_models(section: RewardSection) -> dict[str, ModelSource | JudgeSource]:
    """The sources whose models live in actors or processes of their own, by name; a judge behind a URL has none."""
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


def share_gpus(asked: Mapping[str, tuple[int, float]], visible: Sequence[str]) -> dict[str, list[str | None]]:
    """For each replica of each source, the GPUs that it sees (CUDA_VISIBLE_DEVICES); None: it is given none of its own.

    `asked`: replicas, and GPUs for each; a whole number takes GPUs that no other has, a share below 1 the first with
    room for it. Raises UserError where they do not suffice.
    """
    left = dict.fromkeys(visible, 1.0)
    given: dict[str, list[str | None]] = {name: [] for name in asked}
    for name, (replicas, gpus) in sorted(asked.items(), key=lambda one: -one[1][1]):
        for _ in range(replicas):
            if not gpus:
                given[name].append(None)
                continue
            share = min(gpus, 1.0)
            fitting = [gpu for gpu, room in left.items() if room >= share - 1e-9][: max(1, round(gpus))]
            if len(fitting) < round(max(gpus, 1)):
                raise UserError(
                    f"reward.sources.{name}.gpus: {gpus:g} for each of {replicas} replicas, and of the "
                    f"{len(visible)} GPUs that this process sees, {', '.join(visible) or 'none'}, too few are left"
                )
            for gpu in fitting:
                left[gpu] -= share
            given[name].append(",".join(fitting))
    return given

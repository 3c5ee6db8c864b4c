"""Source of the recipe -> its scorer. What a source needs is imported when it is built: the attention source alone
needs neither a model library nor the network."""

from collections.abc import Mapping

from reward_server.config import RewardSection, SourceSection
from reward_server.interventions import InterventionFile
from reward_server.model_sources_config import (
    ExternalSource,
    JudgeSource,
    PerplexitySource,
    ProcessSource,
    SequenceSource,
)
from reward_server.runner import ModelRunner
from reward_server.scorers.attention import attention_scorer
from reward_server.scorers.base import Scorer
from reward_server.scorers.external import external_scorer
from reward_server.scorers.judge import judge_scorer
from reward_server.scorers.perplexity import perplexity_scorer
from reward_server.scorers.process import process_scorer
from reward_server.scorers.sequence import sequence_scorer
from reward_server.scorers.symbolic import (
    exact_match_scorer,
    language_scorer,
    length_scorer,
    numeric_match_scorer,
    pattern_scorer,
    repetition_scorer,
)
from reward_server.sources_config import (
    AttentionSource,
    ExactMatchSource,
    LanguageSource,
    LengthSource,
    NumericMatchSource,
    PatternSource,
)


def build_scorers(
    section: RewardSection,
    *,
    runners: Mapping[str, ModelRunner] | None = None,
    interventions: InterventionFile | None = None,
    without: Mapping[str, Scorer] | None = None,
) -> dict[str, Scorer]:
    """The scorers of a recipe by the sources' names, but for those in `without`.

    `runners`: models of sources that live elsewhere, by the source's name. Raises UserError.
    """
    allowed = section.options_allowed()
    return {
        name: build_scorer(
            name,
            source,
            options_allowed=allowed,
            runner=(runners or {}).get(name),
            interventions=interventions,
        )
        for name, source in section.sources.items()
        if name not in (without or {})
    }


def build_scorer(
    name: str,
    source: SourceSection,
    *,
    options_allowed: bool,
    runner: ModelRunner | None = None,
    interventions: InterventionFile | None = None,
) -> Scorer:
    """The scorer of one source. Raises UserError for what an operator can get wrong."""
    match source:
        case AttentionSource():
            return attention_scorer(source, options_allowed=options_allowed)
        case LengthSource():
            return length_scorer(source)
        case ExactMatchSource():
            return exact_match_scorer(source)
        case NumericMatchSource():
            return numeric_match_scorer(source)
        case PatternSource():
            return pattern_scorer(source)
        case LanguageSource():
            return language_scorer(source)
        case SequenceSource():
            return sequence_scorer(name, source, interventions=interventions, runner=runner)
        case ProcessSource():
            return process_scorer(name, source, runner=runner)
        case PerplexitySource():
            return perplexity_scorer(name, source, runner=runner)
        case JudgeSource():
            return judge_scorer(name, source, runner=runner)
        case ExternalSource():
            return external_scorer(name, source)
        case _:
            return repetition_scorer(source)

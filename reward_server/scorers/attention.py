"""The `attention` source: statistics or dense rows of an item -> the attention reward of the specification.

`services.attention.reward` computes; this module reads the wire's forms and names what is missing.
"""

from reward_server.schema import AttentionRows, ErrorCode, Item
from reward_server.scorers.base import FunctionScorer, ItemFailure, Scored, ok, revision_of
from reward_server.sources_config import AttentionSource
from services.attention.failures import AttentionFailure
from services.attention.options import AttentionOptions
from services.attention.reward import AttentionReward, score_rows, score_statistics

OPTIONS_IGNORED = "attention_options_ignored"
"""Flag of an item whose `attention_options` do not count, as the recipe does not allow them."""


def attention_scorer(source: AttentionSource, *, options_allowed: bool) -> FunctionScorer:
    """The scorer of an attention source. With `options_allowed`, an item's own options are laid over the recipe's."""
    recipe = source.resolved()

    def score(item: Item) -> Scored:
        given = {} if item.attention_options is None else item.attention_options.model_dump(exclude_none=True)
        options = (
            AttentionOptions.model_validate({**recipe.model_dump(), **given}) if given and options_allowed else recipe
        )
        reward, sent = _reward(item, options)
        scored = ok(
            reward.reward,
            {
                "coverage": reward.coverage,
                "focus": reward.focus,
                "repeat": reward.repeat,
                "spike": reward.spike,
                "mass_mean": reward.mass_mean,
                "peak_share": reward.peak_share,
                "entropy_q05": reward.entropy_q05,
                "rows_without_mass": reward.rows_without_mass,
            },
        )
        ignored = (OPTIONS_IGNORED,) if given and not options_allowed else ()
        return Scored(scored.component, (*sent, *reward.flags, *ignored))

    return FunctionScorer(revision_of(source), score)


def _reward(item: Item, options: AttentionOptions) -> tuple[AttentionReward, tuple[str, ...]]:
    """The reward, and the flags that came with the attention."""
    attention = item.attention
    if item.response_ids is None:
        raise ItemFailure(ErrorCode.MISSING_RESPONSE_IDS, "attention needs `response_ids`")
    if attention is None:
        raise ItemFailure(ErrorCode.MISSING_ATTENTION, "attention was asked for and the item has no `attention`")
    try:
        if isinstance(attention, AttentionRows):
            weights = attention.salient_weights
            reward = score_rows(
                attention.rows,
                attention.content,
                attention.salient,
                # A weight that is no number is refused by name, as invalid_weights.
                None if weights is None else [float("nan") if w is None else float(w) for w in weights],
                item.response_ids,
                item.eos_ids,
                options,
            )
            return reward, ()
        reward = score_statistics(
            attention.mass,
            attention.salient_mass,
            attention.neg_entropy_sum,
            attention.peak,
            attention.salient_count,
            attention.content_count,
            item.response_ids,
            item.eos_ids,
            options,
        )
        return reward, attention.flags
    except AttentionFailure as failure:
        raise ItemFailure(ErrorCode(failure.code), failure.message) from failure

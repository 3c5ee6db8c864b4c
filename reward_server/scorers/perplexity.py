"""The `perplexity` source: how surprised a frozen language model is by the response.

    value = -1/n * sum_t log p(y_t | prompt, y_<t)      nats a token, over the n tokens of the response's text

The prompt is written with the reference's own chat template; the end of sequence does not count. exp(value) is the
perplexity. Its default weight is -1: likely text is rewarded.
"""

import math

from reward_server.model_sources_config import PerplexitySource
from reward_server.runner import ModelRunner, Output, Row
from reward_server.schema import ErrorCode, Item
from reward_server.scorers.base import ItemFailure, Scored, Scorer, ok, prompt_turns, response_text, revision_of
from reward_server.scorers.models import Asked, ModelScorer, limited, load
from services.scoring_format import CHAT, Example, ScorerFormat, encode_continuation


def perplexity_scorer(name: str, source: PerplexitySource, *, runner: ModelRunner | None = None) -> Scorer:
    """Raises UserError for what is no causal language model."""
    loaded = load(name, source, runner)
    template = source.input_template or (CHAT if loaded.tokenizer.chat_template is not None else "{prompt}{response}")
    form = ScorerFormat(
        kind="preference",
        input_template=template,
        strip_bos=source.strip_bos is not False,
        max_tokens=2**31 - 1,
    )
    form = limited(name, loaded, form, source)

    def prepare(item: Item) -> Asked:
        example = Example(prompt_turns(item), response_text(item))
        encoded, start = loaded.encoded(encode_continuation, form, example)
        # Without a token before it, the first token of the response has no probability.
        at = tuple(range(max(start, 1), len(encoded.ids)))
        if not at:
            raise ItemFailure(ErrorCode.EMPTY_RESPONSE, "the response has no token with one before it")

        def finish(outputs: list[Output]) -> Scored:
            (logs,) = outputs[0]
            mean = -sum(logs) / len(logs)
            return ok(mean, {"tokens": len(logs), "perplexity": math.exp(min(mean, 700.0))})

        return Asked((Row(encoded.ids, at=at),), finish, encoded.flags)

    more = {"model": loaded.facts.revision, "format": form.model_dump(mode="json")}
    return ModelScorer(revision_of(source, **more), loaded.batcher, prepare)

"""OpenRLHF's `remote_rm_url`: {"query", "prompts", "labels"} -> {"rewards", "scores", "extra_logs"}.

The client decodes `query`, prompt and response in one, with special tokens, sends no headers of its own, tries five
times, a second apart, on any error, and then goes on without a reward. It may send empty lists.
"""

from collections.abc import Mapping, Sequence

from reward_server.adapters.common import Foreign, Label, Told, pair_item, without_end
from reward_server.answering import Format, Rewards
from reward_server.config import AdaptersSection
from reward_server.problems import field_problem, invalid
from reward_server.schema import Item, Many


class Request(Foreign):
    query: Many[str]
    prompts: Many[str]
    labels: Many[Label] | None = None


class Answer(Told):
    """Lists are aligned to `query`; `extra_logs` has the sources that every item has a value of."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


def items(request: Request, reading: AdaptersSection) -> Sequence[Item]:
    count = len(request.query)
    labels = request.labels or (None,) * count
    for name, values in (("prompts", request.prompts), ("labels", labels)):
        if len(values) != count:
            message = f"{len(values)} entries for {count} of query"
            raise invalid([field_problem((name,), message, "length_mismatch")])
    found: list[Item] = []
    for i, (query, prompt, label) in enumerate(zip(request.query, request.prompts, labels, strict=True)):
        # A tokenizer may put its first token's text before the prompt.
        _, contained, response = query.partition(prompt) if prompt else ("", "all", query)
        if not contained:
            raise invalid([field_problem(("query", i), f"does not contain prompts[{i}]", "value_error")])
        found.append(pair_item(i, prompt, without_end(response, reading), label))
    return found


def write(_: Request, rewards: Rewards, _query: Mapping[str, str]) -> Answer:
    names = [name for name in (rewards.components[0] if rewards.components else ()) if _in_all(name, rewards)]
    return Answer(
        rewards=list(rewards.values),
        scores=list(rewards.values),
        extra_logs={name: [values[name] for values in rewards.components] for name in names},
    )


def _in_all(name: str, rewards: Rewards) -> bool:
    return all(name in values for values in rewards.components)


REWARDS = Format(
    name="OpenRLHF",
    paths=("/openrlhf", "/get_reward"),
    request=Request,
    answer=Answer,
    summary="OpenRLHF: `remote_rm_url`.",
    items=items,
    write=write,
    place=lambda _, i: ("query", i),
)

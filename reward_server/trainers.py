"""What other trainers call to be rewarded by this server: a reward function for TRL, `compute_score` for verl.

Needs what the client needs. An item whose own data has no score is None to TRL, which leaves it out, and an exception
to verl, which knows nothing of the kind; an outage is an exception to both. Neither ever becomes a number.
"""

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from reward_server.client import SyncRewardClient
from reward_server.schema import Item, Message

URL = "ATTUNE_REWARD_URL"
TOKEN = "ATTUNE_REWARD_TOKEN"  # noqa: S105 - the variable's name
COLUMNS = ("reference", "facts", "principles", "prompt_class")
"""Columns of a TRL data set that go with the item, under these names."""

Chat = Sequence[dict[str, Any]]


class RewardFailed(Exception):  # noqa: N818
    """The item's own data has no score: its code and message."""


def trl_reward(
    client: SyncRewardClient,
    *,
    sources: Sequence[str] | None = None,
    eos_ids: Sequence[int] = (),
    reference: str = "reference",
    deadline_s: float = 300.0,
    name: str = "attune",
) -> Callable[..., list[float | None]]:
    """A function for `reward_funcs` of TRL's trainers, called as f(prompts=, completions=, completion_ids=, **columns).

    Prompts and completions are texts or chats. `reference`: the column that has the references. `eos_ids`: the
    policy's, for sources that count tokens. `deadline_s` is of a whole batch. `name` is what TRL's metrics call it.
    """

    def reward(
        prompts: Sequence[str | Chat],
        completions: Sequence[str | Chat],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        given = {"reference": columns.get(reference), **{key: columns.get(key) for key in COLUMNS[1:]}}
        items = [
            Item(
                id=str(i),
                prompt=prompt if isinstance(prompt, str) else None,
                messages=None if isinstance(prompt, str) else tuple(message(turn) for turn in prompt),
                response=completion if isinstance(completion, str) else "".join(text(turn) for turn in completion),
                response_ids=None if completion_ids is None else tuple(map(int, completion_ids[i])),
                eos_ids=tuple(eos_ids),
                **{key: plain(values[i]) for key, values in given.items() if values is not None},
            )
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        return [result.reward for result in client.settled(items, sources, deadline_s=deadline_s)]

    reward.__name__ = name
    return reward


def message(turn: dict[str, Any]) -> Message:
    return Message(role=str(turn["role"]), content=text(turn))


def text(turn: dict[str, Any]) -> str:
    """The text of a chat's turn, also where its content is a list of parts."""
    content: Any = turn["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


def plain(value: Any) -> Any:
    """A column's value as the item has it: a list as a tuple, a number as its text; the item refuses anything else."""
    if isinstance(value, list):
        return tuple(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def compute_score(
    data_source: str,  # noqa: ARG001 - verl's signature
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    **_: Any,
) -> float:
    """verl's `custom_reward_function`: the reward of one solution by the server at ATTUNE_REWARD_URL, with the key in
    ATTUNE_REWARD_TOKEN.

    `extra_info` may have `prompt` (a text or a chat), `facts`, `principles` and `prompt_class`. Raises RewardFailed
    where the item has no score, RewardUnavailable where the server does not answer.
    """
    extra = extra_info or {}
    prompt = extra.get("prompt")
    item = Item(
        id=str(extra.get("index", 0)),
        prompt=prompt if isinstance(prompt, str) else None,
        messages=None if prompt is None or isinstance(prompt, str) else tuple(message(turn) for turn in prompt),
        response=solution_str,
        reference=plain(ground_truth),
        **{key: plain(extra[key]) for key in COLUMNS[1:] if extra.get(key) is not None},
    )
    client = _client(os.environ.get(URL), os.environ.get(TOKEN))
    (result,) = client.settled([item], deadline_s=300.0)
    if result.reward is None:
        raise RewardFailed(f"{result.error.code.value}: {result.error.message}" if result.error else "no reward")
    return result.reward


@lru_cache(maxsize=8)
def _client(url: str | None, token: str | None) -> SyncRewardClient:
    if url is None:
        raise RuntimeError(f"set {URL} to the address of the reward server, for example http://127.0.0.1:8077")
    return SyncRewardClient(url, token)

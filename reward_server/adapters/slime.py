"""slime's `rm_url`: {"prompt", "response", "label"} -> a number; an object where the URL has `?reward_key=NAME`.

The client sends one sample at a time and tries ten times, with growing pauses, on any error.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Discriminator, Tag

from reward_server.adapters.common import MANY_TAG, ONE_TAG, Foreign, Label, one_or_many, pair_item, without_end
from reward_server.answering import Format, Rewards
from reward_server.config import AdaptersSection
from reward_server.schema import Item, Many, Message


class Turn(Foreign):
    role: str
    content: str


class Request(Foreign):
    prompt: Annotated[Annotated[str, Tag(ONE_TAG)] | Annotated[Many[Turn], Tag(MANY_TAG)], Discriminator(one_or_many)]
    response: str
    label: Label = None


def items(request: Request, reading: AdaptersSection) -> Sequence[Item]:
    response = without_end(request.response, reading)
    if isinstance(request.prompt, str):
        return [pair_item(0, request.prompt, response, request.label)]
    messages = tuple(Message(role=turn.role, content=turn.content) for turn in request.prompt)
    return [Item(id="0", messages=messages, response=response, reference=request.label)]


def write(_: Request, rewards: Rewards, query: Mapping[str, str]) -> float | dict[str, float]:
    (value,) = rewards.values
    return {**rewards.components[0], query["reward_key"]: value} if "reward_key" in query else value


REWARD = Format(
    name="slime",
    paths=("/slime",),
    request=Request,
    answer=float | dict[str, float],
    summary="slime: `rm_url`; with `?reward_key=NAME` an object that has it.",
    items=items,
    write=write,
    place=lambda _, __: ("response",),
)

"""NeMo Gym's `/verify` of a resources server: the request of a rollout with its response, in the form of OpenAI's
responses, -> the same with `reward` and `reward_components`. What else the request has comes back as it came.

The prompt is the text of the input's messages, the response the text of the output's messages; calls of tools and
reasoning are no text. `reference`, or `expected_answer` in its place, is what `exact_match` compares with.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, JsonValue, Tag

from reward_server.adapters.common import MANY_TAG, ONE_TAG, Told, one_or_many, without_end
from reward_server.answering import Format, Rewards
from reward_server.config import AdaptersSection
from reward_server.problems import Path, field_problem, invalid
from reward_server.schema import Item, Many, Message


class Open(BaseModel):
    """A part of the request: what is not read is kept, as it goes back with the answer."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)


class Part(Open):
    type: str
    text: str | None = None


class Entry(Open):
    """A message, or something else that the list has beside them."""

    type: str = "message"
    role: str | None = None
    content: (
        Annotated[Annotated[str, Tag(ONE_TAG)] | Annotated[Many[Part], Tag(MANY_TAG)], Discriminator(one_or_many)]
        | None
    ) = None

    def text(self) -> str:
        """The text of a message; empty for anything else."""
        if self.type != "message" or self.content is None:
            return ""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text or "" for part in self.content if part.type in ("input_text", "output_text", "text"))


class Parameters(Open):
    input: Annotated[Annotated[str, Tag(ONE_TAG)] | Annotated[Many[Entry], Tag(MANY_TAG)], Discriminator(one_or_many)]
    instructions: str | None = None


class Output(Open):
    output: Many[Entry]


class Request(Open):
    responses_create_params: Parameters
    response: Output
    reference: str | int | float | None = None
    expected_answer: str | int | float | None = None


class Answer(Told):
    model_config = ConfigDict(frozen=True, extra="allow")

    responses_create_params: JsonValue
    response: JsonValue
    reward: float
    reward_components: dict[str, float]


def items(request: Request, reading: AdaptersSection) -> Sequence[Item]:
    parameters = request.responses_create_params
    entries = (Entry(role="user", content=parameters.input),) if isinstance(parameters.input, str) else parameters.input
    messages = [Message(role=entry.role or "user", content=entry.text()) for entry in entries if entry.text()]
    if parameters.instructions:
        messages.insert(0, Message(role="system", content=parameters.instructions))
    if not messages:
        raise invalid([field_problem(("responses_create_params", "input"), "has no message with a text", "missing")])
    response = "\n".join(text for entry in request.response.output if (text := entry.text()))
    given = request.reference if request.reference is not None else request.expected_answer
    reference = None if given is None else str(given)
    return [Item(id="0", messages=tuple(messages), response=without_end(response, reading), reference=reference)]


def write(request: Request, rewards: Rewards, _query: Mapping[str, str]) -> dict[str, Any]:
    (value,) = rewards.values
    # As it came: a field that was not sent is not in the answer either.
    sent = request.model_dump(mode="json", exclude_unset=True)
    return {**sent, "reward": value, "reward_components": dict(rewards.components[0])}


def place(_: Request, __: int) -> Path:
    return ("response", "output")


VERIFY = Format(
    name="NeMo Gym",
    paths=("/verify",),
    request=Request,
    answer=Answer,
    summary="NeMo Gym: a resources server's verification.",
    items=items,
    write=write,
    place=place,
)

"""verl's reward loop: `/classify`, as vLLM has it, and `/v1/embeddings`, as SGLang has it; one text, prompt and
response rendered by the reward model's chat template. The client reads `data[-1].probs[-1]` or
`data[-1].embedding[-1]`, tries 5xx again, and gives up on any 4xx.
"""

import base64
import struct
from collections.abc import Mapping, Sequence
from typing import Literal

from reward_server.adapters.common import Foreign, Texts, Told, Usage, as_list, sigmoid, text_item
from reward_server.answering import Format, Rewards
from reward_server.config import AdaptersSection
from reward_server.problems import Path
from reward_server.schema import Item


class Request(Foreign):
    input: Texts
    model: str | None = None


class Answer(Told):
    object: Literal["list"] = "list"
    model: str | None
    usage: Usage = Usage()


class ClassifyRequest(Request):
    """`use_activation` (`activation` before vLLM 0.11.2) true: the sigmoid of the reward; else the reward."""

    use_activation: bool | None = None
    activation: bool | None = None
    truncate_prompt_tokens: None = None


class Class(Told):
    index: int
    label: str | None = None
    probs: list[float]
    num_classes: int = 1


class ClassifyAnswer(Answer):
    data: list[Class]


class EmbeddingsRequest(Request):
    """`encoding_format` base64: float32, little-endian, what OpenAI's client asks for by itself."""

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Literal[1] | None = None


class Embedding(Told):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsAnswer(Answer):
    data: list[Embedding]


def items(request: Request, reading: AdaptersSection) -> Sequence[Item]:
    return [text_item(i, text, reading) for i, text in enumerate(as_list(request.input))]


def place(request: Request, index: int) -> Path:
    return ("input",) if isinstance(request.input, str) else ("input", index)


def write_classes(request: ClassifyRequest, rewards: Rewards, _query: Mapping[str, str]) -> ClassifyAnswer:
    active = request.use_activation or request.activation
    data = [Class(index=i, probs=[sigmoid(value) if active else value]) for i, value in enumerate(rewards.values)]
    return ClassifyAnswer(model=request.model, data=data)


def write_embeddings(request: EmbeddingsRequest, rewards: Rewards, _query: Mapping[str, str]) -> EmbeddingsAnswer:
    def written(value: float) -> list[float] | str:
        if request.encoding_format == "float":
            return [value]
        return base64.b64encode(struct.pack("<f", value)).decode()

    data = [Embedding(index=i, embedding=written(value)) for i, value in enumerate(rewards.values)]
    return EmbeddingsAnswer(model=request.model, data=data)


CLASSIFY = Format(
    name="verl, vLLM",
    paths=("/classify",),
    request=ClassifyRequest,
    answer=ClassifyAnswer,
    summary="verl with a vLLM reward model; vLLM's classification: one class, whose score is the reward.",
    items=items,
    write=write_classes,
    place=place,
)
EMBEDDINGS = Format(
    name="verl, SGLang",
    paths=("/v1/embeddings",),
    request=EmbeddingsRequest,
    answer=EmbeddingsAnswer,
    summary="verl with an SGLang reward model: an embedding of one number, the reward.",
    items=items,
    write=write_embeddings,
    place=place,
)

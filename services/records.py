"""The typed records that cross a process boundary: prompts, leases, samples, groups, scores, published weights.

Imports nothing of ours. Every record is immutable, refuses unknown fields and carries no code: JSON and msgpack
encode it, `model_validate` reads it back (design, invariant 9).

Invariant 2 is enforced here: a `Score` is `ok` with a finite value or `failed` with a kind and a code, and nothing else
can be constructed.
"""

import math
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = 1

FailureKind = Literal["infra", "data"]
FinishReason = Literal["stop", "length"]
GroupState = Literal["pending", "leased", "generated", "scored", "consumed", "committed", "failed"]


class PolicyVersion(NamedTuple):
    """(incarnation, step): the incarnation grows by 1 at each restart of the learner; the order is lexicographic."""

    incarnation: int
    step: int


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Failure(Record):
    """Why something failed. `infra` is retried elsewhere; `data` has a small budget and is then surfaced."""

    kind: FailureKind
    code: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    message: str


class Score(Record):
    """What one source said of one sample: a finite value, or a failure; never a number that stands for a failure."""

    status: Literal["ok", "failed"]
    value: float | None = None
    detail: dict[str, Any] = {}
    error: Failure | None = None

    @model_validator(mode="after")
    def _number_or_failure(self) -> Self:
        if self.status == "ok":
            if self.value is None or not math.isfinite(self.value) or self.error is not None:
                raise ValueError(f"an ok score has a finite value and no error, got value {self.value!r}")
        elif self.value is not None or self.error is None:
            raise ValueError(f"a failed score has an error and no value, got value {self.value!r}")
        return self


class Message(Record):
    role: str
    content: str


class Prompt(Record):
    """One row of a prompt source: either `text` or `messages`, and what a score may need beside it.

    `prompt_class` says which principles weigh more for it (`services.principles.PrincipleSet.classes`).
    """

    prompt_id: str
    source: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    reference: str | None = None
    facts: tuple[str, ...] = ()
    principles: tuple[str, ...] = ()
    prompt_class: str | None = None
    keywords: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _text_or_messages(self) -> Self:
        if (self.text is None) == (self.messages is None):
            raise ValueError("a prompt has either `text` or `messages`")
        return self


class Lease(Record):
    """The right to generate one group, once: answers with another `attempt` are refused (fencing)."""

    group_id: str
    attempt: int
    epoch: int
    order: int
    prompt: Prompt


class Attention(Record):
    """A sample's attention on its context: M_t, C_t, E_t and X_t of the specification, one number a response token.

    `content` and `salient` are positions in the prompt; `salient_weights` is aligned to `salient`. `map` holds the
    dense rows [T][P] where they were asked for and stand inline; `map_ref` names the file that holds them in a run
    directory.
    """

    layers: tuple[int, ...]
    content: tuple[int, ...]
    salient: tuple[int, ...]
    salient_weights: tuple[float, ...]
    mass: tuple[float, ...]
    salient_mass: tuple[float, ...]
    neg_entropy_sum: tuple[float, ...]
    peak: tuple[float, ...]
    map: tuple[tuple[float, ...], ...] | None = None
    map_ref: str | None = None


class Sample(Record):
    """One response to one prompt, with everything that scoring and training need.

    `policy_versions` are spans (incarnation, step, tokens) that add up to the response's length. `logprobs` are of
    softmax(logits / temperature); `sampling_logprobs` of the truncated distribution the tokens were drawn from, where
    top-p or top-k truncates, with `kept_ids` the token ids that each step kept (the learner replays them: invariant 7).
    `reward` is the recipe's combination of `scores`.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    sample_id: str
    group_id: str
    prompt_id: str
    attempt: int
    policy_versions: tuple[tuple[int, int, int], ...]
    prompt: str
    prompt_ids: tuple[int, ...]
    response: str
    response_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...]
    sampling_logprobs: tuple[float, ...] | None = None
    kept_ids: tuple[tuple[int, ...], ...] | None = None
    attention: Attention | None = None
    scores: dict[str, Score] = {}
    reward: Score | None = None
    flags: tuple[str, ...] = ()
    created_at: float


class Group(Record):
    """The N samples of one prompt: the unit of lease, stream entry, score and training.

    `version` is the policy version that the group's generation began with; `order` its place in lease order.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    group_id: str
    attempt: int
    epoch: int
    order: int
    version: PolicyVersion
    prompt: Prompt
    eos_ids: tuple[int, ...]
    samples: tuple[Sample, ...]


class WeightsBucket(Record):
    """One safetensors file of published weights; `checksum` is BLAKE2b-128 of the file's bytes, in hexadecimal."""

    file: str
    names: tuple[str, ...]
    bytes: int
    checksum: str


class PublishedWeights(Record):
    """The manifest of one published policy version: `weights.json` in the directory of its buckets, written last."""

    schema_version: Literal[1] = SCHEMA_VERSION
    version: PolicyVersion
    buckets: tuple[WeightsBucket, ...]


def group_id_of(epoch: int, prompt_id: str) -> str:
    return f"{epoch}:{prompt_id}"


def epoch_of(group_id: str) -> int:
    return int(group_id.partition(":")[0])


def sample_id_of(group_id: str, index: int) -> str:
    return f"{group_id}:{index}"

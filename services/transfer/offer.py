"""What is said before the first byte: who sends which version to whom, where they meet, how long each wait may be."""

import re
from dataclasses import dataclass

from pydantic import Field, ValidationError

from services.records import PolicyVersion, Record


class Broken(Exception):  # noqa: N818 - reads as what it says where it is raised
    """A transfer that ended before its end; the message says at what, and who is missing."""


class Offer(Record):
    """One transfer. Goes round as JSON, in the place of a manifest's path.

    `address` is HOST:PORT of the sender's store; "" where nobody was there to receive, and another offer will follow.
    `key` is what the transfer's entries in the store begin with. `receivers` are the names of all who are to join.
    Deadlines (s): `join_s` for that; `phase_s` for every wait after it, as a bucket or an answer; `whole_s` for all
    that comes after the joining.
    """

    version: PolicyVersion
    address: str
    key: str
    sender: str
    receivers: tuple[str, ...]
    join_s: float = Field(gt=0)
    phase_s: float = Field(gt=0)
    whole_s: float = Field(gt=0)

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def name(self) -> str:
        return f"the transfer of version {version_text(self.version)}"

    def lists(self, owner: str) -> bool:
        """Whether a part of `owner` is to receive."""
        return any(owner_of(receiver) == owner for receiver in self.receivers)


def is_offer(published: str) -> bool:
    """Whether this is an offer, and not the path of a manifest."""
    return published.startswith("{")


def name_of(published: str) -> str:
    """What a message calls it: a manifest's path, or a transfer by its version."""
    return read_offer(published).name if is_offer(published) else published


def read_offer(published: str) -> Offer:
    """Raises Broken where it is none."""
    try:
        return Offer.model_validate_json(published)
    except ValidationError as error:
        raise Broken(f"{published[:200]!r} is no offer of weights: {error}") from error


def receiver_of(owner: str, rank: int) -> str:
    """The name of the part of an engine that is its tensor-parallel `rank`."""
    return f"{owner}/{rank}"


def owner_of(receiver: str) -> str:
    return receiver.rpartition("/")[0]


def version_text(version: PolicyVersion) -> str:
    return f"{version.incarnation}.{version.step}"


@dataclass(frozen=True)
class Report:
    """How a transfer ended, for each receiver: it has all of it, it refused and said why, or it did not answer.

    `bytes` were sent (once, however many received) in `seconds` from the first bucket to the last answer, by `backend`.
    """

    received: tuple[str, ...]
    refused: dict[str, str]
    silent: dict[str, str]
    bytes: int
    seconds: float
    backend: str

    @property
    def whole(self) -> bool:
        return not self.refused and not self.silent


def short(error: BaseException) -> str:
    """An error in a line, without the paths of its sources and its advice."""
    line = (str(error).strip().splitlines() or [""])[0]
    line = re.sub(r"^\[[^\]]*\.\w+:\d+\] ", "", line).split(". This is typically")[0].split(". This may indicate")[0]
    return f"{type(error).__name__}: {line}"

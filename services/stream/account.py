"""What a ledger holds, read and never written: groups by state, what happened to them, one line a group.

`attune ledger` reads a run through this alone, so that looking cannot change what is looked at.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import redis

from services.records import Failure, GroupState, PolicyVersion
from services.stream.calls import Calls
from services.stream.codec import failure_from_json

T = TypeVar("T")

STATES: tuple[GroupState, ...] = get_args(GroupState)
CHUNK = 500
"""Groups one script or round trip handles: Redis serves nobody else meanwhile."""


@dataclass(frozen=True)
class Gate:
    """What leases are given under: the version to hold, its manifest, and how many groups may ever be admitted."""

    version: PolicyVersion
    weights: str
    limit: int


@dataclass(frozen=True)
class Settled:
    """The first `epochs` epochs, all of whose groups are done in a manifest: how many were committed, how many failed.

    The ledger holds these numbers in their place, so that it does not grow with the length of a run.
    """

    epochs: int = 0
    committed: int = 0
    failed: int = 0


@dataclass(frozen=True)
class GroupRow:
    """One line of the account: where a group is, and why it is not committed. Of a committed one little is kept."""

    group_id: str
    state: GroupState
    epoch: int
    order: int
    attempt: int
    owner: str | None
    step: int | None
    version: PolicyVersion | None
    failure: Failure | None
    """Why it failed; of a pending group, why it went back."""
    losses: int = 0
    """Leases of it that were lost in a row: the owner died, or fell silent for the length of a lease."""
    leased_at: float | None = None
    """When the present lease was given, and until when it holds (Unix time, s, by Redis's clock)."""
    expires_at: float | None = None


_FIELDS = (
    "epoch",
    "order",
    "attempt",
    "owner",
    "step",
    "version_inc",
    "version_step",
    "failure",
    "losses",
    "leased_ms",
    "expires_ms",
)


class Account:
    """One run's ledger, to be read. Raises StreamLost where Redis does not answer for `patience_s` seconds."""

    def __init__(self, client: redis.Redis, run_id: str, *, patience_s: float = 30.0) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", run_id):
            raise ValueError(f"run id {run_id!r}: allowed are letters, digits, '_', '.' and '-'")
        self._calls = Calls(client, patience_s)
        self._prefix = f"attune:{{{run_id}}}:"

    def counts(self) -> dict[str, int]:
        """Groups by state; every state is there. Settled groups are among them."""
        reads = [("ZCARD", self._key(f"state:{state}")) for state in STATES]
        settled, *replies = self._calls.commands([self._settled_read, *reads])  # MULTI is refused where memory is out
        counts = dict(zip(STATES, map(int, replies), strict=True))
        _, committed, failed = settled
        return counts | {
            "committed": counts["committed"] + int(committed or 0),
            "failed": counts["failed"] + int(failed or 0),
        }

    def settled(self) -> Settled:
        """What is done and no longer there group by group."""
        return Settled(*(int(value or 0) for value in self._calls.command(*self._settled_read)))

    @property
    def _settled_read(self) -> tuple[str, ...]:
        return ("HMGET", self._key("settled"), "epochs", "committed", "failed")

    def counters(self) -> dict[str, int]:
        """Events since the run began; those that never happened are absent.

        late, late_scores, late_failures (answers that were dropped), failures_infra, failures_data, expired, released,
        regenerated, uncommitted.
        """
        found: dict[bytes, bytes] = self._calls.command("HGETALL", self._key("counters"))
        return {text(name): int(value) for name, value in found.items()}

    def gate(self) -> Gate | None:
        fields = self._calls.command("HMGET", self._key("gate"), "incarnation", "step", "weights", "limit")
        if fields[0] is None:
            return None
        return Gate(PolicyVersion(int(fields[0]), int(fields[1])), text(fields[2]), int(fields[3]))

    def ids(self, state: GroupState, limit: int | None = None) -> list[str]:
        """The groups in a state, in lease order, but for settled ones."""
        if limit == 0:
            return []
        return [
            text(i)
            for i in self._calls.command("ZRANGE", self._key(f"state:{state}"), 0, -1 if limit is None else limit - 1)
        ]

    def states(self) -> dict[GroupState, Sequence[str]]:
        """Every group that is not settled, by its state at one moment, in lease order."""
        reads = [("ZRANGE", self._key(f"state:{state}"), 0, -1) for state in STATES]
        replies = self._calls.commands(reads, at_once=True)
        return {state: [text(i) for i in ids] for state, ids in zip(STATES, replies, strict=True)}

    def rows(self, state: GroupState, ids: Sequence[str]) -> Iterator[GroupRow]:
        """All that is known of these groups, which were in this state."""
        for chunk in chunks(ids):
            replies = self._calls.commands([("HMGET", self._key(f"group:{i}"), *_FIELDS) for i in chunk])
            for group_id, values in zip(chunk, replies, strict=True):
                if values[0] is not None:  # else the run was forgotten in between
                    yield _row(group_id, state, dict(zip(_FIELDS, values, strict=True)))

    def list(self, state: GroupState, limit: int | None = None) -> Iterator[GroupRow]:
        """The groups in a state, in lease order, with all that is known of them."""
        return self.rows(state, self.ids(state, limit))

    def now(self) -> float:
        """Redis's clock (Unix time, s), by which leases end."""
        seconds, micros = self._calls.command("TIME")
        return int(seconds) + int(micros) / 1e6

    def _key(self, name: str) -> str:
        return self._prefix + name


def _row(group_id: str, state: GroupState, g: dict[str, bytes | None]) -> GroupRow:
    def whole(name: str) -> int | None:
        value = g[name]
        return None if value is None else int(value)

    def seconds(name: str) -> float | None:
        value = whole(name)
        return None if value is None else value / 1000

    owner, failure, incarnation, step = g["owner"], g["failure"], whole("version_inc"), whole("version_step")
    return GroupRow(
        group_id=group_id,
        state=state,
        epoch=whole("epoch") or 0,
        order=whole("order") or 0,
        attempt=whole("attempt") or 0,
        owner=None if owner is None else text(owner),
        step=whole("step"),
        version=None if incarnation is None or step is None else PolicyVersion(incarnation, step),
        failure=None if failure is None else failure_from_json(failure),
        losses=whole("losses") or 0,
        leased_at=seconds("leased_ms"),
        expires_at=seconds("expires_ms"),
    )


def chunks(values: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), CHUNK):
        yield values[start : start + CHUNK]


def text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)

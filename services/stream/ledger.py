"""The sample stream and the ledger: where every group of a run is, moved by scripts that Redis runs as one.

    pending -> leased -> generated -> scored -> consumed at step N -> committed, or failed with a reason

Invariants, and where each is kept:

1. A group is in exactly one state (`move` in common.lua is the only way between them). The committed manifest is the
   truth; the ledger is its projection, made so by `reconcile` at every start, before any lease. A group stays in the
   stream until a commit contains it; a group is committed in one step.
2. One (group_id, attempt) is accepted: a lease raises the attempt, an answer with another one is dropped and counted.
3. Groups are leased in their order, only while those before them that have not failed are fewer than the gate's limit,
   and only to an owner that has loaded the gate's version. A batch is the next groups in that order: none is overtaken,
   a failed one is replaced by the next leased. Groups older than allowed are generated again and counted, never trained
   on. A group whose next lost lease would fail it is held alone: nobody has it and another one at a time.
4. Groups of an epoch that is done as a whole are dropped from the ledger and stay in its numbers (`settle`): what it
   holds is bounded by the epochs under way, not by the length of the run.
5. What the driver writes is a chain of calls: Redis keeps the name of the last, and a call that does not follow on it
   is refused. So a Redis that came back empty, or without its last second, is noticed by the first call that could
   build on what is lost; `on_lost` then makes the ledger anew from what the driver knows, and the call is made again.
   Another driver that has claimed the ledger meanwhile breaks the chain too: then nothing is made anew (`LedgerTaken`).

A call whose reply was lost is sent again with the same token and gets the reply it had: nothing happens twice.
What crosses is msgpack and JSON. Keys begin with `attune:{RUN}:`; core commands of Redis 6.2 only.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast
from uuid import uuid4

import redis

from services.records import Failure, Group, Lease, PolicyVersion, Prompt, epoch_of
from services.stream.account import STATES, Account, Gate, GroupRow, Settled, chunks, text
from services.stream.calls import Argument
from services.stream.codec import decode_group, decode_prompt, encode_group, encode_prompt
from services.stream.config import StreamSection
from services.stream.connect import connect
from services.stream.errors import LedgerError, LedgerForgetting, LedgerLost, LedgerTaken

__all__ = ["STATES", "Gate", "GroupRow", "Ledger", "LoadWeights", "Settled", "Wait", "open_ledger"]

SCORERS = "scorers"

LEASE_EXPIRED = Failure(
    kind="infra", code="lease_expired", message="the actor that held the group did not renew its lease in time"
)
OWNER_DIED = Failure(kind="infra", code="owner_died", message="the actor that held the group died")

REBUILDS = 3
"""Times that one call has the ledger made anew and is made again, where Redis keeps losing it."""

FORGETTING = "forgetting"
"""The key that is there while the others are removed."""

OWNER = "owner"
"""The key that says who has claimed the ledger last, by the number of the claim."""

KEYS_AT_ONCE = 10_000
"""Keys that one SCAN looks at: a few milliseconds of Redis's time."""

_LOOK_AGAIN_S = 0.2


WaitReason = Literal["gate", "empty", "no_payload", "alone"]


@dataclass(frozen=True)
class LoadWeights:
    """The owner holds another version than the gate's: it must load this one before it leases."""

    version: PolicyVersion
    path: str


@dataclass(frozen=True)
class Wait:
    """Nothing to lease now: the gate is shut, no group is pending, the next one has no prompt yet, or one at its last
    chance is held alone, the next one or the one that the owner has."""

    reason: WaitReason


class Ledger(Account):
    """One run's ledger. Safe to use from several threads and processes; every process has its own.

    `lease_losses` (the driver's): leases in a row that a group may lose to owners that die or fall silent; one more
    fails it, None sets no bound.

    Every method raises StreamLost where Redis does not answer for `patience_s` seconds, StreamFull where it refuses
    writes, LedgerError where the request would break an invariant; then nothing has changed.
    """

    def __init__(
        self, client: redis.Redis, run_id: str, *, patience_s: float = 30.0, lease_losses: int | None = None
    ) -> None:
        super().__init__(client, run_id, patience_s=patience_s)
        self._lease_losses = "" if lease_losses is None else lease_losses
        self._heard = "0-0"
        self._last_call = ""
        self.opened: Gate | None = None
        """The gate as this object opened it last."""
        self.on_lost: Callable[[], None] | None = None
        """Makes anew what Redis has lost (`forget` ... `rebuild`, the gate). None: the call raises LedgerLost."""
        self._rebuilding = False
        self._token = uuid4().hex
        self._claims = 0
        """The number of the last claim by this object; 0 where it has made none."""

    # ---- the driver: what there is to do

    def register(self, epoch: int, groups: Sequence[tuple[str, int]]) -> int:
        """Makes (group id, place in lease order) known, as pending; known ones stay. Returns how many are new."""
        return sum(
            int(self._driven("register", epoch, *(value for pair in chunk for value in pair)))
            for chunk in chunks(groups)
        )

    def missing_payload(self, count: int) -> list[str]:
        """The next `count` pending groups that have no prompt yet, in lease order."""
        return [text(i) for i in self._calls.command("ZRANGE", self._key("bare"), 0, count - 1)] if count > 0 else []

    def attach(self, prompts: Mapping[str, Prompt]) -> int:
        """Gives groups their prompts, which they keep until they are committed or failed. Returns how many took one."""
        taken = 0
        for chunk in chunks(list(prompts.items())):
            taken += int(self._script("attach", *(v for i, prompt in chunk for v in (i, encode_prompt(prompt)))))
        return taken

    def open_gate(self, version: PolicyVersion, weights: str, limit: int) -> None:
        """From now on leases are given under `version`, its manifest at `weights`, while fewer than `limit` are in.

        Neither the version nor, within an incarnation, the limit goes back.
        """
        self._driven("open_gate", version.incarnation, version.step, weights, limit)
        self.opened = Gate(version, weights, limit)

    def close_gate(self) -> None:
        """No lease is given until the gate is opened again; work under way goes on. Raises LedgerTaken."""
        self._refuse_if_taken()
        self.opened = None
        self._script("close_gate")

    # ---- a rollout actor

    def lease(self, owner: str, loaded: PolicyVersion | None, ttl_s: float) -> Lease | LoadWeights | Wait:
        """The next group to generate, or the weights to load first, or why there is nothing to do now."""
        incarnation, step = ("", "") if loaded is None else loaded
        reply = self._script("lease", owner, uuid4().hex, incarnation, step, int(ttl_s * 1000))
        kind = text(reply[0])
        if kind == "load":
            return LoadWeights(PolicyVersion(int(reply[1]), int(reply[2])), text(reply[3]))
        if kind == "wait":
            return Wait(cast(WaitReason, text(reply[1])))
        return Lease(
            group_id=text(reply[1]),
            attempt=int(reply[2]),
            epoch=int(reply[3]),
            order=int(reply[4]),
            prompt=decode_prompt(reply[5]),
        )

    def renew(self, owner: str, group_id: str, attempt: int, ttl_s: float) -> bool:
        """Holds a lease for `ttl_s` seconds from now. False: it is the owner's no more, an answer would be late."""
        return bool(self._script("renew", owner, group_id, attempt, int(ttl_s * 1000)))

    def put_generated(self, group: Group) -> bool:
        """The answer to a lease, onto the stream. False: late (another attempt, older weights), dropped and counted."""
        version = group.version
        arguments = (group.group_id, group.attempt, version.incarnation, version.step, uuid4().hex, encode_group(group))
        return self._script("put_generated", *arguments) == b"1"

    def fail(
        self,
        group_id: str,
        attempt: int,
        failure: Failure,
        budget: int,
        *,
        entry_id: str | None = None,
        owner: str | None = None,
    ) -> Literal["pending", "failed", "late"]:
        """A leased or generated group could not be generated or scored.

        `budget` is how many failures of this kind a group may have and still be tried again: with 0 the first one fails
        it, and the next group leased takes its place. A scorer names the entry that it read, a rollout actor itself:
        the attempt alone may be that of a ledger of before. "late": the attempt, the entry or the lease is no more the
        group's; nothing happened.
        """
        arguments = (
            group_id, attempt, failure.kind, failure.model_dump_json(), budget, uuid4().hex, entry_id or "", owner or ""
        )  # fmt: skip
        return cast(Literal["pending", "failed", "late"], text(self._script("fail", *arguments)))

    # ---- a scoring worker

    def read_generated(self, consumer: str, count: int, block_ms: int, min_idle_ms: int) -> list[tuple[str, Group]]:
        """Up to `count` (entry id, group) to score: what this consumer was given and has not answered, else what a dead
        worker has held for `min_idle_ms`, else new ones.

        So it is read again until it is answered, and a worker that takes a dead one's name goes on with what that one
        had. Waits up to `block_ms` for new ones, and never longer than half the client's socket timeout.
        """
        rows: list[Any] = []
        for _ in range(2):
            try:
                rows = self._read(consumer, count, block_ms, min_idle_ms)
                break
            except redis.ResponseError as error:
                if not str(error).startswith("NOGROUP"):
                    raise
                # The first reader of a run, a Redis that came back empty, a ledger that was made anew meanwhile.
                self._make_consumer_group()
        return [(text(entry), decode_group(fields[b"group"])) for entry, fields in rows]

    def _read(self, consumer: str, count: int, block_ms: int, min_idle_ms: int) -> list[Any]:
        stream = self._key("stream:generated")
        # Also what Redis gave in a reply that was lost: nobody else would get it before `min_idle_ms`.
        found = self._calls.command("XREADGROUP", "GROUP", SCORERS, consumer, "COUNT", count, "STREAMS", stream, "0")
        if rows := [row for row in found[0][1] if row[1]] if found else []:
            return rows
        claim = self._calls.command("XAUTOCLAIM", stream, SCORERS, consumer, min_idle_ms, "0-0", "COUNT", count)
        rows = [row for row in claim[1] if row[1]]
        if rows:
            return rows
        block = max(1, min(block_ms, self._calls.longest_block_ms))
        found = self._calls.command(
            "XREADGROUP", "GROUP", SCORERS, consumer, "COUNT", count, "BLOCK", block, "STREAMS", stream, ">"
        )
        return [row for row in found[0][1] if row[1]] if found else []

    def put_scored(self, entry_id: str, group: Group) -> bool:
        """The scored group in the place of the generated one. False: late, dropped and counted."""
        arguments = (entry_id, group.group_id, group.attempt, uuid4().hex, encode_group(group))
        return self._script("put_scored", *arguments) == b"1"

    # ---- the driver: leases that end, batches, commits

    def expire_leases(self) -> list[str]:
        """Leases past their time: back to pending, or failed where a group has lost more than `lease_losses`.

        A slow owner renews what it holds and loses nothing, however long it takes.
        """
        reply = self._script("expire_leases", self._lease_losses, LEASE_EXPIRED.model_dump_json())
        return [text(i) for i in reply]

    def extend_leases(self, seconds: float) -> None:
        """No lease ends within `seconds` from now: after Redis was away, owners that live renew theirs first."""
        self._script("extend_leases", int(seconds * 1000))

    def release(self, owner: str) -> list[str]:
        """What a dead actor held goes back to pending, or failed where a group has lost more than `lease_losses`.

        So that a prompt that takes its actor down with it does not take down the run: nor its neighbours, for at its
        last chance it is leased alone.
        """
        return [text(i) for i in self._script("release", owner, self._lease_losses, OWNER_DIED.model_dump_json())]

    def take(self, step: int, size: int, *, final: bool = False, oldest_step: int | None = None) -> list[str] | None:
        """The batch of `step`: the next `size` groups in lease order, once each is scored; None until then.

        Asked again for the same step, it answers the same. With `final`, fewer are a batch once nothing else is left,
        and [] says that all is done; only where no group will be registered any more: a short batch in mid-run puts all
        later groups at a later step than the admission limit reckons with. Groups of the batch that were generated by a
        version before `oldest_step` go back to pending.
        """
        reply = self._driven("take", step, size, int(final), "" if oldest_step is None else oldest_step)
        return None if reply[0] == b"wait" else [text(i) for i in reply[1:]]

    def fetch(self, group_ids: Sequence[str], *, wait_s: float = 0.0) -> list[Group]:
        """Scored groups, in the order asked for; they stay until a commit contains them.

        Those that Redis has lost are waited for `wait_s` seconds, for the driver puts back what it has.
        """
        give_up = time.monotonic() + wait_s
        while True:
            try:
                return self._fetch(group_ids)
            except LedgerError:
                if time.monotonic() >= give_up:
                    raise
            time.sleep(min(_LOOK_AGAIN_S, wait_s))

    def _fetch(self, group_ids: Sequence[str]) -> list[Group]:
        entries = self._calls.commands([("HMGET", self._key(f"group:{i}"), "entry", "state") for i in group_ids])
        for group_id, (entry, state) in zip(group_ids, entries, strict=True):
            if entry is None or state not in (b"scored", b"consumed"):
                raise LedgerError(f"group {group_id} has no scored samples: its state is {text(state or b'unknown')}")
        stream = self._key("stream:scored")
        found = self._calls.commands([("XRANGE", stream, entry, entry) for entry, _ in entries])
        for group_id, rows in zip(group_ids, found, strict=True):
            if not rows:
                raise LedgerError(f"group {group_id} has lost its stream entry")
        return [decode_group(rows[0][1][b"group"]) for rows in found]

    def commit(self, steps: Mapping[int, Sequence[str]]) -> int:
        """What a manifest on the disk contains: committed, off the stream, payloads dropped. Idempotent, resumable.

        Returns how many were not yet committed. Refuses a group that is committed in another step.
        """
        pairs = [(group, step) for step, groups in steps.items() for group in groups]
        return sum(int(self._driven("commit", *(value for pair in chunk for value in pair))) for chunk in chunks(pairs))

    def mark_failed(self, failed: Mapping[str, Failure]) -> None:
        """What the driver takes for failed, whatever state it is in. Idempotent.

        What actors write is not in the driver's chain: a failure of theirs that Redis loses would not be noticed. Once
        the driver builds on it, it has to be.
        """
        for chunk in chunks(list(failed.items())):
            self._driven("mark_failed", *(value for i, why in chunk for value in (i, why.model_dump_json())))

    def settle(self, done: Settled, first_order: int) -> None:
        """Drops the groups of the first `done.epochs` epochs, all of them done in a manifest, and keeps their number.

        `first_order` is the place in lease order of the first group after them. Idempotent, resumable; settling what is
        settled already does nothing. Refuses where one of them is under way, or where the ledger's numbers are not
        `done`'s; but a ledger made anew, that knows none of them, takes these for its own.
        """
        while self._driven("settle", done.epochs, first_order, done.committed, done.failed):
            pass

    def wait_scored(self, block_ms: int) -> bool:
        """Blocks until a group was scored or failed since this object's last call; False: none within `block_ms`."""
        block = max(1, min(block_ms, self._calls.longest_block_ms))
        bell = self._key("stream:bell")
        if not self._calls.command("XREAD", "COUNT", 1, "BLOCK", block, "STREAMS", bell, self._heard):
            return False
        last = self._calls.command("XREVRANGE", bell, "+", "-", "COUNT", 1)
        self._heard = text(last[0][0]) if last else "0-0"
        return True

    # ---- the driver: a ledger that is the manifest's projection

    def claim(self) -> None:
        """Takes the ledger for this object: what was called from another one before is refused from now on.

        Forgets the gate, here too: nothing is leased until it is opened again, with any version and limit.

        Raises:
            LedgerTaken: this object has claimed it before, and another one since. A first claim takes it from anybody.
        """
        self._refuse_if_taken()
        if self._calls.command("EXISTS", self._key(FORGETTING)):  # whoever began it has died meanwhile
            self.forget()
        call = uuid4().hex
        self._claims = int(self._script("claim", call, self._token, self._claims))
        self._last_call = call
        self.opened = None

    def _refuse_if_taken(self) -> None:
        """A Redis that lost its end may name an earlier owner, and an empty one none: neither has taken anything."""
        number, token = self._calls.command("HMGET", self._key(OWNER), "number", "token")
        if self._claims and number is not None and int(number) >= self._claims and text(token) != self._token:
            raise LedgerTaken(f"{self._calls.where}: the ledger was taken by another driver, and this one has to end")

    def reconcile(self, committed: Mapping[int, Sequence[str]], failed: Mapping[str, Failure]) -> dict[str, int]:
        """Makes the ledger the projection of the manifest. After `register`, before any lease; resumable at any line.

        In the manifest -> committed, or failed; committed here but not there -> pending; consumed -> scored, lower in
        order than what was scored after it, so taken again in the same step and place; leased, or its stream entry
        lost -> pending; generated stays. A group that had failed since the last commit stays failed, so that the
        batches come out the same. Claims the ledger.
        Returns how many groups went back, by where to: {"rescored": .., "pending": .., "uncommitted": ..}.
        """
        step_of = {group: step for step, groups in committed.items() for group in groups}
        if len(step_of) != sum(map(len, committed.values())):
            raise LedgerError("the manifest holds a group twice")
        self.claim()
        had = self.ids("committed")
        steps = self._calls.commands([("HGET", self._key(f"group:{i}"), "step") for i in had])
        # Committed by a commit that the run does not resume from, or there in another step.
        stray = [i for i, step in zip(had, steps, strict=True) if i not in step_of or int(step) != step_of[i]]
        for chunk in chunks(stray):
            self._driven("uncommit", *chunk)
        self.commit(self._not_settled(committed))
        self.mark_failed(failed)
        rescored, pending = self._driven("sweep")
        return {"rescored": int(rescored), "pending": int(pending), "uncommitted": len(stray)}

    def rebuild(
        self,
        committed: Mapping[int, Sequence[str]],
        failed: Mapping[str, Failure],
        trained: Mapping[int, Sequence[str]],
        batch: tuple[int, Sequence[Group]] | None,
    ) -> None:
        """Makes the ledger anew in the middle of a run, where Redis has lost something and everybody else lives.

        After `forget`, `claim` and `register`. `trained`: steps that the learner has in it and no commit contains:
        consumed, so that nobody generates them again. `batch`: the step under way and its groups, whose samples go back
        onto the stream. Everything else is pending: an answer to a lease of before is late.
        """
        self.commit(self._not_settled(committed))
        self.mark_failed(failed)
        for step, groups in trained.items():
            for chunk in chunks(groups):
                self._driven("consume", step, *chunk)
        if batch is not None:
            step, samples = batch
            self._driven("consume", step, *(group.group_id for group in samples))
            for group in samples:
                version = group.version
                self._driven(
                    "put_back", group.group_id, group.attempt, version.incarnation, version.step, encode_group(group)
                )

    def _not_settled(self, committed: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
        """Of a manifest's steps the groups that a commit may still concern: a long run has few of them.

        A settling that was cut off has left some of its groups here: they are among these.
        """
        epochs = self.settled().epochs
        here = {group for groups in self.states().values() for group in groups} if epochs else set[str]()
        found = {
            step: [group for group in groups if epoch_of(group) >= epochs or group in here]
            for step, groups in committed.items()
        }
        return {step: groups for step, groups in found.items() if groups}

    def look(self) -> tuple[str, bool]:
        """The name of the server's process, and whether it holds what this object called last.

        Another name is a Redis that was restarted, or another one in its place.
        """
        info, mark = self._calls.commands([("INFO", "server"), ("GET", self._key("mark"))])
        return str(info["run_id"]), text(mark or "") == self._last_call

    def flush(self) -> None:
        """Forgets the run: removes every key of it and of no other."""
        self._remove(keep=())

    def forget(self) -> None:
        """`flush`, but for who has claimed the ledger, and the counters of what has happened. Raises LedgerTaken."""
        self._refuse_if_taken()
        self._remove(keep=(self._key("counters").encode(), self._key(OWNER).encode()))

    def _remove(self, *, keep: Sequence[bytes]) -> None:
        forgetting = self._key(FORGETTING).encode()
        keep = (*keep, forgetting)
        self._calls.command("SET", forgetting, 1)
        cursor, gone = 0, set[bytes]()
        while True:
            cursor, keys = self._calls.command("SCAN", cursor, "MATCH", self._prefix + "*", "COUNT", KEYS_AT_ONCE)
            gone.update(key for key in keys if key not in keep)
            if int(cursor) == 0:
                break
        for some in chunks(sorted(gone)):  # Redis's own order differs from server to server
            self._calls.command("UNLINK", *some)
        self._calls.command("UNLINK", forgetting)
        self._last_call = ""

    def _make_consumer_group(self) -> None:
        try:
            self._calls.command("XGROUP", "CREATE", self._key("stream:generated"), SCORERS, "0", "MKSTREAM")
        except redis.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise

    def _script(self, name: str, *args: Argument) -> Any:
        """A call by anybody: it waits while the driver makes the ledger anew."""
        if self.on_lost is not None:
            return self._made_anew_for(lambda: self._calls.script(name, self._prefix, *args))
        return self._calls.script(name, self._prefix, *args, wait_out=(LedgerForgetting,))

    def _driven(self, name: str, *args: Argument) -> Any:
        """A call in the driver's chain."""
        return self._made_anew_for(lambda: self._next_in_chain(name, *args))

    def _made_anew_for(self, call: Callable[[], Any]) -> Any:
        """The reply to a call of the driver; where Redis has lost something, `on_lost` makes the ledger anew first."""
        for _ in range(REBUILDS):
            try:
                return call()
            except LedgerLost:
                if self.on_lost is None or self._rebuilding:
                    raise
                self._rebuilding = True
                try:
                    self.on_lost()
                except LedgerLost:
                    continue  # lost again meanwhile
                finally:
                    self._rebuilding = False
        return call()

    def _next_in_chain(self, name: str, *args: Argument) -> Any:
        call = uuid4().hex
        reply = self._calls.script(name, self._prefix, *args, self._last_call, call)
        if name != "take" or reply[0] == b"ready":  # a batch that is not ready changes nothing
            self._last_call = call
        return reply


def open_ledger(url: str, run_id: str, section: StreamSection, *, lease_losses: int | None = None) -> Ledger:
    """The ledger of a run at `url`, with the section's deadlines; `lease_losses` is the driver's to give.

    Raises:
        StreamUnavailable: no usable Redis answers there.
    """
    client = connect(url, section.connect_timeout_s, socket_timeout_s=section.socket_timeout_s)
    return Ledger(client, run_id, patience_s=section.patience_s, lease_losses=lease_losses)

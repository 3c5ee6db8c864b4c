"""The replicas of one model, in processes of their own, as one `ModelRunner`: where a batch goes, what happens when a
replica dies, how one comes back. The same for children of the server (`reward_server.model_process`) and for Ray actors
(`reward_server.model_actor`).

Invariants: a batch that no replica has finished raises, so that its items fail as infra (design, 2). A replica that
comes back holds the model that was there before, or is not used: scores belong to the revision that answers name (8).
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from typing import Protocol

from reward_server.logs import where
from reward_server.runner import ModelFacts, Output, Row
from services.errors import Deadline

log = logging.getLogger(__name__)

BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
STEADY_S = 300.0
"""A replica that has lived for so long has all its restarts again."""
LATE_S = 10.0
"""Once one replica holds its model, a server that does not need all waits so long (s) for the others."""


class ReplicaLost(Exception):  # noqa: N818 - reads as what it says where it is raised
    """A replica died, or did not answer in time and counts as dead."""


class NoReplica(ReplicaLost):
    """None lives: the batch was given to nobody, so that it is not what took one down."""


class ReplicaAway(Deadline):
    """Its process was not there: there is no place for it now. It has not failed, and may yet come."""


class Replica(Protocol):
    """One copy of a model in another process. `run` is called by one thread at a time, never beside `start`."""

    def start(self) -> ModelFacts:
        """What it holds, once that is loaded; starts it where it does not run. Raises UserError for a model that cannot
        be loaded, Deadline, ReplicaLost."""
        ...

    def run(self, rows: Sequence[Row]) -> list[Output]:
        """Raises ReplicaLost where it is gone; anything else is the model's own error, and the replica lives."""
        ...

    def stop(self) -> None:
        """Ends what this side has started, at once, from any thread."""
        ...


class ReplicaRunner:
    """A batch goes to a replica that is free. Where that one fails, it goes to another; where every living one has
    failed, the last error is raised. A replica that is lost is started again, with growing pauses, up to `restarts`
    times in a row."""

    def __init__(
        self,
        name: str,
        replicas: Sequence[Replica],
        *,
        restarts: int,
        wait_s: float = 120.0,
        needs_all: bool = True,
    ) -> None:
        """Waits until all are loaded. `name`: the source's, for messages; `wait_s`: deadline for a free replica.

        Without `needs_all` it begins with those that start, if one does; those that are dead or late count as lost, and
        join when they come: where replicas outlive the server, one that is away must not keep the next server from the
        others.
        Raises what a replica raised while it loaded, ValueError where the replicas are not of one model."""
        self._name = name
        self._restarts = restarts
        self._wait_s = wait_s
        self._replicas = tuple(replicas)
        self._changed = threading.Condition()
        self._ended = threading.Event()
        self._used = dict.fromkeys(self._replicas, 0)
        try:
            starting = _started(replicas, needs_all=needs_all)
            errors = {replica: future.exception() for replica, future in starting.items() if future.done()}
            lost = [replica for replica, error in errors.items() if isinstance(error, ReplicaLost | Deadline)]
            if needs_all or len(lost) == len(replicas):
                lost = []  # no loss to bear, but the error to raise
            facts = [starting[replica].result() for replica in errors if replica not in lost]
            if not facts or any(one != facts[0] for one in facts):
                revisions = len({one.revision for one in facts})
                raise ValueError(f"{len(facts)} replicas of {revisions} models, one is needed")
        except BaseException:
            self.close()
            raise
        self._facts = facts[0]
        now = time.monotonic()
        self._since = dict.fromkeys(self._replicas, now)
        self._living = {replica for replica in errors if replica not in lost}
        self._free = deque(replica for replica in self._replicas if replica in self._living)
        for replica in lost:
            log.error("a replica of %s did not start: %s", name, errors[replica])
            self._lose(replica)
        for replica, future in starting.items():
            if replica not in errors:
                self._lose(replica, coming=future)

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    @property
    def lanes(self) -> int:
        return len(self._replicas)

    def living(self) -> int:
        """Replicas that hold the model now."""
        with self._changed:
            return len(self._living)

    def run(self, rows: Sequence[Row]) -> list[Output]:
        tried: set[Replica] = set()
        error: Exception = NoReplica(f"no replica of {self._name} lives")
        while (replica := self._take(tried)) is not None:
            tried.add(replica)
            try:
                outputs = replica.run(rows)
            except ReplicaLost as lost:
                error = lost
                self._lose(replica)
            except Exception as failure:
                error = failure
                self._give_back(replica)
            except BaseException:
                self._give_back(replica)
                raise
            else:
                self._give_back(replica)
                return outputs
        raise error

    def close(self) -> None:
        """Ends all replicas; what they run fails, and nothing is started again."""
        self._ended.set()
        for replica in self._replicas:
            replica.stop()

    def _take(self, tried: set[Replica]) -> Replica | None:
        """One that is free and not among those that were tried; None where none of the others lives."""
        end = time.monotonic() + self._wait_s
        with self._changed:
            while True:
                free = next((replica for replica in self._free if replica not in tried), None)
                if free is not None:
                    self._free.remove(free)
                    return free
                if not self._living - tried:
                    return None
                left = end - time.monotonic()
                if left <= 0:
                    raise Deadline(waited_for="a replica that is free", who=self._name, seconds=self._wait_s)
                self._changed.wait(left)

    def _give_back(self, replica: Replica) -> None:
        with self._changed:
            self._free.append(replica)
            self._changed.notify_all()

    def _lose(self, replica: Replica, *, coming: Future[ModelFacts] | None = None) -> None:
        """`coming`: a start of it that is under way."""
        with self._changed:
            self._living.discard(replica)
            self._changed.notify_all()  # who waits for another learns that there is one less
        if not self._ended.is_set():
            threading.Thread(
                target=self._bring_back, args=(replica, coming), name=f"restarts-{self._name}", daemon=True
            ).start()

    def _bring_back(self, replica: Replica, coming: Future[ModelFacts] | None) -> None:
        number = self._replicas.index(replica) + 1
        if time.monotonic() - self._since[replica] >= STEADY_S:
            self._used[replica] = 0
        log.warning(
            "number %d of %d replicas of %s is %s", number, self.lanes, self._name, "late" if coming else "lost"
        )
        while coming is not None or self._used[replica] < self._restarts:
            starting, coming = coming, None
            if starting is None:
                if self._ended.wait(min(LONGEST_BACKOFF_S, BACKOFF_S * 2 ** self._used[replica])):
                    return
                self._used[replica] += 1
            try:
                facts = replica.start() if starting is None else starting.result()
            except ReplicaAway as error:
                log.warning("replica %d of %s: %s", number, self._name, error)
                self._used[replica] -= starting is None
                continue
            except Exception as error:
                log.error("replica %d of %s did not start: %s", number, self._name, where(error))
                continue
            if facts != self._facts:
                # Its scores would be told as the old model's.
                log.error("replica %d of %s holds another model now: start the server again", number, self._name)
                replica.stop()
                return
            with self._changed:
                self._since[replica] = time.monotonic()
                self._living.add(replica)
                self._free.append(replica)
                self._changed.notify_all()
            if self._ended.is_set():
                replica.stop()
            log.warning("replica %d of %s is back", number, self._name)
            return
        log.error("replica %d of %s is not started again: %d restarts are used", number, self._name, self._restarts)


def _started(replicas: Sequence[Replica], *, needs_all: bool) -> dict[Replica, Future[ModelFacts]]:
    """The starts of all, done; or, without `needs_all`, some of them still under way while others are done."""
    pool = ThreadPoolExecutor(max(1, len(replicas)))
    starting = {replica: pool.submit(replica.start) for replica in replicas}
    pool.shutdown(wait=False)
    if not needs_all:
        for future in as_completed(starting.values()):
            if future.exception() is None:
                wait(starting.values(), LATE_S)
                return starting
    wait(starting.values())
    return starting


def start_all(makers: Mapping[str, Callable[[], ReplicaRunner]]) -> dict[str, ReplicaRunner]:
    """The runners of several models, which load at the same time. Where one fails the others are closed, and its error
    is raised."""
    with ThreadPoolExecutor(max(1, len(makers))) as pool:
        starting = {name: pool.submit(make) for name, make in makers.items()}
    errors = [error for future in starting.values() if (error := future.exception()) is not None]
    if errors:
        for future in starting.values():
            if future.exception() is None:
                future.result().close()
        raise errors[0]
    return {name: future.result() for name, future in starting.items()}

"""The sender's side of a transfer. It never waits without an end, and reports on every receiver by its name."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from services.records import PolicyVersion
from services.transfer.group import (
    LOST,
    POLL_S,
    get,
    join,
    listen,
    new_group,
    put,
    try_put,
)
from services.transfer.offer import Broken, Offer, Report, short, version_text
from services.transfer.packing import TensorMeta, checksum, pack, packed_bytes
from services.transfer.shared import alive, lent
from services.transfer.ways import Backend, ByGroup, Lending, Wanted, Way, backend_for, place_of, settle_lent

log = logging.getLogger(__name__)


class Sender:
    """One transfer, from the offer to the report: `start`, `send` for each bucket, `finish`; or `stop` at any point.

    Listens at `host` alone. `device` is where the tensors are. `backend` gloo: by it, whatever else there would be.
    After False from `start` or `send` nothing more is sent.
    """

    def __init__(
        self,
        version: PolicyVersion,
        receivers: Sequence[str],
        *,
        name: str,
        host: str,
        device: torch.device,
        join_s: float,
        phase_s: float,
        whole_s: float,
        backend: Wanted = "auto",
    ) -> None:
        key = uuid4().hex
        store, port = listen(host, key, phase_s)
        self._store: Any = store
        self.offer = Offer(
            version=version,
            address=f"{host}:{port}",
            key=key,
            sender=name,
            receivers=tuple(receivers),
            join_s=join_s,
            phase_s=phase_s,
            whole_s=whole_s,
        )
        self._device = device
        self._wanted = backend
        self._way: Way | None = None
        self._joined: list[str] = []
        self._processes: dict[str, int] = {}
        self._plan: Sequence[Sequence[TensorMeta]] = ()
        self._stopped: str | None = None
        self._bytes = 0
        self._began = time.monotonic()
        self._backend = "none"

    def start(self, plan: Sequence[Sequence[TensorMeta]]) -> bool:
        """Waits for the receivers, `join_s` at most, and forms the group with those who came. `plan`: the buckets."""
        self._plan = plan
        settle_lent()
        here = place_of(self._device)
        places = self._wait_for_receivers()
        self._processes = {
            name: int(place["process"]) for name, place in places.items() if place["machine"] == here["machine"] != ""
        }
        places = {name: place for name, place in places.items() if not self._dead(name)}
        self._joined = list(places)
        if not places:
            return self._stop("no receiver came")
        backend: Backend = "gloo" if self._wanted == "gloo" else backend_for([here, *places.values()])
        self._backend = backend
        try:
            self._way = self._begin(backend)
        except (Broken, OSError, *LOST) as error:
            instead = "; cluster.transfer_backend: gloo does without" if backend == "ipc" else ""
            return self._stop(f"no way to {', '.join(self._joined)} by {backend}: {short(error)}{instead}")
        self._began = time.monotonic()
        return True

    def send(self, index: int, tensors: Mapping[str, Tensor]) -> bool:
        """Sends bucket `index` of the plan; the tensors may change afterwards."""
        metas = self._plan[index]
        size = packed_bytes(metas)
        if self._way is None or self._stopped is not None:
            raise RuntimeError("the transfer has not been started, or is over")
        flat = self._way.room(size)
        pack(metas, tensors, flat)
        what = f"bucket {index + 1} of {len(self._plan)} to be taken by {', '.join(self._joined)}"
        try:
            arrived = self._way.bring(index, flat, what)
            put(self._store, f"checksum/{index}", checksum(flat))  # computed while the bytes are on their way
            arrived()
        except Broken as error:
            return self._stop(str(error))
        except LOST as error:
            return self._stop(f"bucket {index + 1} of {len(self._plan)}: {short(error)}")
        self._bytes += size
        return True

    def finish(self) -> Report:
        """Waits for every receiver's answer, `phase_s` at most, and ends the transfer."""
        self._wait_for_answers()
        received: list[str] = []
        refused: dict[str, str] = {}
        for receiver in self._joined:
            if self._store.check([f"done/{receiver}"]):
                error = get(self._store, f"done/{receiver}")
                if error is None:
                    received.append(receiver)
                else:
                    refused[receiver] = str(error)
        silent = {
            receiver: self._why_silent(receiver)
            for receiver in self.offer.receivers
            if receiver not in received and receiver not in refused
        }
        seconds = time.monotonic() - self._began
        try_put(self._store, "end", None)
        self._leave()
        report = Report(tuple(received), refused, silent, self._bytes, seconds, self._backend)
        if not report.whole:
            log.warning("the transfer of version %s: %s", version_text(self.offer.version), report)
        return report

    def stop(self, why: str) -> None:
        """Ends the transfer for all, for a reason that the receivers are told."""
        self._stop(why)
        self._leave()

    def _begin(self, backend: Backend) -> Way:
        """Says how the bytes come and in which buckets, and makes ready for it."""
        most = max(packed_bytes(bucket) for bucket in self._plan)
        start: dict[str, Any] = {
            "backend": backend,
            "receivers": self._joined,
            "plan": [[meta.to_json() for meta in bucket] for bucket in self._plan],
        }
        if backend == "ipc":
            memory = lent(most, self._device)
            try:
                put(self._store, "start", start | {"handle": memory.handle()})
            except BaseException:
                memory.close()
                raise
            there = {name: self._processes[name] for name in self._joined}
            return Lending(self._store, memory, there, self._gone, self.offer.phase_s)
        put(self._store, "start", start)
        group = new_group(self._store, backend, 0, len(self._joined) + 1, self.offer.host, self.offer.phase_s)
        device = torch.device("cpu") if backend == "gloo" else self._device
        return ByGroup(group, device, self.offer.phase_s, most)

    def _wait_for_receivers(self) -> dict[str, dict[str, str]]:
        """What those who came said of themselves, in the offer's order."""
        end = time.monotonic() + self.offer.join_s
        waiting = list(self.offer.receivers)
        while waiting and time.monotonic() < end:
            waiting = [name for name in waiting if not self._here(name, "join") and not self._here(name, "left")]
            time.sleep(POLL_S if waiting else 0)
        came = [name for name in self.offer.receivers if self._here(name, "join") and not self._here(name, "left")]
        return {name: get(self._store, f"join/{name}") for name in came}

    def _wait_for_answers(self) -> None:
        """Until each has answered, or is known to be gone: where the transfer broke, those who live say so soon."""
        end = time.monotonic() + self.offer.phase_s
        waiting = list(self._joined)
        while waiting and time.monotonic() < end:
            waiting = [name for name in waiting if self._gone(name) is None]
            time.sleep(POLL_S if waiting else 0)

    def _gone(self, receiver: str) -> str | None:
        """Why no more is to be expected of a receiver that joined."""
        if self._dead(receiver):
            return "is dead"
        if not self._here(receiver, "done"):
            return None
        error = get(self._store, f"done/{receiver}")
        return "is done" if error is None else f"gave up: {error}"

    def _dead(self, receiver: str) -> bool:
        """As a supervisor says; of a process of this machine it can be seen."""
        process = self._processes.get(receiver)
        return self._here(receiver, "left") or (process is not None and not alive(process))

    def _why_silent(self, receiver: str) -> str:
        if self._dead(receiver):
            return "it is dead"
        if receiver not in self._joined:
            return f"it did not join within {self.offer.join_s:.0f} s"
        if self._stopped is not None:
            return f"it did not answer; {self._stopped}"
        return f"it did not say within {self.offer.phase_s:.0f} s that it has everything"

    def _here(self, receiver: str, key: str) -> bool:
        return bool(self._store.check([f"{key}/{receiver}"]))

    def _stop(self, why: str) -> bool:
        self._stopped = self._stopped or why
        try_put(self._store, "stopped", self._stopped)
        if self._way is not None and self._way.joint:
            self._end_way()
        return False

    def _leave(self) -> None:
        """Gives the group, its memory and the store back; receivers that are still there see the connection close."""
        self._end_way()
        self._store = None

    def _end_way(self) -> None:
        way, self._way = self._way, None
        if way is not None:
            way.leave()


def withdraw(offer: Offer, receivers: Sequence[str]) -> None:
    """Tells the sender that these will not come, or not answer any more: a supervisor knows it before a deadline does.

    Where the sender is gone, or has ended the transfer, there is nobody to be told.
    """
    try:
        store = join(offer.host, offer.port, offer.key, 2.0)
        for receiver in receivers:
            put(store, f"left/{receiver}", None)
    except (OSError, *LOST) as error:
        log.debug("withdrawing %s: %s", receivers, error)

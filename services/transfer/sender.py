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
    backend_for,
    broadcast,
    finish,
    get,
    join,
    leave,
    listen,
    new_group,
    place_of,
    put,
    try_put,
)
from services.transfer.offer import Broken, Offer, Report, short, version_text
from services.transfer.packing import TensorMeta, checksum, pack, packed_bytes

log = logging.getLogger(__name__)


class Sender:
    """One transfer, from the offer to the report: `start`, `send` for each bucket, `finish`; or `stop` at any point.

    Listens at `host` alone. `device` is where the tensors are. After False from `start` or `send` nothing more is sent.
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
        self._group: Any = None
        self._joined: list[str] = []
        self._plan: Sequence[Sequence[TensorMeta]] = ()
        self._flat: Tensor | None = None
        self._stopped: str | None = None
        self._bytes = 0
        self._began = time.monotonic()
        self._backend = "none"

    def start(self, plan: Sequence[Sequence[TensorMeta]]) -> bool:
        """Waits for the receivers, `join_s` at most, and forms the group with those who came. `plan`: the buckets."""
        self._plan = plan
        places = self._wait_for_receivers()
        self._joined = list(places)
        if not places:
            return self._stop("no receiver came")
        backend = backend_for([place_of(self._device), *places.values()])
        self._backend = backend
        if backend == "gloo":
            self._device = torch.device("cpu")
        try:
            put(
                self._store,
                "start",
                {
                    "backend": backend,
                    "receivers": self._joined,
                    "plan": [[meta.to_json() for meta in bucket] for bucket in plan],
                },
            )
            self._group = new_group(self._store, backend, 0, len(places) + 1, self.offer.host, self.offer.phase_s)
        except (Broken, *LOST) as error:
            return self._stop(f"the group of {len(places)} receivers did not form: {short(error)}")
        self._began = time.monotonic()
        return True

    def send(self, index: int, tensors: Mapping[str, Tensor]) -> bool:
        """Sends bucket `index` of the plan; the tensors may change afterwards."""
        metas = self._plan[index]
        size = packed_bytes(metas)
        if self._flat is None:
            most = max(packed_bytes(bucket) for bucket in self._plan)
            self._flat = torch.zeros(most, dtype=torch.uint8, device=self._device)
        flat = self._flat[:size]
        pack(metas, tensors, flat)
        what = f"bucket {index + 1} of {len(self._plan)} to be taken by {', '.join(self._joined)}"
        try:
            work = broadcast(self._group, flat, self.offer.phase_s, what)
            put(self._store, f"checksum/{index}", checksum(flat))  # computed while the bytes are on their way
            finish(work, self.offer.phase_s, what)
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
            waiting = [name for name in waiting if not self._here(name, "done") and not self._here(name, "left")]
            time.sleep(POLL_S if waiting else 0)

    def _why_silent(self, receiver: str) -> str:
        if self._here(receiver, "left"):
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
        if self._group is not None:
            leave(self._group)
            self._group = None
        return False

    def _leave(self) -> None:
        """Gives the group, its memory and the store back; receivers that are still there see the connection close."""
        if self._group is not None:
            leave(self._group)
        self._group = self._flat = self._store = None


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

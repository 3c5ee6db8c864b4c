"""Weights by transfer (`cluster.weights: collective`): which engines hold the newest version, and who gets it when.

A round is one transfer to those who lack the version and are up. It is the same whether the version is new and all of
them lack it, or one actor was replaced and lacks it alone. The learner can serve a round whenever it does not train,
and then it waits for a batch, perhaps from just that actor: so the driver looks for those who lack the version each
time around in that wait, and nothing is kept anywhere for latecomers.

The gate carries the offer, and so is opened before the bytes move. That lets nobody ahead: a lease is given only to an
actor that says it holds the gate's version, and it says so when it has verified and loaded all of it.
"""

import logging
from collections.abc import Sequence
from typing import Any

from cluster.config import Config
from cluster.learners import LearnerGroup
from cluster.run_dir import RunDir
from cluster.running import PartFailed, Running
from cluster.supervise import Supervisor
from services.records import PolicyVersion
from services.stream.ledger import Ledger
from services.transfer.offer import Offer, Report, owner_of, read_offer, receiver_of, version_text
from services.transfer.sender import withdraw

log = logging.getLogger(__name__)

ROUNDS = 3
"""Times that one version is sent to actors that live and refuse it, before the run ends with their reason."""


class WeightRounds:
    """The driver's side of every transfer of a run."""

    def __init__(
        self, supervisor: Supervisor, learners: LearnerGroup, ledger: Ledger, run: RunDir, config: Config
    ) -> None:
        self._supervisor = supervisor
        self._learners = learners
        self._ledger = ledger
        self._run = run
        self._seconds = config.cluster.rendezvous_s + config.cluster.publish_s
        self._answer_s = config.cluster.transfer_s
        self._ranks = config.rollout.vllm.tensor_parallel if config.rollout.engine == "vllm" else 1
        self._ready: dict[str, Any] = {}
        self._holding: set[str] = set()
        self._version = PolicyVersion(0, 0)
        self._limit = 0
        self._under_way: Offer | None = None
        self._backend = ""
        supervisor.on_death = self._left

    def publish(self, version: PolicyVersion, limit: int) -> None:
        """Brings the learner's weights to every rollout actor that is up, and opens the gate for `limit` groups."""
        self._version, self._limit = version, limit
        self._holding = set()
        if not self._lacking():
            nobody = Offer(
                version=version, address="", key="", sender="learner-0", receivers=(), join_s=1, phase_s=1, whole_s=1
            )
            self._ledger.open_gate(version, nobody.model_dump_json(), limit)
        self.catch_up()

    def catch_up(self) -> bool:
        """Brings the version that was published last to actors that are up and lack it; whether there were any.

        Raises:
            PartFailed: an actor did not get it in ROUNDS rounds, or was lost once too often; names it and says why.
        """
        missed: dict[str, str] = {}
        for number in range(ROUNDS):
            lacking = self._lacking()
            if not lacking:
                return number > 0
            offer = self._offer([receiver_of(owner, rank) for owner in lacking for rank in range(self._ranks)])
            self._ledger.open_gate(self._version, offer.model_dump_json(), self._limit)
            report = self.serve(offer)
            if report.received and report.backend != self._backend:
                self._backend = report.backend
                self._run.event("weights_backend", backend=report.backend)
            missed = {owner_of(receiver): why for receiver, why in [*report.refused.items(), *report.silent.items()]}
            self._holding |= set(lacking) - set(missed)
            for receiver, why in report.silent.items():
                self._supervisor.give_up(owner_of(receiver), f"{self._name}: {receiver}: {why}")
        lacking = [owner for owner in self._lacking() if owner in missed]
        if lacking:
            raise PartFailed(f"{self._name} did not reach {lacking[0]} in {ROUNDS} rounds: {missed[lacking[0]]}")
        return True

    def offer_to(self, part: str) -> Offer:
        """An offer for a part that is no rollout actor; `serve` follows."""
        return self._offer([receiver_of(part, 0)])

    def serve(self, offer: Offer) -> Report:
        """The transfer that was offered, from the first who joins to the last answer."""
        self._under_way = offer
        there = {part.name for part in [*self._supervisor.rollouts, *self._supervisor.others]}
        for owner in {owner_of(name) for name in offer.receivers} - there:  # dead since they were seen to be up
            self._left(owner)
        try:
            found = self._learners.call("send_weights", what=f"{self._name} to end", seconds=self._seconds)
        finally:
            self._under_way = None
        report = Report(**found)
        if not report.whole:
            self._run.event("transfer_broken", version=list(self._version), missing={**report.refused, **report.silent})
        return report

    @property
    def _name(self) -> str:
        return f"the transfer of version {version_text(self._version)}"

    def _lacking(self) -> list[str]:
        self._supervisor.check()
        return [part.name for part in self._supervisor.rollouts if part.name not in self._holding and self._is_up(part)]

    def _is_up(self, part: Running) -> bool:
        """Whether an actor has built its engine: one that is building it would keep the others waiting."""
        if part.name not in self._ready:
            self._ready[part.name] = part.handle.ready.remote()
        done, _ = self._supervisor.ray.wait([self._ready[part.name]], timeout=0)
        return bool(done)

    def _offer(self, receivers: Sequence[str]) -> Offer:
        answer = self._learners.call(
            "offer_weights",
            tuple(self._version),
            list(receivers),
            what=f"{self._name} to begin",
            seconds=self._answer_s,
        )
        return read_offer(answer)

    def _left(self, owner: str) -> None:
        """A part has died: the learner need not wait for it."""
        if self._under_way is None:
            return
        if names := [name for name in self._under_way.receivers if owner_of(name) == owner]:
            withdraw(self._under_way, names)

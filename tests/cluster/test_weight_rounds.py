"""Transfers of weights as the driver sees them: whom the learner need not wait for. The learner's side is played."""

from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import weight_rounds
from cluster.running import Running
from cluster.weight_rounds import WeightRounds
from services.records import PolicyVersion
from services.transfer.offer import Offer, Report


class Sending:
    """A learner with an evaluator and a model beside it; `meanwhile` is what happens while it sends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.withdrawn: list[str] = []
        monkeypatch.setattr(weight_rounds, "withdraw", lambda _, names: self.withdrawn.extend(names))
        self.meanwhile: Callable[[], object] = lambda: None
        parts: Any = [Running(name, None) for name in ("evaluator", "model of taste 1")]
        self.supervisor: Any = SimpleNamespace(rollouts=[], others=parts, on_death=None)
        config: Any = SimpleNamespace(
            cluster=SimpleNamespace(rendezvous_s=300, publish_s=300, transfer_s=60),
            rollout=SimpleNamespace(engine="transformers"),
        )
        run: Any = SimpleNamespace(event=lambda *_, **__: None)
        learners: Any = SimpleNamespace(call=self.call)
        ledger: Any = None
        self.rounds = WeightRounds(self.supervisor, learners, ledger, run, config)

    def call(self, method: str, *arguments: Any, **_: Any) -> Any:
        if method == "offer_weights":
            version, receivers = arguments
            return Offer(
                version=PolicyVersion(*version), address="127.0.0.1:1", key="k", sender="learner-0",
                receivers=tuple(receivers), join_s=300, phase_s=60, whole_s=300,
            ).model_dump_json()  # fmt: skip
        self.meanwhile()
        return asdict(Report((), {}, {"evaluator/0": "it is dead"}, 0, 0.0, "none"))

    def send(self, dies: str | None = None, meanwhile: str | None = None) -> list[str]:
        offer = self.rounds.offer_to("evaluator")
        self.die(dies)
        self.meanwhile = lambda: self.die(meanwhile)
        self.rounds.serve(offer)
        return self.withdrawn

    def die(self, name: str | None) -> None:
        if name is not None:
            self.supervisor.others = [part for part in self.supervisor.others if part.name != name]
            self.supervisor.on_death(name)


@pytest.mark.parametrize("moment", ["dies", "meanwhile"])
def test_an_evaluator_that_is_dead_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    assert Sending(monkeypatch).send(**{moment: "evaluator"}) == ["evaluator/0"]


@pytest.mark.parametrize("moment", ["dies", "meanwhile"])
def test_the_death_of_a_part_that_takes_no_weights_takes_nobody_out(
    monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    assert Sending(monkeypatch).send(**{moment: "model of taste 1"}) == []
    assert Sending(monkeypatch).send() == []

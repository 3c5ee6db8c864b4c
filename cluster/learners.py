"""The learner's ranks, driven as one: every call goes to all of them at once and has a deadline."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.config import Config
from cluster.plan import Part
from cluster.reservation import Reservation
from cluster.running import LearnerDied, LedgerBehind, PartDied, PartFailed, Running, Unanswered
from cluster.supervise import Supervisor
from learner.faults import PeerLost
from learner.worker import LearnerWorker
from services.stream.errors import LedgerError

TELL_S = 10.0
"""Seconds in which a rank that took its peers' work with it turns out to be gone."""


@dataclass(frozen=True)
class LearnerGroup:
    """Ranks 0 .. n-1 of the learner. Rank 0's answer is the group's, but for `answers`."""

    supervisor: Supervisor
    ranks: tuple[Running, ...]
    tick: Callable[[], None]
    parameters: int = 0
    """Of the policy."""

    def call(self, method: str, *args: Any, what: str, seconds: float) -> Any:
        """Calls a method on every rank and returns rank 0's answer; raises as `answers` does."""
        return self.answers(method, *args, what=what, seconds=seconds)[0]

    def answers(self, method: str, *args: Any, what: str, seconds: float) -> list[Any]:
        """Calls a method on every rank and returns the answers in their order.

        Raises:
            LearnerDied: a rank died, lost its peers, or did not answer in time; names it.
            LedgerBehind: the ledger no longer has what the ranks were to train on.
            PartFailed, UserError: what a rank said of its work, which another try would say again; or another part
                ended that is not started again.
        """
        references = [getattr(rank.handle, method).remote(*args) for rank in self.ranks]
        names = [rank.name for rank in self.ranks]
        try:
            return self.supervisor.wait(references, names, what=what, seconds=seconds, tick=self.tick)
        except (PartDied, Unanswered) as gone:
            raise LearnerDied(str(gone)) from gone
        except PartFailed as failed:
            if isinstance(failed.__cause__, LedgerError):
                raise LedgerBehind(str(failed)) from failed
            if isinstance(failed.__cause__, PeerLost):
                dead = self.supervisor.dead_among(self.ranks, TELL_S)
                raise LearnerDied(f"{dead[0]} died" if dead else str(failed)) from failed
            raise


def learner_environment(config: Config) -> dict[str, str]:
    """What DeepSpeed and torch read before they are imported: the threads, and the CPU where no GPU is asked for."""
    environment = {"OMP_NUM_THREADS": str(config.learner.threads), "TOKENIZERS_PARALLELISM": "false"}
    if not config.cluster.learner_gpus:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def start_learners(
    supervisor: Supervisor,
    part: Part,
    config: Config,
    tree: Mapping[str, Any],
    run_dir: str,
    *,
    total_steps: int,
    resume: str | None,
    tick: Callable[[], None],
    room: Reservation | None = None,
) -> LearnerGroup:
    """Starts the ranks, joins them into one process group and loads the policy, or the checkpoint `resume`.

    They go where `room` was reserved for them, which is given back with them.
    """
    environment = learner_environment(config)
    supervisor.room = room
    ranks = tuple(
        Running(
            f"learner-{rank}",
            supervisor.actor(
                f"learner-{rank}",
                LearnerWorker,
                part,
                environment,
                dict(tree),
                rank,
                part.count,
                run_dir,
                within=None if room is None else room.options(rank),
            ),
            part=part,
        )
        for rank in range(part.count)
    )
    group = LearnerGroup(supervisor, ranks, tick)
    supervisor.learners = list(ranks)
    seconds = config.cluster.start_s
    address, port = LearnerGroup(supervisor, ranks[:1], tick).call(
        "address", what="the learner's address", seconds=seconds
    )
    info = group.call(
        "setup", address, port, resume, total_steps, what="the learner to load the policy", seconds=seconds
    )
    return replace(group, parameters=int(info["parameters"]))

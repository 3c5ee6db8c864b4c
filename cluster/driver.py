"""The driver of a run: takes the run directory, brings Redis and Ray up, hands over to `cluster.training`, takes all
down."""

import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from uuid import uuid4

from rich.console import Console

from cluster.config import Config
from cluster.feed import total_steps
from cluster.history import History, begin_incarnation, open_history
from cluster.janitor import began_at, with_janitor
from cluster.model_dirs import is_marked, policy_mark
from cluster.plan import addresses_of_ray, fitting, nodes_of_ray
from cluster.ray_job import MARGIN_S, check_run_dir, is_job, short_grace, stop_wait_s
from cluster.ray_metrics import RayMetrics
from cluster.ray_runtime import ray_cluster
from cluster.recipe import save_resolved
from cluster.restarts import RestartBudget
from cluster.run_dir import RunDir
from cluster.signals import stop_request
from cluster.status import StatusFile
from cluster.summary import Outcome, said_finished, say_end
from cluster.supervise import Supervisor
from cluster.training import Training
from cluster.training_data import load_training_data
from rollout.worker import check_engine
from services.errors import UserError
from services.stream.embedded import EmbeddedRedis
from services.stream.keeper import KeptRedis
from services.stream.ledger import STATES, open_ledger
from services.telemetry import Telemetry

log = logging.getLogger(__name__)


def train(config: Config, run_path: Path, *, resume: str, console: Console) -> Outcome:
    """Runs a recipe to its end, to a signal or to an error.

    Raises:
        UserError, PlanError: what the user can mend.
        Deadline, PartFailed: a part that did not answer, or died; the last commit is valid.
    """
    run_path = run_path.absolute()  # the ranks work in other directories than this process
    run = RunDir(run_path)
    if is_job(os.environ):
        check_run_dir(run_path)
        # An earlier attempt may still be writing its last commit on a cluster that is going away.
        run.lock(stop_wait_s(os.environ) + MARGIN_S)
    else:
        run.lock()
    try:
        say_short_grace(config, run)
        history = open_history(run, config, resume, run.run_id() or uuid4().hex[:12])
        check_engine(config.rollout, config.policy)
        data = load_training_data(config, run)
        if is_finished(config, run, history, len(data.splits.train)):
            say_finished(config, run, history)
            return Outcome(None, history.steps_done, history.committed_steps, 0.0)
        with ExitStack() as stack:
            stop = stack.enter_context(stop_request())
            weights_dir = stack.enter_context(shared_weights(config, history.run_id))
            url, check_stream = stack.enter_context(stream_of(config, run))
            ledger = open_ledger(url, history.run_id, config.stream, lease_losses=config.rollout.lease_losses)
            try:
                ray = stack.enter_context(ray_cluster(config.cluster))
            except SystemExit as ended:  # while Ray comes up it takes SIGTERM for itself
                if ended.code != signal.SIGTERM:
                    raise
                outcome = Outcome("SIGTERM", history.steps_done, history.committed_steps, 0.0)
                say_end(run, config, outcome, ledger.counts())
                return outcome
            stop.install()
            fitting(config, nodes_of_ray(ray.nodes()))
            machine = check_reach(config, addresses_of_ray(ray.nodes()))
            telemetry = Telemetry(
                config.run.trackers,
                run.path,
                config.run.name,
                config.model_dump(mode="json"),
                others={"ray": partial(RayMetrics, config.run.name, history.run_id)},
            )
            save_resolved(config, run.config)
            if resume not in ("auto", "never"):
                # An older commit was asked for: what came after it is generated again. Before the run goes back to it,
                # or a start that is cut off here would leave scored groups of the other branch to the next.
                ledger.forget()
            begin_incarnation(run, history, data.fingerprint)
            budget = RestartBudget(config.cluster.restarts, config.cluster.restart_pause_s)
            label = f"{config.run.name}.{history.run_id[:6]}.{history.incarnation}"
            supervisor = Supervisor(
                ray, label, run, ledger, budget, config.cluster.progress_s, watch=check_stream, machine=machine
            )
            stack.callback(supervisor.stop)
            training = Training(
                config, run, history, data, ledger, supervisor, stop, weights_dir, url, telemetry, console
            )
            return training.run_to_the_end()
    except Exception as error:
        with suppress(OSError):  # the disk may be what failed: the error itself says more
            if run.events.exists():
                run.event("ended", error=f"{type(error).__name__}: {error}")
        raise
    finally:
        run.unlock()


def say_short_grace(config: Config, run: RunDir) -> None:
    """Says where Ray would end this run before its last commit; it goes on all the same, from the commit before."""
    if is_job(os.environ) and (short := short_grace(config.cluster.stop_s, os.environ)) is not None:
        log.warning("%s", short)
        run.event("short_grace", why=short)


def is_finished(config: Config, run: RunDir, history: History, prompts: int) -> bool:
    """Whether every step of the recipe is committed and policy/ is of that commit: there is nothing to go on with."""
    done = history.settled(config.run.epochs)
    steps = total_steps(
        prompts,
        epochs=config.run.epochs,
        steps=config.run.steps,
        groups_per_step=config.run.groups_per_step,
        steps_done=history.committed_steps,
        groups_done=done.committed + done.failed,
    )
    return history.committed_steps >= steps and is_marked(run.policy, policy_mark(run, history))


def say_finished(config: Config, run: RunDir, history: History) -> None:
    """Says that a run is finished, where it was killed between its last act and its last word; else nothing."""
    steps = history.committed_steps
    if said_finished(run, steps):
        return
    run.steps_done = steps
    StatusFile(run, steps).end("finished")
    counts = {**dict.fromkeys(STATES, 0), "committed": history.groups_done, "failed": len(history.failed)}
    say_end(run, config, Outcome(None, steps, steps, 0.0), counts)


def check_reach(config: Config, machines: set[str]) -> str | None:
    """What a run keeps on one machine by default, actors on other machines would not find.

    Returns the one of the machines (their addresses) that the run stays on whichever join the cluster later; None where
    any can be used.

    Raises:
        UserError: the cluster has several, and the stream or the weights are on this one alone.
    """
    in_shared_memory = config.cluster.weights == "files" and config.cluster.weights_dir is None
    if config.stream.url is not None and not in_shared_memory:
        return None
    if len(machines) < 2:
        return next(iter(machines), None)
    if config.stream.url is None:
        raise UserError(
            f"stream.url: is null, and the cluster has {len(machines)} machines; give the URL of a Redis that all of "
            "them reach"
        )
    raise UserError(
        f"cluster.weights_dir: is null (shared memory), and the cluster has {len(machines)} machines; give a path that "
        "all of them see, or set cluster.weights to 'collective'"
    )


@contextmanager
def stream_of(config: Config, run: RunDir) -> Iterator[tuple[str, Callable[[], None]]]:
    """The URL of the recipe's Redis, or of one that is a child of this process, with its data in the run directory.

    With it a check that raises where the child is down for good.
    """
    if config.stream.url is not None:
        yield config.stream.resolved_url(), lambda: None
        return
    server = EmbeddedRedis(run.redis, config.stream.appendfsync, maxmemory_mb=config.stream.maxmemory_mb)
    with KeptRedis(server, restarts=config.stream.restarts, told=run.event) as kept:
        yield server.url, kept.check


@contextmanager
def shared_weights(config: Config, run_id: str) -> Iterator[Path]:
    """The directory that weights are published in, of this driver alone; gone at its end, whatever ends it."""
    root = Path(config.cluster.weights_dir or "/dev/shm").absolute()  # noqa: S108
    for left_over in root.glob(f"attune-{run_id}-*"):  # of a machine that went down, or a janitor that did
        pid, _, began = left_over.name.rpartition("-")[2].partition(".")
        if not (pid.isdecimal() and str(began_at(int(pid))) == began):  # else: of a copy of the run that lives
            shutil.rmtree(left_over, ignore_errors=True)
    directory = root / f"attune-{run_id}-{os.getpid()}.{began_at(os.getpid())}"
    with with_janitor(directory):
        directory.mkdir(parents=True)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

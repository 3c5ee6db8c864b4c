"""The models of a server alone: each replica is a child process, so that the event loop and the models never share an
interpreter, and one that dies takes no other with it. A run has actors in their place (`reward_server.model_actor`)."""

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from reward_server.config import RewardSection
from reward_server.model_main import facts_of, read, rows_message, write
from reward_server.placement import model_spec, placed_models, share_gpus
from reward_server.replicas import ReplicaLost, ReplicaRunner, start_all
from reward_server.runner import ModelFacts, ModelSpec, Output, Row
from services.errors import Deadline, UserError

LOAD_S = 600.0
RUN_S = 120.0


class ModelFailed(Exception):  # noqa: N818 - reads as what it says where it is raised
    """The model raised, in its process: the type and the places in the code, not what was said."""


class ModelProcess:
    """A child process that holds a model, as a replica."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        threads: int,
        gpus: str | None = None,
        load_s: float = LOAD_S,
        run_s: float = RUN_S,
    ) -> None:
        """`threads`: of torch. `gpus`: CUDA_VISIBLE_DEVICES of the child; None: the server's own. `load_s`, `run_s`:
        deadlines for loading and for one batch."""
        self._spec = spec
        self._environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if gpus is not None:
            self._environment["CUDA_VISIBLE_DEVICES"] = gpus
        self._load_s = load_s
        self._run_s = run_s
        self._lock = threading.Lock()
        self._stopped = False
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    @property
    def pid(self) -> int | None:
        """Of the child that was started last."""
        return None if self._process is None else self._process.pid

    def start(self) -> ModelFacts:
        self._end()
        connection = self._spawn()
        try:
            return facts_of(self._ask(connection, {"spec": asdict(self._spec)}, self._load_s))
        except _Late:
            self._end()
            raise Deadline(waited_for="a model to load", who=self._spec.field, seconds=self._load_s) from None

    def run(self, rows: Sequence[Row]) -> list[Output]:
        if self._connection is None:
            raise ReplicaLost(f"the process of {self._spec.field} is not started")
        try:
            return self._ask(self._connection, rows_message(rows), self._run_s)["outputs"]
        except _Late:
            self._end()  # a late answer would be taken for the next batch's
            raise ReplicaLost(f"the process of {self._spec.field} did not answer within {self._run_s:.0f} s") from None

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
        self._end()

    def _spawn(self) -> Connection:
        ours, theirs = socket.socketpair()
        with theirs:
            # A child that is stopped reads nothing: no write waits for it longer than for an answer.
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(self._run_s) + 1, 0))
            connection = Connection(ours.detach())
            # The child finds the packages where this process does, and not in whatever directory it is started in.
            path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
            number = theirs.fileno()
            with self._lock:
                if self._stopped:
                    raise ReplicaLost(f"the process of {self._spec.field} was stopped")
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "reward_server.model_main", str(number), self._spec.field],
                    pass_fds=(number,),
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # standard output is the server's alone
                    env={**os.environ, **self._environment, "PYTHONPATH": path},
                )
        self._connection = connection
        return connection

    def _ask(self, connection: Connection, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        try:
            write(connection, message)
            if not connection.poll(seconds):
                raise _Late
            answer = read(connection)
        except BlockingIOError:  # the write had no end
            raise _Late from None
        except (OSError, EOFError) as error:
            raise ReplicaLost(f"the process of {self._spec.field} ended") from error
        if "refused" in answer:
            raise UserError(answer["refused"])
        if "failed" in answer:
            raise ModelFailed(answer["failed"])
        return answer

    def _end(self) -> None:
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.wait()


class _Late(Exception):  # noqa: N818
    """No answer before the deadline."""


def model_processes(section: RewardSection, *, without: Collection[str] = ()) -> dict[str, ReplicaRunner]:
    """The models of a recipe, by the source's name, but for those in `without`, each in processes of its own.

    Raises UserError for a model that cannot be loaded and for GPUs that are not there, Deadline.
    """
    models = {name: source for name, source in placed_models(section).items() if name not in without}
    gpus = share_gpus({name: (one.replicas, one.gpus) for name, one in models.items()}, visible_gpus())
    cores = len(os.sched_getaffinity(0))
    shared = max(1, cores // max(1, sum(one.replicas for one in models.values())))

    def started(name: str) -> ReplicaRunner:
        source = models[name]
        spec = model_spec(name, source)
        threads = source.threads or shared
        run_s = max(RUN_S, section.source_timeout_s)
        replicas = [ModelProcess(spec, threads=threads, gpus=visible, run_s=run_s) for visible in gpus[name]]
        return ReplicaRunner(name, replicas, restarts=source.restarts, wait_s=run_s)

    return start_all({name: partial(started, name) for name in models})


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return tuple(name.strip() for name in given.split(",") if name.strip())
    numbers = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")]
    return tuple(sorted(numbers, key=int))

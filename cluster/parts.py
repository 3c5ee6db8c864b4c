"""The actors that serve a run beside the learner: reward server, scoring workers, rollout actors."""

import math
import secrets
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from cluster.config import Config
from cluster.plan import Part, model_part
from cluster.ray_metrics import ROLLOUT_COUNTERS, export_counters
from cluster.reward_actors import RewardActor, ScoringActor
from cluster.running import Kept, Running
from cluster.supervise import POLL_S, Supervisor
from reward_server.model_actor import ModelActor
from reward_server.placement import model_spec, placed_models
from reward_server.runner import ModelSpec
from rollout.worker import RolloutWorker
from services.errors import Deadline

THIN = {"OMP_NUM_THREADS": "1"}


def labels_of(config: Config, run_id: str, actor: str) -> dict[str, str]:
    """The labels of what an actor exports of itself."""
    return {"run": config.run.name, "run_id": run_id, "actor": actor}


class RewardParts:
    """The run's reward server, with a token of its own, and the workers that bring it the samples, each kept up.

    Where the recipe names a server (`reward.url`), the workers go to that one and none is started. A server that was
    started again stands elsewhere: its workers are told where.
    """

    def __init__(
        self, supervisor: Supervisor, parts: Mapping[str, Part], config: Config, stream_url: str, run_id: str
    ) -> None:
        """Begins to start them; `wait` returns when they are up."""
        self._supervisor = supervisor
        self._part = parts["scoring_worker"]
        self._config = config
        self._stream_url = stream_url
        self._run_id = run_id
        self._workers: list[Kept] = []
        self._url, self._token = config.reward.worker.url, config.reward.worker_token()
        if self._url is not None:
            self._serve_at(self._url)
            return
        self._token = secrets.token_hex(32)
        models = {
            name: _model_actors(supervisor, parts[model_part(name)], model_spec(name, source), source.threads)
            for name, source in placed_models(config.reward).items()
        }

        def start() -> Running:
            server = supervisor.actor(
                "reward-server",
                RewardActor,
                parts["reward_server"],
                THIN,
                config.reward,
                token=self._token,
                models=models,
                load_s=config.cluster.start_s,
                labels=labels_of(config, run_id, "reward-server"),
            )
            return Running("reward server", server, up=server.start.remote())

        supervisor.keep(Kept("reward_server", parts["reward_server"], start, on_up=self._serve_at))

    def wait(self, seconds: float, tick: Callable[[], None]) -> None:
        """Returns when there is a server and its workers were started.

        Raises:
            Deadline, PartFailed, UserError: there is none, and why.
        """
        end = time.monotonic() + seconds
        while not self._workers:
            if time.monotonic() > end:
                raise Deadline(waited_for="the reward server to start", who="reward server", seconds=seconds)
            tick()
            self._supervisor.check()
            time.sleep(POLL_S)

    def _serve_at(self, url: str) -> None:
        self._url = url
        for kept in self._workers:
            if kept.now is not None:
                kept.now.handle.point_to.remote(url, self._token)
        for index in range(self._part.count if not self._workers else 0):
            kept = Kept("scoring_worker", self._part, partial(self._start_worker, f"scoring-{index}"))
            self._workers.append(self._supervisor.keep(kept))

    def _start_worker(self, name: str) -> Running:
        worker = self._supervisor.actor(
            name,
            ScoringActor,
            self._part,
            THIN,
            self._config.reward,
            url=self._url,
            token=self._token,
            stream_url=self._stream_url,
            run_id=self._run_id,
            min_ok=self._config.learner.min_ok,
            name=name,
            stream=self._config.stream,
            labels=labels_of(self._config, self._run_id, name),
        )
        return Running(name, worker, worker.run.remote())


def _model_actors(supervisor: Supervisor, part: Part, spec: ModelSpec, threads: int | None) -> list[Any]:
    """The replicas of a source's model."""
    environment = {
        "OMP_NUM_THREADS": str(threads or max(1, math.ceil(part.cpus))),
        "TOKENIZERS_PARALLELISM": "false",
    }
    handles: list[Any] = []
    for index in range(part.count):
        title = f"{part.name} {index + 1}"
        handles.append(supervisor.actor(title.replace(" ", "-"), ModelActor, part, environment, spec))
        supervisor.others.append(Running(title, handles[-1], part=part))
    return handles


def start_rollouts(
    supervisor: Supervisor,
    part: Part,
    config: Config,
    idf: str | None,
    stream_url: str,
    run_id: str,
) -> None:
    """Starts the rollout actors. They build their engines at once and are leased nothing until the gate is opened.

    `part` may have fewer than the recipe: the others are started when the cluster has room for them.
    """
    environment = {"OMP_NUM_THREADS": str(config.rollout.threads), "TOKENIZERS_PARALLELISM": "false"}

    def start(owner: str) -> Running:
        arguments: dict[str, Any] = {
            "policy": config.policy,
            "capture": config.attention,
            "rollout": config.actors_rollout,
            "data": config.data,
            "salience": config.salience,
            "idf": idf,
            "stream_url": stream_url,
            "run_id": run_id,
            "owner": owner,
            "seed": config.run.seed,
            "stream": config.stream,
            "watch": partial(export_counters, names=ROLLOUT_COUNTERS, labels=labels_of(config, run_id, owner)),
        }
        handle = supervisor.actor(owner, RolloutWorker, part, environment, **arguments)
        return Running(owner, handle, handle.run.remote())

    supervisor.start_rollouts(part, start, missing=config.rollout.actors - part.count)


def wait_for_rollouts(supervisor: Supervisor, count: int, seconds: float, tick: Callable[[], None]) -> None:
    """Returns once there is a rollout actor, and `count` or all that run have built their engines.

    Raises:
        Deadline: names those that have not.
        PlanError: the cluster has no room for any.
        PartFailed, UserError: a model that cannot be loaded is met here.
    """
    asked: dict[str, Any] = {}
    end = time.monotonic() + seconds
    while True:
        rollouts = supervisor.rollouts
        for part in rollouts:
            if part.name not in asked:
                asked[part.name] = part.handle.ready.remote()
        waiting = [asked[part.name] for part in rollouts]
        done = supervisor.ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)[0] if waiting else []
        tick()
        supervisor.check()  # raises what the engine of one that failed said
        if rollouts and len(done) >= min(count, len(waiting)) and supervisor.rollouts == rollouts:
            return
        if time.monotonic() > end:
            supervisor.check_room("rollout", seconds)
            late = [part.name for part in rollouts if asked[part.name] not in done] or ["the rollout actors"]
            raise Deadline(waited_for="the rollout actors to build their engines", who=", ".join(late), seconds=seconds)
        if not waiting:
            time.sleep(POLL_S)

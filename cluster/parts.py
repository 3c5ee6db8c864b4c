"""The actors that serve a run beside the learner: reward server, scoring workers, rollout actors."""

import math
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from cluster.config import Config
from cluster.plan import Part, model_part
from cluster.reward_actors import RewardActor, ScoringActor
from cluster.supervise import Running, Supervisor
from reward_server.model_actor import ModelActor
from reward_server.placement import model_spec, placed_models
from reward_server.runner import ModelSpec
from rollout.worker import RolloutWorker

THIN = {"OMP_NUM_THREADS": "1"}


def start_rewards(
    supervisor: Supervisor,
    parts: Mapping[str, Part],
    config: Config,
    stream_url: str,
    run_id: str,
    tick: Callable[[], None],
) -> None:
    """Starts the run's reward server, with a token of its own, and the workers that bring it the samples.

    Where the recipe names a server (`reward.url`), the workers go to that one and none is started.
    """
    url, token = config.reward.worker.url, config.reward.worker_token()
    if url is None:
        token = secrets.token_hex(32)
        models = {
            name: _model_actors(supervisor, parts[model_part(name)], model_spec(name, source), source.threads)
            for name, source in placed_models(config.reward).items()
        }
        server = supervisor.actor(
            RewardActor,
            parts["reward_server"],
            THIN,
            config.reward,
            token=token,
            models=models,
            load_s=config.cluster.start_s,
        )
        url = supervisor.wait(
            [server.start.remote()],
            ["reward server"],
            what="the reward server to start",
            seconds=config.cluster.start_s,
            tick=tick,
        )[0]
        supervisor.others.append(Running("reward server", server))
    for index in range(parts["scoring_worker"].count):
        name = f"scoring-{index}"
        worker = supervisor.actor(
            ScoringActor,
            parts["scoring_worker"],
            THIN,
            config.reward,
            url=url,
            token=token,
            stream_url=stream_url,
            run_id=run_id,
            min_ok=config.min_ok_samples,
            name=name,
            stream=config.stream,
        )
        supervisor.services.append(Running(name, worker, worker.run.remote()))


def _model_actors(supervisor: Supervisor, part: Part, spec: ModelSpec, threads: int | None) -> list[Any]:
    """The replicas of a source's model."""
    environment = {
        "OMP_NUM_THREADS": str(threads or max(1, math.ceil(part.cpus))),
        "TOKENIZERS_PARALLELISM": "false",
    }
    handles: list[Any] = []
    for index in range(part.count):
        handles.append(supervisor.actor(ModelActor, part, environment, spec))
        supervisor.others.append(Running(f"{part.name} {index + 1}", handles[-1]))
    return handles


def start_rollouts(
    supervisor: Supervisor,
    part: Part,
    config: Config,
    idf: str | None,
    stream_url: str,
    run_id: str,
) -> None:
    """Starts the rollout actors. They build their engines at once and are leased nothing until the gate is opened."""
    environment = {"OMP_NUM_THREADS": str(config.rollout.threads), "TOKENIZERS_PARALLELISM": "false"}

    def start(owner: str) -> Running:
        arguments: dict[str, Any] = {
            "policy": config.policy,
            "capture": config.attention,
            "rollout": config.rollout,
            "data": config.data,
            "salience": config.salience,
            "idf": idf,
            "stream_url": stream_url,
            "run_id": run_id,
            "owner": owner,
            "seed": config.run.seed,
            "stream": config.stream,
        }
        handle = supervisor.actor(RolloutWorker, part, environment, **arguments)
        return Running(owner, handle, handle.run.remote())

    supervisor.start_rollouts(part.count, start)


def wait_for_rollouts(supervisor: Supervisor, seconds: float, tick: Callable[[], None]) -> None:
    """Returns once every rollout actor has built its engine: a model that cannot be loaded is met here."""
    supervisor.wait(
        [rollout.handle.ready.remote() for rollout in supervisor.rollouts],
        [rollout.name for rollout in supervisor.rollouts],
        what="the rollout actors to build their engines",
        seconds=seconds,
        tick=tick,
    )

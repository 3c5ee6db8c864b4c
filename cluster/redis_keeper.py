"""The Redis of a run: the recipe's, or one that is a child of the driver and is started again when it dies.

Every call on Redis is tried again for `stream.patience_s` seconds, the driver's own too: so a thread watches the
server, which nothing that waits for it can hold up. What it had answered is in its log, but for what the kernel had not
been given yet; that it did not lose what the run builds on is for `cluster.batches` to see.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cluster.config import Config
from cluster.restarts import RestartBudget
from cluster.run_dir import RunDir
from cluster.supervise import PartFailed
from services.stream.embedded import EmbeddedRedis

log = logging.getLogger(__name__)

LOOK_S = 0.1
KIND = "redis"


@dataclass
class RedisOfRun:
    """Where it is (`url`, a secret), and what became of it."""

    url: str
    failed: list[Exception] = field(default_factory=list)

    def check(self) -> None:
        """Raises PartFailed where the embedded server is gone for good."""
        if self.failed:
            raise self.failed[0]


@contextmanager
def redis_of(config: Config, run: RunDir, budget: RestartBudget) -> Iterator[RedisOfRun]:
    """The recipe's Redis, or a server of the run's own with its data in the run directory, kept up for the block."""
    if config.stream.url is not None:
        yield RedisOfRun(config.stream.resolved_url())
        return
    with EmbeddedRedis(run.redis, config.stream.appendfsync, maxmemory_mb=config.stream.maxmemory_mb) as server:
        found = RedisOfRun(server.url)
        ended = threading.Event()
        keeper = threading.Thread(target=_keep, args=(server, found, run, budget, ended), name="redis-keeper")
        keeper.start()
        try:
            yield found
        finally:
            ended.set()
            keeper.join()


def _keep(server: EmbeddedRedis, found: RedisOfRun, run: RunDir, budget: RestartBudget, ended: threading.Event) -> None:
    while not ended.wait(LOOK_S):
        if server.alive():
            continue
        run.event("redis_died", actor=repr(server))
        pause = budget.spend(KIND)
        if pause is None:
            found.failed.append(PartFailed(f"the embedded redis-server died; {run.redis / 'redis.log'} may say why"))
            return
        log.warning("the embedded redis-server died; started again in %.1f s", pause)
        if ended.wait(pause):
            return
        try:
            server.start()
        except Exception as error:  # it is said by the thread that everybody looks at
            found.failed.append(PartFailed(f"the embedded redis-server does not start again: {error}"))
            return
        run.event("part_started", actor=KIND)

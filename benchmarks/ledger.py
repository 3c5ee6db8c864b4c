"""What exact accounting costs: a run's data path with the ledger and its commits, against a plain in-memory queue.

One program does in turn what the parts of a run do: prompts are rendered and generated for (transformers engine),
scored (attention reward), trained on (one ZeRO-3 rank) and the weights published and loaded, at the quickstart's sizes.
Blocks of steps alternate: `queue` hands groups on as objects in a deque and writes nothing; `ledger` leases each group,
puts it on the stream, reads it, puts it back scored, takes and fetches the batch as driver and learner do, on a real
Redis with its append-only file, and ends each block, as long as the quickstart's `checkpoint.every`, with a commit: a
checkpoint, flushed and hashed, its manifest, and the ledger told.

All of it is in one thread, so nothing of the ledger hides behind other work: in a run actors and scorers wait for Redis
beside the learner, and the cost is at most this. `throughput_ratio` is the time of the queue's steps over the ledger's;
its limit is 1. `ledger_share` and `commit_share` are measured inside the ledger's blocks and do not depend on how two
blocks compare: what they leave of 1 is the ratio that the machine's own noise hides.

Responses are cut at RESPONSE tokens, what the quickstart's fine-tuned policy says on average: an untrained one never
ends, and longer ones would make the ledger look cheaper.
"""

import asyncio
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from benchmarks.common import Options, finish, parse_options
from benchmarks.pipeline import QUICK, build_policy
from benchmarks.pipeline import Size as PolicySize
from cluster.config import Config
from cluster.feed import Feed
from cluster.history import History
from cluster.learners import learner_environment
from cluster.recipe import resolve
from cluster.run_dir import RunDir
from learner.commit import begin_checkpoint, commit_checkpoint, prune_checkpoints
from reward_server.scorers.attention import attention_scorer
from reward_server.sources_config import AttentionSource
from reward_server.worker import failure_of, group_items
from rollout.prepare import Preparation, group_of, group_seed, prepare, request_of, sampling_of
from rollout.worker import build_oracle, build_renderer
from services.records import Group, Lease, PolicyVersion, Prompt, Score
from services.stream.embedded import EmbeddedRedis
from services.stream.ledger import open_ledger
from services.text.salience import fit_idf
from services.text.sources import load_prompts

T = TypeVar("T")

NAME = "ledger"
GROUPS, SAMPLES, EVERY, RESPONSE = 16, 8, 10, 12
"""recipes/cagsr-qa.yaml: run.groups_per_step, rollout.samples, checkpoint.every; and tokens of a response."""
LEASE_S = 300.0


@dataclass(frozen=True)
class Size:
    """`rounds` of one block of each kind, of `steps` steps; `warm` steps before them are not counted."""

    rounds: int
    steps: int
    warm: int
    prompts: int


FULL = Size(rounds=5, steps=EVERY, warm=3, prompts=2000)
SHORT = Size(rounds=1, steps=2, warm=1, prompts=400)


@dataclass
class Clock:
    """Seconds by what they were spent on."""

    spent: dict[str, float] = field(default_factory=dict)

    def of(self, what: str, call: Callable[[], T]) -> T:
        began = time.perf_counter()
        try:
            return call()
        finally:
            self.spent[what] = self.spent.get(what, 0.0) + time.perf_counter() - began


def recipe(policy: Path, size: Size) -> Config:
    return resolve(
        {
            "run": {"seed": 0, "epochs": 100, "groups_per_step": GROUPS, "trackers": []},
            "data": {"source": "generated:qa", "limit": size.prompts},
            "salience": {"content": "user"},
            "policy": {"model": str(policy), "family": "decoder"},
            "rollout": {"actors": 1, "samples": SAMPLES, "max_tokens": RESPONSE},
            "learner": {"ranks": 1, "advantage": "grpo", "minibatches": 2, "kl": {"place": "loss", "coef": 0.15}},
            "checkpoint": {"every": EVERY},
        },
        NAME,
    )


class Parts:
    """The work of a step, the same in both kinds of block."""

    def __init__(self, config: Config, root: Path, prompts: Sequence[Prompt]) -> None:
        from learner.worker import LearnerWorker

        renderer = build_renderer(config.policy, config.data, config.rollout)
        self.config = config
        self.preparation = Preparation(renderer, config.salience, fit_idf(prompts, renderer, config.salience))
        self.engine = build_oracle(config.policy, config.attention, config.rollout)
        self.scorer = attention_scorer(AttentionSource(preset="comparable"), options_allowed=False)
        self.learner = LearnerWorker(config.model_dump(mode="json"), 0, 1, str(root))
        self.learner.setup(*self.learner.address(), None, 1000)
        self.weights = root / "weights"
        self.version = PolicyVersion(1, 0)

    def generate(self, lease: Lease) -> Group:
        prepared = prepare(lease.prompt, self.preparation)
        seed = group_seed(0, lease.epoch, lease.prompt.prompt_id, self.version.step)
        request = request_of(prepared, sampling_of(self.config.rollout), seed, 0)
        (completions,) = asyncio.run(self.engine.generate([request]))
        return group_of(
            lease,
            prepared,
            completions,
            tokenizer=self.preparation.tokenizer,
            layers=self.engine.layers,
            eos_ids=self.engine.eos_ids,
            version=self.version,
        )

    def score(self, group: Group) -> Group:
        found = asyncio.run(self.scorer.score(group_items(group)))
        scores = [
            Score(
                status=one.component.status,
                value=one.component.value,
                detail=dict(one.component.detail),
                error=None if one.component.error is None else failure_of(one.component.error),
            )
            for one in found
        ]
        rewarded = zip(group.samples, scores, strict=True)
        samples = tuple(s.model_copy(update={"scores": {"attention": score}, "reward": score}) for s, score in rewarded)
        return group.model_copy(update={"samples": samples})

    def train(self, step: int, groups: Sequence[Group]) -> str:
        """Trains, publishes, loads; the path of the published weights."""
        self.learner.train_on(step, groups)
        self.version = PolicyVersion(1, step + 1)
        shutil.rmtree(self.weights, ignore_errors=True)
        manifest = self.learner.publish(self.version, str(self.weights))
        asyncio.run(self.engine.load_weights(manifest, "rollout-0"))
        return manifest


class Queue:
    """Groups go on as they are."""

    def __init__(self, parts: Parts, prompts: Sequence[Prompt]) -> None:
        self._parts = parts
        self._prompts = prompts
        self._next = 0

    def step(self, step: int) -> None:
        parts, generated, scored = self._parts, deque[Group](), deque[Group]()
        for _ in range(GROUPS):
            prompt = self._prompts[self._next % len(self._prompts)]
            lease = Lease(group_id=f"0:{prompt.prompt_id}", attempt=1, epoch=0, order=self._next, prompt=prompt)
            generated.append(parts.generate(lease))
            self._next += 1
        while generated:
            scored.append(parts.score(generated.popleft()))
        parts.train(step, list(scored))

    def end(self) -> None:
        """Nothing is kept."""


class Accounted:
    """Groups go by Redis, and a block ends with a commit."""

    def __init__(self, parts: Parts, prompts: Sequence[Prompt], url: str, run: RunDir) -> None:
        config = parts.config
        self._parts = parts
        self._run = run
        self._history = History(run_id="benchmark", incarnation=1)
        self._actor, self._scorer, self._learner, self._driver = (
            open_ledger(url, "benchmark", config.stream, lease_losses=config.rollout.lease_losses) for _ in range(4)
        )
        self._feed = Feed(prompts, seed=0, epochs=100, steps=None, groups_per_step=GROUPS)
        self._done = 0
        self.clock = Clock()
        self._driver.claim()
        self._feed.register(self._driver, self._window)
        self._driver.reconcile({}, {})
        self._open("weights.json")

    @property
    def _window(self) -> int:
        return 3 * GROUPS

    def _open(self, manifest: str) -> None:
        self._feed.register(self._driver, self._done * GROUPS + self._window)
        self._feed.top_up(self._driver, self._window)
        self._driver.open_gate(self._parts.version, manifest, self._feed.admission_limit(self._done, 0))

    def step(self, step: int) -> None:
        parts, of = self._parts, self.clock.of
        self._driver.open_gate(parts.version, "weights.json", self._feed.admission_limit(self._done, 0))
        for _ in range(GROUPS):
            lease = of("ledger", lambda: self._actor.lease("rollout-0", parts.version, LEASE_S))
            assert isinstance(lease, Lease), lease
            group = parts.generate(lease)
            of("ledger", lambda group=group: self._actor.put_generated(group))
        for entry, group in of("ledger", lambda: self._scorer.read_generated("scoring-0", GROUPS, 1, 60_000)):
            scored = parts.score(group)
            of("ledger", lambda entry=entry, scored=scored: self._scorer.put_scored(entry, scored))
        batch = of("ledger", self._take)
        groups = of("ledger", lambda: self._learner.fetch(batch))
        manifest = parts.train(step, groups)
        self._history.steps[self._done] = batch
        self._done += 1
        of("ledger", lambda: self._open(manifest))

    def _take(self) -> list[str]:
        """As the driver waits for a batch: it asks, looks at leases and counts, and keeps the samples."""
        self._driver.expire_leases()
        self._driver.counts()
        batch = self._driver.take(self._done, GROUPS, oldest_step=0)
        assert batch is not None
        self._driver.fetch(batch)
        self._driver.look()
        return batch

    def end(self) -> None:
        self.clock.of("commit", self._commit)

    def _commit(self) -> None:
        partial = begin_checkpoint(self._run.path, self._done)
        self._parts.learner.save_checkpoint(str(partial))
        commit_checkpoint(partial, self._history.manifest())
        new = range(self._history.committed_steps, self._done)
        self._history.committed_steps = self._done
        self._driver.commit({step: self._history.steps[step] for step in new})
        prune_checkpoints(self._run.path, self._parts.config.checkpoint.keep)


def figures(queue_s: Sequence[float], ledger_s: Sequence[float], spent: dict[str, float], steps: int) -> dict[str, Any]:
    """The results, from the seconds of each block of `steps` steps, and what the ledger's blocks spent on what.

    Raises:
        ValueError: there is no block of one kind.
    """
    if not queue_s or not ledger_s:
        raise ValueError("a ratio needs a block of each kind")
    whole = sum(ledger_s)
    return {
        "throughput_ratio": median(queue_s) / median(ledger_s),
        "limit": 1.0,
        "ledger_share": spent["ledger"] / whole,
        "commit_share": spent["commit"] / whole,
        "ratio_by_shares": 1 - (spent["ledger"] + spent["commit"]) / whole,
        "seconds_a_step_queue": median(queue_s) / steps,
        "seconds_a_step_ledger": median(ledger_s) / steps,
        "ledger_ms_a_step": 1000 * spent["ledger"] / (steps * len(ledger_s)),
        "ledger_ms_a_group": 1000 * spent["ledger"] / (steps * len(ledger_s) * GROUPS),
        "commit_s": spent["commit"] / len(ledger_s),
        "steps_between_commits": steps,
        "groups_a_step": GROUPS,
        "samples_a_group": SAMPLES,
        "tokens_a_response": RESPONSE,
        "blocks": len(ledger_s),
    }


def measure(options: Options, root: Path) -> dict[str, Any]:
    import os

    size = SHORT if options.quick else FULL
    config = recipe(root / "policy", size)
    os.environ |= learner_environment(config)
    of_policy = QUICK if options.quick else PolicySize(1, (0,), GROUPS, RESPONSE, size.prompts)
    build_policy(options.quick, of_policy, root / "policy")
    prompts = load_prompts(config.data).train
    run = RunDir(root / "run")
    run.path.mkdir()
    with EmbeddedRedis(run.redis) as server:
        parts = Parts(config, root, prompts)
        queue, accounted = Queue(parts, prompts), Accounted(parts, prompts, server.url, run)
        step = 0
        seconds: dict[str, list[float]] = {"queue": [], "ledger": []}
        for way in (queue, accounted):
            for _ in range(size.warm):
                way.step(step)
                step += 1
            way.end()
        accounted.clock = Clock()
        for number in range(size.rounds):
            for name in ("queue", "ledger") if number % 2 == 0 else ("ledger", "queue"):
                way = queue if name == "queue" else accounted
                began = time.perf_counter()
                for _ in range(size.steps):
                    way.step(step)
                    step += 1
                way.end()
                seconds[name].append(time.perf_counter() - began)
    return figures(seconds["queue"], seconds["ledger"], accounted.clock.spent, size.steps)


def main() -> None:
    options = parse_options(NAME, "The cost of exact accounting: ledger and commits against an in-memory queue.")
    with tempfile.TemporaryDirectory(prefix="attune-ledger-") as root:
        results = measure(options, Path(root))
    finish(NAME, options, results)


if __name__ == "__main__":
    main()

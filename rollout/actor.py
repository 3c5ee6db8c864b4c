"""The rollout actor: leases prompts, generates, streams each group on as it finishes, takes new weights between groups.

It asks the ledger for work and is told by it which weights to hold: it calls no learner and no learner calls it. A
lease is renewed while its group is being generated, so that only a dead or stuck actor loses one.

A prompt that cannot be generated for is a failure of data and is reported as such; anything else that goes wrong is a
failure of infrastructure, ends the actor, and the lease passes to another.
"""

import asyncio
import logging
import time
from dataclasses import dataclass, replace

from rollout.config import RolloutSection
from rollout.engine import Engine
from rollout.prepare import Preparation, group_of, group_seed, prepare, request_of, sampling_of
from services.errors import UserError
from services.records import Failure, Group, Lease, PolicyVersion
from services.stream.ledger import Ledger, LoadWeights, Wait
from services.transfer.offer import Broken, is_offer, read_offer
from services.weights import Corrupt

log = logging.getLogger(__name__)

DATA_BUDGET = 0
"""A prompt that does not fit the model will not fit it at a second attempt."""


@dataclass
class RolloutCounters:
    """What an actor did so far. Times are seconds: `busy_s` in the engine, generating or loading weights; `load_s`
    loading weights; `capture_s` taking attention. `tokens` of responses; `prompt_tokens` once a group."""

    groups: int = 0
    samples: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    busy_s: float = 0.0
    load_s: float = 0.0
    capture_s: float = 0.0
    renewed: int = 0
    loads: int = 0


async def _some_done(working: set[asyncio.Task[None]], seconds: float | None) -> set[asyncio.Task[None]]:
    """Waits for a task to end, at most `seconds` (None: until one does); what is left. Raises what a task raised."""
    if not working:
        await asyncio.sleep(seconds or 0.0)
        return working
    done, left = await asyncio.wait(working, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    return left


class RolloutLoop:
    """The loop of one actor over one engine. `seed` is the run's."""

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        preparation: Preparation,
        section: RolloutSection,
        *,
        owner: str,
        seed: int,
    ) -> None:
        self._engine = engine
        self._ledger = ledger
        self._preparation = preparation
        self._section = section
        self._owner = owner
        self._seed = seed
        self._loaded: PolicyVersion | None = None
        self._broken: str | None = None
        self._stopping = False
        self._limit = section.group_limit
        self._in_engine = 0
        self._busy_since = 0.0
        self.counters = RolloutCounters()

    async def run(self) -> None:
        """Works until `stop`; raises what ends the actor. Groups are generated side by side, as many as allowed."""
        working: set[asyncio.Task[None]] = set()
        try:
            while not self._stopping:
                if len(working) >= self._limit:
                    working = await _some_done(working, self._section.poll_s if self._section.loads_in_flight else None)
                    if len(working) >= self._limit:
                        await self._keep_up()
                    continue
                answer = await asyncio.to_thread(self._ledger.lease, self._owner, self._loaded, self._section.lease_s)
                if isinstance(answer, Wait):
                    working = await _some_done(working, self._section.poll_s)
                elif isinstance(answer, LoadWeights):
                    if not self._section.loads_in_flight:
                        while working:
                            working = await _some_done(working, None)
                    if not await self._load(answer):
                        working = await _some_done(working, self._section.poll_s)
                else:
                    working.add(asyncio.create_task(self._work(answer)))
            while working:
                working = await _some_done(working, None)
        finally:
            for task in working:
                task.cancel()

    def stop(self) -> None:
        """Ends `run` after the groups in hand."""
        self._stopping = True

    def progress(self) -> tuple[int, bool]:
        """Groups generated and sets of weights loaded, and whether the engine has work."""
        return self.counters.groups + self.counters.loads, self._in_engine > 0

    def figures(self) -> RolloutCounters:
        """The counters as of now: an engine that has not come to rest since is counted up to this moment."""
        since = time.monotonic() - self._busy_since if self._in_engine else 0.0
        counters = self.counters
        return replace(counters, busy_s=counters.busy_s + since, capture_s=self._engine.capture_s)

    async def _load(self, answer: LoadWeights) -> bool:
        """False where there is nothing to load yet: the offer is not for this actor, or its transfer broke off."""
        if is_offer(answer.path) and (answer.path == self._broken or not read_offer(answer.path).lists(self._owner)):
            return False
        self._enter_engine()
        began = time.monotonic()
        try:
            self._loaded = await self._engine.load_weights(answer.path, self._owner)
        except Broken as error:
            # The engine may be torn. The driver knows who has the version, and offers it again to those who have not.
            log.warning("%s: %s", self._owner, error)
            self._loaded = None
            self._broken = answer.path
            return False
        except (FileNotFoundError, Corrupt):
            gate = await asyncio.to_thread(self._ledger.gate)
            if gate is not None and gate.weights == answer.path:
                raise
            # Removed while it was being read, because a newer version was published: the next lease names that one.
        finally:
            self._leave_engine()
            self.counters.load_s += time.monotonic() - began
        self.counters.loads += 1
        return True

    async def _keep_up(self) -> None:
        """Takes newer weights without asking for a lease: all hands are full, perhaps for minutes."""
        gate = await asyncio.to_thread(self._ledger.gate)
        if gate is not None and gate.version != self._loaded:
            await self._load(LoadWeights(gate.version, gate.weights))

    async def _work(self, lease: Lease) -> None:
        renewing = asyncio.create_task(self._renew(lease))
        self._enter_engine()
        try:
            group = await self._generate(lease)
        except UserError as error:
            failure = Failure(kind="data", code="prompt_refused", message=str(error))
            await asyncio.to_thread(
                self._ledger.fail, lease.group_id, lease.attempt, failure, DATA_BUDGET, owner=self._owner
            )
            return
        finally:
            renewing.cancel()
            self._leave_engine()
        await asyncio.to_thread(self._ledger.put_generated, group)
        self.counters.groups += 1
        self.counters.samples += len(group.samples)
        self.counters.prompt_tokens += len(group.samples[0].prompt_ids)
        self.counters.tokens += sum(len(sample.response_ids) for sample in group.samples)

    async def _generate(self, lease: Lease) -> Group:
        version = self._engine.version
        prepared = prepare(lease.prompt, self._preparation)
        seed = group_seed(self._seed, lease.epoch, lease.prompt.prompt_id, version.step)
        request = request_of(prepared, sampling_of(self._section), seed, self._section.keep_maps)
        try:
            (completions,) = await self._engine.generate([request])
        except UserError as error:  # the engine knows token ids, not prompts
            raise UserError(f"prompt {lease.prompt.prompt_id}: {error}") from error
        return group_of(
            lease,
            prepared,
            completions,
            tokenizer=self._preparation.tokenizer,
            layers=self._engine.layers,
            eos_ids=self._engine.eos_ids,
            version=version,
        )

    def _enter_engine(self) -> None:
        if self._in_engine == 0:
            self._busy_since = time.monotonic()
        self._in_engine += 1

    def _leave_engine(self) -> None:
        self._in_engine -= 1
        if self._in_engine == 0:
            self.counters.busy_s += time.monotonic() - self._busy_since

    async def _renew(self, lease: Lease) -> None:
        while True:
            await asyncio.sleep(self._section.lease_s / 3)
            try:
                await asyncio.to_thread(
                    self._ledger.renew, self._owner, lease.group_id, lease.attempt, self._section.lease_s
                )
            except Exception as error:
                # Redis may be back, or have room again, before the group is done: then it is not to be lost for want
                # of a renewal. What stays wrong ends the actor in its own calls.
                log.warning("%s: a lease is not renewed: %s", self._owner, error)
                continue
            self.counters.renewed += 1

"""The scoring worker: takes generated groups off the stream, has them scored over HTTP, writes them back.

Invariants (design): a failure is never a number (2): a sample keeps its failure with its name, and a group with fewer
than `min_ok` scored samples is failed in the ledger. Every wait has a deadline (6): a server that gives no usable
answer for `outage_s` ends the run with `ScoringOutage`. The ledger's fencing decides which answer counts, so that a
group that two workers score is written once (1).
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from reward_server.client import RewardClient, RewardRefused, RewardUnavailable, pause_s
from reward_server.config import WorkerSection
from reward_server.schema import (
    AttentionStatistics,
    Component,
    ErrorCode,
    Item,
    ItemError,
    Message,
    Result,
    RewardResponse,
    ServerInfo,
    item_error,
)
from services.attention.reward import NO_SALIENT_TOKENS
from services.records import Failure, Group, Sample, Score

log = logging.getLogger(__name__)


class ScoringOutage(Exception):  # noqa: N818 - the event, not an error of the worker
    """The reward server has given no usable answer for too long. The message is for the user."""


class ScoringRefused(Exception):  # noqa: N818
    """The reward server refuses what the worker sends (its token, its version): no retry helps."""


class ScoringLedger(Protocol):
    """What the worker asks of the ledger: `services.stream.ledger.Ledger`."""

    def read_generated(
        self, consumer: str, count: int, block_ms: int, min_idle_ms: int
    ) -> Sequence[tuple[str, Group]]: ...
    def put_scored(self, entry_id: str, group: Group) -> bool: ...
    def fail(self, group_id: str, attempt: int, failure: Failure, budget: int, *, entry_id: str | None = None) -> str:
        """`pending`, `failed`, or `late` where another answer came first; takes the entry off the stream."""
        ...


class ScoringWorker:
    """One reader of the stream. Several may run, in one process or many, each with a `consumer` name of its own."""

    def __init__(
        self, ledger: ScoringLedger, client: RewardClient, section: WorkerSection, min_ok: int, *, consumer: str
    ) -> None:
        """`client`: one that tries once, as the worker tries again by itself, and counts the time. `min_ok`: the fewest
        scored samples a group needs (2; 1 where the advantage needs no group)."""
        self._ledger = ledger
        self._client = client
        self._asking: RewardClient | None = None
        self._section = section
        self._min_ok = min_ok
        self._consumer = consumer
        self._failing_since: float | None = None
        self._stop = asyncio.Event()
        self._at_hand = 0
        self._at_hand_since = 0.0
        self._busy_s = 0.0
        self._steps = 0
        self.counters: Counter[str] = Counter()
        """groups_scored, groups_late, groups_failed, samples_ok, samples_failed, failed/CODE."""

    async def run(self) -> None:
        """Works until `stop`. Raises ScoringOutage or ScoringRefused: the groups at hand stay in the stream."""
        while not self._stop.is_set():
            await self.step()

    def stop(self) -> None:
        """Ends `run` soon, also out of a pause between tries; unscored groups stay in the stream."""
        self._stop.set()

    async def use(self, client: RewardClient) -> None:
        """Asks another server from the next try on: the old one is gone, and so is what failed there. The old client is
        closed once no try is under way with it."""
        old, self._client = self._client, client
        self._failing_since = None
        if old is not self._asking:
            await old.close()

    def progress(self) -> tuple[int, bool]:
        """How often it got through what it had read, and whether it has groups at hand."""
        return self._steps, self._at_hand > 0

    def busy_s(self) -> float:
        """Seconds so far in which it had groups at hand, those of now among them."""
        return self._busy_s + (time.monotonic() - self._at_hand_since if self._at_hand else 0.0)

    async def step(self) -> int:
        """Reads once, scores and writes what came: the number of groups."""
        try:
            return await self._step()
        finally:
            self._busy_s, self._at_hand = self.busy_s(), 0
            self._steps += 1

    async def _step(self) -> int:
        section = self._section
        entries = await asyncio.to_thread(
            self._ledger.read_generated, self._consumer, section.groups, section.block_ms, section.min_idle_ms
        )
        self._at_hand, self._at_hand_since = len(entries), time.monotonic()
        if not entries:
            self._failing_since = None  # nobody asks the server meanwhile: that is no time in which it fails
            return 0
        items = [item for _, group in entries for item in group_items(group)]
        try:
            results = await self._score(items)
        except _Stopped:
            return 0
        at = 0
        for entry_id, group in entries:
            own = results[at : at + len(group.samples)]
            at += len(group.samples)
            await asyncio.to_thread(self._write, entry_id, scored_group(group, own))
        return len(entries)

    def _write(self, entry_id: str, group: Group) -> None:
        rewards = [sample.reward for sample in group.samples if sample.reward is not None]
        errors = [reward.error for reward in rewards if reward.error is not None]
        self.counters["samples_ok"] += len(rewards) - len(errors)
        self.counters["samples_failed"] += len(errors)
        self.counters.update(f"failed/{error.code}" for error in errors)
        if len(rewards) - len(errors) >= self._min_ok:
            accepted = self._ledger.put_scored(entry_id, group)
            self.counters["groups_scored" if accepted else "groups_late"] += 1
            return
        failure = group_failure(errors, len(rewards), self._min_ok)
        budget = self._section.infra_budget if failure.kind == "infra" else self._section.data_budget
        state = self._ledger.fail(group.group_id, group.attempt, failure, budget, entry_id=entry_id)
        self.counters["groups_late" if state == "late" else "groups_failed"] += 1
        log.warning("group %s is %s after scoring: %s", group.group_id, state, failure.message)

    async def _score(self, items: Sequence[Item]) -> list[tuple[Result, ServerInfo | None]]:
        size = self._section.batch_items
        return [
            result
            for start in range(0, len(items), size)
            for result in await self._score_batch(items[start : start + size])
        ]

    async def _score_batch(self, items: Sequence[Item]) -> list[tuple[Result, ServerInfo | None]]:
        """Results of one request's items; those that failed as infra are asked for again, `retries` times.

        A try says nothing of the items, and is not counted, where the server gave no usable answer or none was there to
        score (`source_down`): the items are held until there is, at most `outage_s`. Anything else is counted although
        nothing got through: an item that a service rejects spends its group's budget and does not hold up the others.
        What a model goes down with is not tried on it again: should it be the cause, a model has few lives, and the
        group's next attempt has other responses.
        """
        found: dict[int, tuple[Result, ServerInfo | None]] = {}
        left: list[int] = list(range(len(items)))
        tries = pauses = 0
        held = False
        while left:
            batch = [items[i] for i in left]
            began, client = time.monotonic(), self._client
            try:
                answer = await self._ask(client, batch)
            except RewardUnavailable as failure:
                self._note_failure(client, str(failure), began)
                pauses += 1
                await self._pause(pauses, failure.retry_after_s)
                continue
            except RewardRefused as refusal:
                if refusal.status != 413:
                    raise ScoringRefused(f"the reward server refuses the run's samples: {refusal}") from refusal
                self._failing_since = None
                for i, result in zip(left, await self._score_smaller(batch, str(refusal)), strict=True):
                    found[i] = result
                break
            down = any(_is_down(result) for result in answer.results)
            if down and tries:
                break
            found.update((i, (result, answer.server)) for i, result in zip(left, answer.results, strict=True))
            infra: list[int] = [i for i in left if _is_infra(found[i][0])]
            if held and not down:
                # Somebody is there again. What these items do to it is no part of the outage that was waited out.
                self._failing_since, pauses = None, 0
            held = down
            if len(infra) < len(left):
                self._failing_since = None
            else:
                error = found[infra[0]][0].error
                self._note_failure(client, f"{client.url}: {error.message if error else 'failed'}", began)
            if not down:
                if tries >= self._section.retries:
                    break
                tries += 1
            left = infra
            if left:
                pauses += 1
                await self._pause(pauses)
        return [found[i] for i in range(len(items))]

    async def _score_smaller(self, items: Sequence[Item], why: str) -> list[tuple[Result, ServerInfo | None]]:
        """A request that is too large, in halves; an item that is too large alone fails."""
        if len(items) == 1:
            return [(failed_result(items[0].id, item_error(ErrorCode.TOO_LARGE, why)), None)]
        middle = len(items) // 2
        return [*await self._score_batch(items[:middle]), *await self._score_batch(items[middle:])]

    async def _ask(self, client: RewardClient, items: Sequence[Item]) -> RewardResponse:
        """One try; a client that was replaced meanwhile is closed."""
        self._asking = client
        try:
            return await client.score(items)
        finally:
            self._asking = None
            if client is not self._client:
                await client.close()

    def _note_failure(self, client: RewardClient, why: str, began: float) -> None:
        """Notes a try that scored nothing: from the beginning of the first one, the server fails. One that was replaced
        meanwhile says nothing of the new one."""
        if client is not self._client:
            return
        if self._failing_since is None:
            self._failing_since = began
        failing_s = time.monotonic() - self._failing_since
        log.warning("scoring failed, for %.0f s now: %s", failing_s, why)
        if failing_s >= self._section.outage_s:
            raise ScoringOutage(
                f"the reward server at {self._client.url} has scored nothing for {failing_s:.0f} s "
                f"(reward.worker.outage_s is {self._section.outage_s:g}); last: {why}"
            )

    async def _pause(self, tries: int, asked_s: float | None = None) -> None:
        """Waits between tries, or as long as it is asked to; leaves the worker's step where it is told to stop."""
        try:
            async with asyncio.timeout(pause_s(tries, self._section.backoff_s, asked_s)):
                await self._stop.wait()
        except TimeoutError:
            return
        raise _Stopped


class _Stopped(Exception):  # noqa: N818
    """Leaves a step in which the worker was told to stop."""


def _is_infra(result: Result) -> bool:
    return result.error is not None and result.error.kind == "infra"


def _is_down(result: Result) -> bool:
    return result.error is not None and result.error.code is ErrorCode.SOURCE_DOWN


def failed_result(item_id: str, error: ItemError) -> Result:
    return Result(id=item_id, status="failed", reward=None, components={}, error=error)


def group_items(group: Group) -> list[Item]:
    """The samples of a group as the contract's items, in order; ids are sample ids."""
    prompt = group.prompt
    messages = prompt.messages
    return [
        Item(
            id=sample.sample_id,
            prompt=prompt.text,
            messages=None if messages is None else tuple(Message(role=m.role, content=m.content) for m in messages),
            response=sample.response,
            response_ids=sample.response_ids,
            eos_ids=group.eos_ids,
            reference=prompt.reference,
            facts=prompt.facts or None,
            principles=prompt.principles or None,
            prompt_class=prompt.prompt_class,
            attention=attention_body(sample),
        )
        for sample in group.samples
    ]


def attention_body(sample: Sample) -> AttentionStatistics | None:
    """The statistics of a sample as the contract has them: never its dense map."""
    attention = sample.attention
    if attention is None:
        return None
    return AttentionStatistics(
        mass=attention.mass,
        salient_mass=attention.salient_mass,
        neg_entropy_sum=attention.neg_entropy_sum,
        peak=attention.peak,
        salient_count=len(attention.salient),
        content_count=len(attention.content),
        flags=tuple(flag for flag in sample.flags if flag == NO_SALIENT_TOKENS),
    )


def scored_group(group: Group, results: Sequence[tuple[Result, ServerInfo | None]]) -> Group:
    """The group with `scores`, `reward` and flags in each sample; the reward's detail has the recipe's revision."""
    samples = tuple(
        sample.model_copy(
            update={
                "scores": {name: score_of(component) for name, component in result.components.items()},
                "reward": reward_of(result, server),
                "flags": tuple(dict.fromkeys((*sample.flags, *result.flags))),
            }
        )
        for sample, (result, server) in zip(group.samples, results, strict=True)
    )
    return group.model_copy(update={"samples": samples})


def score_of(component: Component) -> Score:
    return Score(
        status=component.status,
        value=component.value,
        detail={**component.detail, **({"judged_by": component.principles} if component.principles else {})},
        error=None if component.error is None else failure_of(component.error),
    )


def reward_of(result: Result, server: ServerInfo | None) -> Score:
    return Score(
        status=result.status,
        value=result.reward,
        detail=dict(result.detail) if server is None else {**result.detail, "recipe_revision": server.recipe_revision},
        error=None if result.error is None else failure_of(result.error),
    )


def failure_of(error: ItemError) -> Failure:
    return Failure(kind=error.kind, code=error.code.value, message=error.message)


def group_failure(errors: Sequence[Failure], samples: int, min_ok: int) -> Failure:
    """Why a group fails: infra where scoring its infra failures again could save it, else the commonest data code."""
    by_data = [error for error in errors if error.kind == "data"]
    kind = "data" if samples - len(by_data) < min_ok else "infra"
    told = by_data if kind == "data" and by_data else list(errors)
    if not told:
        return Failure(kind="data", code="too_few_samples", message=f"{samples} samples, at least {min_ok} are needed")
    code = Counter(error.code for error in told).most_common(1)[0][0]
    message = next(error.message for error in told if error.code == code)
    ok = samples - len(errors)
    return Failure(kind=kind, code=code, message=f"{ok} of {samples} samples scored, {min_ok} are needed: {message}")

"""Items -> results: asks the sources, with a deadline each, and combines their components. Knows no transport.

Invariants (design): a failure is never a number (2): a source that raises, answers too late or breaks its own contract
fails its items as `infra`. Scoring is a function of the request and the recipe's revision (8): nothing here has memory.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from reward_server.attention import attention_scorer
from reward_server.combination import combine
from reward_server.config import AttentionSource, ExactMatchSource, LengthSource, RewardSection, SourceSection
from reward_server.logs import where
from reward_server.metrics import Metrics
from reward_server.progress import Progress
from reward_server.schema import (
    AttentionRows,
    ErrorCode,
    Item,
    RewardResponse,
    ServerInfo,
    SourceInfo,
    failed_component,
)
from reward_server.scorers import Scored, Scorer, exact_match_scorer, length_scorer, repetition_scorer

log = logging.getLogger(__name__)

PROBE = Item(
    id="probe",
    prompt="Which numbers are these?",
    response="one two three",
    response_ids=(5, 6, 7),
    eos_ids=(2,),
    reference="one two three",
    attention=AttentionRows(rows=((0.5, 0.25), (0.25, 0.5), (0.125, 0.125)), content=(0, 1), salient=(1,)),
)
"""The item that readiness scores: every source must answer it with a number."""


def build_scorer(source: SourceSection, *, options_allowed: bool) -> Scorer:
    """The scorer of a source."""
    if isinstance(source, AttentionSource):
        return attention_scorer(source, options_allowed=options_allowed)
    if isinstance(source, LengthSource):
        return length_scorer(source)
    if isinstance(source, ExactMatchSource):
        return exact_match_scorer(source)
    return repetition_scorer(source)


class ScoringService:
    """The sources of one recipe."""

    def __init__(self, section: RewardSection, metrics: Metrics, scorers: Mapping[str, Scorer] | None = None) -> None:
        """`scorers` replaces the sources' own, by name: for sources that live in other processes."""
        self.section = section
        self.metrics = metrics
        built = {
            name: build_scorer(source, options_allowed=section.options_allowed())
            for name, source in section.sources.items()
            if scorers is None or name not in scorers
        }
        self.scorers: dict[str, Scorer] = {**built, **(scorers or {})}
        self.progress = Progress(section.stalled_s)
        self.recipe_revision = section.recipe_revision()
        self.version = version("attune")

    async def score(self, items: Sequence[Item], sources: Sequence[str] | None = None) -> RewardResponse:
        """Results in the order of the items. `sources` are names of this recipe; None: all of them."""
        started = time.perf_counter()
        names = list(dict.fromkeys(sources)) if sources is not None else list(self.section.sources)
        scored = await asyncio.gather(*(self._ask(name, items) for name in names))
        results = tuple(
            combine(
                item.id,
                {name: answers[i].component for name, answers in zip(names, scored, strict=True)},
                self.section.sources,
                [flag for answers in scored for flag in answers[i].flags],
            )
            for i, item in enumerate(items)
        )
        seconds = time.perf_counter() - started
        self.metrics.answer(seconds, results)
        return RewardResponse(results=results, server=self.info(names, 1000 * seconds))

    def info(self, names: Sequence[str], latency_ms: float) -> ServerInfo:
        return ServerInfo(
            version=self.version,
            recipe_revision=self.recipe_revision,
            sources={name: SourceInfo(revision=self.scorers[name].revision) for name in names},
            latency_ms=latency_ms,
        )

    async def probe(self) -> dict[str, str]:
        """Scores the built-in item, looks at the age of progress: what is wrong, by source; empty where nothing is."""

        async def problem_of(name: str) -> str | None:
            try:
                async with asyncio.timeout(self.section.ready_timeout_s):
                    (answer,) = await self.scorers[name].score([PROBE])
            except TimeoutError:
                return f"no answer within {self.section.ready_timeout_s:g} s"
            except Exception as problem:
                log.error("source %s failed the probe: %s", name, where(problem))
                return f"raised {type(problem).__name__}"
            return None if answer.component.error is None else answer.component.error.message

        problems = await asyncio.gather(*(problem_of(name) for name in self.scorers))
        found = {name: problem for name, problem in zip(self.scorers, problems, strict=True) if problem is not None}
        return found or self.progress.stalled(time.monotonic())

    async def _ask(self, name: str, items: Sequence[Item]) -> Sequence[Scored]:
        started = time.perf_counter()
        try:
            with self.metrics.busy(name):
                async with asyncio.timeout(self.section.source_timeout_s):
                    answers = await self.scorers[name].score(items)
            if len(answers) != len(items):
                raise RuntimeError(f"{len(answers)} answers for {len(items)} items")
        except TimeoutError:
            message = f"source {name} did not answer within {self.section.source_timeout_s:g} s"
            answers = [Scored(failed_component(ErrorCode.SOURCE_TIMEOUT, message))] * len(items)
        except Exception as problem:
            log.error("source %s failed: %s", name, where(problem))
            message = f"source {name} raised {type(problem).__name__}"
            answers = [Scored(failed_component(ErrorCode.SOURCE_ERROR, message))] * len(items)
        components = [answer.component for answer in answers]
        self.metrics.source(name, time.perf_counter() - started, components)
        self.progress.note(name, components, time.monotonic())
        return answers

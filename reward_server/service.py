"""Items -> results: asks the sources, with a deadline each, and combines their components. Knows no transport.

Invariants (design): a failure is never a number (2): a source that raises, answers too late or breaks its own contract
fails its items as `infra`. Scoring is a function of the request and the recipe's revision (8): nothing here has memory.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from reward_server.combination import Ensemble, combine, reducer
from reward_server.config import RewardSection, digest
from reward_server.interventions import InterventionFile
from reward_server.logs import where
from reward_server.metrics import Metrics
from reward_server.model_sources_config import AskingSource
from reward_server.progress import Progress
from reward_server.replicas import NoReplica
from reward_server.runner import ModelRunner
from reward_server.schema import (
    AttentionRows,
    ErrorCode,
    Item,
    RewardResponse,
    ServerInfo,
    SourceInfo,
    failed_component,
)
from reward_server.scorers.base import Scored, Scorer
from reward_server.scorers.build import build_scorers
from reward_server.watched import WatchedRunner

log = logging.getLogger(__name__)

PROBE = Item(
    id="probe",
    prompt="Which numbers are these?",
    response="one two 3",
    response_ids=(5, 6, 7),
    eos_ids=(2,),
    reference="one two 3",
    facts=("The numbers are in rising order.",),
    attention=AttentionRows(rows=((0.5, 0.25), (0.25, 0.5), (0.125, 0.125)), content=(0, 1), salient=(1,)),
)
"""The item that readiness scores: every source must answer it with a number."""


class ScoringService:
    """The sources of one recipe."""

    def __init__(
        self,
        section: RewardSection,
        metrics: Metrics,
        scorers: Mapping[str, Scorer] | None = None,
        *,
        runners: Mapping[str, ModelRunner] | None = None,
    ) -> None:
        """`scorers` replaces the sources' own, by name; `runners` are models that live in other processes, by the
        source's name. Loads the others: raises UserError."""
        self.section = section
        self.metrics = metrics
        self.interventions = None if section.interventions is None else InterventionFile(section.interventions)
        watched = {name: WatchedRunner(name, runner, metrics) for name, runner in (runners or {}).items()}
        self.scorers: dict[str, Scorer] = {
            **build_scorers(section, runners=watched, interventions=self.interventions, without=scorers),
            **(scorers or {}),
        }
        self.progress = Progress(section.stalled_s)
        self._ensembles = {
            name: Ensemble(one.of, reducer(one.reduce, one.quantile), one) for name, one in section.ensembles.items()
        }
        crs = section.crs
        self._weights = {} if crs is None else {crs.preference: crs.weight, crs.absolute: 1 - crs.weight}
        self._recipe_revision = section.recipe_revision()
        self.version = version("attune")

    @property
    def recipe_revision(self) -> str:
        """Of the recipe and, where it has sources whose scores depend on more, of their revisions as they are now."""
        return self._revision({name: scorer.revision for name, scorer in self.scorers.items()})

    def _revision(self, revisions: Mapping[str, str]) -> str:
        sources = self.section.sources
        asking = {name: revision for name, revision in revisions.items() if isinstance(sources[name], AskingSource)}
        return digest({"recipe": self._recipe_revision, "sources": asking}) if asking else self._recipe_revision

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
                ensembles=self._ensembles,
                weights=self._weights,
                disagreement=self.section.disagreement,
            )
            for i, item in enumerate(items)
        )
        seconds = time.perf_counter() - started
        self.metrics.answer(seconds, results)
        # A revision that changed meanwhile is told as it was when the source scored.
        told = {
            name: next((answer.revision for answer in answers if answer.revision is not None), None)
            for name, answers in zip(names, scored, strict=True)
        }
        revisions = {name: told.get(name) or scorer.revision for name, scorer in self.scorers.items()}
        return RewardResponse(results=results, server=self.info(names, 1000 * seconds, revisions))

    def info(self, names: Sequence[str], latency_ms: float, revisions: Mapping[str, str]) -> ServerInfo:
        return ServerInfo(
            version=self.version,
            recipe_revision=self._revision(revisions),
            sources={name: SourceInfo(revision=revisions[name]) for name in names},
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
        except NoReplica:
            message = f"no replica of source {name}'s model lives"
            answers = [Scored(failed_component(ErrorCode.SOURCE_DOWN, message))] * len(items)
        except Exception as problem:
            log.error("source %s failed: %s", name, where(problem))
            message = f"source {name} raised {type(problem).__name__}"
            answers = [Scored(failed_component(ErrorCode.SOURCE_ERROR, message))] * len(items)
        components = [answer.component for answer in answers]
        self.metrics.source(name, time.perf_counter() - started, components)
        self.progress.note(name, components, time.monotonic())
        return answers

"""Preference pairs against a reward server: how often the chosen response has the higher reward, as RewardBench counts.

A line of the file has `prompt` (a text or a chat), `chosen`, `rejected` (texts, or chats that continue the prompt), and
may have `subset`, `reference`, `facts` and `principles`. A pair of which one side has no score is left out of the
accuracy and counted as failed; equal rewards are no preference, and count as wrong.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.table import Table

from reward_server.client import RewardRefused, RewardUnavailable, SyncRewardClient
from reward_server.schema import Item, Message, Result
from services.errors import UserError


class Turn(BaseModel):
    model_config = ConfigDict(frozen=True)

    role: str
    content: str


class Pair(BaseModel):
    """A line of the file; what else it has is ignored."""

    model_config = ConfigDict(frozen=True)

    prompt: str | tuple[Turn, ...]
    chosen: str | tuple[Turn, ...]
    rejected: str | tuple[Turn, ...]
    subset: str = "all"
    reference: str | None = None
    facts: tuple[str, ...] | None = None
    principles: tuple[str, ...] | None = None

    def items(self, number: int) -> tuple[Item, Item]:
        """The chosen response and the rejected one."""
        chat = (
            None
            if isinstance(self.prompt, str)
            else tuple(Message(role=t.role, content=t.content) for t in self.prompt)
        )
        chosen, rejected = (
            Item(
                id=f"{number}:{side}",
                prompt=self.prompt if isinstance(self.prompt, str) else None,
                messages=chat,
                response=response if isinstance(response, str) else "\n".join(turn.content for turn in response),
                reference=self.reference,
                facts=self.facts,
                principles=self.principles,
            )
            for side, response in (("chosen", self.chosen), ("rejected", self.rejected))
        )
        return chosen, rejected


@dataclass(frozen=True)
class Tally:
    """Pairs of one subset. `accuracy` is None where none was scored."""

    pairs: int
    scored: int
    right: int
    ties: int
    failed: int

    @property
    def accuracy(self) -> float | None:
        return self.right / self.scored if self.scored else None


@dataclass(frozen=True)
class Figures:
    """Tallies by subset in the file's order, and of all pairs."""

    subsets: dict[str, Tally]
    all: Tally

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        named = {"all": self.all, **{f"subset/{name}": tally for name, tally in self.subsets.items()}}
        return {name: {**asdict(tally), "accuracy": tally.accuracy} for name, tally in named.items()}


def run_pairs(path: Path, url: str, token: str | None, *, sources: Sequence[str] | None = None) -> Figures:
    """Scores a file's pairs at a server. Raises UserError for a wrong file, a server that refuses or is not there."""
    pairs = list(read_pairs(path))
    items = [item for number, pair in enumerate(pairs) for item in pair.items(number)]
    with SyncRewardClient(url, token) as client:
        try:
            results = client.settled(items, sources)
        except (RewardRefused, RewardUnavailable) as error:
            raise UserError(str(error)) from error
    return count_pairs([pair.subset for pair in pairs], results)


def count_pairs(subsets: Sequence[str], results: Sequence[Result]) -> Figures:
    """Figures of pairs' results: chosen and rejected in turn, two of each pair."""
    verdicts: dict[str, list[str]] = {}
    for number, subset in enumerate(subsets):
        chosen, rejected = (result.reward for result in results[2 * number : 2 * number + 2])
        if chosen is None or rejected is None:
            verdict = "failed"
        else:
            verdict = "right" if chosen > rejected else "tie" if chosen == rejected else "wrong"
        verdicts.setdefault(subset, []).append(verdict)
    everything = [verdict for found in verdicts.values() for verdict in found]
    return Figures({subset: _tally(found) for subset, found in verdicts.items()}, _tally(everything))


def _tally(verdicts: Sequence[str]) -> Tally:
    failed = verdicts.count("failed")
    return Tally(
        pairs=len(verdicts),
        scored=len(verdicts) - failed,
        right=verdicts.count("right"),
        ties=verdicts.count("tie"),
        failed=failed,
    )


def read_pairs(path: Path) -> Iterator[Pair]:
    """The pairs of a JSONL file. Raises UserError with file, line and field."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield Pair.model_validate(json.loads(line))
            except ValidationError as error:
                problem = error.errors(include_input=False)[0]
                raise UserError(f"{path}:{number}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
            except ValueError as error:
                raise UserError(f"{path}:{number}: no JSON: {error}") from None


def table(figures: Figures) -> Table:
    """The figures as a table."""
    drawn = Table("subset", *(("pairs", "accuracy", "ties", "failed")))
    for name, tally in (*figures.subsets.items(), ("all pairs", figures.all)):
        accuracy = "-" if tally.accuracy is None else f"{100 * tally.accuracy:.1f} %"
        drawn.add_row(name, str(tally.pairs), accuracy, str(tally.ties), str(tally.failed))
    return drawn

"""TRL's own GRPO trainer on a small model, with the reward server as its reward."""

import asyncio
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from reward_server.config import RewardSection
from reward_server.schema import Component, ErrorCode, Item, failed_component
from reward_server.scorers.base import Scored
from reward_server.serve import RewardServer

pytestmark = pytest.mark.slow


class Picky:
    """The share of a small set of tokens in the response; every fourth item that it sees has no score."""

    revision = "1"

    def __init__(self) -> None:
        self.seen: list[Item] = []

    async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
        found = [self._one(len(self.seen) + i, item) for i, item in enumerate(items)]
        self.seen.extend(items)
        return found

    def value(self, number: int, item: Item) -> float | None:
        if number % 4 == 3 or not item.response_ids:
            return None
        return sum(token % 7 == 0 for token in item.response_ids) / len(item.response_ids)

    def _one(self, number: int, item: Item) -> Scored:
        value = self.value(number, item)
        if value is None:
            return Scored(failed_component(ErrorCode.EMPTY_RESPONSE, "as if empty"))
        return Scored(Component(status="ok", value=value))


def test_grpo_is_rewarded_and_leaves_out_what_has_no_score(tiny_decoder: Path, questions_file: Path) -> None:
    source = Picky()
    server = RewardServer(RewardSection(), token="t", scorers={"attention": source})
    url = asyncio.run(server.start())
    program = Path(__file__).with_name("trl_program.py")
    done = subprocess.run(
        [sys.executable, program, tiny_decoder, questions_file, url, "t"],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    asyncio.run(server.stop())
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])

    rows = [json.loads(line) for line in questions_file.read_text().splitlines()]
    asked = {row["prompt"]: row["response"] for row in rows}
    assert len(source.seen) == 3 * 8
    assert all(item.prompt in asked and item.reference == asked[item.prompt] for item in source.seen)
    assert all(item.response_ids for item in source.seen)
    for step, mean in enumerate(told["means"]):
        values = [source.value(8 * step + i, source.seen[8 * step + i]) for i in range(8)]
        scored = [value for value in values if value is not None]
        assert len(scored) == 6
        assert math.isclose(mean, sum(scored) / 6, abs_tol=1e-6)  # None is left out, not counted as 0
    assert len(told["means"]) == 3
    assert told["moved"]

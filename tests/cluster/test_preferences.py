"""Synthetic comparisons: off-topic negatives, and what a judge's differences come to."""

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import run_command
from cluster.preferences import Pair, judged, off_topic, pairs_of
from cluster.preferences_config import PreferencesSection
from cluster.recipe import resolve
from reward_server.model_sources_config import JudgeSource
from reward_server.schema import ErrorCode, Item
from reward_server.scorers.base import ItemFailure, Scored, failed
from reward_server.scorers.judge import verdict
from services.errors import UserError
from services.principles import PrincipleSet
from services.text.config import DataSection
from services.text.preference_data import labelled_of
from services.text.readers import Row

SET = PrincipleSet.model_validate(
    {
        "version": "1",
        "principles": [
            {"id": "long", "text": "The longer is better.", "negative": "The shorter is better."},
            {"id": "loud", "text": "The louder is better.", "negative": "The quieter is better."},
        ],
    }
)
JUDGE = JudgeSource(model="none")


class Ruler:
    """A judge that measures: length in letters, loudness in exclamation marks; it favours the first place by `bias`."""

    revision = "ruler"

    def __init__(self, bias: float = 0.0) -> None:
        self.bias = bias

    async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
        await asyncio.sleep(0)
        return [self._one(item) for item in items]

    def _one(self, item: Item) -> Scored:
        assert item.principles is not None
        assert item.reference is not None
        assert item.response is not None
        if "unclear" in item.response:
            return failed(ItemFailure(ErrorCode.JUDGE_UNCLEAR, "it does not say"))
        measure = len if "longer" in item.principles[0] else lambda text: 2 * text.count("!")
        gap = measure(item.response) - measure(item.reference)

        def logs(margin: float) -> list[float]:
            return [-math.log1p(math.exp(-margin)), -math.log1p(math.exp(margin))]

        return verdict(JUDGE, [logs(gap + self.bias), logs(-gap + self.bias)])


def section(**values: Any) -> PreferencesSection:
    return PreferencesSection.model_validate(
        {"method": "principles", "judge": {"kind": "judge", "model": "none"}, "responses": "r.jsonl", **values}
    )


def pairs(count: int, first: str = "a long answer!", second: str = "short!!!") -> list[Pair]:
    return [Pair(f"p{i}", {"prompt": f"q{i}"}, first, second) for i in range(count)]


def test_the_largest_difference_decides_and_negation_turns_it_round() -> None:
    """By length the first wins by 6, by loudness the second by 4: length decides, in whatever sense it was drawn."""
    rows, written = judged(pairs(40), Ruler(), SET, section(principles=2))
    assert written.comparisons == 40
    assert {row["decided_by"] for row in rows} == {"long"}
    for row in rows:
        longer = "The longer is better." in row["principles"]
        assert (row["chosen"] == "a long answer!") == longer
        assert row["scores"]["long"]["value"] == pytest.approx(6)
        assert row["scores"]["loud"]["value"] == pytest.approx(-4)
    assert {row["first_is_chosen"] for row in rows} == {True, False}
    alone, _ = judged(pairs(40), Ruler(), SET, section(principles=1, negated=0.0))
    assert {row["decided_by"] for row in alone} == {"long", "loud"}
    assert all((row["chosen"] == "short!!!") == (row["decided_by"] == "loud") for row in alone)


def test_the_same_seed_draws_the_same() -> None:
    again = [judged(pairs(12), Ruler(), SET, section(principles=1, seed=seed))[0] for seed in (1, 1, 2)]
    assert again[0] == again[1]
    assert again[0] != again[2]


def test_swap_consistency_is_counted_and_the_place_cancels() -> None:
    rows, written = judged(pairs(3, "four", "three"), Ruler(bias=3.0), SET, section(principles=1))
    assert written.consistent == 0.0  # the place outweighs a letter, and there is nothing loud
    assert all(row["scores"]["long"]["value"] == pytest.approx(-1) for row in rows)
    _, steady = judged(pairs(3), Ruler(bias=3.0), SET, section())
    assert steady.consistent == 1.0


def test_what_the_judge_cannot_say_is_left_out_and_counted() -> None:
    rows, written = judged([*pairs(2, "unclear"), *pairs(3)], Ruler(), SET, section())
    assert (len(rows), written.failed) == (3, 2)
    equal, none = judged(pairs(2, "same", "also"), Ruler(), SET, section())
    assert (equal, none.failed) == ([], 2)


def test_soft_labels_are_the_judges_probability() -> None:
    rows, _ = judged(pairs(4), Ruler(), SET, section(principles=2, soft_labels=True))
    assert all(row["label_prob"] == pytest.approx(1 / (1 + math.exp(-6))) for row in rows)
    for row in rows:
        record = labelled_of(Row("here", row, None), "comparisons", "s")
        assert record.asked.principles == tuple(row["principles"])


def test_off_topic_negatives_answer_another_prompt_of_the_same_split(questions_file: Path) -> None:
    data = DataSection(source=str(questions_file))
    rows = list(off_topic(data, PreferencesSection(negatives=2)))
    assert rows == list(off_topic(data, PreferencesSection(negatives=2)))
    by_split = {split: {row["chosen"] for row in rows if row["split"] == split} for split in ("train", "test")}
    for row in rows:
        assert row["rejected"] != row["chosen"]
        assert row["split"] not in by_split or row["rejected"] in by_split[row["split"]]
    assert len({(row["prompt"], row["rejected"]) for row in rows}) == len(rows)


def test_pairs_are_the_first_two_different_responses(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    given = [("q", "a"), ("q", "a"), ("p", "x"), ("q", "b"), ("q", "c")]
    path.write_text("".join(json.dumps({"prompt": q, "response": r}) + "\n" for q, r in given))
    (pair,) = pairs_of(DataSection(), section(responses=str(path)))
    assert (pair.asked, pair.first, pair.second) == ({"prompt": "q"}, "a", "b")
    path.write_text('{"prompt": "q", "response": ""}\n')
    with pytest.raises(UserError, match=r"samples.jsonl:1: response is ''"):
        pairs_of(DataSection(), section(responses=str(path)))


def test_the_command_writes_what_training_reads(
    tmp_path: Path, questions_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "pairs.jsonl"
    recipe.write_text(f"data: {{source: {questions_file}}}\npolicy: {{}}\n")
    assert run_command(["preferences", str(recipe), "--out", str(out)]) == 0
    assert "36 comparisons" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 36
    assert run_command(["preferences", str(recipe), "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"method": "principles"}, "needs preferences.judge"),
        ({"judge": {"kind": "judge", "model": "m", "mode": "rate"}}, "need compare"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        resolve({"data": {}, "policy": {}, "preferences": values}, "recipe")

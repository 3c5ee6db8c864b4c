"""Labelled responses: what is read, and that every complaint names place, field, value and what is allowed."""

import json
from pathlib import Path
from typing import Any

import pytest

from services.errors import UserError
from services.scoring_format import StepRule, Turn, split_steps
from services.text.corpora.labelled import FRAMES, GENERATED, HELD_OUT_FRAMES, SELDOM, generate_labelled
from services.text.preference_data import (
    Comparison,
    Rating,
    Shape,
    Steps,
    labelled_of,
    load_labelled,
    split_labelled,
)
from services.text.readers import Row

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
RATED = {"prompt": "q", "response": "a", "rating": 3}
STEPPED = {"prompt": "q", "response": "one\ntwo", "step_labels": ["correct", "incorrect"]}


def of(values: dict[str, Any], shape: Shape = "comparisons") -> Any:
    return labelled_of(Row("data.jsonl:7", values, None), shape, "data.jsonl")


def test_comparisons_in_every_form() -> None:
    pair = of({**PAIR, "principles": "be brief", "facts": ["f", "g"], "scores": {"judge": 1}, "weight": 2})
    assert (pair.responses, pair.ranks, pair.probability) == (("a", "b"), (0, 1), 1.0)
    assert (pair.asked.principles, pair.asked.facts, pair.asked.weight) == (("be brief",), ("f", "g"), 2.0)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    ranked = of({"messages": messages, "responses": ["a", "b", "c"], "ranks": [2, 0, 0]})
    assert ranked.ranks == (2, 0, 0)
    assert ranked.asked.turns == (Turn("system", "s"), Turn("user", "q"))
    assert of({"prompt": "q", "responses": ["a", "b", "c"]}).ranks == (0, 1, 2)


def test_a_soft_label_below_a_half_turns_the_comparison_round() -> None:
    assert of({**PAIR, "label_prob": 0.2}).ranks == (1, 0)
    assert of({**PAIR, "label_prob": 0.2}).probability == 0.8
    tie = of({"prompt": "q", "responses": ["a", "b"], "ranks": [1, 1]})
    assert tie.probability == 0.5


def test_ratings_and_steps() -> None:
    rated = of({**RATED, "language": "en", "paraphrases": [{"text": "p", "similarity": 0.5}]}, "ratings")
    assert isinstance(rated, Rating)
    assert (rated.rating, rated.paraphrases[0].similarity) == (3.0, 0.5)
    labelled = of({"prompt": "q", "response": "a", "labels": {"quality": 1, "humour": 0}}, "ratings")
    assert labelled.labels == {"quality": 1.0, "humour": 0.0}
    for labels in (["correct", "neutral", "incorrect"], [1, 0, -1]):
        assert of({**STEPPED, "step_labels": labels}, "steps").labels == (2, 1, 0)
    assert of({**STEPPED, "step_labels": [True, False]}, "steps").labels == (2, 0)


@pytest.mark.parametrize(
    ("values", "shape", "said"),
    [
        ({"chosen": "a", "rejected": "b"}, "comparisons", "prompt"),
        ({**PAIR, "chosen": ""}, "comparisons", "chosen is ''"),
        ({**PAIR, "rejected": 5}, "comparisons", "rejected is 5"),
        ({**PAIR, "label_prob": 1.5}, "comparisons", "label_prob is 1.5, allowed is a number from 0 to 1"),
        ({**PAIR, "weight": -1}, "comparisons", "weight is -1"),
        ({**PAIR, "weight": float("nan")}, "comparisons", "weight is nan"),
        ({**PAIR, "split": "exam"}, "comparisons", "split is 'exam'"),
        ({**PAIR, "principles": [1]}, "comparisons", "principles is"),
        ({"prompt": "q", "responses": ["a"]}, "comparisons", "at least 2"),
        ({"prompt": "q", "responses": ["a", "b"], "ranks": [1]}, "comparisons", "ranks is [1]"),
        ({"prompt": "q", "responses": ["a", "b", "c"], "label_prob": 1}, "comparisons", "two responses; here are 3"),
        ({"messages": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "comparisons", "messages is"),
        (
            {"messages": [{"role": "assistant", "content": "x"}], **PAIR, "prompt": None},
            "comparisons",
            "user's message",
        ),
        ({**RATED, "rating": "good"}, "ratings", "rating is 'good'"),
        ({**RATED, "labels": {"a": 1}}, "ratings", "one of rating"),
        ({"prompt": "q", "response": "a", "labels": {"a": "x"}}, "ratings", "labels is"),
        ({**RATED, "paraphrases": [{"text": "p", "similarity": 3}]}, "ratings", "paraphrases is"),
        ({**STEPPED, "step_labels": ["right"]}, "steps", "step_labels is ['right']"),
        ({**STEPPED, "step_labels": []}, "steps", "step_labels is []"),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], shape: Shape, said: str) -> None:
    with pytest.raises(UserError) as raised:
        of(values, shape)
    assert str(raised.value).startswith("data.jsonl:7: ")
    assert said in str(raised.value)


def test_a_file_is_split_by_prompt_and_its_own_split_counts(tmp_path: Path) -> None:
    rows = [{**PAIR, "prompt": f"q{i % 40}", "chosen": f"a{i}"} for i in range(120)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**PAIR, "prompt": "own", "split": "test"}]))
    splits = split_labelled(load_labelled(str(path), "comparisons"), 0.25, seed=1)
    assert len(splits.train) + len(splits.held_out) == 121
    assert 10 <= len(splits.held_out) <= 60
    assert not {r.asked.key for r in splits.train} & {r.asked.key for r in splits.held_out}
    assert "own" in {record.asked.turns[0].content for record in splits.held_out}
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no rows"):
        load_labelled(str(tmp_path / "empty.jsonl"), "comparisons")


SHAPE_OF: dict[str, Shape] = {
    "generated:preferences": "comparisons",
    "generated:ratings": "ratings",
    "generated:principles": "comparisons",
    "generated:usual_principles": "comparisons",
    "generated:steps": "steps",
}


@pytest.mark.parametrize("source", GENERATED)
def test_generated_records_are_records_and_the_same_every_time(source: str) -> None:
    rows = generate_labelled(source, 0)
    assert [row.values for row in rows] == [row.values for row in generate_labelled(source, 0)]
    records = [labelled_of(row, SHAPE_OF[source], source) for row in rows]
    splits = split_labelled(records, 0.1, 0)
    assert len(splits.train) > 4 * len(splits.held_out) / 2 > 0
    for record in records[:200]:
        if isinstance(record, Steps):
            assert len(split_steps(record.response, StepRule())) == len(record.labels)
        if isinstance(record, Comparison):
            assert len(set(record.responses)) == len(record.responses)


@pytest.mark.parametrize("source", ["generated:principles", "generated:usual_principles"])
def test_held_out_principles_are_worded_as_none_in_training(source: str) -> None:
    rows = [row.values for row in generate_labelled(source, 0)]
    seen = {text for row in rows if row["split"] == "train" for text in row["principles"]}
    held_out = {text for row in rows if row["split"] != "train" for text in row["principles"]}
    assert len(held_out) > 20
    assert not seen & held_out
    # The words themselves are known: what is new is how they are put.
    words = {word.strip(".") for text in seen for word in text.split()}
    assert {word.strip(".") for text in held_out for word in text.split()} <= words
    assert not set(FRAMES) & set(HELD_OUT_FRAMES)


def test_a_pair_comes_back_with_its_principles_turned_round() -> None:
    """What decides is the principle: of every two answers each is chosen once."""
    rows = [row.values for row in generate_labelled("generated:principles", 0)]
    for plain, turned in zip(rows[::2], rows[1::2], strict=True):
        assert (plain["chosen"], plain["rejected"]) == (turned["rejected"], turned["chosen"])
        assert plain["decided_by"] == turned["decided_by"]
        assert plain["turned"] != turned["turned"]
        assert plain["split"] == turned["split"]


def test_usual_principles_lean_one_way_and_come_alone() -> None:
    rows = [row.values for row in generate_labelled("generated:usual_principles", 0)]
    assert all(len(row["principles"]) == 1 for row in rows)
    assert sum(row["turned"] for row in rows) / len(rows) == pytest.approx(SELDOM, abs=0.03)
    negations = [negates(row["principles"][0]) for row in rows]
    assert sum(negations) / len(rows) == pytest.approx(SELDOM, abs=0.03)


def negates(text: str) -> bool:
    return " not " in text or text.startswith("Avoid ")

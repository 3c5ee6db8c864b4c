"""The benchmark of models that score: what its policy may not have seen, and (slow) the figures that it must show."""

from pathlib import Path

import pytest

from benchmarks.common import Options
from benchmarks.reward_models import answers, measure, restated, shown
from services.text.corpora.labelled import ATTRIBUTES, generate_labelled


def test_the_policy_has_read_no_held_out_question_and_no_held_out_wording() -> None:
    rows = [row.values for row in generate_labelled("generated:principles", 0)]
    held_out = [row for row in rows if row["split"] != "train"]
    prompts = {row["prompt"] for row in held_out}
    wordings = {f"- {text}" for row in held_out for text in row["principles"]}
    described = shown(200)
    assert not prompts & {turns[0] for turns, _ in answers() + described}
    assert not wordings & {turns[0] for turns, _ in restated(500)}
    assert not wordings & {said for _, said in described}


def test_a_restated_principle_is_what_it_asks_for() -> None:
    """An independent reading: a negation turns the word round."""
    for (text,), word in restated(300):
        said = text.removeprefix("- ").rstrip(".").split()
        ((name, opposite),) = [
            (name, words is sides[1]) for name, sides in ATTRIBUTES.items() for words in sides if set(said) & set(words)
        ]
        negation = "not" in said or "Avoid" in said
        assert word == ATTRIBUTES[name][opposite != negation][0]


@pytest.mark.slow
def test_each_kind_learns_its_truth(tmp_path: Path) -> None:
    found = measure(tmp_path, Options(quick=True, out=None))
    assert found["preference_accuracy"] >= 0.85
    assert found["absolute_rank_correlation"] >= 0.85
    assert found["principle_accuracy"] >= 0.85
    assert found["process_accuracy"] >= 0.85
    assert found["principle_turned"] >= 0.8
    assert found["judge_pairs"] >= 60
    assert 0 <= found["judge_swap_consistency"] <= 1

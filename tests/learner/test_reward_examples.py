"""Records -> examples: token ids by the one format, targets, weights, paraphrases and probes."""

from collections import Counter
from typing import Any

import pytest

from learner.reward_examples import Example, encode_records, prepared, probes_of, rated, with_paraphrases
from learner.reward_model_config import RewardModelSection
from learner.reward_training import held_out_figures
from services.errors import UserError
from services.scoring_format import Example as Input
from services.scoring_format import encode, turns_of
from services.text.preference_data import Shape, labelled_of
from services.text.readers import Row
from services.text.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["What is it? It is one and two, and brief."], 300, "decoder")


def records(shape: Shape, *rows: dict[str, Any]) -> list[Any]:
    return [labelled_of(Row(f"f:{place}", row, None), shape, "f") for place, row in enumerate(rows, 1)]


def test_inputs_are_what_serving_makes_of_them(tokenizer: Any) -> None:
    section = RewardModelSection(kind="principle")
    form = section.format(context=None, facts=True)
    (record,) = records(
        "comparisons", {"prompt": "q", "chosen": "a", "rejected": "b", "principles": ["brief"], "facts": ["one"]}
    )
    ((example,), cut) = (encode_records([record], tokenizer, form, section).examples, 0)
    given = [Input(turns_of("q"), text, principles=("brief",), facts=("one",)) for text in ("a", "b")]
    assert example.inputs == tuple(encode(tokenizer, form, each).ids for each in given)
    assert example.inputs != tuple(encode(tokenizer, form, Input(turns_of("q"), text)).ids for text in ("a", "b"))
    # What the model is not served with it is not trained with.
    other = RewardModelSection()
    (example,) = encode_records([record], tokenizer, other.format(None), other).examples
    assert example.inputs == tuple(encode(tokenizer, form, Input(turns_of("q"), text)).ids for text in ("a", "b"))
    (plain,) = records("comparisons", {"prompt": "q", "chosen": "a", "rejected": "b"})
    with pytest.raises(UserError, match=r"f:1: principles is empty"):
        encode_records([plain], tokenizer, form, section)
    assert cut == 0


def test_steps_must_be_as_many_as_their_labels(tokenizer: Any) -> None:
    section = RewardModelSection(kind="process")
    rows = records("steps", {"prompt": "q", "response": "one\ntwo", "step_labels": [1, -1]})
    (example,) = encode_records(rows, tokenizer, section.format(None), section).examples
    assert example.targets == (2.0, 0.0)
    assert len(example.step_ends) == len(example.weights) == 2
    rows = records("steps", {"prompt": "q", "response": "one", "step_labels": [1, -1]})
    with pytest.raises(UserError, match="f:1: step_labels has 2 labels, and the response has 1 steps"):
        encode_records(rows, tokenizer, section.format(None), section)


def test_a_tie_of_two_is_a_tie_under_every_loss(tokenizer: Any) -> None:
    tie, soft = records(
        "comparisons",
        {"prompt": "q", "responses": ["one", "two"], "ranks": [1, 1]},
        {"prompt": "q", "chosen": "one", "rejected": "two", "label_prob": 0.8},
    )
    pairs, luce = RewardModelSection(), RewardModelSection(comparison_loss="plackett_luce")
    (example,) = encode_records([tie], tokenizer, pairs.format(None), pairs).examples
    assert (example.targets, example.probability) == ((0.0, 1.0), 0.5)
    (example,) = encode_records([tie], tokenizer, luce.format(None), luce).examples
    assert (example.targets, example.probability) == ((0.0, 0.0), 1.0)
    with pytest.raises(UserError, match="f:2: label_prob is a soft label"):
        encode_records([soft], tokenizer, luce.format(None), luce)


def test_figures_of_ties_alone_have_no_accuracy() -> None:
    ties = [Example(((1,), (2,)), (0.0, 1.0), (1.0,), probability=0.5), Example(((1,),) * 3, (0.0,) * 3, (1.0,))]
    figures = held_out_figures(ties, [[1.0, 0.0], [2.0, 1.0, 0.0]], "comparisons")
    assert "accuracy" not in figures
    assert figures["calibration_error"] > 0


def test_ratings_are_mapped_to_the_unit_interval() -> None:
    one, several = records(
        "ratings",
        {"prompt": "q", "response": "a", "rating": 4},
        {"prompt": "q", "response": "a", "labels": {"quality": 5, "toxicity": 5}},
    )
    assert rated(one, RewardModelSection(kind="absolute", label_range=(1, 5))) == 0.75
    with pytest.raises(UserError, match=r"f:1: rating is 4, allowed are 0 to 1 \(reward_model.label_range\)"):
        rated(one, RewardModelSection(kind="absolute"))
    weighted = RewardModelSection(kind="absolute", label_range=(1, 5), label_weights={"quality": 3, "toxicity": -1})
    assert rated(several, weighted) == 0.75
    with pytest.raises(UserError, match="label_weights"):
        rated(several, RewardModelSection(kind="absolute", label_range=(1, 5)))


def test_paraphrases_follow_their_response_and_are_rated_lower() -> None:
    section = RewardModelSection(kind="absolute", label_range=(0, 10), other_language=0.5)
    rows = records(
        "ratings",
        {
            "prompt": "q",
            "response": "a",
            "rating": 8,
            "language": "en",
            "paraphrases": [
                {"text": "b", "similarity": 0.5, "language": "en"},
                {"text": "c", "similarity": 1.0, "language": "fr"},
                {"text": "d", "language": "en"},
            ],
        },
    )
    asked: list[Any] = []

    def similarity(pairs: Any) -> list[float]:
        asked.extend(pairs)
        return [0.25]

    found: list[Any] = with_paraphrases(rows, section, similarity)
    assert [(record.response, record.rating) for record in found] == [("a", 8), ("b", 4), ("c", 4), ("d", 2)]
    assert asked == [("a", "d")]
    half = records(
        "ratings",
        {
            "prompt": "q",
            "response": "a",
            "rating": 8,
            "paraphrases": [{"text": "b", "similarity": 1, "language": "en"}],
        },
    )
    with pytest.raises(UserError, match="language"):
        with_paraphrases(half, section, similarity)


def rating(value: float) -> Example:
    return Example(((1, 2),), (value,), (1.0,))


def test_uneven_ratings_are_evened_out() -> None:
    examples = [rating(1.0)] * 90 + [rating(0.1)] * 10

    def counts(**values: Any) -> Counter[float]:
        return Counter(e.targets[0] for e in prepared(examples, RewardModelSection(kind="absolute", **values), 0))

    assert counts() == {1.0: 90, 0.1: 10}
    assert counts(sampling="over") == {1.0: 90, 0.1: 90}
    assert counts(sampling="under", under_ratio=2) == {1.0: 20, 0.1: 10}
    weighed = prepared(examples, RewardModelSection(kind="absolute", balance=True), 0)
    sums = Counter[float]()
    for example in weighed:
        sums[example.targets[0]] += example.weights[0]  # type: ignore[assignment]
    assert sums[1.0] == pytest.approx(sums[0.1])
    assert sum(sums.values()) == pytest.approx(100)


def test_probes_are_best_bad_irrelevant_meaningless() -> None:
    rows = records(
        "comparisons", *({"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(6))
    )
    probes = probes_of(rows, 4, seed=0)
    assert len(probes) == 4
    for probe in probes:
        number = probe.asked.turns[0].content[1:]
        best, bad, irrelevant, meaningless = probe.responses
        assert (best, bad) == (f"good {number}", f"bad {number}")
        assert irrelevant in {f"good {i}" for i in range(6)} - {best}
        assert len(meaningless.split()) == 2
        assert "good" not in meaningless
    assert probes_of(records("ratings", {"prompt": "q", "response": "a", "rating": 1}), 4, 0) == []
    several = records(
        "ratings", *({"prompt": f"q{i}", "response": f"{i}{r}", "rating": r} for i in range(2) for r in (0.1, 0.9))
    )
    assert {probe.responses[:2] for probe in probes_of(several, 4, 0)} == {("00.9", "00.1"), ("10.9", "10.1")}


def test_figures_of_a_judge_that_knows_its_doubt() -> None:
    """Labels of probability 0.8 and scores whose margin says 0.8: right, and calibrated."""
    import math

    pairs = [Example(((1,), (2,)), (0.0, 1.0), (1.0,), probability=0.8)] * 10
    figures = held_out_figures(pairs, [[math.log(4), 0.0]] * 10, "comparisons")
    assert figures["accuracy"] == 1.0
    assert figures["calibration_error"] == pytest.approx(0, abs=1e-9)
    sure = held_out_figures(pairs, [[9.0, 0.0]] * 10, "comparisons")
    assert sure["calibration_error"] == pytest.approx(0.2, abs=1e-3)


def test_figures_of_ratings_and_steps() -> None:
    ratings = [rating(value) for value in (0.1, 0.4, 0.9)]
    figures = held_out_figures(ratings, [[-2.0], [0.1], [3.0]], "ratings")
    assert figures["rank_correlation"] == pytest.approx(1)
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert len(figures["error_by_range"]) == 3
    steps = [Example(((1, 2, 3),), (2.0, 1.0, 0.0), (1.0,) * 3, step_ends=(0, 1, 2))]
    assert held_out_figures(steps, [[0.9, 0.1, 0.2]], "steps")["accuracy"] == 1.0  # the neutral one is left out


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "preference", "sampling": "over"},
        {"kind": "absolute", "centring": 0.1},
        {"kind": "preference", "balance": True},
        {"kind": "absolute", "label_range": (1, 1)},
        {"kind": "opinion"},
    ],
)
def test_settings_that_do_not_fit_together_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="1 validation error"):
        RewardModelSection(**values)

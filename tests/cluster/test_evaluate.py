import asyncio
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from cluster.evaluate import evaluate, rescore
from cluster.evaluation_config import EvaluationSection
from cluster.evaluation_result import compare, load_result
from cluster.evaluation_table import comparison_table, summary_table
from services.attention.options import AttentionOptions
from services.attention.reward import score_statistics
from services.errors import UserError

SETTINGS = EvaluationSection(decodings=("greedy", "sample"), samples=3, resamples=200, batch_prompts=5)
OPTIONS = AttentionOptions()


def run(engine, prompts, decode, settings=SETTINGS, **kwargs):
    return asyncio.run(evaluate(engine, prompts, settings, OPTIONS, max_tokens=10, decode=decode, **kwargs))


def shown(table) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_every_prompt_is_answered_under_every_decoding_and_measured(bigram, prompts, decode):
    seen = []
    engine = bigram()
    result = run(engine, prompts, decode, progress=lambda done, total: seen.append((done, total)))
    assert [len([r for r in result.responses if r.decoding == d]) for d in ("greedy", "sample")] == [12, 36]
    assert seen[-1] == (24, 24)
    for metric in (
        "reward",
        "coverage",
        "mass",
        "rouge_l",
        "token_f1",
        "exact_match",
        "repetition",
        "length",
        "finished",
    ):
        assert metric in result.figures["sample"], metric
    one = next(r for r in result.responses if r.decoding == "sample" and r.failure is None)
    prompt = next(p for p in prompts if p.prompt_id == one.prompt_id)
    rows = engine._rows(prompt.prompt_ids, one.response_ids, prompt.keys)
    expected = score_statistics(
        rows.mass,
        rows.salient_mass,
        rows.neg_entropy_sum,
        rows.peak,
        1,
        len(prompt.prompt_ids),
        one.response_ids,
        (0,),
        OPTIONS,
    )
    assert one.values["reward"] == pytest.approx(expected.reward, abs=1e-12)
    assert one.values["mass"] == pytest.approx(expected.mass_mean, abs=1e-12)


def test_greedy_has_one_response_and_no_spread_within_prompts(bigram, prompts, decode):
    result = run(bigram(), prompts, decode)
    assert result.figures["greedy"]["reward"].within_sd is None
    assert result.figures["sample"]["reward"].within_sd > 0


def test_a_prompts_draws_do_not_depend_on_the_other_prompts(bigram, prompts, decode):
    whole = run(bigram(), prompts, decode)
    alone = run(bigram(), prompts[7:8], decode)
    assert [r for r in whole.responses if r.prompt_id == "p7"] == list(alone.responses)


def test_perplexity_is_of_the_reference_tokens_at_temperature_1(bigram, prompts, decode):
    engine = bigram()
    result = run(engine, prompts, decode, settings=SETTINGS.model_copy(update={"temperature": 0.5}))
    nats = [
        -engine._log_probabilities(a, 1.0)[b]
        for p in prompts
        for a, b in zip([p.prompt_ids[-1], *p.reference_ids[:-1]], p.reference_ids, strict=True)
    ]
    figure = result.figures["greedy"]["perplexity"]
    assert figure.value == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
    assert figure.low < figure.value < figure.high


def test_metrics_that_need_a_reference_are_absent_without_one(bigram, prompts, decode):
    bare = [replace(p, reference=None, reference_ids=None) for p in prompts]
    result = run(bigram(), bare, decode)
    assert not {"rouge_l", "perplexity", "exact_match"} & result.figures["greedy"].keys()
    assert result.figure("greedy/rouge_l") is None


def test_a_response_that_cannot_be_scored_is_counted_and_is_no_number(bigram, prompts, decode):
    result = run(bigram(mute=True), prompts, decode)
    assert "reward" not in result.figures["greedy"]
    assert result.figure(SETTINGS.chooses_by) is None
    assert sum(result.failures["sample"].values()) == 36
    assert all("reward" not in r.values and r.failure for r in result.responses)
    assert result.scalars()["evaluation/sample/failed"] == 36
    assert "no_attention_mass" in shown(summary_table(result))


def test_a_prompt_that_does_not_fit_is_refused_by_name(bigram, prompts, decode):
    result = run(bigram(max_context=15), prompts, decode)
    refused = {p.prompt_id: p.refused for p in result.prompts if p.refused}
    assert refused == {p.prompt_id: refused[p.prompt_id] for p in prompts if len(p.prompt_ids) + 10 > 15}
    assert "p3: a prompt of 6 tokens and a response of 10" in refused["p3"]
    assert not {r.prompt_id for r in result.responses} & refused.keys()
    with pytest.raises(UserError, match="no prompt fits"):
        run(bigram(max_context=4), prompts, decode)
    with pytest.raises(UserError, match="validation split has no prompts"):
        run(bigram(), [], decode)


def test_rescoring_by_the_same_policy_changes_nothing_and_the_log_ratio_is_zero(bigram, prompts, decode):
    engine = bigram()
    settings = SETTINGS.model_copy(update={"temperature": 0.7})
    result = run(engine, prompts, decode, settings=settings)
    again = asyncio.run(rescore(engine, result))
    assert {k: v for k, v in again.figures["sample"].items() if k in result.figures["sample"]} == result.figures[
        "sample"
    ]
    for metric in ("log_ratio_token", "log_ratio_response", "k3_token"):
        assert again.figures["sample"][metric].value == pytest.approx(0, abs=1e-5)


def test_rescoring_measures_the_same_responses_by_another_policys_attention(bigram, prompts, decode):
    start, trained = bigram(sharpness=1.0), bigram(sharpness=1.6)
    before = run(start, prompts, decode, label="start")
    after = run(trained, prompts, decode, label="trained")
    again = asyncio.run(rescore(start, after))
    assert [r.response_ids for r in again.responses] == [r.response_ids for r in after.responses]
    assert again.figures["sample"]["rouge_l"] == after.figures["sample"]["rouge_l"]
    assert again.figures["sample"]["mass"].value != after.figures["sample"]["mass"].value
    assert again.figures["sample"]["k3_token"].value > 0
    assert again.figures["sample"]["log_ratio_token"].value > 0
    assert again.figures["sample"]["perplexity"] == before.figures["sample"]["perplexity"]
    text = shown(comparison_table(before, after, again))
    assert "under the start's attention" in text
    assert "log ratio to the start, a response" in text


def test_comparison_pairs_prompts_and_gives_the_gain_in_within_prompt_deviations(bigram, prompts, decode):
    before, after = run(bigram(), prompts, decode), run(bigram(sharpness=2.0), prompts, decode)
    change = next(c for c in compare(before, after) if (c.decoding, c.metric) == ("sample", "focus"))
    figure = before.figures["sample"]["focus"]
    assert change.difference == pytest.approx(change.after - change.before)
    assert change.in_sd == pytest.approx(change.difference / figure.within_sd)
    assert change.low <= change.difference <= change.high
    assert change.in_sd_low <= change.in_sd <= change.in_sd_high
    corpus = next(c for c in compare(before, after) if c.metric == "distinct_2")
    assert corpus.low is None


def test_a_result_survives_json_and_is_strict_json(bigram, prompts, decode, tmp_path):
    result = run(bigram(), prompts, decode)
    result.save(tmp_path / "evaluation.json")
    assert load_result(tmp_path / "evaluation.json") == result
    json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    with pytest.raises(UserError, match="no such file"):
        load_result(tmp_path / "none.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="not a result"):
        load_result(tmp_path / "other.json")


def test_scalars_are_named_by_decoding_and_metric(bigram, prompts, decode):
    result = run(bigram(), prompts, decode)
    scalars = result.scalars()
    assert scalars["evaluation/greedy/reward"] == result.figure("greedy/reward").value
    assert scalars["evaluation/greedy/failed"] == sum(result.failures["greedy"].values())
    assert result.figure(SETTINGS.chooses_by) == result.figures["greedy"]["reward"]


@pytest.mark.parametrize(
    "bad",
    [{"decodings": ["beam"]}, {"decodings": ["greedy", "greedy"]}, {"best_metric": "nucleus/accuracy"}, {"top_p": 0}],
)
def test_settings_that_mean_nothing_are_refused(bad):
    with pytest.raises(ValueError, match=r"decodings|best_metric|top_p"):
        EvaluationSection(**bad)

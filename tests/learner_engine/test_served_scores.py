"""What `attune reward-model` trains, the reward server serves: a held-out logit is the same in both to 1e-5.

One rank trains a model of each kind on text, and says what its engine makes of the held-out inputs, padded in one
batch. The server loads the directory through the source of that kind and is asked the same over its own contract.
"""

import asyncio
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from learner.reward_examples import encode_records
from learner.reward_model_config import RewardModelSection
from reward_server.config import RewardSection
from reward_server.schema import Item
from reward_server.scorers.build import build_scorers
from services.errors import UserError
from services.models import load_config, load_tokenizer, max_context_of
from services.models_config import PolicySection
from services.scoring_format import write_format
from services.text.preference_data import labelled_of
from services.text.readers import Row
from tests.learner_engine.conftest import SCORING, job_of, run_ranks

NEAR = 1e-5
CITIES = ("Paris", "Rome", "Oslo", "Bern", "Cairo", "Lima", "Quito", "Delhi", "Tokyo", "Seoul", "Accra", "Dakar")
CASES: dict[str, dict[str, Any]] = {
    "preference": {"kind": "preference"},
    "doubled": {"kind": "preference"},  # template and tokenizer both write the beginning of sequence
    "plain": {"kind": "preference", "input_template": "Q {prompt} A {response}"},
    "facts": {"kind": "preference"},
    "judged": {"kind": "preference"},
    "absolute": {"kind": "absolute", "label_range": [1, 5]},
    "principle": {"kind": "principle"},
    "process": {"kind": "process", "step_rule": {"by": "lines"}},
}


def rows_of(case: str, cities: tuple[str, ...]) -> list[dict[str, Any]]:
    """Records of a truth: what names the city of the question is better."""
    rows: list[dict[str, Any]] = []
    for place, city in enumerate(cities):
        other = cities[place - 1]
        asked: dict[str, Any] = {"prompt": f"Where is {city} on the map?"}
        if place % 3 == 0:
            turns = [("user", "Tell me."), ("assistant", "Of what?"), ("user", f"Which river runs through {city}?")]
            asked = {"messages": [{"role": role, "content": content} for role, content in turns]}
        good, bad = f"{city} is a city, and {city} is large.", f"{other} is large."
        if case == "absolute":
            rows += [{**asked, "response": good, "rating": 5}, {**asked, "response": bad, "rating": 1 + place % 3}]
        elif case == "process":
            rows.append({**asked, "response": f"{good}\n{bad}\n", "step_labels": ["correct", "incorrect"]})
        else:
            rows.append({**asked, "chosen": good, "rejected": bad})
            if case in ("principle", "judged"):  # a judge's data has principles, whatever is trained on it
                rows[-1]["principles"] = ["Name the city."] if place % 2 else ["Be large.", "Name the city."]
        if case in ("facts", "principle", "process") and place % 4 < 3:
            rows[-1]["facts"] = [f"{city} is a city.", f"{other} is old."]
    return rows


@pytest.fixture(scope="module")
def trained(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Case -> the model's directory, the held-out items, and the training engine's logits of them."""
    from tokenizers.processors import TemplateProcessing

    root = tmp_path_factory.mktemp("served")
    single = shutil.copytree(tiny_decoder, root / "single-policy")
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))  # rotary: no weights
    doubled = shutil.copytree(single, root / "doubled-policy")
    tokenizer: Any = load_tokenizer(PolicySection(model=str(doubled)))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(doubled)
    jobs: dict[str, Any] = {}
    forms: dict[str, Any] = {}
    items: dict[str, list[dict[str, Any]]] = {}
    for case, kind in CASES.items():
        policy = PolicySection(model=str(doubled if case == "doubled" else single))
        settings = {**SCORING, "batch_size": 4, "epochs": 3, **kind}
        section = RewardModelSection.model_validate(settings)
        form = forms[case] = section.format(max_context_of(load_config(policy)))
        tokenizer = load_tokenizer(policy)
        if case == "doubled":
            assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
        parts: list[Any] = []
        for cities in (CITIES[:8], CITIES[8:]):
            rows = rows_of(case, cities)
            shape: Any = section.shape
            records = [labelled_of(Row(f"row {i}", row, None), shape, "x") for i, row in enumerate(rows)]
            if case in ("facts", "principle", "process"):
                form = forms[case] = form.model_copy(update={"facts": True})
            parts.append([asdict(example) for example in encode_records(records, tokenizer, form, section).examples])
        if case == "doubled":
            assert all(ids[:2].count(tokenizer.bos_token_id) == 1 for each in parts[1] for ids in each["inputs"])
        items[case] = [
            {**{key: row[key] for key in ("prompt", "messages", "facts", "principles") if key in row}, "response": text}
            for row in rows
            for text in ([row["response"]] if "response" in row else [row["chosen"], row["rejected"]])
        ]
        jobs[case] = {
            **job_of(policy.model, 0),
            "scenario": "reward_model",
            "reward_model": settings,
            "data": {"train": parts[0], "pretrain": [], "held_out": [], "probes": []},
            "asked": parts[1],
        }
    results = run_ranks(jobs, 1, root)
    for case, result in results.items():
        write_format(result["directory"], forms[case])
    return {case: {**result, "items": items[case]} for case, result in results.items()}


def served(kind: str, result: Any, **options: Any) -> list[Any]:
    source = {"kind": kind, "model": result["directory"], **options}
    scorer = build_scorers(RewardSection.model_validate({"sources": {"s": source}}))["s"]
    items = [Item.model_validate_json(json.dumps({"id": str(i), **item})) for i, item in enumerate(result["items"])]
    components = [one.component for one in asyncio.run(scorer.score(items))]
    assert not [one.error for one in components if one.error is not None]
    return components


@pytest.mark.parametrize("case", ["preference", "doubled", "plain", "facts", "judged", "absolute", "principle"])
def test_a_held_out_logit_is_the_same_in_training_and_serving(trained: Any, case: str) -> None:
    result = trained[case]
    kind = case if case in ("absolute", "principle") else "preference"
    components = served(kind, result)
    logits = [logit for logits in result["logits"] for logit in logits]
    assert len(logits) == len(components) == 8
    assert max(logits) - min(logits) > 100 * NEAR  # not one number for all
    assert [one.detail["logit"] for one in components] == pytest.approx(logits, abs=NEAR)
    expected = [1 / (1 + math.exp(-logit)) for logit in logits] if case == "absolute" else logits
    assert [one.value for one in components] == pytest.approx(expected, abs=NEAR)
    # What an operator lays over scorer.json is another input.
    other = {"doubled": {"strip_bos": False}, "facts": {"facts": False}, "principle": {"facts": False}}
    if case in other:
        assert [one.value for one in served(kind, result, **other[case])] != pytest.approx(expected, abs=10 * NEAR)


def test_a_facts_source_shows_what_training_showed(trained: Any) -> None:
    result = trained["facts"]
    whole = [place for place, item in enumerate(result["items"]) if "facts" in item]
    assert 0 < len(whole) < len(result["items"])
    logits = [logit for logits in result["logits"] for logit in logits]
    asked = {**result, "items": [result["items"][place] for place in whole]}
    assert [one.value for one in served("facts", asked)] == pytest.approx([logits[i] for i in whole], abs=NEAR)
    with pytest.raises(UserError, match="kind principle, the source is facts; a principle source shows facts too"):
        served("facts", trained["principle"])


def test_steps_have_the_probabilities_that_training_gave_them(trained: Any) -> None:
    result = trained["process"]
    for one, logits in zip(served("process", result, neutral=0.0, aggregate="min"), result["logits"], strict=True):
        odds = [[math.exp(x) for x in step] for step in logits]
        expected = [step[2] / sum(step) for step in odds]
        assert [one.detail["step_0"], one.detail["step_1"]] == pytest.approx(expected, abs=NEAR)
        assert one.value == pytest.approx(min(expected), abs=NEAR)

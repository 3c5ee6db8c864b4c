"""Facts in training and in use: a model that is shown them tells right answers that nothing else gives away.

Each question is answered by one of eight words, and only its facts say which: drawn anew for every record, they cannot
be learnt by heart. The model without facts can do no better than guess.
"""

import asyncio
import random
from dataclasses import asdict
from typing import Any

import pytest

from learner.reward_examples import encode_records
from learner.reward_model_config import RewardModelSection
from reward_server.config import RewardSection
from reward_server.schema import Item
from reward_server.scorers.build import build_scorers
from services.models import load_tokenizer
from services.models_config import PolicySection
from services.scoring_format import write_format
from services.text.preference_data import labelled_of
from services.text.readers import Row
from tests.learner_engine.conftest import SCORING, job_of, run_ranks

VALUES = [f"w{i}" for i in range(20, 28)]
SETTINGS: dict[str, Any] = {
    **SCORING,
    "epochs": 4,  # with 2 it is half learnt on one kind of processor, and learnt on another
    "batch_size": 32,
    "lr": 5e-3,
    "microbatch_tokens": 2048,
    "input_template": "{prompt} w4 {response}",
    "facts_template": "{facts} w5 ",
}


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    made: list[dict[str, Any]] = []
    for _ in range(count):
        right, wrong = draw.sample(VALUES, 2)
        prompt = f"w3 w{draw.randrange(30, 60)}"
        made.append({"prompt": prompt, "facts": [f"w6 {right}"], "chosen": right, "rejected": wrong})
    return made


@pytest.fixture(scope="module")
def models(model_dirs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of two models trained alike on the same comparisons, one `shown` their facts and one `blind`."""
    section = RewardModelSection.model_validate(SETTINGS)
    tokenizer = load_tokenizer(PolicySection(model=model_dirs["tied"]))
    records = [labelled_of(Row(f"{i}", row, None), "comparisons", "x") for i, row in enumerate(rows(1600, 1))]
    forms = {"shown": section.format(64, facts=True), "blind": section.format(64)}
    jobs = {}
    for name, form in forms.items():
        train = [asdict(example) for example in encode_records(records, tokenizer, form, section).examples]
        jobs[name] = {
            **job_of(model_dirs["tied"], 0),
            "scenario": "reward_model",
            "reward_model": SETTINGS,
            "data": {"train": train, "pretrain": [], "held_out": [], "probes": []},
        }
    results = run_ranks(jobs, 1, tmp_path_factory.mktemp("facts"))
    for name, form in forms.items():
        write_format(results[name]["directory"], form)
    return {name: result["directory"] for name, result in results.items()}


def accuracy(model: str, kind: str) -> float:
    """Held-out pairs that the served model orders right."""
    source = {"kind": kind, "model": model}
    scorer = build_scorers(RewardSection.model_validate({"sources": {"s": source}}))["s"]
    held_out = rows(200, 2)
    items = [
        Item(id="x", prompt=row["prompt"], facts=tuple(row["facts"]), response=row[name])
        for row in held_out
        for name in ("chosen", "rejected")
    ]
    values = [one.component.value for one in asyncio.run(scorer.score(items))]
    return sum(a > b for a, b in zip(values[::2], values[1::2], strict=True)) / len(held_out)


def test_facts_tell_what_is_right(models: dict[str, Any]) -> None:
    shown, blind = accuracy(models["shown"], "facts"), accuracy(models["blind"], "preference")
    assert shown >= 0.85
    assert blind < 0.65
    assert accuracy(models["shown"], "preference") == shown  # scorer.json says that it was shown facts

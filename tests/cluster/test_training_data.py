"""The prompts of a run that goes on are those it was started with: groups and their order follow from them."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config
from cluster.files import read_jsonl
from cluster.history import History, begin_incarnation
from cluster.recipe import resolve
from cluster.run_dir import RunDir
from cluster.training_data import load_training_data
from services.errors import UserError
from tests.conftest import questions


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    return run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    write(path, questions())
    return path


@pytest.fixture
def config(source: Path, tiny_decoder: Path) -> Config:
    return resolve(
        {
            "run": {"groups_per_step": 2},
            "data": {"source": str(source), "validation_fraction": 0.0, "test_fraction": 0.0},
            "policy": {"model": str(tiny_decoder)},
            "rollout": {"max_tokens": 8},
            "salience": {"method": "idf"},
        },
        "test",
    )


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def start(run: RunDir, config: Config) -> None:
    """As the driver, before the first group is registered."""
    data = load_training_data(config, run)
    begin_incarnation(run, History("run", run.last_incarnation() + 1), data.fingerprint)


@pytest.mark.parametrize("change", ["edited", "added", "removed", "moved"])
def test_other_prompts_are_refused_before_anything_is_written(
    run: RunDir, config: Config, source: Path, change: str
) -> None:
    start(run, config)
    events, salience = run.events.read_bytes(), run.salience.read_bytes()
    rows = questions()
    if change == "edited":
        rows[5]["prompt"] += " Please."
    elif change == "added":
        rows.append({"prompt": "Who lives in Paris?", "response": "Parisians."})
    elif change == "removed":
        del rows[5]
    else:
        rows.append(rows.pop(5))
    write(source, rows)
    with pytest.raises(UserError, match=rf"{source}.*36 then, {len(rows)} now.* put the source back as it was"):
        start(run, config)
    assert run.events.read_bytes() == events
    assert run.salience.read_bytes() == salience
    write(source, questions())
    start(run, config)
    assert run.last_incarnation() == 2


def test_a_reference_may_be_mended(run: RunDir, config: Config, source: Path) -> None:
    """No group and no order hangs on it."""
    start(run, config)
    write(source, [row | {"response": row["response"].upper()} for row in questions()])
    start(run, config)
    assert run.last_incarnation() == 2


@pytest.mark.parametrize(
    ("data", "evaluation", "says"),
    [
        ({}, {}, r"evaluation\.split 'validation': .* leaves no prompts there, and evaluation\.every is 5"),
        (
            {"validation_fraction": 0.5},
            {"split": "test"},
            r"evaluation\.split 'test': .* set data\.test_fraction",
        ),
        (
            {"validation_fraction": 0.5},
            {"best_metric": "greedy/rouge_l"},
            r"evaluation\.best_metric 'greedy/rouge_l': needs a reference",
        ),
        ({"validation_fraction": 0.5}, {"best_metric": "nucleus/perplexity"}, r"evaluation\.best_metric"),
    ],
)
def test_evaluations_that_could_never_choose_a_best_are_refused_before_the_run(
    run: RunDir, config: Config, source: Path, data: dict[str, Any], evaluation: dict[str, Any], says: str
) -> None:
    write(source, [{"prompt": row["prompt"]} for row in questions()])
    tree = config.model_dump(mode="json")
    tree["data"] |= data
    tree["evaluation"] |= {"every": 5, **evaluation}
    asked = resolve(tree, "test")
    with pytest.raises(UserError, match=says):
        start(run, asked)
    assert list(run.path.iterdir()) == []
    load_training_data(asked)  # what is no run evaluates nothing on its own
    tree["evaluation"]["every"] = 0
    start(run, resolve(tree, "test"))


def test_one_reference_is_enough_to_choose_by(run: RunDir, config: Config, source: Path) -> None:
    (first, *others), splits = questions(), ["train", "validation"]
    bare = [{"prompt": row["prompt"], "split": splits[place % 2]} for place, row in enumerate(others)]
    write(source, [*bare, first | {"split": "validation"}])
    tree = config.model_dump(mode="json")
    tree["evaluation"] |= {"every": 5, "best_metric": "greedy/rouge_l"}
    start(run, resolve(tree, "test"))


def test_a_run_of_a_release_that_noted_no_prompts_goes_on_and_notes_them(
    run: RunDir, config: Config, source: Path
) -> None:
    run.event("start", run_id="run", incarnation=1, step=0)
    start(run, config)
    assert list(read_jsonl(run.events))[-1]["prompts"]["count"] == 36
    write(source, questions()[1:])
    with pytest.raises(UserError, match="36 then, 35 now"):
        start(run, config)

"""What two ranks hold of a model under ZeRO-3, against what `attune doctor` says that they will."""

from pathlib import Path

import pytest

from cluster.memory import FLOAT32, Need, checkpoint_bytes
from cluster.needs import needs_of
from cluster.plan import parts_of
from cluster.recipe import resolve
from cluster.shapes import shape_of
from tests.learner_engine.conftest import job_of, run_ranks

RANKS = 2
PADDING = 0.02
"""Every parameter is padded to a multiple of the ranks: some elements of a tiny model."""


def predicted(job: dict, model: str) -> Need:
    config = resolve({**job["config"], "policy": {"model": model}}, "test")
    parts = parts_of(config)
    return needs_of(config, shape_of(config.policy), parts, captured=1)["learner"]


MODELS = {
    "untied": {"value_function": "separate", "dtype": "float32"},
    "tied": {"value_function": "shared", "dtype": "bfloat16"},
}


def test_partitions_are_what_was_predicted(model_dirs: dict[str, str], tmp_path: Path) -> None:
    jobs = {
        model: {**job_of(model_dirs[model], 1, ranks=RANKS, advantage="gae", **learner), "scenario": "held"}
        for model, learner in MODELS.items()
    }
    for model, held in run_ranks(jobs, RANKS, tmp_path).items():
        saved = held.pop("checkpoint")
        items = {item.name: item.bytes for item in predicted(jobs[model], model_dirs[model]).items}
        assert {name: items[name] for name in held} == {
            name: pytest.approx(bytes, rel=PADDING) for name, bytes in held.items()
        }
        trained = RANKS * held["float32 master, partition"] // FLOAT32
        assert checkpoint_bytes(trained, kept=1) / RANKS == pytest.approx(saved, rel=0.1)  # and what pickle adds

"""Seeds and requests: what a group's random numbers depend on, and on nothing else."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.config import RolloutSection
from rollout.engine import AttentionRows, KeySets, Sampling
from rollout.prepare import attention_of, group_seed, sampling_of

WHERE = st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from(["a", "b", "1", "1:2"]), st.integers(0, 3))


@given(WHERE, WHERE)
def test_seeds_of_different_groups_differ(one: tuple[int, int, str, int], other: tuple[int, int, str, int]) -> None:
    assert (group_seed(*one) == group_seed(*other)) == (one == other)
    assert 0 <= group_seed(*one) < 2**63


def test_every_process_has_the_same_seeds() -> None:
    program = "from rollout.prepare import group_seed; print(group_seed(7, 1, 'p', 3))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) == group_seed(7, 1, "p", 3)


def test_a_request_is_drawn_as_the_recipe_says() -> None:
    rollout = RolloutSection(samples=3, max_tokens=9, temperature=0.7, top_p=0.9, top_k=20, truncation="replay")
    assert sampling_of(rollout) == Sampling(samples=3, max_tokens=9, temperature=0.7, top_p=0.9, top_k=20)


@pytest.mark.parametrize("dense", [None, np.asarray([[0.25, 0.75], [1.0, 0.0]], dtype=np.float32)])
def test_statistics_keep_their_values_and_their_places(dense: np.ndarray | None) -> None:
    columns = [np.asarray([0.1 * i, 0.3], dtype=np.float32) for i in range(4)]
    keys = KeySets((0, 1), (1,), (1.0,))
    attention = attention_of(AttentionRows(*columns, dense=dense), keys, (3, 5))
    assert attention.layers == (3, 5)
    assert (attention.content, attention.salient, attention.salient_weights) == ((0, 1), (1,), (1.0,))
    found = (attention.mass, attention.salient_mass, attention.neg_entropy_sum, attention.peak)
    for value, column in zip(found, columns, strict=True):
        assert np.array_equal(np.asarray(value, dtype=np.float32), column)
    assert attention.map == (None if dense is None else ((0.25, 0.75), (1.0, 0.0)))

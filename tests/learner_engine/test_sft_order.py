"""The order of fine-tuning: every pair once an epoch, by the seed alone, with little padding."""

import random

from hypothesis import given
from hypothesis import strategies as st

from learner.sft import epoch_order, updates_of
from learner.sft_config import SftSection


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=80), st.integers(1, 20))
def test_every_pair_once(lengths: list[tuple[int, int]], minibatches: int) -> None:
    order = epoch_order(lengths, min(minibatches, len(lengths)), seed=5)
    assert sorted(order) == list(range(len(lengths)))
    assert order == epoch_order(lengths, min(minibatches, len(lengths)), seed=5)


def test_less_padding_and_another_order_each_epoch() -> None:
    draw = random.Random(0)
    lengths = [(draw.randint(5, 20), draw.randint(3, 40)) for _ in range(640)]

    def padded(order: list[int]) -> int:
        return sum(32 * max(sum(lengths[row]) for row in order[i : i + 32]) for i in range(0, 640, 32))

    order = epoch_order(lengths, 20, seed=1)
    real = sum(map(sum, lengths))
    assert padded(list(range(640))) > 1.4 * real
    assert padded(order) < 1.1 * real
    assert order != epoch_order(lengths, 20, seed=2)
    # The short ones do not all come first.
    first = sum(sum(lengths[row]) for row in order[:320])
    assert abs(first / real - 0.5) < 0.1


def test_updates_count_the_last_short_batch() -> None:
    assert updates_of(20, SftSection(epochs=2, batch_size=7)) == 6

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.text.order import Cursor, Steps, epoch_order, index_at, steps_of


@given(st.integers(0, 300), st.integers(0, 2**40), st.integers(0, 50))
def test_an_epoch_is_a_permutation_and_a_function_of_its_arguments(n, seed, epoch):
    order = epoch_order(n, seed, epoch)
    assert sorted(order) == list(range(n))
    epoch_order.cache_clear()
    assert epoch_order(n, seed, epoch) == order


def test_the_order_is_the_same_in_every_release():
    assert epoch_order(8, 0, 0) == KNOWN_ORDER


KNOWN_ORDER = (4, 1, 5, 0, 2, 7, 3, 6)


def test_epochs_and_seeds_differ():
    assert len({epoch_order(100, seed, epoch) for seed in range(4) for epoch in range(4)}) == 16


@given(st.integers(1, 50), st.integers(0, 500), st.integers(0, 500))
def test_a_cursor_goes_on_where_it_stopped(n, start, count):
    cursor = Cursor.at(start, n)
    assert cursor.order(n) == start
    assert 0 <= cursor.index < n
    assert cursor.advance(count, n).order(n) == start + count


def test_resuming_from_a_cursor_visits_each_prompt_once_an_epoch():
    n, seed = 7, 3
    cursor, seen = Cursor(), []
    for _ in range(n * 2):
        seen.append((cursor.epoch, index_at(cursor.order(n), n, seed)))
        cursor = cursor.advance(1, n)
    assert sorted(seen) == [(epoch, index) for epoch in range(2) for index in range(n)]


def test_the_last_short_batch_is_a_step():
    assert steps_of(10, 4) == Steps(full=2, last=2)
    assert steps_of(10, 4).count == 3
    assert steps_of(8, 4).count == 2
    with pytest.raises(ValueError, match="groups_per_step"):
        steps_of(8, 0)

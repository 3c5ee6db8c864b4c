from hypothesis import given
from hypothesis import strategies as st

from services.text.order import epoch_order


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

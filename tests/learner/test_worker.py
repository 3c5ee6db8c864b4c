"""Deadlines of the learner's ranks: who is waited for comes to its own before the others give it up."""

from hypothesis import given
from hypothesis import strategies as st

from learner.worker import collective_s

SECONDS = st.floats(0.1, 1e6)


@given(SECONDS, SECONDS, SECONDS, SECONDS, SECONDS)
def test_a_rank_that_waits_for_receivers_is_not_given_up_before_it_may_name_them(
    start_s: float, publish_s: float, rendezvous_s: float, transfer_s: float, checkpoint_s: float
) -> None:
    cluster = {"start_s": start_s, "publish_s": publish_s, "rendezvous_s": rendezvous_s, "transfer_s": transfer_s}
    waits = (start_s, publish_s, checkpoint_s, rendezvous_s + transfer_s + transfer_s)
    assert collective_s(cluster, checkpoint_s) >= max(waits) + 30

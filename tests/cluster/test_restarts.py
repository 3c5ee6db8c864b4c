"""The budget of restarts: back-off, its end, and what a commit gives back."""

from cluster.restarts import LONGEST_PAUSE_S, RestartBudget


def test_pauses_double_until_the_budget_is_used_up() -> None:
    budget = RestartBudget(3, 2.0)
    assert [budget.spend("rollout") for _ in range(4)] == [2.0, 4.0, 8.0, None]
    assert budget.spend("learner") == 2.0  # another part has its own


def test_a_commit_gives_everything_back() -> None:
    budget = RestartBudget(1, 2.0)
    assert budget.spend("learner") == 2.0
    assert budget.spend("learner") is None
    budget.committed()
    assert budget.spend("learner") == 2.0


def test_no_budget_is_no_restart_and_no_pause_is_endless() -> None:
    assert RestartBudget(0, 1.0).spend("learner") is None
    budget = RestartBudget(50, 1.0)
    assert max(pause for _ in range(50) if (pause := budget.spend("redis")) is not None) == LONGEST_PAUSE_S

"""A checkpoint of N ranks on M: the same weights and moments, and the same training up to the order of sums."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.reshard import part_of


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 6))
def test_parts_of_parts_are_the_parts(numel: int, before: int, after: int) -> None:
    """Cut for some ranks, then for others, is cut for the others; and all of them together are the parameter."""
    whole = torch.randn(numel)
    saved = [part_of([whole], numel, rank, before) for rank in range(before)]
    again = [part_of(saved, numel, rank, after) for rank in range(after)]
    assert all(part.numel() == math.ceil(numel / after) for part in again)
    assert torch.equal(torch.cat(again)[:numel], whole)
    for rank, part in enumerate(again):
        assert torch.equal(part, part_of([whole], numel, rank, after))


def weights(result: Any) -> dict[str, torch.Tensor]:
    return torch.load(result["weights"])


def test_two_ranks_on_one_and_on_two_again(two_ranks: Any, changed_ranks: Any) -> None:
    as_saved = weights(changed_ranks["at_once on two"])
    for name in ("at_once on one", "partitioned on one"):  # loaded, nothing trained: bit for bit
        found = weights(changed_ranks[name])
        assert all(torch.equal(found[key], tensor) for key, tensor in as_saved.items())
    whole = weights(two_ranks["tied"])
    assert not all(torch.equal(whole[key], tensor) for key, tensor in as_saved.items())
    for name in ("one on one", "two on two"):
        found = weights(changed_ranks[name])
        assert found.keys() == whole.keys()
        for key, tensor in whole.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5, msg=f"{name}: {key}")
    # The moments came along: with Adam begun anew, these updates would be others from the first on.
    for step, theirs in zip(changed_ranks["one on one"]["steps"], two_ranks["tied"]["steps"][2:], strict=True):
        assert step["metrics"] == pytest.approx(theirs["metrics"], rel=1e-3, abs=1e-4)
    assert changed_ranks["two on two"]["info"]["updates_done"] == 4 * 4

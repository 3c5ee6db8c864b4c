import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.microbatch import Minibatch, Tokens, collate, pad_rows, plan_epoch

lengths_of = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=40)


def plan(
    lengths: list[tuple[int, int]], world_size: int = 2, minibatches: int = 1, **other: int
) -> tuple[Minibatch, ...]:
    options = {"token_budget": 64, "logit_chunk": 16, "seed": 5} | other
    return plan_epoch(lengths, world_size=world_size, minibatches=minibatches, **options)


@settings(max_examples=80, deadline=None)
@given(lengths=lengths_of, world_size=st.integers(1, 5), parts=st.integers(1, 4), budget=st.integers(1, 200))
def test_every_sample_counts_once_and_ranks_make_equal_calls(
    lengths: list[tuple[int, int]], world_size: int, parts: int, budget: int
) -> None:
    parts = min(parts, len(lengths))
    epoch = plan(lengths, world_size, parts, token_budget=budget)
    assert len(epoch) == parts
    assert sorted(row for minibatch in epoch for row in minibatch.rows) == list(range(len(lengths)))
    sizes = [len(minibatch.rows) for minibatch in epoch]
    assert max(sizes) - min(sizes) <= 1
    for minibatch in epoch:
        counted = [
            row
            for rank in minibatch.ranks
            for micro in rank
            for row, weight in zip(micro.rows, micro.weights, strict=True)
            if weight == 1
        ]
        assert sorted(counted) == sorted(minibatch.rows)
        assert len(minibatch.ranks) == world_size
        assert len({len(rank) for rank in minibatch.ranks}) == 1
        for peers in zip(*minibatch.ranks, strict=True):
            assert len({micro.chunks for micro in peers}) == 1
            most = max(sum(lengths[row][1] for row in micro.rows) for micro in peers)
            assert peers[0].chunks == -(-most // 16)
            for micro in peers:
                assert set(micro.weights) in ({1.0}, {0.0})
                assert micro.rows
                padded = len(micro.rows) * max(sum(lengths[row]) for row in micro.rows)
                assert padded <= budget or len(micro.rows) == 1


@given(lengths=lengths_of, seed=st.integers(0, 3))
def test_minibatches_are_the_same_at_any_world_size(lengths: list[tuple[int, int]], seed: int) -> None:
    parts = min(3, len(lengths))
    contents = [[m.rows for m in plan(lengths, world, parts, seed=seed)] for world in (1, 2, 4)]
    assert contents[0] == contents[1] == contents[2]
    assert plan(lengths, 2, parts, seed=seed) == plan(lengths, 2, parts, seed=seed)


def test_tokens_are_balanced_over_ranks() -> None:
    lengths = [(10, n) for n in range(1, 41)]
    (minibatch,) = plan(lengths, 4, token_budget=200)
    loads = [
        sum(sum(lengths[row]) for micro in rank if micro.weights[0] for row in micro.rows) for rank in minibatch.ranks
    ]
    assert max(loads) - min(loads) <= 50


def test_order_without_a_seed_and_too_few_samples() -> None:
    (minibatch,) = plan_epoch([(1, 1)] * 5, world_size=1, minibatches=1, token_budget=4, logit_chunk=4, seed=None)
    assert minibatch.rows == (0, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="2 samples cannot make 3 minibatches"):
        plan([(1, 1)] * 2, minibatches=3)
    with pytest.raises(ValueError, match="0 samples"):
        plan([])


def test_collate_for_a_decoder() -> None:
    batch = collate([Tokens((5, 6, 7), (8,)), Tokens((9,), (10, 11), ((10, 4), ()))], family="decoder", pad_id=1)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 10, 11, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.rows.tolist() == [[2, 3, 0], [0, 1, 2]]  # P-1+t, then the query after the last token
    assert batch.response_ids.tolist() == [[8, 0], [10, 11]]
    assert batch.response_mask.tolist() == [[True, False], [True, True]]
    assert batch.kept_ids is not None
    assert batch.kept_ids.tolist() == [[[-1, -1], [-1, -1]], [[10, 4], [-1, -1]]]
    assert batch.decoder_input_ids is None


def test_collate_for_an_encoder_decoder() -> None:
    samples = [Tokens((5, 6, 7), (8,)), Tokens((9,), (10, 11))]
    batch = collate(samples, family="encoder-decoder", pad_id=1, decoder_start_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7], [9, 1, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.decoder_input_ids is not None
    assert batch.decoder_input_ids.tolist() == [[0, 8, 1], [0, 10, 11]]
    assert batch.rows.tolist() == [[0, 1, 0], [0, 1, 2]]
    assert batch.kept_ids is None
    with pytest.raises(ValueError, match="decoder_start_id"):
        collate(samples, family="encoder-decoder", pad_id=1)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Tokens((), (1,)), "at least one"),
        (Tokens((1,), ()), "at least one"),
        (Tokens((1,), (2, 3), ((2,),)), "1 kept sets for 2 tokens"),
        (Tokens((1,), (2,), ((3, 4),)), "token 2 of row 0 is not among"),
    ],
)
def test_samples_that_cannot_be_trained_on_are_refused(sample: Tokens, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate([sample], family="decoder", pad_id=0)


def test_pad_rows() -> None:
    torch.testing.assert_close(pad_rows([[1.5], [2.0, 3.0]]), torch.tensor([[1.5, 0.0], [2.0, 3.0]]))

"""A step's batch: scored groups as tensors, the same on every rank."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.errors import BadBatch, NonFinite
from learner.microbatch import Tokens, pad_rows
from services.records import Group, Sample


@dataclass(frozen=True)
class Batch:
    """The ok samples of a step's groups, in lease order; failed ones are left out (invariant 2). B samples, T tokens.

    samples    the records; `tokens` what the model is fed
    groups     int64 [B], samples of one prompt share a number
    mask       bool [B, T], tokens that exist
    behaviour  [B, T], log-probabilities of the tokens under the policy that drew them, of the distribution that is
               trained (invariant 7): `logprobs`, or `sampling_logprobs` where truncated sampling is replayed
    rewards    B numbers, the recipe's combination of scores
    truncated  bool [B], finish_reason == "length"
    failed     samples of these groups that have no reward
    """

    samples: tuple[Sample, ...]
    tokens: tuple[Tokens, ...]
    groups: Tensor
    mask: Tensor
    behaviour: Tensor
    rewards: tuple[float, ...]
    truncated: Tensor
    failed: int

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(prompt, response) tokens a sample."""
        return [(len(item.prompt_ids), len(item.response_ids)) for item in self.tokens]

    def rewards_by_group(self) -> list[list[float]]:
        """The rewards of each prompt's samples."""
        found: dict[int, list[float]] = {}
        for group, reward in zip(self.groups.tolist(), self.rewards, strict=True):
            found.setdefault(group, []).append(reward)
        return list(found.values())


def batch_of(groups: Sequence[Group], *, replay: bool) -> Batch:
    """The batch of these groups. `replay`: the sets that truncated sampling kept are replayed.

    Raises:
        BadBatch: no sample is ok; or a sample's log-probabilities are not one finite number a token.
    """
    samples: list[Sample] = []
    members: list[int] = []
    for number, group in enumerate(groups):
        ok = [sample for sample in group.samples if sample.reward is not None and sample.reward.status == "ok"]
        samples += ok
        members += [number] * len(ok)
    if not samples:
        raise BadBatch(f"none of the samples of {len(groups)} groups has a reward: there is nothing to train on")
    behaviour = pad_rows([_behaviour(sample, replay) for sample in samples])
    if not bool(torch.isfinite(behaviour).all()):
        row = int((~torch.isfinite(behaviour)).any(1).nonzero()[0])
        raise NonFinite(f"sample {samples[row].sample_id}: a recorded log-probability is not finite")
    return Batch(
        samples=tuple(samples),
        tokens=tuple(
            Tokens(sample.prompt_ids, sample.response_ids, sample.kept_ids if replay else None) for sample in samples
        ),
        groups=torch.tensor(members),
        mask=pad_rows([[1.0] * len(sample.response_ids) for sample in samples]).bool(),
        behaviour=behaviour,
        rewards=tuple(_reward(sample) for sample in samples),
        truncated=torch.tensor([sample.finish_reason == "length" for sample in samples]),
        failed=sum(len(group.samples) for group in groups) - len(samples),
    )


def _behaviour(sample: Sample, replay: bool) -> tuple[float, ...]:
    recorded = sample.sampling_logprobs if replay and sample.sampling_logprobs is not None else sample.logprobs
    if len(recorded) != len(sample.response_ids):
        raise BadBatch(
            f"sample {sample.sample_id}: {len(recorded)} log-probabilities for {len(sample.response_ids)} tokens"
        )
    return recorded


def _reward(sample: Sample) -> float:
    assert sample.reward is not None
    assert sample.reward.value is not None  # a Score that is ok has a finite value
    return sample.reward.value

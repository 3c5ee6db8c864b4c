"""Batches that must not be trained on: what gives them away before an update, and the names of what does it within one.

Everything here follows from the whole batch, which every rank has, so that all ranks decide alike. What shows only in
an update (a loss or gradient that is not finite) is in the norm that the ranks add up: no rank takes a step then.
"""

import math

from learner.advantages import FinishLength, loss_mask_of
from learner.batch import Batch
from learner.config import BadBatchSection
from learner.errors import BadBatch, NonFinite


def flat_share(batch: Batch) -> float:
    """The share of prompts whose samples all have the same reward: nothing is to be learnt from them. Prompts with one
    sample do not count; 0 where there are no others."""
    several = [values for values in batch.rewards_by_group() if len(values) > 1]
    return sum(max(values) == min(values) for values in several) / len(several) if several else 0.0


def check_batch(batch: Batch, kl: float, section: BadBatchSection, finish_length: FinishLength) -> None:
    """Raises BadBatch where nothing of the batch carries a loss, or it is over a limit of the recipe.

    `kl`: nats a response, to the reference.
    """
    if not bool(loss_mask_of(batch.mask, batch.truncated, finish_length).any()):
        raise BadBatch("every response was cut at the token limit, and `finish_length: mask` gives those no loss")
    if not math.isfinite(kl):
        raise NonFinite(f"the KL to the reference is {kl}")
    if section.kl_limit is not None and abs(kl) > section.kl_limit:
        raise BadBatch(
            f"the KL to the reference is {kl:.3g} nats a response, learner.bad_batch.kl_limit {section.kl_limit:g}"
        )
    share = flat_share(batch)
    if section.flat_limit is not None and share > section.flat_limit:
        raise BadBatch(
            f"the rewards of {share:.0%} of the prompts do not vary, learner.bad_batch.flat_limit "
            f"{section.flat_limit:.0%}: the reward has collapsed, or the samples are all alike"
        )

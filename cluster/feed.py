"""Prompts into the ledger: every group of an epoch is registered before its first lease, payloads a window ahead.

A group's place in lease order is `epoch * n + its place in the epoch's permutation`: it follows from the seed alone, so
a restart finds the same order without having stored it.
"""

import math
from collections.abc import Sequence

from services.records import Prompt, epoch_of, group_id_of
from services.stream.ledger import Ledger, Settled
from services.text.order import epoch_order


def total_steps(
    prompts: int,
    *,
    epochs: int,
    steps: int | None,
    groups_per_step: int,
    steps_done: int = 0,
    groups_done: int = 0,
) -> int:
    """Steps of a run: until the epochs are used up, the last batch short where they do not divide, or `steps`.

    Counted from what is done: a run that was given more epochs has a short batch in its middle.
    """
    possible = steps_done + math.ceil(max(0, epochs * prompts - groups_done) / groups_per_step)
    return possible if steps is None else min(steps, possible)


def epochs_registered(prompts: int, epochs: int, order: int) -> int:
    """How many epochs begin at or before place `order`."""
    return min(epochs, order // prompts + 1) if prompts else 0


def groups_of_epoch(prompts: Sequence[Prompt], seed: int, epoch: int) -> list[tuple[str, int, Prompt]]:
    """(group id, place in lease order, prompt) of every group of an epoch, in that order."""
    chosen = [prompts[index] for index in epoch_order(len(prompts), seed, epoch)]
    first = epoch * len(prompts)
    return [(group_id_of(epoch, prompt.prompt_id), first + n, prompt) for n, prompt in enumerate(chosen)]


class Feed:
    """The training prompts in lease order. `seed` is the run's, `epochs` and `steps` (None: all) bound the run.

    `groups_done` groups are in the `steps_done` steps that the run goes on from. Failed groups are not among them:
    `total_steps` is what learning-rate schedules reckon with, and must come out the same whether the run was stopped
    before a failure, after it, or never. Where groups fail, the ledger says that all is done some steps before.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        epochs: int,
        steps: int | None,
        groups_per_step: int,
        steps_done: int = 0,
        groups_done: int = 0,
    ) -> None:
        self._prompts = prompts
        self._seed = seed
        self._epochs = epochs
        self._registered = 0
        self.settled = 0
        """Epochs that have left the ledger."""
        self._by_group: dict[str, Prompt] = {}
        self.groups_per_step = groups_per_step
        self._steps_done = steps_done
        self._groups_done = groups_done
        self.total_steps = total_steps(
            len(prompts),
            epochs=epochs,
            steps=steps,
            groups_per_step=groups_per_step,
            steps_done=steps_done,
            groups_done=groups_done,
        )

    def register(self, ledger: Ledger, order: int) -> None:
        """Registers every epoch that begins at or before place `order`, each whole; idempotent."""
        while self._registered < epochs_registered(len(self._prompts), self._epochs, order):
            self._register_epoch(ledger, self._registered)
            self._registered += 1

    def register_again(self, ledger: Ledger) -> None:
        """Registers what was registered before, in a ledger that may have lost it."""
        for epoch in range(self.settled, self._registered):
            self._register_epoch(ledger, epoch)

    def settle(self, ledger: Ledger, done: Settled) -> None:
        """Drops the first epochs, all of whose groups are done in a manifest, here and in the ledger."""
        ledger.settle(done, done.epochs * len(self._prompts))
        self.begin_after(done.epochs)

    def begin_after(self, epochs: int) -> None:
        """The first `epochs` epochs are settled: nothing of them is registered any more."""
        self.settled = max(self.settled, epochs)
        self._registered = max(self._registered, epochs)
        self._by_group = {group: prompt for group, prompt in self._by_group.items() if epoch_of(group) >= epochs}

    def _register_epoch(self, ledger: Ledger, epoch: int) -> None:
        groups = groups_of_epoch(self._prompts, self._seed, epoch)
        self._by_group |= {group_id: prompt for group_id, _, prompt in groups}
        ledger.register(epoch, [(group_id, order) for group_id, order, _ in groups])

    @property
    def all_registered(self) -> bool:
        return self._registered >= self._epochs  # more, where the recipe had more when they were trained

    def top_up(self, ledger: Ledger, window: int) -> None:
        """Gives those of the next `window` pending groups their prompts that have none yet."""
        missing = set(ledger.missing_payload(window))
        if not missing:
            return
        following = [row.group_id for row in ledger.list("pending", window)]
        # A run that went further before it was stopped has registered epochs that this one has not come to.
        known = [group_id for group_id in following if group_id in missing and group_id in self._by_group]
        ledger.attach({group_id: self._by_group[group_id] for group_id in known})

    def admission_limit(self, step: int, max_staleness: int) -> int:
        """Groups that may ever have been leased, failed ones not counted, while `step` steps are done (invariant 3)."""
        ahead = min(max_staleness + step + 1, self.total_steps) - self._steps_done
        return self._groups_done + ahead * self.groups_per_step

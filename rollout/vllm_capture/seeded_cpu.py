"""Requests with a seed of their own under chunked prefill on the CPU, which vLLM 0.32 cannot: it takes a discarded draw
back by `Generator.set_offset`, and a CPU generator has no offset. Here its state is kept and put back instead.
"""

from typing import Any

import numpy as np


def keep_discarded_generators(runner: Any) -> None:
    """Wraps the V1 runner so that a request still in its prefill leaves its generator as it was."""
    sample, book = runner._sample, runner._bookkeeping_sync

    def discarded() -> list[int]:
        batch = runner.input_batch
        (rows,) = np.nonzero(runner.discard_request_mask.np[: batch.num_reqs])
        return [row for row in rows.tolist() if row in batch.generators]

    def sampled(*args: Any, **kwargs: Any) -> Any:
        before = {row: runner.input_batch.generators[row].get_state() for row in discarded()}
        result = sample(*args, **kwargs)
        for row, state in before.items():
            runner.input_batch.generators[row].set_state(state)
        return result

    def booked(*args: Any, **kwargs: Any) -> Any:
        generators = runner.input_batch.generators
        aside = {row: generators.pop(row) for row in discarded()}
        try:
            return book(*args, **kwargs)
        finally:
            generators.update(aside)

    runner._sample, runner._bookkeeping_sync = sampled, booked

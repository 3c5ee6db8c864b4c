"""Weights from ZeRO-3 partitions straight to the engines: gathered on all ranks, sent by rank 0.

What this takes beside the partitions is two buckets on rank 0, the gathered one and the one that is sent, and one on
the other ranks. After each bucket rank 0 tells the others whether the transfer goes on, so that none waits in a
gathering that the others have left.
"""

import torch

from learner.engine import Engine
from learner.publish import Zero3Source
from services.transfer.offer import Report, short
from services.transfer.sender import Sender


def send(engine: Engine, source: Zero3Source, sender: Sender | None) -> Report | None:
    """One transfer; `sender` is rank 0's, which alone gets the report. Collective."""
    try:
        going = _agree(engine, sender is None or sender.start(source.plan()))
        if going:
            for index, tensors in enumerate(source.buckets()):
                if not _agree(engine, sender is None or sender.send(index, tensors)):
                    break
    except BaseException as error:
        if sender is not None:  # a rank has died, as a rule: the receivers are told at once
            sender.stop(f"the learner cannot go on: {short(error)}")
        raise
    return None if sender is None else sender.finish()


def _agree(engine: Engine, going: bool) -> bool:
    """What rank 0 says."""
    if engine.world_size == 1:
        return going
    said = torch.tensor([int(going)], device=engine.device)
    torch.distributed.broadcast(said, src=0)
    return bool(said.item())

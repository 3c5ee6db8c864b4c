"""What the parties of a transfer do in processes of their own; each says how far it is through its `pipe`."""

import resource
from multiprocessing.connection import Connection

import torch

from services.records import PolicyVersion
from services.transfer.offer import Broken, Offer
from services.transfer.packing import TensorMeta
from services.transfer.receiver import receiving
from services.transfer.sender import Sender
from services.transfer.ways import Wanted, place_of

CPU = torch.device("cpu")


def plan(buckets: int) -> list[list[TensorMeta]]:
    """Buckets of 1.5 MiB: a float32 matrix, and bfloat16s that do not end on a multiple of 16 bytes."""
    return [
        [TensorMeta(f"{i}.weight", torch.float32, (512, 512)), TensorMeta(f"{i}.bias", torch.bfloat16, (3, 87381))]
        for i in range(buckets)
    ]


def tensors(index: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    return {
        f"{index}.weight": torch.randn(512, 512, generator=generator),
        f"{index}.bias": torch.randn(87381, 3, generator=generator).to(torch.bfloat16).T,  # not contiguous
    }


def sender(receivers: list[str], backend: Wanted = "auto", *, join_s: float = 30.0, phase_s: float = 20.0) -> Sender:
    return Sender(
        PolicyVersion(1, 3),
        receivers,
        name="learner-0",
        host="127.0.0.1",
        device=CPU,
        join_s=join_s,
        phase_s=phase_s,
        whole_s=60.0,
        backend=backend,
    )


def receive(pipe: Connection, offer: Offer, name: str, out: str | None = None) -> None:
    """Takes a transfer into the file `out`, or nowhere. Says how many bytes its memory grew, or what broke."""
    taken: dict[str, torch.Tensor] = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with receiving(offer, name, CPU) as incoming:
            for key, tensor in incoming.tensors:
                if out is not None:
                    taken[key] = tensor.clone()
    except Broken as error:
        pipe.send(str(error))
        return
    if out is not None:
        torch.save(taken, out)
    pipe.send(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def send(pipe: Connection, receivers: list[str], backend: Wanted, *, hang_after: int, phase_s: float = 20.0) -> None:
    """Says its offer, sends so many buckets of four, and then nothing more."""
    one = sender(receivers, backend, phase_s=phase_s)
    pipe.send(one.offer)
    one.start(plan(4))
    for index in range(hang_after):
        one.send(index, tensors(index))
    pipe.recv()


def place(pipe: Connection) -> None:
    pipe.send(place_of(CPU))

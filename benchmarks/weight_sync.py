"""Weights from one process into a model of another: by collective (a look at the sender's memory, or gloo) and by
files, against what loopback and memory give.

One model of over 50M parameters in float32. The receiver is a process of its own that holds the same model and takes
the weights as a rollout actor does (`rollout.weight_loading.take_weights`); the sender holds its weights unpartitioned,
so that the way is measured and not the gathering. A time runs from the offer, or from the first bucket that is written,
until the receiver says that it has everything: in either way every bucket is hashed on both sides. Rounds take turns;
figures are medians.

`bandwidth_share` is the share of the loopback bandwidth (one TCP connection between two processes, nothing done with
the bytes) that the collective over gloo reaches, hashing and loading included. `hash_bytes_per_s` is what one core
hashes: the least that any of these ways takes is one hash and one copy, for both sides hash at once.
"""

import hashlib
import multiprocessing
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Options, finish, parse_options
from learner.publish import buckets_of
from services.records import PolicyVersion
from services.transfer.packing import TensorMeta
from services.transfer.sender import Sender
from services.transfer.ways import Wanted
from services.weights import write_bucket, write_manifest

NAME = "weight_sync"
WIDTH, LAYERS, FEED_FORWARD, VOCABULARY = 576, 12, 1536, 16000
MIB = 2**20
BUCKETS_MIB = (256, 32)
"""The default of `cluster.bucket_mib`, and one that lets packing, sending and loading overlap in such a model."""
CHUNK = 4 * MIB


def build_model(quick: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH // (4 if quick else 1),
            intermediate_size=FEED_FORWARD // (4 if quick else 1),
            num_hidden_layers=LAYERS // (3 if quick else 1),
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=128,
        )
    )


def receiver(pipe: Connection, quick: bool) -> None:
    """Takes what it is told to, into a model of its own or into nothing, until the other side is gone."""
    from rollout.weight_loading import take_weights

    torch.set_num_threads(1)
    model = build_model(quick).requires_grad_(False)
    pipe.send("ready")
    while True:
        kind, what = pipe.recv()
        if kind == "weights":
            take_weights(model, what, "rollout-0", before_first=lambda: None)
        elif kind == "stream":
            drain(what)
        else:
            return
        pipe.send("taken")


def drain(address: tuple[str, int]) -> None:
    """Reads a connection to its end, and says so on it."""
    buffer = bytearray(CHUNK)
    with socket.create_connection(address) as connection:
        while connection.recv_into(buffer):
            pass
        connection.sendall(b"!")


def by_collective(pipe: Connection, named: Mapping[str, Tensor], mib: int, backend: Wanted) -> float:
    """Seconds; `auto` is `ipc`, on one machine."""
    names = buckets_of([(name, tensor.nbytes) for name, tensor in named.items()], mib * MIB)
    plan = [[TensorMeta(name, named[name].dtype, tuple(named[name].shape)) for name in bucket] for bucket in names]
    sender = Sender(
        PolicyVersion(1, 1),
        ["rollout-0/0"],
        name="learner-0",
        host="127.0.0.1",
        device=torch.device("cpu"),
        join_s=60.0,
        phase_s=60.0,
        whole_s=300.0,
        backend=backend,
    )
    began = time.perf_counter()
    pipe.send(("weights", sender.offer.model_dump_json()))
    if sender.start(plan):
        for index in range(len(plan)):
            sender.send(index, named)
    report = sender.finish()
    if not report.whole or report.backend != ("gloo" if backend == "gloo" else "ipc"):
        raise RuntimeError(f"the transfer broke, or was another: {report}")
    seconds = time.perf_counter() - began
    pipe.recv()
    return seconds


def by_files(pipe: Connection, named: Mapping[str, Tensor], mib: int) -> float:
    directory = Path(tempfile.mkdtemp(prefix="attune-weight-sync-", dir="/dev/shm"))
    try:
        began = time.perf_counter()
        names = buckets_of([(name, tensor.nbytes) for name, tensor in named.items()], mib * MIB)
        buckets = [
            write_bucket(directory, index, {name: named[name] for name in bucket}) for index, bucket in enumerate(names)
        ]
        pipe.send(("weights", str(write_manifest(directory, PolicyVersion(1, 1), buckets))))
        pipe.recv()
        return time.perf_counter() - began
    finally:
        shutil.rmtree(directory)


def by_loopback(pipe: Connection, size: int) -> float:
    """Bytes of a buffer through one connection, read and thrown away."""
    chunk = memoryview(bytes(CHUNK))
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe.send(("stream", server.getsockname()))
        connection, _ = server.accept()
        with connection:
            began = time.perf_counter()
            for start in range(0, size, CHUNK):
                connection.sendall(chunk[: min(CHUNK, size - start)])
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)
            seconds = time.perf_counter() - began
    pipe.recv()
    return seconds


def by_copy(size: int) -> float:
    source, target = (torch.ones(size, dtype=torch.uint8) for _ in range(2))
    began = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - began


def by_hash(size: int) -> float:
    content = bytes(min(size, 64 * MIB))
    began = time.perf_counter()
    hashlib.blake2b(content, digest_size=16).digest()
    return (time.perf_counter() - began) * size / len(content)


def measure(options: Options) -> dict[str, Any]:
    torch.set_num_threads(1)
    named = dict(build_model(options.quick).requires_grad_(False).named_parameters())
    size = sum(tensor.nbytes for tensor in named.values())
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=receiver, args=(theirs, options.quick), daemon=True)
    process.start()
    try:
        pipe.recv()
        ways: dict[str, Callable[[], float]] = {
            **{f"ipc_{mib}_mib": lambda mib=mib: by_collective(pipe, named, mib, "auto") for mib in BUCKETS_MIB},
            **{f"gloo_{mib}_mib": lambda mib=mib: by_collective(pipe, named, mib, "gloo") for mib in BUCKETS_MIB},
            **{f"files_{mib}_mib": lambda mib=mib: by_files(pipe, named, mib) for mib in BUCKETS_MIB},
            "loopback": lambda: by_loopback(pipe, size),
            "copy": lambda: by_copy(size),
            "hash": lambda: by_hash(size),
        }
        for way in ways.values():
            way()  # once, for buffers and connections that are made at the first time
        rounds = 2 if options.quick else 7
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                seconds[name].append(way())
        pipe.send(("end", None))
        process.join(30)
    finally:
        process.kill()
    taken = {name: median(values) for name, values in seconds.items()}
    ipc, gloo, files = (taken[f"{way}_{BUCKETS_MIB[0]}_mib"] for way in ("ipc", "gloo", "files"))
    return {
        "seconds": gloo,
        "bytes": size,
        "bandwidth_share": taken["loopback"] / gloo,
        "files_over_gloo": files / gloo,
        "gloo_over_ipc": gloo / ipc,
        "parameters": sum(tensor.numel() for tensor in named.values()),
        "rounds": rounds,
        **{f"seconds_{name}": value for name, value in taken.items()},
        "loopback_bytes_per_s": size / taken["loopback"],
        "copy_bytes_per_s": size / taken["copy"],
        "hash_bytes_per_s": size / taken["hash"],
    }


def main() -> None:
    options = parse_options(NAME, "Weights into another process: by collective and by files.")
    finish(NAME, options, measure(options))


if __name__ == "__main__":
    main()

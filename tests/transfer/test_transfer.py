"""Transfers between real processes, by a look at the sender's memory and over gloo.

What arrives is what was sent; who dies or hangs is named in time.
"""

import gc
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

import services.transfer.ways
from services.transfer import cuda_memory
from services.transfer.group import broadcast, finish, join, new_group, put
from services.transfer.offer import Broken, Offer, Report
from services.transfer.packing import TensorMeta, checksum, pack, packed_bytes, unpack, words_checksum
from services.transfer.receiver import receiving
from services.transfer.sender import Sender, withdraw
from services.transfer.shared import alive, borrowed, lent
from services.transfer.ways import Lending, Wanted, backend_for, place_of, settle_lent
from tests.transfer.party import CPU, place, plan, receive, send, sender, tensors

Party = Callable[..., tuple[Any, Any]]
PHASE_S = 20.0  # far more than a phase takes, on a busy machine too
SHORT_S = 6.0  # of those who wait for somebody that hangs
A, B = "rollout-0/0", "rollout-1/0"


@pytest.fixture
def party() -> Iterator[Party]:
    """Starts a function of `party.py` in a process of its own, forked from one that has torch; kills what is left."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.transfer.party"])
    started: list[Any] = []

    def start(function: Callable[..., None], *arguments: Any, **settings: Any) -> tuple[Any, Any]:
        ours, theirs = context.Pipe()
        process = context.Process(target=function, args=(theirs, *arguments), kwargs=settings, daemon=True)
        process.start()
        started.append(process)
        return process, ours

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture(params=["auto", "gloo"])
def backend(request: pytest.FixtureRequest) -> Wanted:
    """By a buffer that all look at, and by a process group."""
    return request.param


def said(pipe: Any, seconds: float = 30) -> Any:
    assert pipe.poll(seconds)
    return pipe.recv()


def send_all(one: Sender, buckets: int, *, before: dict[int, Callable[[], object]] | None = None) -> Report:
    """The learner's side of a transfer; `before` is done before a bucket."""
    going = one.start(plan(buckets))
    for index in range(buckets):
        if not going:
            break
        (before or {}).get(index, lambda: None)()
        going = one.send(index, tensors(index))
    return one.finish()


def test_two_receivers_get_the_same_bits_a_bucket_at_a_time(party: Party, backend: Wanted, tmp_path: Path) -> None:
    buckets = 12
    one = sender([A, B], backend)
    pipes = [party(receive, one.offer, name, str(tmp_path / name[-3]))[1] for name in (A, B)]
    report = send_all(one, buckets)
    assert (report.received, report.whole, report.backend) == ((A, B), True, "ipc" if backend == "auto" else "gloo")
    assert report.bytes == sum(map(packed_bytes, plan(buckets)))
    sent = {name: tensor for index in range(buckets) for name, tensor in tensors(index).items()}
    for name, pipe in zip((A, B), pipes, strict=True):
        assert isinstance(said(pipe), int)
        taken = torch.load(tmp_path / name[-3])
        assert list(taken) == list(sent)
        assert all(torch.equal(taken[key], sent[key]) and taken[key].dtype == sent[key].dtype for key in sent)


def test_a_receiver_needs_the_memory_of_a_bucket_not_of_the_model(party: Party, backend: Wanted) -> None:
    one = sender([A], backend)
    _, pipe = party(receive, one.offer, A)
    assert send_all(one, 120).whole  # 180 MiB
    assert said(pipe) < 60 * 2**20  # what the process takes for itself, half of it, is in it


def test_a_receiver_that_dies_is_named_and_the_other_is_not_kept(party: Party, backend: Wanted) -> None:
    one = sender([A, B], backend)
    dying, _ = party(receive, one.offer, A)
    _, living = party(receive, one.offer, B)
    died: list[float] = []

    def kill() -> None:
        dying.kill()
        died.append(time.monotonic())

    report = send_all(one, 8, before={3: kill})
    assert time.monotonic() - died[0] < PHASE_S / 2  # it is seen, and not waited for
    assert report.received == ()
    assert report.silent == {A: "it is dead"}
    assert list(report.refused) == [B]
    assert re.match(r"the transfer of version 1\.3: learner-0 ended it: bucket \d of 8", said(living))


def test_a_receiver_that_dies_before_it_begins_does_not_break_it(party: Party, backend: Wanted) -> None:
    one = sender([A, B], backend)
    dying, _ = party(receive, one.offer, A)
    end = time.monotonic() + PHASE_S
    while not one._store.check([f"join/{A}"]):
        assert time.monotonic() < end
        time.sleep(0.01)
    dying.kill()
    dying.join()
    party(receive, one.offer, B)
    report = send_all(one, 3)
    assert (report.received, report.refused, report.silent) == ((B,), {}, {A: "it is dead"})


def test_memory_that_a_stopped_receiver_looks_at_is_kept_as_long_as_it_lives(party: Party) -> None:
    one = sender([A], phase_s=1.0)
    hanging, _ = party(receive, one.offer, A)
    report = send_all(one, 100, before={3: lambda: os.kill(hanging.pid, signal.SIGSTOP)})
    assert list(report.silent) == [A]
    settle_lent()
    assert lent_files()
    hanging.kill()
    hanging.join()
    settle_lent()
    assert not lent_files()


def lent_files() -> list[str]:
    """Open files of this process that are buffers."""
    return [name for name in looked_at() if name.startswith("/memfd:")]


def test_a_receiver_that_hangs_is_named_at_the_deadline(party: Party, backend: Wanted) -> None:
    one = sender([A, B], backend, phase_s=SHORT_S)
    hanging, _ = party(receive, one.offer, A)
    _, living = party(receive, one.offer, B)
    began: list[float] = []

    def stop() -> None:
        os.kill(hanging.pid, signal.SIGSTOP)
        began.append(time.monotonic())

    report = send_all(one, 100, before={3: stop})
    assert time.monotonic() - began[0] < 4 * SHORT_S
    assert list(report.silent) == [A]
    assert list(report.refused) == [B]
    assert "the transfer of version 1.3" in said(living)


def test_a_supervisor_that_knows_of_a_death_ends_the_wait(party: Party, backend: Wanted) -> None:
    one = sender([A, B], backend, join_s=60.0)
    party(receive, one.offer, B)
    withdraw(one.offer, [A])
    began = time.monotonic()
    report = send_all(one, 2)
    assert time.monotonic() - began < 30
    assert report.received == (B,)
    assert report.silent == {A: "it is dead"}


def test_who_does_not_come_is_named_and_the_others_are_served(party: Party) -> None:
    one = sender([A, B], join_s=2 * SHORT_S)
    party(receive, one.offer, A)
    time.sleep(SHORT_S)  # A has come before the sender asks, and waits as long as it does
    report = send_all(one, 2)
    assert report.received == (A,)
    assert report.silent == {B: "it did not join within 12 s"}
    nobody = sender([A], join_s=0.2)
    assert send_all(nobody, 2).silent == {A: "it did not join within 0 s"}


def test_a_sender_that_dies_is_named_within_the_deadline(party: Party, backend: Wanted) -> None:
    process, pipe = party(send, [A], backend, hang_after=4)
    offer = said(pipe)
    taken: list[str] = []
    died: list[float] = []

    def take() -> None:
        with receiving(offer, A, CPU) as incoming:
            for name, _ in incoming.tensors:
                taken.append(name)
                if name == "1.bias":
                    process.kill()
                    process.join()
                    died.append(time.monotonic())

    with pytest.raises(Broken, match=r"the transfer of version 1\.3: learner-0 is gone"):
        take()
    assert time.monotonic() - died[0] < PHASE_S / 2  # by its end, not by the deadline
    assert taken[:4] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    with pytest.raises(Broken, match=f"learner-0 is not at {offer.address}"), receiving(offer, A, CPU):
        pass


def test_a_sender_that_stops_sending_is_named_at_the_deadline(party: Party, backend: Wanted) -> None:
    _, pipe = party(send, [A], backend, hang_after=1, phase_s=SHORT_S)
    expected = r"waited 6 s for bucket 2 of 4 of .*learner-0 did not send it"
    with pytest.raises(Broken, match=expected), receiving(said(pipe), A, CPU) as incoming:
        list(incoming.tensors)


class Liar:
    """A sender that speaks the wire format, and says another checksum than its bytes have."""

    def __init__(self, one: Sender) -> None:
        self.offer = one.offer
        self._store = join(one.offer.host, one.offer.port, one.offer.key, PHASE_S)

    def send(self) -> None:
        bucket = plan(1)[0]
        flat = torch.zeros(packed_bytes(bucket), dtype=torch.uint8)
        pack(bucket, tensors(0), flat)
        said = checksum(flat)
        flat[100] ^= 1
        start = {"backend": "gloo", "receivers": [A], "plan": [[meta.to_json() for meta in bucket]]}
        put(self._store, "start", start)
        group = new_group(self._store, "gloo", 0, 2, "127.0.0.1", PHASE_S)
        put(self._store, "checksum/0", said)
        finish(broadcast(group, flat, PHASE_S, "a lie"), PHASE_S, "a lie")
        time.sleep(1)


def test_a_damaged_bucket_is_refused_before_its_first_tensor() -> None:
    one = sender([A])
    liar = threading.Thread(target=Liar(one).send)
    liar.start()
    taken: list[str] = []
    expected = r"bucket 1 of 1 of the transfer of version 1\.3: its checksum is not"
    with pytest.raises(Broken, match=expected), receiving(one.offer, A, CPU) as incoming:
        taken.extend(name for name, _ in incoming.tensors)
    assert taken == []
    liar.join()


def test_a_buffer_that_is_not_what_was_summed_up_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """All look at the sender's own memory: what is verified is the copy that is used."""
    one = sender([A])
    put = services.transfer.ways.put

    def changing(store: Any, key: str, value: Any) -> None:
        if key == "lent/0":
            assert isinstance(one._way, Lending)
            one._way.room(101)[100] ^= 1
        put(store, key, value)

    monkeypatch.setattr("services.transfer.ways.put", changing)
    monkeypatch.setattr("services.transfer.sender.checksum", lambda _: said)
    flat = torch.zeros(packed_bytes(plan(1)[0]), dtype=torch.uint8)
    pack(plan(1)[0], tensors(0), flat)
    said = checksum(flat)
    sending = threading.Thread(target=send_all, args=(one, 1))
    sending.start()
    expected = r"bucket 1 of 1 of the transfer of version 1\.3: its checksum is not"
    with pytest.raises(Broken, match=expected), receiving(one.offer, A, CPU) as incoming:
        list(incoming.tensors)
    sending.join()


def looked_at() -> list[str]:
    """What this process has of buffers that are lent: mappings and open files."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    files: list[str] = []
    for file in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # another thread has closed it
            files.append(str(file.readlink()))
    return [name for name in (*maps, *files) if "attune-weights" in name]


def take_from(offer: Offer, process: Any) -> None:
    """Takes what the process sends, and kills it in the midst."""
    with receiving(offer, A, CPU) as incoming:
        for _ in incoming.tensors:
            assert len(looked_at()) == 1
            process.kill()
            process.join()


@pytest.mark.parametrize("ends", ["whole", "by the sender's death"])
def test_nothing_is_left_of_a_buffer(party: Party, ends: str) -> None:
    if ends == "whole":
        one = sender([A])
        party(receive, one.offer, A)
        held: list[str] = []
        assert send_all(one, 2, before={1: lambda: held.extend(looked_at())}).whole
        assert len(held) == 2
    else:
        process, pipe = party(send, [A], "auto", hang_after=4)
        with pytest.raises(Broken, match="learner-0 is gone"):
            take_from(said(pipe), process)
    gc.collect()
    assert looked_at() == []


def test_a_file_that_took_the_number_of_a_buffer_is_not_touched(tmp_path: Path) -> None:
    memory = lent(100, CPU)
    handle = memory.handle()
    seen = borrowed(handle, 100, CPU)
    memory.flat[3] = 7
    assert seen.flat[3] == 7
    memory.close()
    with pytest.raises(Broken, match=r"cannot be looked at from here .*cluster\.transfer_backend: gloo"):
        borrowed(handle, 100, CPU)
    assert seen.flat[3] == 7
    checkpoint = tmp_path / "checkpoint"
    checkpoint.write_bytes(b"abcdef")
    with checkpoint.open("r+b") as file:
        handle = (
            f"{os.getpid()}/{file.fileno()}"  # as of a buffer that is closed, and whose number is another file's now
        )
        with pytest.raises(Broken, match="is not a buffer of 100"):
            borrowed(handle, 100, CPU)
    assert checkpoint.read_bytes() == b"abcdef"


class PlayedDriver:
    """The CUDA driver's calls for memory, on one GPU that has room for 1,000 bytes."""

    def __init__(self) -> None:
        self.free = 1000
        self.allocated: dict[int, int] = {}
        self.open: list[int] = []

    def cuMemAlloc_v2(self, pointer: Any, size: Any) -> int:  # noqa: N802
        if size.value > self.free:
            return 2
        self.free -= size.value
        pointer._obj.value = 0x7000_0000_0000 + self.free
        self.allocated[pointer._obj.value] = size.value
        return 0

    def cuMemFree_v2(self, pointer: Any) -> int:  # noqa: N802
        self.free += self.allocated.pop(pointer.value)
        return 0

    def cuIpcGetMemHandle(self, handle: Any, pointer: Any) -> int:  # noqa: N802
        # A handle has zeros in its midst, as the driver's do.
        handle._obj.reserved[:] = b"\0ipc\0" + pointer.value.to_bytes(8, "big") + bytes(51)
        return 0

    def cuIpcOpenMemHandle_v2(self, pointer: Any, handle: Any, flags: int) -> int:  # noqa: N802
        found = bytes(handle)
        assert (len(found), found[:5], flags) == (64, b"\0ipc\0", 1)
        pointer._obj.value = int.from_bytes(found[5:13], "big")
        if pointer._obj.value not in self.allocated:
            return 201
        self.open.append(pointer._obj.value)
        return 0

    def cuIpcCloseMemHandle(self, pointer: Any) -> int:  # noqa: N802
        self.open.remove(pointer.value)
        return 0

    def cuGetErrorName(self, result: int, name: Any) -> int:  # noqa: N802
        name._obj.value = {2: b"CUDA_ERROR_OUT_OF_MEMORY", 201: b"CUDA_ERROR_INVALID_CONTEXT"}[result]
        return 0


def test_memory_of_a_gpu_is_asked_for_lent_opened_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU has seen this: the driver is played, and so is what torch makes of an address."""
    driver = PlayedDriver()
    monkeypatch.setattr(cuda_memory, "_driver", lambda: driver)
    monkeypatch.setattr(cuda_memory, "tensor_at", lambda _, size, __: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    gpu = torch.device("cuda", 0)
    memory = lent(600, gpu)
    handle = json.loads(json.dumps(memory.handle()))
    looks = [borrowed(handle, 600, gpu) for _ in range(2)]
    assert driver.open == list(driver.allocated) * 2
    with pytest.raises(RuntimeError, match=r"cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
        lent(600, gpu)
    for look in (*looks, looks[0]):
        look.close()
    assert driver.open == []
    memory.close()
    memory.close()
    assert (driver.free, driver.allocated) == (1000, {})
    with pytest.raises(Broken, match="cuIpcOpenMemHandle: CUDA_ERROR_INVALID_CONTEXT"):
        borrowed(handle, 600, gpu)
    with pytest.raises(Broken, match="cannot be looked at from here"):
        borrowed("no handle", 600, gpu)


def test_a_receiver_that_is_not_asked_for_does_not_disturb() -> None:
    one = sender([A])
    with pytest.raises(Broken, match=rf"is not for {B}, but for {A}"), receiving(one.offer, B, CPU):
        pass


def test_packed_tensors_are_those_that_were_packed() -> None:
    metas = [
        TensorMeta("scalar", torch.float64, ()),
        TensorMeta("empty", torch.float32, (0, 3)),
        TensorMeta("odd", torch.bool, (7,)),
        TensorMeta("half", torch.bfloat16, (3, 5)),
    ]
    values = {meta.name: torch.rand(meta.shape).mul(9).to(meta.dtype) for meta in metas}
    flat = torch.zeros(packed_bytes(metas), dtype=torch.uint8)
    pack(metas, values, flat)
    assert all(torch.equal(tensor, values[name]) for name, tensor in unpack(metas, flat))
    assert [TensorMeta.from_json(json.loads(json.dumps(meta.to_json()))) for meta in metas] == metas
    with pytest.raises(ValueError, match="odd was announced"):
        pack(metas, {**values, "odd": torch.zeros(8, dtype=torch.bool)}, flat)
    with pytest.raises(ValueError, match="'manual_seed' is no type"):
        TensorMeta.from_json(["x", "manual_seed", [1]])


@pytest.mark.parametrize("digest", [checksum, words_checksum])
def test_any_damage_changes_the_checksum(digest: Callable[[torch.Tensor], str]) -> None:
    """Both kinds, the GPU's too: a flipped bit, two words that changed places, a bit that went to another place."""
    flat = torch.randint(0, 256, (4096,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    before = digest(flat)
    for bit in range(0, 8 * len(flat), 97):
        damaged = flat.clone()
        damaged[bit // 8] ^= 1 << (bit % 8)
        assert digest(damaged) != before
    swapped = flat.clone()
    swapped[8:16], swapped[80:88] = flat[80:88], flat[8:16]
    assert digest(swapped) != before
    zeros = [torch.zeros(4096, dtype=torch.uint8) for _ in range(2)]
    zeros[0][0] = zeros[1][8] = 1
    assert digest(zeros[0]) != digest(zeros[1])
    assert digest(flat.clone()) == before


def test_the_checksum_of_words_does_not_hang_on_how_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = torch.randint(0, 256, (8 * 1000,), dtype=torch.uint8)
    whole = words_checksum(flat)
    monkeypatch.setattr("services.transfer.packing.CHUNK", 7)
    assert words_checksum(flat) == whole


def test_a_process_that_has_ended_is_dead_before_its_parent_has_asked_after_it() -> None:
    assert alive(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        assert alive(child.pid)
        child.kill()
        end = time.monotonic() + PHASE_S
        while alive(child.pid):  # its entry stays until it is waited for
            assert time.monotonic() < end
            time.sleep(0.01)
        assert Path(f"/proc/{child.pid}").exists()
    assert not alive(child.pid)


def test_what_brings_the_bytes_is_what_the_places_of_all_allow() -> None:
    first, second = {"machine": "here", "gpu": "a"}, {"machine": "here", "gpu": "b"}
    pod = {"machine": "another pod", "gpu": "a"}  # which has a share of the first GPU
    host, another = {"machine": "here", "gpu": ""}, {"machine": "there", "gpu": ""}
    assert backend_for([first, second]) == "nccl"
    assert backend_for([first, first, first]) == "ipc"
    assert backend_for([host, host]) == "ipc"
    for others in ([first, first, second], [first, pod], [first, host], [host, another]):
        assert backend_for(others) == "gloo"
    unknown = {"machine": "", "gpu": ""}
    assert backend_for([unknown, unknown]) == "gloo"


def test_all_of_a_machine_without_gpus_look_at_one_memory(party: Party) -> None:
    process, pipe = party(place)
    there, here = said(pipe), place_of(CPU)
    assert there["machine"] == here["machine"] != ""
    assert (int(there["process"]), int(here["process"])) == (process.pid, os.getpid())


def test_vllm_finds_the_engine_by_the_entry_point() -> None:
    """As vLLM looks for plugins; `register` itself is run wherever an engine is started."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    (entry,) = project["entry-points"]["vllm.general_plugins"].items()
    assert EntryPoint(*entry, "vllm.general_plugins").load().__name__ == "register"


def test_the_store_listens_where_it_was_told_alone() -> None:
    one = sender([A])
    lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    listening = [line.split()[1] for line in lines if line.split()[3] == "0A"]
    mine = [address for address in listening if int(address.split(":")[1], 16) == one.offer.port]
    assert mine == [f"0100007F:{one.offer.port:04X}"]

"""A load generator for HTTP in a process of its own: what it sends is ready before it starts, what it reads is kept as
it came, so that little of the machine goes to it, and its own CPU time is told beside what it saw.

closed   `clients` connections, each of which sends the next body once it has its answer
open     bodies at a fixed rate, whether or not the earlier ones are answered: how overload arrives
"""

import asyncio
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answered:
    """One request: which body, the status (0: the connection was lost), seconds from the generator's start when it was
    sent and when its answer had come whole, `Retry-After`, and the answer's body."""

    index: int
    status: int
    sent_s: float
    done_s: float
    retry_after: str | None
    body: bytes


@dataclass(frozen=True)
class Load:
    """What came of a load: `wall_s` from the first request to the last answer, `cpu_s` of the generator's process."""

    answers: tuple[Answered, ...]
    wall_s: float
    cpu_s: float


class Generator:
    """The process; `closed` and `open` wait until every request has its answer."""

    def __init__(self, url: str, path: str, bodies: Sequence[bytes]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, url, path, list(bodies)), daemon=True)
        self._process.start()
        theirs.close()

    def closed(self, clients: int, start: int, count: int, *, wait_s: float) -> Load:
        """Bodies start .. start + count - 1 by so many clients at once."""
        return self._ask(("closed", clients, start, count), wait_s)

    def open(self, rate: float, start: int, count: int, *, wait_s: float) -> Load:
        """The same bodies, `rate` a second."""
        return self._ask(("open", rate, start, count), wait_s)

    def end(self) -> None:
        self._process.kill()
        self._process.join()

    def _ask(self, what: tuple[Any, ...], wait_s: float) -> Load:
        self._pipe.send(what)
        if not self._pipe.poll(wait_s):
            raise TimeoutError(f"waited {wait_s:.0f} s for the answers to {what[3]} requests: the server gave not all")
        return self._pipe.recv()


def _serve(pipe: Connection, url: str, path: str, bodies: Sequence[bytes]) -> None:
    address = urlsplit(url)
    assert address.hostname is not None
    assert address.port is not None
    requests = [
        (
            f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode()
        + body
        for body in bodies
    ]
    while True:
        kind, number, start, count = pipe.recv()
        chosen = [(index % len(requests), requests[index % len(requests)]) for index in range(start, start + count)]
        drive = _closed if kind == "closed" else _open
        pipe.send(asyncio.run(_timed(drive, _Line(address.hostname, address.port), number, chosen)))


async def _timed(drive: Any, line: "_Line", number: float, chosen: Sequence[tuple[int, bytes]]) -> Load:
    cpu = time.process_time()
    line.began = time.perf_counter()
    answers = await drive(line, number, chosen)
    wall = time.perf_counter() - line.began
    line.close()
    return Load(tuple(answers), wall, time.process_time() - cpu)


class _Line:
    """Kept-alive connections to one server; one that is free is used before another is opened."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.began = 0.0

    async def ask(self, index: int, request: bytes) -> Answered:
        sent = time.perf_counter() - self.began
        status, retry_after, body = 0, None, b""
        try:
            reader, writer = self._free.pop() if self._free else await asyncio.open_connection(*self._address)
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
            body = await reader.readexactly(int(headers["content-length"]))
            status, retry_after = int(head[0].split()[1]), headers.get("retry-after")
            self._free.append((reader, writer))
        except (OSError, asyncio.IncompleteReadError):
            pass  # status 0: it is counted as lost
        return Answered(index, status, sent, time.perf_counter() - self.began, retry_after, body)

    def close(self) -> None:
        for _, writer in self._free:
            writer.close()


async def _closed(line: _Line, clients: int, chosen: Sequence[tuple[int, bytes]]) -> list[Answered]:
    following = iter(chosen)

    async def client() -> list[Answered]:
        return [await line.ask(*one) for one in following]

    return [answer for answers in await asyncio.gather(*(client() for _ in range(clients))) for answer in answers]


async def _open(line: _Line, rate: float, chosen: Sequence[tuple[int, bytes]]) -> list[Answered]:
    tasks: list[asyncio.Task[Answered]] = []
    for position, one in enumerate(chosen):
        await asyncio.sleep(max(0.0, line.began + position / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(line.ask(*one)))
    return list(await asyncio.gather(*tasks))

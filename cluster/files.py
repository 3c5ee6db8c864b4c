"""Files that a kill in mid-write, or a full disk, must not tear."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

BLOCK = 2**16
"""Bytes that are read at once where a file is read from its end: some ten lines of metrics."""


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file of ours; a last line cut short by a kill in mid-write is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            yield json.loads(line)


def append_line(path: Path, line: str) -> None:
    """Adds a line, and waits until it is on the disk; where it cannot be written to its end, nothing of it stays.

    A line torn by a full disk would take the next one with it, and with that every later start: only a last line may
    be torn.
    """
    with path.open("ab", buffering=0) as file:  # a buffer would be written once more when the file is closed
        size = file.seek(0, os.SEEK_END)
        left = memoryview(line.encode() + b"\n")
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def drop_torn_line(path: Path) -> None:
    """Removes a last line that was cut short, so that what is appended next stands on a line of its own."""
    if path.exists() and not (text := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)


def cut_lines(path: Path, belongs: Callable[[dict[str, Any]], bool]) -> None:
    """Removes from the end of a JSONL file of ours the rows that do not belong, and a torn last line.

    Read from its end, to the first row that belongs: those before it do, too. Nothing is written where there is
    nothing to be cut.
    """
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        for start, line in _lines_backwards(file, size):
            if line.endswith(b"\n") and belongs(json.loads(line)):
                break
            end = start
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())


def _lines_backwards(file: IO[bytes], size: int) -> Iterator[tuple[int, bytes]]:
    """(where it begins, line) of a file of so many bytes, the last one first; that one alone may lack its end."""
    start, held = size, b""
    while start > 0:
        step = min(BLOCK, start)
        start -= step
        file.seek(start)
        held = file.read(step) + held
        lines = held.splitlines(keepends=True)
        at = start + len(held)
        held = lines.pop(0) if start else b""  # it may begin before this block
        for line in reversed(lines):
            at -= len(line)
            yield at, line


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)

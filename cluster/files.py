"""Files that a kill in mid-write, or a full disk, must not tear."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)

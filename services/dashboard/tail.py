"""New lines of a file that grows, and whether it was cut back or replaced since.

A run that resumes cuts `metrics.jsonl` back, and it may have grown past the old length again when it is looked at: so
the bytes before the place that was read up to are remembered and compared.
"""

import os
from dataclasses import dataclass
from pathlib import Path

ANCHOR = 96
"""Bytes that are compared. A line ends with figures of its step that no other line has."""
CHUNK = 2**20
LONGEST_LINE = 64 * 2**20


@dataclass(frozen=True)
class Place:
    """Up to where a file was read, and the bytes before it."""

    offset: int = 0
    anchor: bytes = b""


@dataclass(frozen=True)
class News:
    """Whole lines without their ends; `cut` where what was read before no longer stands; `more` where more is there."""

    lines: list[bytes]
    place: Place
    cut: bool
    more: bool
    size: int


def read_news(path: Path, place: Place, chunk: int = CHUNK) -> News:
    """Raises OSError where the file cannot be read; a file that is not there is an empty one."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            cut = size < place.offset or os.pread(
                file.fileno(), len(place.anchor), place.offset - len(place.anchor)
            ) != (place.anchor)
            if cut:
                place = Place()
            data = os.pread(file.fileno(), chunk, place.offset)
            while data and b"\n" not in data and len(data) < min(LONGEST_LINE, size - place.offset):
                data += os.pread(file.fileno(), chunk, place.offset + len(data))
    except FileNotFoundError:
        return News([], Place(), place.offset > 0, False, 0)
    end = data.rfind(b"\n") + 1
    if not end and len(data) >= LONGEST_LINE:  # no line of ours: passed over, or nothing after it were ever read
        end = len(data)
    whole = data[:end]
    if whole:
        place = Place(place.offset + end, (place.anchor + whole)[-ANCHOR:])
    return News(whole.splitlines(), place, cut, place.offset < size and end > 0, size)

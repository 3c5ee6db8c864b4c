"""The append-only file of a Redis, cut as a power failure cuts it."""

import os
from pathlib import Path


def end_without(log: Path, began: int, lost: int, torn: bool) -> int:
    """Where a log ends that lacks its last `lost` commands, but for some bytes (`torn`) of the first of them.

    By commands, not bytes: these depend on the clock, and an example has to come to the same each time. So does what
    Redis removes because its time is over, which therefore counts as a part of what was before it. What the server
    wrote anew when it started, the bytes before `began`, in an order of its own, stays.
    """
    ends = [began]
    with log.open("rb") as file:
        file.seek(began)
        while head := file.readline():
            words: list[bytes] = []
            for _ in range(int(head[1:])):
                words.append(file.read(int(file.readline()[1:])))
                file.seek(2, os.SEEK_CUR)
            if words[0].upper() in (b"DEL", b"UNLINK") and b":call:" in words[1] and len(words) == 2:
                ends.pop()
            ends.append(file.tell())
    kept = max(0, len(ends) - 1 - lost)
    return ends[kept] + (3 if torn and kept < len(ends) - 1 else 0)

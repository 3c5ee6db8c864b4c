"""Files of lines that several programs, and people, write to."""

import os
from pathlib import Path


def ends_its_line(path: Path) -> bool:
    """Whether what is appended begins a line of its own: the file is not there, is empty, or ends in a newline."""
    if not path.exists() or path.stat().st_size == 0:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"

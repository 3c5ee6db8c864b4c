"""Words: the unit of salience. Lower-cased runs of letters and digits, inner apostrophes and hyphens included."""

import re

_WORD = re.compile(r"\w+(?:['’\-]\w+)*")


def words_of(text: str, start: int = 0, end: int | None = None) -> list[tuple[str, int, int]]:
    """(word, first character, end) of each word in text[start:end], with positions in `text`."""
    stop = len(text) if end is None else end
    return [(match.group().lower(), match.start(), match.end()) for match in _WORD.finditer(text, start, stop)]

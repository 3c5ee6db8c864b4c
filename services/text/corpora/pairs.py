"""A generated pair, and how pairs are chosen, split and written: all of it by seeded shuffles of ordered lists.

No set or hash decides an order here, so that every process generates the same corpus from the same seed.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

SEEN_AT_LEAST = 3
"""How often each fact of a held-out pair is at least met in training, in other words."""


@dataclass(frozen=True)
class Pair:
    """A prompt and its reference response.

    `facts` are the atomic facts that the response states. `combination` names what is put together, whatever the words:
    pairs with one combination are in one split, so that a held-out one combines known facts in an unseen way.
    """

    prompt: str
    response: str
    kind: str
    facts: tuple[str, ...]
    combination: str
    split: str = "train"

    def row(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "response": self.response, "split": self.split, "kind": self.kind}


def choose(pools: Mapping[str, Sequence[Pair]], shares: Mapping[str, int], n: int, seed: int) -> list[Pair]:
    """`n` pairs with unique prompts, kind by kind in proportion to `shares`, shuffled.

    Raises ValueError where the phrasings do not give that many different prompts.
    """
    total = sum(shares.values())
    chosen: list[Pair] = []
    spare: list[Pair] = []
    seen: dict[str, None] = {}
    for kind, share in shares.items():
        pool = list(pools[kind])
        Random(f"{seed}:{kind}").shuffle(pool)
        unique: list[Pair] = []
        for pair in pool:
            if pair.prompt not in seen:
                seen[pair.prompt] = None
                unique.append(pair)
        quota = n * share // total
        chosen += unique[:quota]
        spare += unique[quota:]
    # What rounding and small pools left open is filled from the rest.
    Random(f"{seed}:spare").shuffle(spare)
    chosen += spare[: n - len(chosen)]
    if len(chosen) < n:
        raise ValueError(f"the phrasings give {len(chosen)} different prompts, {n} were asked for")
    Random(f"{seed}:order").shuffle(chosen)
    return chosen


def hold_out(pairs: Sequence[Pair], validation: float, test: float, seed: int) -> list[Pair]:
    """The same pairs in the same order with `split` set; the held-out parts have exactly round(fraction * n) pairs.

    Whole combinations are held out, and only those whose facts are all met in what is left: SEEN_AT_LEAST times, or as
    often as a corpus of few pairs allows. Raises ValueError where no choice of whole combinations has the asked size.
    """
    for least in range(SEEN_AT_LEAST, -1, -1):
        splits = _held_out_places(pairs, validation, test, seed, least)
        if splits is not None:
            return [replace(pair, split=split) for pair, split in zip(pairs, splits, strict=True)]
    raise ValueError(f"{len(pairs)} pairs cannot be split into {validation} validation and {test} test")


def _held_out_places(pairs: Sequence[Pair], validation: float, test: float, seed: int, least: int) -> list[str] | None:
    members: dict[str, list[int]] = {}
    for place, pair in enumerate(pairs):
        members.setdefault(pair.combination, []).append(place)
    left = Counter(fact for pair in pairs for fact in pair.facts)
    wanted = {"test": round(test * len(pairs)), "validation": round(validation * len(pairs))}
    splits = ["train"] * len(pairs)
    combinations = list(members)
    Random(f"{seed}:split").shuffle(combinations)
    for combination in combinations:
        places = members[combination]
        split = next((name for name, room in wanted.items() if room >= len(places)), None)
        if split is None:
            continue
        taken = Counter(fact for place in places for fact in pairs[place].facts)
        if any(left[fact] - count < least for fact, count in taken.items()):
            continue
        left -= taken
        wanted[split] -= len(places)
        for place in places:
            splits[place] = split
    return None if any(wanted.values()) else splits


def write_jsonl(pairs: Iterable[Pair], path: Path) -> int:
    """Writes {prompt, response, split, kind} a line, UTF-8; returns the number of lines."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for pair in pairs:
            file.write(json.dumps(pair.row(), ensure_ascii=False) + "\n")
            count += 1
    return count


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def sentence(text: str, capitalised: Callable[[str], str] = upper_first) -> str:
    """Ends with a full stop, begins with a capital."""
    return capitalised(text) + "."

"""Which labelled examples an epoch has, and what each weighs, where labels are uneven. Pure; random by a seed alone.

A stratum is where the label lies: [0, 1] cut into `bins` of equal width (two for labels of yes and no).
"""

import math
import random
from collections.abc import Mapping, Sequence


def stratum(label: float, bins: int) -> int:
    """0 .. bins - 1; a label of exactly 1 is in the last. ValueError: outside [0, 1]."""
    if not 0 <= label <= 1:
        raise ValueError(f"a label lies in [0, 1], got {label}")
    return min(bins - 1, int(label * bins))


def over_sample(strata: Sequence[int], seed: int) -> list[int]:
    """Places with every stratum drawn up to the largest one's size: whole copies first, a random part for the rest.

    Each place comes at least once; the order is that of the places, copies side by side.
    """
    members = _members(strata)
    largest = max(map(len, members.values()), default=0)
    draw = random.Random(f"over:{seed}")
    chosen: list[int] = []
    for places in members.values():
        copies, rest = divmod(largest, len(places))
        chosen += places * copies + draw.sample(places, rest)
    return sorted(chosen)


def under_sample(strata: Sequence[int], ratio: float, seed: int) -> list[int]:
    """Places of which no stratum has more than `ratio` times the smallest one's, chosen at random within each.

    ValueError: `ratio` is below 1.
    """
    if ratio < 1:
        raise ValueError(f"under-sampling keeps at least as many as the smallest stratum has: ratio {ratio} is below 1")
    members = _members(strata)
    most = math.floor(ratio * min(map(len, members.values()), default=0))
    draw = random.Random(f"under:{seed}")
    return sorted(place for places in members.values() for place in draw.sample(places, min(most, len(places))))


def even_weights(strata: Sequence[int]) -> list[float]:
    """A weight an example, so that every stratum weighs the same together and the mean weight is 1."""
    members = _members(strata)
    return [len(strata) / (len(members) * len(members[each])) for each in strata]


def aggregate(labels: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """One rating in [0, 1] of several labels in [0, 1]: their weighted mean.

    A label of negative weight counts against: 1 - value at the weight's size. Labels that the weights do not name are
    left out; those that an example lacks leave theirs to the others. ValueError: none is left.
    """
    used = [(weights[name], value) for name, value in labels.items() if weights.get(name)]
    if not used:
        raise ValueError(f"none of the labels {', '.join(labels)} has a weight (weighted: {', '.join(weights)})")
    return sum(abs(w) * (value if w > 0 else 1 - value) for w, value in used) / sum(abs(w) for w, _ in used)


def paraphrase_rating(rating: float, similarity: float, same_language: bool, other_language: float) -> float:
    """What a paraphrase of a response rated `rating` in [0, 1] is rated: less, as it is less like it.

    Times the cosine of their embeddings (a negative one counts as 0), and times `other_language` (0 to 1) where it is
    not in the prompt's language.
    """
    return rating * max(0.0, min(1.0, similarity)) * (1.0 if same_language else other_language)


def _members(strata: Sequence[int]) -> dict[int, list[int]]:
    members: dict[int, list[int]] = {}
    for place, each in enumerate(strata):
        members.setdefault(each, []).append(place)
    return dict(sorted(members.items()))

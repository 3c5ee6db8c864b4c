"""The figures of an evaluation: pure functions of texts, token ids and numbers.

Overlap with a reference follows SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250) and ROUGE (Lin 2004), diversity follows
Li et al. 2016 (arXiv 1510.03055), repetition Welleck et al. 2019 (arXiv 1908.04319). Prompts, not responses, are the
unit of every interval: responses to one prompt are not independent.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap interval [low, high], over `count` prompts."""

    value: float
    low: float
    high: float
    count: int


def normalise_answer(text: str) -> list[str]:
    """Words of a text as SQuAD compares them: lower-cased, without punctuation and English articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(response: str, reference: str) -> float:
    """1 where the normalised words are the same in the same order, else 0."""
    return float(normalise_answer(response) == normalise_answer(reference))


def token_f1(response: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the multisets of normalised words; 1 where both are empty."""
    given, wanted = normalise_answer(response), normalise_answer(reference)
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def rouge_l(response: str, reference: str) -> float:
    """ROUGE-L, the F-measure over the longest common subsequence, with Porter stemming (the rouge-score library)."""
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"], use_stemmer=True).score(reference, response)["rougeL"].fmeasure)


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]


def repetition(ids: Sequence[int], n: int = 3) -> float:
    """Share of a response's n-grams that repeat an earlier one: 1 - distinct / all; 0 where there are none.

    Welleck's seq-rep-n. The paper takes n = 4; 3 here, for responses may be as short as three tokens.
    """
    grams = ngrams(ids, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(responses: Sequence[Sequence[int]], n: int) -> float | None:
    """Distinct n-grams over all n-grams of all responses; None where there are none.

    Falls as the number of responses grows: compare equal numbers only.
    """
    grams = [gram for ids in responses for gram in ngrams(ids, n)]
    return len(set(grams)) / len(grams) if grams else None


def perplexity(logprob_sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """exp(-sum of log-probabilities / number of tokens), every token weighing the same; None without tokens.

    Infinite where that overflows a float.
    """
    tokens = sum(counts)
    if not tokens:
        return None
    nats = -math.fsum(logprob_sums) / tokens
    return math.exp(nats) if nats < 709 else math.inf


def pooled_within_sd(groups: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation within prompts, pooled: sqrt(sum_i sum_k (x_ik - mean_i)^2 / sum_i (n_i - 1)).

    `groups` holds the values of each prompt's responses; a prompt with one response takes no part. None where no prompt
    has two.
    """
    squares = [sum((x - math.fsum(group) / len(group)) ** 2 for x in group) for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in groups if len(group) > 1)
    return math.sqrt(math.fsum(squares) / freedom) if freedom else None


def bootstrap_mean(values: Sequence[float], *, seed: int, resamples: int = 2000, level: float = 0.95) -> Interval:
    """Mean of one value a prompt with its percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    Prompts are drawn with replacement by a generator of `seed`.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    return bootstrap_ratio(values, [1.0] * len(values), seed=seed, resamples=resamples, level=level)


def bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """sum(numerators) / sum(denominators), both one a prompt, with its percentile bootstrap interval over prompts.

    Raises:
        ValueError: no values, lengths that differ, a value that is not finite, or a denominator that is not positive.
    """
    top, bottom = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if top.shape != bottom.shape or top.ndim != 1 or not top.size:
        raise ValueError(f"a bootstrap needs one numerator and one denominator a prompt: {top.shape}, {bottom.shape}")
    if not (np.isfinite(top).all() and np.isfinite(bottom).all() and (bottom > 0).all()):
        raise ValueError("a bootstrap needs finite values and positive denominators")
    drawn = _resample(top.size, seed, resamples)
    ratios = top[drawn].sum(axis=1) / bottom[drawn].sum(axis=1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high), int(top.size))


def paired_difference(
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval | None:
    """Mean of after - before over the prompts that both have, resampled as pairs; None where they share none."""
    shared = sorted(before.keys() & after.keys())
    if not shared:
        return None
    differences = [after[key] - before[key] for key in shared]
    return bootstrap_mean(differences, seed=seed, resamples=resamples, level=level)


def _resample(size: int, seed: int, resamples: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, size, size=(resamples, size))

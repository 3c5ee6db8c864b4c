"""What a request asks of the capture, and how it travels: a plain mapping in `SamplingParams.extra_args`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EXTRA_ARGS_KEY = "attune"


@dataclass(frozen=True)
class CaptureRequest:
    """`key` names the statistics when they are fetched; `dense` keeps the rows A[t, :] too, `kept_sets` the token ids
    that top-k and top-p left in at each step."""

    key: str
    content: tuple[int, ...]
    salient: tuple[int, ...]
    salient_weights: tuple[float, ...]
    dense: bool = False
    kept_sets: bool = False


def extra_args(
    key: str,
    content: Sequence[int],
    salient: Sequence[int],
    salient_weights: Sequence[float],
    *,
    dense: bool = False,
    kept_sets: bool = False,
) -> dict[str, Any]:
    """`SamplingParams(extra_args=extra_args(...))` asks for the statistics of a request over these positions.

    Positions count from the start of the prompt; `salient_weights` [len(salient)] are scaled to mean 1 by the caller.
    """
    return {
        EXTRA_ARGS_KEY: {
            "key": key,
            "content": list(content),
            "salient": list(salient),
            "salient_weights": list(salient_weights),
            "dense": dense,
            "kept_sets": kept_sets,
        }
    }


def read_request(given: Mapping[str, Any] | None) -> CaptureRequest | None:
    """The request's wish, or None where it has none."""
    wish = (given or {}).get(EXTRA_ARGS_KEY)
    if wish is None:
        return None
    return CaptureRequest(
        str(wish["key"]),
        tuple(wish["content"]),
        tuple(wish["salient"]),
        tuple(wish["salient_weights"]),
        bool(wish.get("dense", False)),
        bool(wish.get("kept_sets", False)),
    )

"""One sample token by token: pieces of text, attention, log-probability, KL; and the rows of its map."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from services.dashboard.layout import RunFiles, parsed

SPREAD = "\N{REPLACEMENT CHARACTER}"
MOST_BYTES = 32 * 2**20
"""Of samples in their files that one answer shows, but for a single one that is larger: what is made of them in memory
is several times that, for everyone who asks at a time."""

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Tokenizer:
    """`decode` of ids, and where it is from; without one, `why` not."""

    decode: Decode | None
    origin: str | None
    why: str | None


def tokenizer_of(run: RunFiles) -> Tokenizer:
    """The run's own tokenizer: of its policy, its newest checkpoint, or the model that it began with."""
    places = [run.path / "policy", *_newest_first(run.path / "checkpoints"), run.path / "policy-best"]
    try:
        tree: Any = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
        places.append(Path(str(tree["policy"]["model"])))
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        pass
    for place in places:
        file = place / "tokenizer.json"
        if file.is_file():
            try:
                return _loaded(file, file.stat().st_mtime_ns)
            except Exception as error:  # the library raises no narrower one for a file that it cannot read
                return Tokenizer(None, None, f"{file} cannot be read: {error}")
    return Tokenizer(None, None, "no tokenizer.json in policy/, checkpoints/ or where policy.model points")


def _newest_first(checkpoints: Path) -> list[Path]:
    found = [path / "model" for path in checkpoints.glob("step_*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.parent.name[5:]), reverse=True)


@lru_cache(maxsize=4)
def _loaded(file: Path, _changed: int) -> Tokenizer:
    try:
        import tokenizers
    except ImportError:
        return Tokenizer(None, None, "the package tokenizers is not installed: pip install 'attune[dashboard]'")
    loaded: Any = tokenizers.Tokenizer.from_file(str(file))  # pyright: ignore[reportUnknownMemberType]
    return Tokenizer(lambda ids: loaded.decode(list(ids), skip_special_tokens=False), str(file), None)


def pieces_of(ids: Sequence[int], decode: Decode) -> list[str]:
    """The text that each token adds; one that ends in the middle of a sign adds nothing, the last of the sign does."""
    pieces: list[str] = []
    before = told = 0
    for at in range(len(ids)):
        known, text = decode(ids[before:told]), decode(ids[before : at + 1])
        # A sign has four bytes at most: what is not whole after as many tokens never will be.
        if text.endswith(SPREAD) and at - told < 3 and at + 1 < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(known) :])
        before, told = told, at + 1
    return pieces


def read_rows(run: RunFiles, places: Sequence[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """The samples at (step, place, length) in their shards; what was cut back meanwhile is left out."""
    rows: list[dict[str, Any]] = []
    for step, place, length in places:
        try:
            with run.shard(step).open("rb") as file:
                file.seek(place)
                row = parsed(file.read(length))
        except FileNotFoundError:
            row = None
        if row is not None:
            rows.append(row)
    return rows


def token_view(row: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """A sample for the page: its record without what is drawn, `tokens` of the response and `prompt_tokens`.

    Each measure is one number a response token: `mass` M_t, `salient_mass` C_t, `entropy` of the attention as a
    distribution over the content (nats), `peak` X_t / M_t, `logprob`, `kl` to the reference (k1, nats),
    `policy_entropy` of the trained policy's distribution there, where the step's first epoch met it (nats).
    """
    prompt, response = _ids(row, "prompt_ids"), _ids(row, "response_ids")
    attention: Mapping[str, Any] = row.get("attention") or {}
    measures: dict[str, list[float | None]] = {
        "logprob": _numbers(row.get("logprobs")),
        "kl": _numbers(row.get("kl_tokens")),
        "policy_entropy": _numbers(row.get("entropy_tokens")),
        **attention_measures(attention),
    }
    return {
        **{
            key: row.get(key)
            for key in ("step", "sample_id", "group_id", "prompt_id", "attempt", "finish_reason", "reward", "scores",
                        "flags", "advantage", "kl_reference", "value", "created_at")
        },
        "policy_versions": row.get("policy_versions") or [],
        "prompt": row.get("prompt"),
        "response": row.get("response"),
        "prompt_ids": prompt,
        "response_ids": response,
        "prompt_pieces": None if tokenizer.decode is None else pieces_of(prompt, tokenizer.decode),
        "pieces": None if tokenizer.decode is None else pieces_of(response, tokenizer.decode),
        "tokenizer": tokenizer.origin,
        "no_tokenizer": tokenizer.why,
        "content": attention.get("content") or [],
        "salient": attention.get("salient") or [],
        "salient_weights": attention.get("salient_weights") or [],
        "layers": attention.get("layers") or [],
        "has_map": bool(attention.get("map_ref") or attention.get("map")),
        "measures": {name: values for name, values in measures.items() if len(values) == len(response) and values},
    }  # fmt: skip


def attention_measures(attention: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Of M_t, C_t, E_t and X_t: entropy is max(0, log M_t - E_t / M_t); None where there is no mass."""
    mass = _numbers(attention.get("mass"))
    sums, peak = _numbers(attention.get("neg_entropy_sum")), _numbers(attention.get("peak"))
    if not len(mass) == len(sums) == len(peak):
        return {}

    def entropy(m: float | None, e: float | None) -> float | None:
        return None if m is None or e is None or m <= 0 else max(0.0, math.log(m) - e / m)

    return {
        "mass": mass,
        "salient_mass": _numbers(attention.get("salient_mass")),
        "entropy": [entropy(m, e) for m, e in zip(mass, sums, strict=True)],
        "peak": [None if not m or x is None else x / m for m, x in zip(mass, peak, strict=True)],
    }


def _numbers(values: Any) -> list[float | None]:
    return [float(value) if isinstance(value, int | float) and math.isfinite(value) else None for value in values or ()]


def _ids(row: Mapping[str, Any], name: str) -> list[int]:
    return [int(number) for number in row.get(name) or ()]


def map_rows(run: RunFiles, row: Mapping[str, Any], low: int, high: int) -> tuple[int, int, bytes] | None:
    """(rows, columns, float32 bytes) of rows low .. high - 1 of a sample's dense attention [T][P]; None: not kept.

    Raises:
        ValueError: the file it names is none of the run's maps, or holds something else.
    """
    attention: Mapping[str, Any] = row.get("attention") or {}
    inline = attention.get("map")
    if inline:
        part = np.asarray(inline, dtype="<f4")[low:high]
        return part.shape[0], part.shape[1], part.tobytes()
    reference = attention.get("map_ref")
    if not reference:
        return None
    maps = (run.path / "samples" / "maps").resolve()
    file = (run.path / str(reference)).resolve()
    if maps not in file.parents:
        raise ValueError("the map that the sample names is outside of the run's maps")
    try:
        with file.open("rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            if size > 2**20:
                raise ValueError("the map's file is none of safetensors")
            entry = json.loads(handle.read(size))["map"]
            if entry["dtype"] != "F32" or len(entry["shape"]) != 2:
                raise ValueError("the map is no matrix of float32")
            rows, columns = entry["shape"]
            high = min(high, rows)
            low = min(low, high)
            handle.seek(8 + size + entry["data_offsets"][0] + low * columns * 4)
            return high - low, columns, handle.read((high - low) * columns * 4)
    except FileNotFoundError:
        return None

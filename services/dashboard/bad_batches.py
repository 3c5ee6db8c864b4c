"""Batches that the run did not train on: `RUN/bad_batches/step_N.jsonl`, line one says why, the others are samples."""

from itertools import islice
from typing import Any

from services.dashboard.layout import RunFiles, parsed
from services.dashboard.tokens import Tokenizer, token_view

MOST = 200
"""Of batches that are listed, and of samples that are shown of one."""


def bad_batches(run: RunFiles) -> list[dict[str, Any]]:
    """(step, why) of the last MOST of them, newest first."""
    files = sorted((run.path / "bad_batches").glob("step_*.jsonl"), reverse=True)[:MOST]
    found: list[dict[str, Any]] = []
    for file in files:
        try:
            with file.open("rb") as lines:
                head = parsed(lines.readline())
        except OSError:  # removed meanwhile
            continue
        if head is not None:
            found.append({"step": head.get("step"), "why": head.get("why")})
    return found


def bad_batch(run: RunFiles, step: int, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Why it was not trained on, and its first MOST samples token by token; None where none of that step was kept."""
    try:
        with (run.path / "bad_batches" / f"step_{step:06d}.jsonl").open("rb") as lines:
            head = parsed(lines.readline()) or {}
            rows = [row for line in islice(lines, MOST) if (row := parsed(line)) is not None]
            more = sum(1 for _ in lines)
    except OSError:  # none of that step; or a number that makes no name
        return None
    samples = [token_view({**row, "step": step}, tokenizer) for row in rows]
    return {"step": step, "why": head.get("why"), "samples": samples, "more": more}

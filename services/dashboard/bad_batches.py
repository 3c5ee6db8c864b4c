"""Batches that the run did not train on: `RUN/bad_batches/step_N.jsonl`, line one says why, the others are samples."""

from typing import Any

from services.dashboard.layout import RunFiles, parsed
from services.dashboard.tokens import MOST_BYTES, Tokenizer, token_view

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
    """Why it was not trained on, and its first samples token by token, MOST of them or MOST_BYTES; None where none of
    that step was kept."""
    samples: list[dict[str, Any]] = []
    read = more = 0
    try:
        with (run.path / "bad_batches" / f"step_{step:06d}.jsonl").open("rb") as lines:
            head = parsed(lines.readline()) or {}
            for line in lines:
                read += len(line)
                if len(samples) == MOST or (samples and read > MOST_BYTES):
                    more += 1
                elif (row := parsed(line)) is not None:
                    samples.append(token_view({**row, "step": step}, tokenizer))
    except OSError:  # none of that step; or a number that makes no name
        return None
    return {"step": step, "why": head.get("why"), "samples": samples, "more": more}

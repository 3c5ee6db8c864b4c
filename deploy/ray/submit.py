"""Submits a training job to a Ray cluster under a stable name, and again after a stop, a crash or a lost head.

    python deploy/ray/submit.py NAME -- python -m cluster train RECIPE --run-dir DIR --resume auto

Ray takes a submission id once: also after `ray job delete` it does not support the same one again. So the attempts of
a run are NAME-1, NAME-2, ...; the run directory, not the id, is what a run goes on from. While an earlier attempt has
not ended, nothing is submitted. The token comes from where Ray looks for it (RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH).

Exit codes: 0 the job succeeded (with --no-wait: was taken), 1 it failed, 2 it was not submitted, 4 it was stopped.
"""

import argparse
import asyncio
import os
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ENDED = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": 4}


def next_attempt(name: str, jobs: Iterable[tuple[str, str]]) -> str:
    """The id after those of `jobs` (submission id, status). Raises SystemExit where one of the name has not ended."""
    numbers = [0]
    for submission, status in jobs:
        match = re.fullmatch(rf"{re.escape(name)}-(\d+)", submission)
        if match is None:
            continue
        if status not in ENDED:
            sys.stderr.write(f"{submission} is {status}; stop it first: ray job stop {submission}\n")
            raise SystemExit(2)
        numbers.append(int(match[1]))
    return f"{name}-{max(numbers) + 1}"


async def follow(client: Any, submission: str) -> None:
    async for lines in client.tail_job_logs(submission):
        sys.stdout.write(lines)
        sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description="Submits a training job under NAME-1, NAME-2, ...")
    parser.add_argument("name", help="of the run")
    parser.add_argument("--address", default=os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"))
    parser.add_argument("--working-dir", default=".", help="what is uploaded: the code (and the recipe)")
    parser.add_argument("--runtime-env", type=Path, default=HERE / "runtime-env.yaml")
    parser.add_argument("--no-wait", action="store_true", help="do not follow the job's log to its end")
    parser.add_argument("command", nargs="+", help="after --: python -m cluster train RECIPE --run-dir DIR")
    asked = parser.parse_args()
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(asked.address)
        jobs = [(job.submission_id or "", str(job.status.value)) for job in client.list_jobs()]
        submission = next_attempt(asked.name, jobs)
        environment = yaml.safe_load(asked.runtime_env.read_text(encoding="utf-8"))
        client.submit_job(
            entrypoint=shlex.join(asked.command),
            submission_id=submission,
            runtime_env={**environment, "working_dir": asked.working_dir},
        )
    except (OSError, RuntimeError, ValueError) as error:
        sys.stderr.write(f"not submitted to {asked.address}: {error}\n")
        return 2
    sys.stdout.write(f"submitted: {submission}\n")
    if asked.no_wait:
        return 0
    asyncio.run(follow(client, submission))
    status = str(client.get_job_status(submission).value)
    sys.stdout.write(f"{submission}: {status}\n")
    return ENDED.get(status, 1)


if __name__ == "__main__":
    sys.exit(main())

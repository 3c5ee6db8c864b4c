"""The GPU kernels of the capture, run by Triton's interpreter and built by its compiler: there need be no GPU.

Whether kernels are interpreted is settled when they are defined, so what runs them does so in a process of its own.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import capture_kernel

ROOT = Path(__file__).resolve().parents[2]

SAME_BITS = """
import torch
from dataclasses import replace
from benchmarks.capture_kernel import UNWRITTEN, Case, scratch, build, run

problem = build(Case(torch.bfloat16, 2, 64, 1, 16, "interleaved", (40, 3, 0, 101), 2), torch.device("cpu"), seed=0)
statistics = problem.slots.statistics

def captured(rows):
    statistics.fill_(UNWRITTEN)
    run(replace(problem, rows=rows), scratch(problem), torch.zeros(4, problem.slots.content.shape[1]))
    return statistics.clone()

together = captured(problem.rows)
assert torch.equal(captured(problem.rows), together)
context = problem.rows.context
for row in (0, 1, 3):
    alone = captured(replace(problem.rows, context=torch.where(torch.arange(4) == row, context, 0)))
    at = problem.rows.slot[row], problem.rows.token[row]
    assert torch.equal(alone[at], together[at])
    alone[at] = UNWRITTEN
    assert (alone == UNWRITTEN).all()
"""

REFUSED = """
import torch
from dataclasses import replace
from benchmarks.capture_kernel import Case, Layer, scratch, build, run

problem = build(Case(torch.float32, 2, 64, 1, 16, "heads first", (5, 7), 2), torch.device("cpu"), seed=0)
for change in ({"query": torch.zeros(3, 2, 64)}, {"query": torch.zeros(2, 3, 64)}, {"heads": torch.ones(1)},
               {"keys": torch.zeros(4, 1, 16, 32)}, {"keys": torch.zeros(4, 1, 16, 64).half()}, {}):
    layer = Layer(**{**vars(problem.layers[0]), **change})
    try:
        run(replace(problem, layers=[layer]), scratch(problem), torch.zeros(2, 10))
    except ValueError as error:
        print(error)
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rollout.vllm_capture import placed_rows, triton_kernels as kernels

TYPES = {"query": "*bf16", "keys": "*bf16", "scale": "fp32", "total": "fp32", "width": "i32"}
TYPES |= {"requests": "i32", "count": "i32", "batch_slot": "*i64"}
INDICES = ("table", "row_slot", "row_token", "row_context", "prompt")
BATCH = ("batch_start", "batch_length", "held")
shape = dict(GROUP=4, MEMBERS=16, DEPTH=128, PADDED=128, BLOCK_SIZE=16, TILE=64, UPCAST=False)
for kernel, constants in (
    (kernels._partials, {**shape, "HEADS": 32, "SPLITS": 16}),
    (kernels._combine, {"HEADS": 32, "PADDED_HEADS": 32, "SPLITS": 16}),
    (kernels._accumulate, {**shape, "KEY_HEADS": 8, "ADD": True}),
    (kernels._reduce, {"DENSE": True, "TILE": 512}),
    (placed_rows._place, {"PER_REQUEST": 3, "BLOCK": 128}),
):
    signature = {
        name: "constexpr" if name in constants
        else "*i32" if kernel is placed_rows._place and name == "query"
        else TYPES.get(name, "*i32" if name in INDICES + BATCH else "i32" if name.startswith("stride") else "*fp32")
        for name in kernel.arg_names
    }
    built = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert built.asm["cubin"]
"""


def python(*arguments: str, interpret: bool, **environment: str) -> str:
    """What a Python of its own prints; its errors are the test's."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=inherited | {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpret else {}) | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_keep_the_bounds_of_the_specification(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    printed = python(
        *("-m", "benchmarks.capture_kernel", "--quick", "--out", str(out)), interpret=True, CUDA_VISIBLE_DEVICES=""
    )
    results = json.loads(printed.strip().splitlines()[-1])["results"]
    assert results == json.loads(out.read_text())["results"]
    assert results["interpreter"] is True
    assert results["missed"] == 0
    assert not any(name.endswith(("_us", "_per_s")) for name in results)
    for dtype, errors in results["errors"].items():
        bounds = results["bounds"][dtype]
        assert errors["entropy"] <= bounds["entropy"]
        assert max(errors[name] for name in ("mass", "salient_mass", "peak", "dense")) <= bounds["statistics"]
    assert set(results["errors"]) == {"float32", "bfloat16", "float16"}


def test_bits_of_a_row_depend_neither_on_the_run_nor_on_the_batch() -> None:
    python("-c", SAME_BITS, interpret=True)


def test_what_does_not_fit_is_refused_before_anything_runs() -> None:
    lines = python("-c", REFUSED, interpret=False).splitlines()
    assert [line.removeprefix("attention kernels: ") for line in lines] == [
        "3 queries for 2 rows",
        "2 head weights of torch.float32",
        "1 head weights of torch.float32",
        "keys of width 32 for queries of 64",
        "query is torch.float32 and keys are torch.float16",
        "tensors on the CPU, where TRITON_INTERPRET=1 was not set before the import",
    ]


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    python("-c", COMPILED, interpret=False, TRITON_CACHE_DIR=str(tmp_path))


def test_without_triton_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "rollout.vllm_capture.triton_kernels"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r"pip install 'triton>=3\.6'"):
        importlib.import_module(name)


def test_a_missed_bound_ends_the_benchmark_with_the_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the benchmark sets it, and this takes it back
    monkeypatch.setattr(sys, "argv", ["capture_kernel", "--quick"])
    monkeypatch.setattr(capture_kernel, "measure", lambda *_: ({"missed": 1}, ["error of mass is 0.5, over 1e-05"]))
    with pytest.raises(SystemExit, match=r"error of mass is 0\.5"):
        capture_kernel.main()
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["results"] == {"missed": 1}

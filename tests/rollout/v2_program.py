"""vLLM's own model runner V2 on a CPU: its Triton kernels, and the capture's, run in Triton's interpreter.

    python tests/rollout/v2_program.py ASKED ANSWERED

ASKED is a pickle of (policy, capture, rollout, calls); a call is a list of generation requests, a list of prompts to be
generated with and without the capture, or the path of a manifest to be loaded. ANSWERED becomes a pickle of
what each gave, and of the capture's report.
"""

import asyncio
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "OMP_NUM_THREADS": "1",
}

from triton.backends import backends  # noqa: E402 - reads the environment

# vLLM takes Triton on a CPU for usable where it names a CPU backend; the interpreter needs none.
backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False))  # pyright: ignore[reportArgumentType]


async def run(asked: Path, answered: Path) -> None:
    from rollout.worker import build_engine

    policy, capture, rollout, calls = pickle.loads(asked.read_bytes())
    engine: Any = await build_engine(policy, capture, rollout)
    answers = [await _answer(engine, call) for call in calls]
    report = (await engine._rpc("attune_capture_report"))[0]
    kind = engine._llm._engine.model_executor.driver_worker.worker.model_runner
    answered.write_bytes(pickle.dumps((engine.layers, answers, report, f"{type(kind).__module__}")))
    await engine.close()


async def _answer(engine: Any, call: Any) -> Any:
    return await engine.generate(call)


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1]), Path(sys.argv[2])))

"""vLLM's engine in this process, for CPUs: what `AsyncLLM` offers of which the rollout engine has need, without its
two processes more (an engine and a worker), each of which imports vLLM and takes a core from the model.

All that touches the engine runs in one thread, one call at a time: a step of the whole batch, or what comes between two
steps.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal


class InProcessLLM:
    """Wraps a `vllm.v1.engine.llm_engine.LLMEngine`; `build` makes it, in the thread that will run it."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vllm")
        self._engine: Any = self._thread.submit(build).result()
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._work = asyncio.Event()
        self._running = asyncio.Event()
        self._running.set()
        self._admitting = asyncio.Event()
        self._admitting.set()
        self._drained = asyncio.Event()
        self._drained.set()
        self._stepping: asyncio.Task[None] | None = None

    async def generate(self, prompt: Any, parameters: Any, request_id: str) -> AsyncGenerator[Any]:
        """The finished output of a request; a caller that goes away ends the request."""
        await self._admitting.wait()
        if self._stepping is None:
            self._stepping = asyncio.create_task(self._step_for_ever())
        answer = self._waiting[request_id] = asyncio.get_running_loop().create_future()
        self._drained.clear()
        try:
            await self._call(self._engine.add_request, request_id, prompt, parameters)
            self._work.set()
            yield await answer
        except (asyncio.CancelledError, GeneratorExit):
            self._thread.submit(self._engine.abort_request, [request_id])
            raise
        finally:
            self._settle(request_id)

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        return await self._call(self._engine.collective_rpc, method, None, args)

    async def pause_generation(self, *, mode: Literal["wait", "keep"]) -> None:
        """No step runs until `resume_generation`; `wait` first finishes what was begun."""
        self._admitting.clear()
        if mode == "wait":
            await self._drained.wait()
        self._running.clear()
        await self._call(lambda: None)  # the step under way has ended

    async def resume_generation(self) -> None:
        self._running.set()
        self._admitting.set()

    async def reset_prefix_cache(self, *, reset_running_requests: bool) -> None:
        await self._call(lambda: self._engine.reset_prefix_cache(reset_running_requests))

    async def update_weight_version(self, version: str) -> None:
        await self._call(self._engine.set_weight_version, version)

    def shutdown(self) -> None:
        self._thread.submit(self._engine.engine_core.shutdown).result()
        self._thread.shutdown()

    async def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def _step_for_ever(self) -> None:
        while True:
            await self._work.wait()
            await self._running.wait()
            try:
                outputs = await self._call(self._step)
            except Exception as error:
                for answer in self._waiting.values():
                    if not answer.done():
                        answer.set_exception(error)
                self._stepping = None
                return
            if outputs is None:
                self._work.clear()
                continue
            for output in outputs:
                answer = self._waiting.get(output.request_id)
                if output.finished and answer is not None and not answer.done():
                    answer.set_result(output)

    def _step(self) -> list[Any] | None:
        """One step; None where there was nothing to do."""
        if not self._engine.has_unfinished_requests():
            return None
        return self._engine.step()

    def _settle(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)
        if not self._waiting:
            self._drained.set()

"""What a rollout actor's process holds: an engine, a connection to the ledger, and the loop between them."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict
from typing import Any

from rollout.actor import RolloutCounters, RolloutLoop
from rollout.config import RolloutSection
from rollout.engine import Engine, Oracle
from rollout.prepare import Preparation
from services.attention.config import CaptureSection
from services.errors import UserError
from services.models import family_of, load_config, load_tokenizer, max_context_of
from services.models_config import PolicySection
from services.stream.config import StreamSection
from services.stream.ledger import open_ledger
from services.text.config import DataSection, SalienceSection
from services.text.render import Renderer
from services.text.salience import Idf


def check_engine(rollout: RolloutSection, policy: PolicySection) -> None:
    """Raises UserError where the recipe's engine does not run the policy's family."""
    if rollout.engine == "vllm" and family_of(load_config(policy)) != "decoder":
        raise UserError(
            f"rollout.engine: 'vllm' captures decoder-only models, and {policy.model} is an encoder-decoder; set "
            "rollout.engine to 'transformers'"
        )


def build_oracle(policy: PolicySection, capture: CaptureSection, rollout: RolloutSection) -> Oracle:
    """The transformers engine, whatever the recipe's is: evaluation measures with it, and recomputes."""
    from rollout.transformers_engine import TransformersEngine

    return TransformersEngine(policy, capture, threads=rollout.threads, max_batch_rows=rollout.max_batch_rows)


async def build_engine(policy: PolicySection, capture: CaptureSection, rollout: RolloutSection) -> Engine:
    """The engine that the recipe names, with the policy's starting weights."""
    if rollout.engine == "transformers":
        return build_oracle(policy, capture, rollout)
    from rollout.vllm_engine import VllmEngine

    check_engine(rollout, policy)
    engine = VllmEngine(policy, capture, rollout)
    await engine.start()
    return engine


def build_renderer(policy: PolicySection, data: DataSection, rollout: RolloutSection) -> Renderer:
    """Renders prompts for the policy, and leaves `max_tokens` of the engine's context to the response.

    Raises:
        UserError: the policy's tokenizer or configuration cannot be had, or nothing is left for the prompt.
    """
    config = load_config(policy)
    context = rollout.context(max_context_of(config))
    if context is not None and family_of(config) == "decoder":
        context -= rollout.max_tokens  # an encoder's positions are the prompt's alone
    return Renderer(load_tokenizer(policy), data, context)


class RolloutWorker:
    """One rollout actor. `idf` is the text of salience.json, or None where the salience rule fits nothing."""

    def __init__(
        self,
        *,
        policy: PolicySection,
        capture: CaptureSection,
        rollout: RolloutSection,
        data: DataSection,
        salience: SalienceSection,
        idf: str | None,
        stream_url: str,
        run_id: str,
        owner: str,
        seed: int,
        stream: StreamSection,
        watch: Callable[[Callable[[], Awaitable[dict[str, Any]]]], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        """`watch` runs beside the loop, and is given what reads the counters."""
        fitted = None if idf is None else Idf.from_json(idf)
        ledger = open_ledger(stream_url, run_id, stream)
        preparation = Preparation(build_renderer(policy, data, rollout), salience, fitted)
        self._building: asyncio.Task[RolloutLoop] | None = None

        async def build() -> RolloutLoop:
            engine = await build_engine(policy, capture, rollout)
            return RolloutLoop(engine, ledger, preparation, rollout, owner=owner, seed=seed)

        self._build = build
        self._watch = watch

    async def ready(self) -> None:
        """Returns once the engine is built."""
        await self._built()

    async def run(self) -> None:
        loop = await self._built()
        watching = None if self._watch is None else asyncio.create_task(self._watch(self.counters))
        try:
            await loop.run()
        finally:
            if watching is not None:
                watching.cancel()

    async def stop(self) -> None:
        (await self._built()).stop()

    async def counters(self) -> dict[str, Any]:
        """`RolloutCounters` as of now; all 0 while the engine is being built."""
        if self._building is None or not self._building.done():
            return asdict(RolloutCounters())
        return asdict(self._building.result().figures())

    async def pulse(self) -> tuple[int, bool]:
        """What it has done so far, growing; and whether it has work, of which building the engine is a part."""
        if self._building is None or not self._building.done():
            return 0, True
        return self._building.result().progress()

    async def _built(self) -> RolloutLoop:
        if self._building is None:
            self._building = asyncio.create_task(self._build())
        return await asyncio.shield(self._building)

"""What a rollout actor's process holds: an engine, a connection to the ledger, and the loop between them."""

import json
from dataclasses import asdict
from typing import Any

from rollout.actor import RolloutLoop
from rollout.config import RolloutSection
from rollout.engine import Engine
from rollout.prepare import Preparation
from services.attention.config import CaptureSection
from services.models import load_tokenizer
from services.models_config import PolicySection
from services.stream.connect import connect
from services.stream.ledger import Ledger
from services.text.config import DataSection, SalienceSection
from services.text.salience import Idf


def build_engine(policy: PolicySection, capture: CaptureSection, rollout: RolloutSection) -> Engine:
    """The engine that the recipe names, with the policy's starting weights."""
    from rollout.transformers_engine import TransformersEngine

    return TransformersEngine(policy, capture, threads=rollout.threads, max_batch_rows=rollout.max_batch_rows)


def build_preparation(policy: PolicySection, data: DataSection, salience: SalienceSection, idf: Idf | None) -> Preparation:
    return Preparation(tokenizer=load_tokenizer(policy), data=data, salience=salience, idf=idf)


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
        connect_s: float,
    ) -> None:
        fitted = None if idf is None else Idf.from_json(json.loads(idf))
        self._engine = build_engine(policy, capture, rollout)
        ledger = Ledger(connect(stream_url, connect_s), run_id)
        preparation = build_preparation(policy, data, salience, fitted)
        self._loop = RolloutLoop(self._engine, ledger, preparation, rollout, owner=owner, seed=seed)

    async def ready(self) -> None:
        """Returns once the engine is built."""

    async def run(self) -> None:
        await self._loop.run()

    async def stop(self) -> None:
        self._loop.stop()

    async def counters(self) -> dict[str, Any]:
        return asdict(self._loop.counters)

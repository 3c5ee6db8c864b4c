"""The scoring worker between a real ledger on a real Redis and a real reward server."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from reward_server.client import RewardClient
from reward_server.config import RewardSection, WorkerSection
from reward_server.serve import RewardServer
from reward_server.worker import ScoringWorker
from services.records import Attention, Group, Lease, PolicyVersion, Prompt, Sample
from services.scoring_format import PRINCIPLE_TEMPLATE
from services.stream.connect import connect
from services.stream.embedded import EmbeddedRedis
from services.stream.ledger import Ledger
from services.text.config import DataSection
from services.text.sources import load_prompts

EOS = 2
SECTION = WorkerSection(groups=3, block_ms=20, backoff_s=0.01, retries=0, data_budget=0)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with EmbeddedRedis(tmp_path / "redis") as redis:
        yield Ledger(connect(redis.url), "run")


def generated(lease: Lease, ids: tuple[int, ...], response: str = "r") -> Group:
    """Two samples of the leased prompt."""
    rows = (0.5,) * len(ids)
    samples = tuple(
        Sample(
            sample_id=f"{lease.group_id}:{k}", group_id=lease.group_id, prompt_id=lease.prompt.prompt_id,
            attempt=lease.attempt, policy_versions=((0, 0, len(ids)),), prompt="p", prompt_ids=(7, 8),
            response=response, response_ids=ids, finish_reason="stop", logprobs=(-1.0,) * len(ids), created_at=0.0,
            attention=Attention(
                layers=(0,), content=(0, 1), salient=(1,), salient_weights=(1.0,), mass=rows, salient_mass=rows,
                neg_entropy_sum=(-0.5,) * len(ids), peak=rows,
            ),
        )
        for k in range(2)
    )  # fmt: skip
    return Group(
        group_id=lease.group_id, attempt=lease.attempt, epoch=lease.epoch, order=lease.order,
        version=PolicyVersion(0, 0), prompt=lease.prompt, eos_ids=(EOS,), samples=samples,
    )  # fmt: skip


async def score_all(ledger: Ledger, section: RewardSection) -> None:
    """Takes all that was generated through a server and back."""
    server = RewardServer(section, token="t")
    async with RewardClient(await server.start(), "t") as client:
        worker = ScoringWorker(ledger, client, SECTION, 2, consumer="w0")
        while await worker.step():
            pass
    await server.stop()


def test_from_generated_to_scored_and_failed(ledger: Ledger) -> None:
    names = [f"0:{n}" for n in range(6)]
    ledger.register(0, [(name, order) for order, name in enumerate(names)])
    ledger.reconcile({}, {})
    ledger.attach({name: Prompt(prompt_id=name[2:], source="t", text="p") for name in names})
    ledger.open_gate(PolicyVersion(0, 0), "weights.json", 100)
    for n in range(len(names)):
        lease = ledger.lease("actor", PolicyVersion(0, 0), 60.0)
        assert isinstance(lease, Lease)
        assert ledger.put_generated(generated(lease, (EOS,) if n == 4 else (5, 6, EOS)))

    asyncio.run(score_all(ledger, RewardSection()))
    counts = ledger.counts()
    assert (counts["scored"], counts["failed"], counts["generated"]) == (5, 1, 0)
    (failed,) = ledger.list("failed")
    assert failed.group_id == "0:4"
    assert failed.failure is not None
    assert (failed.failure.kind, failed.failure.code) == ("data", "empty_response")
    scored = [name for name in names if name != "0:4"]
    for group in ledger.fetch(scored):
        assert all(sample.reward is not None and sample.reward.status == "ok" for sample in group.samples)


def test_a_prompts_class_goes_from_the_data_to_its_principles(
    ledger: Ledger, scoring_models: dict[str, Path], tmp_path: Path
) -> None:
    """Rows of a file, leased, generated and scored: the class decides which of two principles stands in the input."""
    texts = {"sound": "Each step is sound.", "kind": "Nobody is hurt."}
    principles = {
        "schema_version": 1,
        "version": "1",
        "principles": [{"id": name, "text": text} for name, text in texts.items()],
        "classes": {"reasoning": {"weights": {"sound": 1e12}}, "red_team": {"weights": {"kind": 1e12}}},
    }
    (tmp_path / "set.yaml").write_text(json.dumps(principles), encoding="utf-8")
    rows = [("reasoning", "sound"), ("red_team", "kind")] * 3
    lines = [{"prompt": f"Where is Rome {i}?", "prompt_class": name} for i, (name, _) in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    data = DataSection(source=str(tmp_path / "rows.jsonl"), validation_fraction=0, test_fraction=0)
    prompts = {f"0:{i}": prompt for i, prompt in enumerate(load_prompts(data).train)}
    ledger.register(0, [(name, order) for order, name in enumerate(prompts)])
    ledger.reconcile({}, {})
    ledger.attach(prompts)
    ledger.open_gate(PolicyVersion(0, 0), "weights.json", 100)
    for _ in prompts:
        lease = ledger.lease("actor", PolicyVersion(0, 0), 60.0)
        assert isinstance(lease, Lease)
        assert ledger.put_generated(generated(lease, (5, 6, EOS), response="Rome is a city."))
    model = str(scoring_models["sequence"])
    source = {"kind": "principle", "model": model, "principles": str(tmp_path / "set.yaml"), "count": 1}
    asyncio.run(score_all(ledger, RewardSection.model_validate({"sources": {"principle": source}})))

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    loader: Any = AutoModelForSequenceClassification
    scorer = loader.from_pretrained(model).eval()
    for group, (_, principle), line in zip(ledger.fetch(list(prompts)), rows, lines, strict=True):
        block = PRINCIPLE_TEMPLATE.replace("{principles}", f"- {texts[principle]}")
        turns = (("user", line["prompt"]), ("assistant", "Rome is a city."), ("user", block))
        chat = [{"role": role, "content": content} for role, content in turns]
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
        expected = scorer(input_ids=ids).logits[0, 0].item()
        for sample in group.samples:
            assert sample.reward is not None
            assert sample.reward.value == pytest.approx(expected, abs=1e-5)
            assert list(sample.scores["principle"].detail["judged_by"]) == [texts[principle]]

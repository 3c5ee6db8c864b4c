"""A run directory written as the driver writes it, by the driver's own `RunDir`, with everything that a page shows."""

import json
import math
import random
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from cluster.run_dir import RunDir
from services.records import Attention, Failure, Group, PolicyVersion, Prompt, Sample, Score, group_id_of, sample_id_of

HOSTILE = "<script>window.hurt = 1</script><img src=x onerror='window.hurt = 2'>"
QUESTIONS = ("What is the capital of France?", "Who wrote the old song of Oslo?", "Is Lima larger than Quito?")
ANSWERS = ("Paris is the capital of France.", "Nobody knows who wrote it.", "Yes, Lima is larger than Quito by far.")
SAMPLES = 4
UNCLEAR = Failure(kind="data", code="judge_unclear", message="the judge gives too little")


class Scene:
    """A run whose steps are written one by one."""

    def __init__(self, path: Path, tokenizer: Any = None, seed: int = 0) -> None:
        self.run = RunDir(path)
        self.run.lock()
        self.steps = 0
        self.incarnation = 1
        self.tokenizer = tokenizer
        self.random = random.Random(seed)
        path.joinpath("config.yaml").write_text(yaml.safe_dump(recipe(path)), encoding="utf-8")
        if tokenizer is not None:
            self.run.policy.mkdir()
            tokenizer.save(str(self.run.policy / "tokenizer.json"))
        self.run.steps_done = 0
        self.run.event("start", run_id="scene", incarnation=1, step=0)

    def ids(self, text: str) -> list[int]:
        return list(text.encode()) if self.tokenizer is None else self.tokenizer.encode(text).ids

    def step(self, prompt: str | None = None, response: str | None = None, **more: float) -> None:
        number = self.steps
        self.run.steps_done = number
        group = self.group(number, prompt, response)
        extra = {
            sample.sample_id: {
                "kl_reference": 0.1,
                "advantage": self.random.gauss(0, 1),
                "kl_tokens": [self.random.gauss(0, 0.2) for _ in sample.response_ids],
                "entropy_tokens": [self.random.uniform(0, 3) for _ in sample.response_ids],
            }
            for sample in group.samples
        }
        self.run.write_samples(number, [group], extra)
        rewards = [sample.reward.value for sample in group.samples if sample.reward and sample.reward.value is not None]
        mean = sum(rewards) / max(1, len(rewards))
        metrics = {
            "reward/mean": mean,
            "reward/std": 0.1,
            "reward/attention/mean": mean / 2,
            "reward/attention/std": 0.05,
            "reward/judge/mean": mean / 3,
            "kl/reference": math.log1p(number),
            "length/mean": float(len(group.samples[0].response_ids)),
            "staleness/mean": 0.5,
            "staleness/max": 1.0,
            "queue/scored": 3.0,
            "idle/learner": 0.25,
            "idle/rollouts": 0.5,
            "incarnation": float(self.incarnation),
            "time_s": time.monotonic(),
            **more,
        }
        self.run.write_metrics(number, {**metrics, "reward/revisions": ["abc"]})
        self.steps = number + 1
        self.run.steps_done = self.steps

    def back_to(self, step: int) -> None:
        """What a resume does to the files."""
        self.run.cut_back(step)
        self.steps = step
        self.incarnation += 1
        self.run.steps_done = step
        self.run.event("start", run_id="scene", incarnation=self.incarnation, step=step)

    def group(self, number: int, prompt: str | None, response: str | None) -> Group:
        text = f"<user>{prompt or QUESTIONS[number % 3]}<assistant>"
        identity = group_id_of(0, f"{number:08x}")
        samples = tuple(
            self.sample(number, k, identity, text, response or f"{ANSWERS[number % 3]}{'!' * k}")
            for k in range(SAMPLES)
        )
        return Group(
            group_id=identity, attempt=1, epoch=0, order=number, version=PolicyVersion(self.incarnation, number),
            prompt=Prompt(prompt_id=f"{number:08x}", source="scene", text=text), eos_ids=(2,), samples=samples,
        )  # fmt: skip

    def sample(self, step: int, k: int, group: str, prompt: str, response: str) -> Sample:
        asked, said = self.ids(prompt), self.ids(response)
        value = self.random.gauss(0.1 * step, 0.3)
        judged = self.random.gauss(0, 1)
        detail = {"first": judged, "second": judged, "judged_by": ["Nobody is hurt by it."]}
        scores = {
            "attention": Score(status="ok", value=value, detail={"coverage": 0.4, "focus": -0.9, "repeat": 0.0}),
            "judge": Score(status="failed", error=UNCLEAR)
            if k == 3
            else Score(status="ok", value=judged, detail={**detail, "consistent": int(k != 1), "mass": 0.9}),
        }
        return Sample(
            sample_id=sample_id_of(group, k), group_id=group, prompt_id=group.partition(":")[2], attempt=1,
            policy_versions=((self.incarnation, max(0, step - 1), len(said)),), prompt=prompt, prompt_ids=tuple(asked),
            response=response, response_ids=tuple(said), finish_reason="length" if k == 2 else "stop",
            logprobs=tuple(-self.random.random() for _ in said), attention=self.attention(len(asked), len(said), k < 2),
            scores=scores, reward=Score(status="ok", value=value, detail={"recipe_revision": "abc"}),
            flags=("judge_inconsistent",) if k == 1 else (), created_at=time.time(),
        )  # fmt: skip

    def attention(self, prompt: int, response: int, keep: bool) -> Attention:
        """Row t looks at content position 1 + t mod (P - 2), and a little at the rest."""
        content, rows = tuple(range(1, prompt - 1)), []
        for t in range(response):
            row = [0.2 / prompt] * prompt
            row[1 + t % (prompt - 2)] += 0.5
            rows.append(tuple(row))
        mass = [sum(row[j] for j in content) for row in rows]
        return Attention(
            layers=(1,), content=content, salient=content[:2], salient_weights=(1.0, 1.0), mass=tuple(mass),
            salient_mass=tuple(row[1] + row[2] for row in rows),
            neg_entropy_sum=tuple(sum(row[j] * math.log(row[j]) for j in content) for row in rows),
            peak=tuple(max(row[j] for j in content) for row in rows), map=tuple(rows) if keep else None,
        )  # fmt: skip


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def recipe(path: Path) -> dict[str, Any]:
    judge = {"kind": "judge", "mode": "compare", "model": "m", "principles": ["The better answer is true."]}
    return {
        "run": {"name": path.name},
        "policy": {"model": str(path / "policy")},
        "reward": {"sources": {"attention": {"kind": "attention"}, "judge": judge}},
    }

"""One rank of a learner in a process of its own: `python rank_program.py JOBS.json RANK`.

A test starts as many as it wants ranks; they run the jobs one after the other, and rank 0 writes what came of each.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

import learner.commit
import learner.zero
from learner.engine import texts_of_ranks
from learner.errors import NonFinite
from learner.publish import BUCKET_BYTES, export, publish
from learner.reward_examples import Example
from learner.reward_training import Data
from learner.scoring_model import ScoringInput
from learner.worker import LearnerWorker
from services.errors import UserError
from services.models import load_tokenizer
from services.records import Group, PolicyVersion, Score

Job = dict[str, Any]
LIKE_ALL = Score(status="ok", value=0.5)
GATHER_ABOVE = learner.zero.GATHER_ABOVE


def groups_of(job: Job, step: int) -> list[Group]:
    return [Group.model_validate(group) for group in job["batches"][step]]


def worker_of(job: Job, rank: int) -> LearnerWorker:
    return LearnerWorker(job["config"], rank, job["world_size"], job["directory"])


def weights_of(worker: LearnerWorker, directory: Path) -> str:
    """Everything that is trained, the value function too, as this rank's gathered copy on disk."""
    from deepspeed import zero

    named = dict(worker.engine.policy.named_parameters())
    with zero.GatheredParameters(list(named.values())):
        tensors = {name: parameter.detach().clone() for name, parameter in named.items()}
    if worker.rank == 0:
        torch.save(tensors, directory)
    return str(directory)


def train(job: Job, rank: int) -> dict[str, Any]:
    """Steps `first` to `last`; publishes, exports and saves where the job says so."""
    worker = worker_of(job, rank)
    out = Path(job["directory"])
    info = worker.setup(job["address"], job["port"], job.get("resume"), job.get("total_steps"))
    steps = []
    for step in range(job.get("first", 0), job["last"]):
        if step == job.get("save_at"):
            worker.save_checkpoint(str(out / "saved"))
        steps.append(worker.train_on(step, groups_of(job, step)))
    if "publish" in job:
        bucket_bytes = job.get("bucket_bytes", BUCKET_BYTES)
        publish(worker.engine, PolicyVersion(1, job["last"]), out / "published", bucket_bytes)
        export(worker.engine, load_tokenizer(worker.policy_section), out / "exported", bucket_bytes)
        worker.save_checkpoint(str(out / "saved"))
    weights = weights_of(worker, out / "weights.pt")
    return {"info": info, "steps": steps, "weights": weights}


def poison(groups: list[Group]) -> list[Group]:
    """e^1000 overflows: the ratio of one sample is infinite."""
    sample = groups[0].samples[0]
    broken = sample.model_copy(update={"logprobs": (-1000.0,) * len(sample.logprobs)})
    return [groups[0].model_copy(update={"samples": (broken, *groups[0].samples[1:])}), *groups[1:]]


def poisoned(job: Job, rank: int) -> dict[str, Any]:
    """A step whose gradient is not finite, and the weights around it."""
    worker = worker_of(job, rank)
    out = Path(job["directory"])
    worker.setup(job["address"], job["port"], None, None)
    before = weights_of(worker, out / "before.pt")
    try:
        worker.train_on(7, poison(groups_of(job, 0)))
        message = ""
    except NonFinite as error:
        message = str(error)
    return {"message": message, "before": before, "after": weights_of(worker, out / "after.pt")}


def every_sample(groups: list[Group], **changes: Any) -> list[Group]:
    return [
        group.model_copy(update={"samples": tuple(s.model_copy(update=changes) for s in group.samples)})
        for group in groups
    ]


def unknown(groups: list[Group]) -> list[Group]:
    """An engine recorded no number for one token."""
    sample = groups[-1].samples[-1]
    broken = sample.model_copy(update={"logprobs": (math.nan, *sample.logprobs[1:])})
    return [*groups[:-1], groups[-1].model_copy(update={"samples": (*groups[-1].samples[:-1], broken)})]


def skipped(job: Job, rank: int) -> dict[str, Any]:
    """Batches that are bad in one way each, left out, and then the steps of the job."""
    worker = worker_of(job, rank)
    worker.setup(job["address"], job["port"], None, None)
    state = worker.trainer
    groups = groups_of(job, 0)
    batches = (poison(groups), every_sample(groups, reward=LIKE_ALL), unknown(groups))
    bad = [worker.train_on(step, batch) for step, batch in enumerate(batches, 7)]
    recipe, worker._rollout = worker._rollout, {**worker._rollout, "finish_length": "mask"}
    bad.append(worker.train_on(10, every_sample(groups, finish_reason="length")))
    worker._rollout = recipe
    unmoved = worker.trainer == state and worker.engine.updates_done == 0
    steps = [worker.train_on(step, groups_of(job, step)) for step in range(job["last"])]
    return {
        "bad": bad,
        "unmoved": unmoved,
        "steps": steps,
        "weights": weights_of(worker, Path(job["directory"]) / "weights.pt"),
    }


def figures(job: Job, rank: int) -> dict[str, Any]:
    """A batch whose ratio is infinite, under an objective that has no ratio in it; and what is trained by it."""
    worker = worker_of(job, rank)
    worker.setup(job["address"], job["port"], None, None)
    return {**worker.train_on(7, poison(groups_of(job, 0))), "updates": worker.engine.updates_done}


def partly(job: Job, rank: int) -> dict[str, Any]:
    """Batches with a bad sample, in steps whose first minibatch does not have it: updates are made before it is met."""
    worker = worker_of(job, rank)
    worker.setup(job["address"], job["port"], None, None)
    for step in range(7, 27):
        before, done = worker.trainer, worker.engine.updates_done
        result = worker.train_on(step, poison(groups_of(job, 0)))
        updates = worker.engine.updates_done - done
        taken = worker.trainer.standardiser.count - before.standardiser.count
        if updates:
            break
        assert worker.trainer == before
    return {**result, "step": step, "updates": updates, "taken": taken}


def held(job: Job, rank: int) -> dict[str, Any]:
    """Bytes of what DeepSpeed holds after a step, by what it is; the names are those of `cluster.memory`."""
    worker = worker_of(job, rank)
    worker.setup(job["address"], job["port"], None, None)
    worker.train_on(0, groups_of(job, 0))
    optimizer: Any = worker.engine._optimizer
    assert worker._reference is not None
    moments = [v for state in optimizer.optimizer.state.values() for k, v in state.items() if k.startswith("exp_avg")]
    saved = Path(job["directory"]) / "held"
    worker.save_checkpoint(str(saved))
    [own] = saved.rglob(f"*_pp_rank_{rank}_*optim_states.pt")
    return {
        "checkpoint": own.stat().st_size,
        "parameters, partition": sum(p.ds_tensor.nbytes for p in worker.engine.policy.parameters()),  # type: ignore[attr-defined]
        "gradients, partition": optimizer.grad_partitions_flat_buffer.nbytes,
        "float32 master, partition": sum(flat.nbytes for flat in optimizer.fp32_partitioned_groups_flat),
        "Adam's moments, partition": sum(moment.nbytes for moment in moments),
        "reference, partition": sum(p.ds_tensor.nbytes for p in worker._reference._engine.module.parameters()),
    }


def sft(job: Job, rank: int) -> dict[str, Any]:
    worker = worker_of(job, rank)
    directory = str(Path(job["directory"]) / "tuned")
    progress = Path(job["directory"]) / "progress"
    reports = worker.sft(
        job["address"], job["port"], job["sft"], job["train"], job["validation"], str(progress), directory
    )
    return {"reports": reports, "directory": directory, "progress": progress.stat().st_size if rank == 0 else 0}


def reward_model(job: Job, rank: int) -> dict[str, Any]:
    """Trains a model that scores on examples of token ids, and says what it made of the held-out ones."""
    worker = worker_of(job, rank)
    directory = Path(job["directory"]) / "scorer"
    data = Data(*([Example(**example) for example in job["data"][part]] for part in PARTS))
    work, resume = directory.parent / "work", job.get("resume")
    report = worker.reward_model(
        job["address"], job["port"], job["reward_model"], data, str(work), resume, str(directory)
    )
    metrics = directory / "training" / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    asked = [Example(**example) for example in job.get("asked", [])]
    return {
        "report": report,
        "lines": [json.loads(line) for line in lines],
        "directory": str(directory),
        "logits": logits_of(worker, asked) if asked else [],
        "heard": texts_of_ranks(f"{rank}" + "é" * 100 * rank, worker.engine.device),
    }


def apart(job: Job, rank: int) -> dict[str, Any]:
    """Trains a model that scores, with a directory for each rank, as on machines that share none; what was said."""
    learner.commit.SEEN_S = 0.0
    try:
        return reward_model({**job, "directory": f"{job['directory']}/{rank}"}, rank)
    except UserError as error:
        return {"said": str(error)}
    except RuntimeError:  # the other rank has ended
        return {}


@torch.no_grad()
def logits_of(worker: LearnerWorker, examples: list[Example]) -> list[Any]:
    """What the training engine says of examples, all of them padded in one batch: of each, a logit an input, or the
    logits of each step."""
    rows = [torch.tensor(ids) for example in examples for ids in example.inputs]
    ids = pad_sequence(rows, batch_first=True, padding_value=worker.engine.policy.lm.config.pad_token_id)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    ends = [torch.tensor(example.step_ends) for example in examples if example.step_ends]
    steps = pad_sequence(ends, batch_first=True) if ends else None
    found = worker.engine.score(ScoringInput(ids, mask, steps)).tolist()
    if steps is not None:
        return [row[: len(example.step_ends)] for row, example in zip(found, examples, strict=True)]
    flat = iter(found)
    return [[next(flat) for _ in example.inputs] for example in examples]


PARTS = ("train", "pretrain", "held_out", "probes")
SCENARIOS: dict[str, Callable[[Job, int], dict[str, Any]]] = {
    "train": train,
    "poisoned": poisoned,
    "skipped": skipped,
    "figures": figures,
    "partly": partly,
    "sft": sft,
    "reward_model": reward_model,
    "apart": apart,
    "held": held,
}


def main() -> None:
    path, rank = Path(sys.argv[1]), int(sys.argv[2])
    jobs = json.loads(path.read_text())
    results = {}
    for name, job in jobs["jobs"].items():
        directory = path.parent / name
        directory.mkdir(exist_ok=True)
        learner.zero.GATHER_ABOVE = job.get("gather_above", GATHER_ABOVE)
        results[name] = SCENARIOS[job["scenario"]]({**jobs["ranks"], **job, "directory": str(directory)}, rank)
    if rank == 0:
        Path(jobs["out"]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()

"""Small models, made-up batches, and ranks in processes of their own."""

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from cluster.config import Config
from learner.policy import PolicyWithValue
from services.records import Group, PolicyVersion, Prompt, Sample, Score
from services.scoring_format import ScorerFormat, write_format

PROGRAM = Path(__file__).with_name("rank_program.py")
VOCABULARY = 64


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of tiny models: `tied` and `untied` Llamas, a `t5`, and a Llama that scores, of another width."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    special: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 2}
    found: dict[str, str] = {}
    for name in ("tied", "untied", "t5"):
        if name == "t5":
            model: Any = T5ForConditionalGeneration(
                T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, **special)
            )
        else:
            model = LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    max_position_embeddings=64,
                    bos_token_id=1,
                    tie_word_embeddings=name == "tied",
                    **special,
                )
            )
        model.save_pretrained(root / name)
        _tokenizer().save_pretrained(root / name)
        found[name] = str(root / name)
    widths = {"hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(num_labels=1, max_position_embeddings=64, initializer_range=0.2, **widths, **special)
    LlamaForSequenceClassification(config).save_pretrained(root / "scorer")
    _tokenizer().save_pretrained(root / "scorer")
    write_format(root / "scorer", ScorerFormat(kind="preference", input_template="{prompt} {response}"))
    return {**found, "scorer": str(root / "scorer")}


def logprobs_of(directory: str, prompt: list[int], response: list[int], temperature: float) -> list[float]:
    """Of the response's tokens under the model, by transformers' own forward: what a rollout records."""
    from learner.microbatch import Tokens, collate
    from services.models import load_policy_model
    from services.models_config import PolicySection

    model = _cached(directory, lambda: load_policy_model(PolicySection(model=directory)))
    policy = _cached(f"policy {directory}", lambda: PolicyWithValue(model, value="none").eval())
    family = "encoder-decoder" if policy.encoder_decoder else "decoder"
    inputs = collate([Tokens(tuple(prompt), tuple(response))], family=family, pad_id=0, decoder_start_id=0)
    with torch.no_grad():
        return policy(inputs, temperature).logprobs[0].tolist()


_CACHE: dict[str, Any] = {}


def _cached(key: str, build: Callable[[], Any]) -> Any:
    if key not in _CACHE:
        _CACHE[key] = build()
    return _CACHE[key]


def batch(directory: str, step: int, *, groups: int = 4, samples: int = 3, temperature: float = 0.7) -> list[Group]:
    """Groups of random responses of very uneven lengths, with the log-probabilities the model gives them."""
    draw = random.Random(f"{step}")
    made: list[Group] = []
    for g in range(groups):
        prompt = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(2, 12))]
        group_id = f"0:prompt{step}-{g}"
        rows: list[Sample] = []
        for k in range(samples):
            response = [draw.randrange(3, VOCABULARY) for _ in range(draw.choice([1, 2, 5, 20]))]
            failed = g == 1 and k == 0
            rows.append(
                Sample(
                    sample_id=f"{group_id}:{k}",
                    group_id=group_id,
                    prompt_id=f"prompt{step}-{g}",
                    attempt=1,
                    policy_versions=((1, step, len(response)),),
                    prompt="",
                    prompt_ids=tuple(prompt),
                    response="",
                    response_ids=tuple(response),
                    finish_reason="length" if len(response) == 20 else "stop",
                    logprobs=tuple(logprobs_of(directory, prompt, response, temperature)),
                    scores={"length": Score(status="ok", value=float(len(response)))},
                    reward=(
                        Score.model_validate(
                            {"status": "failed", "error": {"kind": "data", "code": "empty_response", "message": "none"}}
                        )
                        if failed
                        else Score(status="ok", value=draw.gauss(0, 1))
                    ),
                    created_at=0.0,
                )
            )
        made.append(
            Group(
                group_id=group_id,
                attempt=1,
                epoch=0,
                order=step * groups + g,
                version=PolicyVersion(1, step),
                prompt=Prompt(prompt_id=f"prompt{step}-{g}", source="test", text="x"),
                eos_ids=(2,),
                samples=tuple(rows),
            )
        )
    return made


MINIBATCHES = {"epochs": 2, "minibatches": 2}
SKIP = {"action": "skip"}
STATEFUL = {
    "advantage": "gae",
    "value_function": "separate",
    "standardise_rewards": "running",
    "kl": {"place": "reward", "coef": 0.1, "controller": "adaptive", "horizon": 20},
    "entropy_coef": 0.01,
    "schedule": "cosine",
}


def resolved(**sections: dict[str, Any]) -> dict[str, Any]:
    """A whole recipe, as the driver hands it to the ranks."""
    return Config.model_validate({"data": {}, **sections}).model_dump(mode="json")


def job_of(model: str, steps: int, **learner: Any) -> dict[str, Any]:
    """A job of `rank_program` that trains `steps` steps; `learner` overrides its section."""
    return {
        "scenario": "train",
        "total_steps": steps,
        "config": resolved(
            run={"seed": 3},
            policy={"model": model},
            rollout={"temperature": 0.7},
            learner={"lr": 1e-3, "value_lr": 1e-2, "device": "cpu", "microbatch_tokens": 64, **learner},
        ),
        "batches": [[group.model_dump(mode="json") for group in batch(model, step)] for step in range(steps)],
        "last": steps,
    }


def run_ranks(jobs: dict[str, dict[str, Any]], ranks: int, directory: Path, timeout_s: float = 550) -> Any:
    """Runs jobs on so many ranks, and returns what rank 0 said of each."""
    processes, logs = _start_ranks(jobs, ranks, directory)
    try:
        codes = [process.wait(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, code in enumerate(codes):
        logs[rank].seek(0)
        assert code == 0, f"rank {rank} ended with {code}:\n{logs[rank].read()[-4000:]}"
    return json.loads((directory / "out.json").read_text())


def start_rank(jobs: dict[str, dict[str, Any]], directory: Path) -> subprocess.Popen[bytes]:
    """Runs jobs on one rank and does not wait."""
    processes, _ = _start_ranks(jobs, 1, directory)
    return processes[0]


def _start_ranks(
    jobs: dict[str, dict[str, Any]], ranks: int, directory: Path
) -> tuple[list[subprocess.Popen[bytes]], list[Any]]:
    """The processes, and the files that they log to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = directory / "jobs.json"
    shared = {"world_size": ranks, "address": "127.0.0.1", "port": port}
    path.write_text(json.dumps({"jobs": jobs, "ranks": shared, "out": str(directory / "out.json")}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    logs = [(directory / f"rank{rank}.log").open("w+") for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(path), str(rank)],
            env=environment,
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]
    return processes, logs


PAIRS = [
    ([draw.randrange(3, VOCABULARY) for _ in range(draw.randint(2, 9))],
     [draw.randrange(3, VOCABULARY) for _ in range(draw.choice([1, 4, 12]))])
    for draw in [random.Random(11)]
    for _ in range(20)
]  # fmt: skip
SFT = {"epochs": 2, "batch_size": 7, "lr": 3e-3, "warmup_share": 0.4, "schedule": "linear", "grad_clip": 0.5}


def scoring_data(kind: str, count: int, seed: int, *, turned: bool = False) -> list[dict[str, Any]]:
    """Examples of a known truth: w5 is good and w6 is bad (`turned`: the other way round), among other words."""
    draw = random.Random(f"{kind}:{seed}")
    good, bad = (6, 5) if turned else (5, 6)
    made: list[dict[str, Any]] = []
    for _ in range(count):
        if kind == "steps":
            marks = [draw.choice((good, bad)) for _ in range(draw.randint(1, 4))]
            steps = [[*(draw.randrange(8, VOCABULARY) for _ in range(draw.randint(1, 3))), mark] for mark in marks]
            ends = [sum(map(len, steps[: i + 1])) for i in range(len(steps))]
            made.append(
                {
                    "inputs": [[1, *(token for step in steps for token in step)]],
                    "targets": [2.0 if mark == good else 0.0 for mark in marks],
                    "weights": [1.0] * len(marks),
                    "step_ends": ends,
                }
            )
            continue
        marks = [[good] * 2, [good, bad], [bad] * 2][: draw.randint(2, 3)]
        inputs = [[1, *(draw.randrange(8, VOCABULARY) for _ in range(draw.randint(1, 6))), *mark] for mark in marks]
        made.append({"inputs": inputs, "targets": list(range(len(marks))), "weights": [1.0]})
    return made


SCORING = {"batch_size": 16, "lr": 1e-2, "warmup_share": 0.1, "evaluations": 2, "patience": 0, "epochs": 2}


def scoring_job(model: str, kind: str = "comparisons", *, turned: bool = False, **settings: Any) -> dict[str, Any]:
    """A job that trains a model that scores; `turned`: on held-out labels that contradict the training ones."""
    known = {"kind": "process", "step_rule": {"by": "lines"}} if kind == "steps" else {"centring": 0.01}
    return {
        **job_of(model, 0),
        "scenario": "reward_model",
        "reward_model": {**SCORING, **known, **settings},
        "data": {
            "train": scoring_data(kind, 160, 1),
            "pretrain": scoring_data(kind, 32, 2),
            "held_out": scoring_data(kind, 40, 3, turned=turned),
            "probes": [],
        },
    }


@pytest.fixture(scope="session")
def rank_runs(model_dirs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """What one rank and two ranks made of their jobs. They run side by side: one alone leaves a core idle."""
    one = {name: job_of(model_dirs[name], 5, **MINIBATCHES) for name in ("tied", "untied", "t5")}
    root = tmp_path_factory.mktemp("two")
    with ThreadPoolExecutor(2) as pool:
        runs = (
            pool.submit(run_ranks, one, 1, tmp_path_factory.mktemp("one")),
            pool.submit(run_ranks, two_rank_jobs(model_dirs, root), 2, root),
        )
        return runs[0].result(), runs[1].result()


@pytest.fixture(scope="session")
def one_rank(rank_runs: tuple[Any, Any]) -> Any:
    """What one rank made of the jobs that two ranks are compared with, by name."""
    return rank_runs[0]


@pytest.fixture(scope="session")
def two_ranks(rank_runs: tuple[Any, Any]) -> Any:
    """What two ranks made of many jobs, by name."""
    return rank_runs[1]


@pytest.fixture(scope="session")
def changed_ranks(two_ranks: Any, model_dirs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What became of the two ranks' checkpoint on one rank, and of that one's on two again; by name of the job."""
    saved = str(Path(two_ranks["tied"]["weights"]).parent / "saved")
    resumed = {**job_of(model_dirs["tied"], 5, **MINIBATCHES), "first": 2, "resume": saved}
    root = tmp_path_factory.mktemp("changed")
    one = {
        "at_once": {**resumed, "last": 2},
        "partitioned": {**resumed, "last": 2, "gather_above": 0},
        "one": {**resumed, "save_at": 4},
    }
    two = {"at_once": {**resumed, "last": 2}, "two": {**resumed, "first": 4, "resume": str(root / "one" / "saved")}}
    found = {f"{name} on one": result for name, result in run_ranks(one, 1, root).items()}
    again = tmp_path_factory.mktemp("again")
    return found | {f"{name} on two": result for name, result in run_ranks(two, 2, again).items()}


def two_rank_jobs(model_dirs: dict[str, str], root: Path) -> dict[str, dict[str, Any]]:
    """One pair of processes runs all of these: starting them is what takes time."""
    tied = {**job_of(model_dirs["tied"], 5, **MINIBATCHES), "save_at": 2}
    valued = {"value_function": "from_reward_model", "value_model": model_dirs["scorer"], "advantage": "gae"}
    return {
        "tied": tied,
        "again": tied,
        "resumed": {**tied, "save_at": None, "first": 2, "resume": str(root / "tied" / "saved")},
        "partitioned": {**tied, "save_at": None, "gather_above": 0, "publish": True, "bucket_bytes": 4096},
        "untied": job_of(model_dirs["untied"], 5, **MINIBATCHES),
        "t5": {**job_of(model_dirs["t5"], 5, **MINIBATCHES), "publish": True},
        "stateful": {**job_of(model_dirs["tied"], 3, **STATEFUL), "save_at": 1},
        "stateful_resumed": {
            **job_of(model_dirs["tied"], 3, **STATEFUL), "first": 1, "resume": str(root / "stateful" / "saved"),
        },
        "valued": {**job_of(model_dirs["tied"], 3, **valued), "save_at": 1},
        "valued_resumed": {
            **job_of(model_dirs["tied"], 3, **valued), "first": 1, "resume": str(root / "valued" / "saved"),
        },
        "decayed": {
            **job_of(model_dirs["tied"], 3, **MINIBATCHES, weight_decay=0.5),
            "first": 2, "resume": str(root / "tied" / "saved"),
        },
        "poisoned": {**job_of(model_dirs["tied"], 1), "scenario": "poisoned"},
        "figures": {
            **job_of(model_dirs["tied"], 1, objective="policy_gradient", baseline="batch_mean", bad_batch=SKIP),
            "scenario": "figures",
        },
        "partly": {
            **job_of(model_dirs["tied"], 1, **MINIBATCHES, standardise_rewards="running", bad_batch=SKIP),
            "scenario": "partly",
        },
        "skipped": {
            **job_of(model_dirs["tied"], 5, **MINIBATCHES, bad_batch={"action": "skip", "flat_limit": 0.9}),
            "scenario": "skipped",
        },
        "sft": {
            **job_of(model_dirs["untied"], 0), "scenario": "sft", "sft": SFT, "train": PAIRS, "validation": PAIRS[:6],
        },
    }  # fmt: skip


@pytest.fixture(scope="session")
def sft_case() -> tuple[Any, dict[str, Any]]:
    """The pairs and settings of the fine-tuning job."""
    return PAIRS, SFT


@pytest.fixture(scope="session")
def scoring_runs(model_dirs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """What one rank and two ranks made of the jobs that train models that score, by name."""
    comparisons = scoring_job(model_dirs["tied"])
    two = {
        "comparisons": comparisons,
        "steps": scoring_job(model_dirs["tied"], "steps"),
        "lora": {**scoring_job(model_dirs["untied"], lora={"rank": 4}, lr=2e-2), "gather_above": 0},
        "contradicted": scoring_job(model_dirs["tied"], turned=True, patience=2, evaluations=5),
    }
    with ThreadPoolExecutor(2) as pool:
        runs = (
            pool.submit(run_ranks, {"comparisons": comparisons}, 1, tmp_path_factory.mktemp("one")),
            pool.submit(run_ranks, two, 2, tmp_path_factory.mktemp("two")),
        )
        return runs[0].result(), runs[1].result()


@pytest.fixture(scope="session")
def scoring_held_out() -> dict[str, list[dict[str, Any]]]:
    """The held-out examples of the jobs that train models that score, by what is learnt."""
    return {kind: scoring_data(kind, 40, 3) for kind in ("comparisons", "steps")}

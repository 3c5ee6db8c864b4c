"""Pairs a second through HTTP against the same model scored offline, and what the server does at twice what it can.

`attune reward-server` serves a randomly initialised model of over 50 million parameters; every request has one pair of
128 tokens. Closed loops of 1, 16 and 128 clients, in a process of their own, take turns with the model offline: the
same pairs, encoded beforehand, sorted by length, in a third process with as many torch threads as the server's model
has (all cores) and no server at work. `offline_pairs_per_s` is the better of one forward over all pairs and of forwards
of the server's budget of tokens. Figures are medians over the rounds.

    offline_ratio_N = pairs / (wall_s - generator_cpu_s / cores) / offline_pairs_per_s

The generator shares the cores with the server; its CPU time is taken out as the share of the machine that it had. The
ratio of the walls alone is `raw_ratio_N`. Every score that comes back is compared with the offline one (`max_error`).
`p50_ms` and `p99_ms` are of 128 clients. `server_cpu_s_a_pair` is what the HTTP side costs, in a process beside the
model's.

Overload: pairs come at twice the rate of 128 clients, whether or not the earlier ones are answered.
`goodput_kept` is what is scored a second, over what 128 clients had; the rest is refused with 429 and Retry-After.
`overload_lost` counts requests with any other outcome. `memory_growth` is the resident memory of the server's
processes in the last third of the overload over that in its second third.

`flop_limit_pairs_per_s`: matrix products alone, at the rate of a large one on the same threads; `flop_share` is what
offline scoring reaches of it.
"""

import contextlib
import json
import math
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import yaml

from benchmarks.common import finish, parse_options
from benchmarks.http_load import Answered, Load
from benchmarks.http_load import Generator as LoadGenerator

NAME = "reward_server"
WIDTH, LAYERS, FEED_FORWARD, HEADS, VOCABULARY = 576, 13, 1536, 9, 1024
TOKENS = 128
CLIENTS = (1, 16, 128)
BATCH_TOKENS = 2048
HELD = 160
"""Requests that the server holds: the 128 clients', and some more."""
WORDS = tuple(a + b for a in ("ba", "de", "fi", "go", "lu", "mo", "ne", "ri", "su", "ta") for b in
              ("bor", "dan", "fel", "gim", "lok", "mer", "nat", "pir", "sul", "tev"))  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Rounds, pairs offline, pairs of each number of clients in a round, pairs of the overload, layers of the model."""

    rounds: int
    offline: int
    pairs: Mapping[int, int]
    overload: int
    layers: int


FULL = Size(rounds=5, offline=128, pairs={1: 32, 16: 96, 128: 256}, overload=6 * HELD, layers=LAYERS)
QUICK = Size(rounds=1, offline=64, pairs={1: 16, 16: 32, 128: 256}, overload=3 * HELD, layers=2)


def main() -> None:
    options = parse_options(NAME, "Pairs a second through the reward server, against the model alone.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with TemporaryDirectory() as directory:
        finish(NAME, options, measure(Path(directory), QUICK if options.quick else FULL))


def measure(root: Path, size: Size) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0))
    parameters = build(root / "model", size.layers)
    pairs = make_pairs(root / "model", max(size.pairs.values()))
    bodies = [json.dumps({"items": [{"id": str(i), **pair}]}).encode() for i, pair in enumerate(pairs)]
    with offline(root / "model", pairs, cores) as alone, server(root, cores) as (url, pid):
        generator = LoadGenerator(url, "/v1/rewards", bodies)
        try:
            expected: list[float] = alone("scores")
            peak: float = alone("peak")
            for clients in CLIENTS:  # once, for connections, threads and buffers that are made at the first time
                generator.closed(clients, 0, 2 * clients, wait_s=600)
            loads: dict[int, list[Load]] = {clients: [] for clients in CLIENTS}
            speeds: list[dict[str, float]] = []
            used: dict[str, list[float]] = {"server": [], "model": []}
            for turn in range(size.rounds):
                speeds.append(alone(("speed", size.offline)))
                for clients in CLIENTS:
                    before = cpu_s(pid)
                    loads[clients].append(generator.closed(clients, turn * 7, size.pairs[clients], wait_s=600))
                    if clients == CLIENTS[-1]:
                        for part, seconds in cpu_s(pid).items():
                            used[part].append((seconds - before[part]) / size.pairs[clients])
            capacity = median(rate(load) for load in loads[CLIENTS[-1]])
            with memory(pid) as resident:
                over = generator.open(2 * capacity, 0, size.overload, wait_s=600)
        finally:
            generator.end()
    scored = [answer for of in (*loads.values(), [over]) for load in of for answer in load.answers]
    flop = flop_of_pair(root / "model")
    speed = max(median(turn[way] for turn in speeds) for way in speeds[0])
    return {
        **{f"offline_ratio_{n}": median(rate(load, cores) for load in of) / speed for n, of in loads.items()},
        "p50_ms": percentile(loads[CLIENTS[-1]], 0.50),
        "p99_ms": percentile(loads[CLIENTS[-1]], 0.99),
        "offline_pairs_per_s": speed,
        **{f"raw_ratio_{n}": median(map(rate, of)) / speed for n, of in loads.items()},
        **{f"pairs_per_s_{n}": median(map(rate, of)) for n, of in loads.items()},
        **{f"generator_cpu_share_{n}": median(load.cpu_s / load.wall_s / cores for load in of)
           for n, of in loads.items()},
        **{f"p{q}_ms_{n}": percentile(of, q / 100) for n, of in loads.items() for q in (50, 99)},
        **{f"offline_pairs_per_s_{way}": median(turn[way] for turn in speeds) for way in speeds[0]},
        **{f"{part}_cpu_s_a_pair": median(seconds) for part, seconds in used.items()},
        "max_error": max_error(scored, expected),
        **overload(over, capacity, resident),
        "flop_limit_pairs_per_s": peak / flop,
        "flop_share": speed * flop / peak,
        "parameters": parameters,
        "tokens_a_pair": TOKENS,
        "threads": cores,
        "rounds": size.rounds,
    }  # fmt: skip


def build(directory: Path, layers: int) -> int:
    """A model with one label, and a tokenizer in which every word of a pair is one token: the parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification
    from transformers.utils import logging

    from services.text.tokenizer import train_tokenizer

    logging.disable_progress_bar()
    tokenizer = train_tokenizer([" ".join(WORDS)] * 4, VOCABULARY)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=FEED_FORWARD, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=2 * TOKENS,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model.num_parameters()


def make_pairs(model: Path, count: int) -> list[dict[str, str]]:
    """Prompts with responses of random words, each of TOKENS tokens as the server encodes them, all different."""
    from transformers import AutoTokenizer

    random = Random(0)
    tokenizer = AutoTokenizer.from_pretrained(model)

    def pair(words: int) -> dict[str, str]:
        chosen = random.choices(WORDS, k=words)
        return {"prompt": " ".join(chosen[:40]), "response": " ".join(chosen[40:])}

    words = TOKENS - (len(encoded(tokenizer, pair(50))) - 50)
    pairs = [pair(words) for _ in range(count)]
    lengths = {len(encoded(tokenizer, one)) for one in pairs}
    if lengths != {TOKENS}:
        raise RuntimeError(f"pairs of {TOKENS} tokens are asked for, there are some of {sorted(lengths)}")
    return pairs


def encoded(tokenizer: Any, pair: Mapping[str, str]) -> tuple[int, ...]:
    from services.scoring_format import Example, ScorerFormat, encode, turns_of

    form = ScorerFormat(kind="preference", max_tokens=2 * TOKENS)
    return encode(tokenizer, form, Example(turns_of(pair["prompt"]), pair["response"])).ids


def flop_of_pair(model: Path) -> float:
    """Of the matrix products of one forward: two for each weight of the trunk and token, and the attention's two."""
    layers = json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    weights = layers * (4 * WIDTH * WIDTH + 3 * WIDTH * FEED_FORWARD)
    return 2.0 * TOKENS * weights + layers * 4.0 * TOKENS * TOKENS * WIDTH


@contextlib.contextmanager
def offline(model: Path, pairs: Sequence[Mapping[str, str]], threads: int) -> Generator[Callable[[Any], Any]]:
    """A process that holds the model: a function that asks it for `scores`, for `peak` or for ("speed", pairs)."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_offline, args=(theirs, model, list(pairs), threads), daemon=True)
    process.start()
    theirs.close()

    def ask(what: Any) -> Any:
        pipe.send(what)
        if not pipe.poll(600):
            raise TimeoutError(f"waited 600 s for {what}: the offline model did not answer")
        return pipe.recv()

    try:
        yield ask
    finally:
        pipe.send(None)
        process.join(30)
        process.kill()


def _offline(pipe: Connection, model: Path, pairs: Sequence[Mapping[str, str]], threads: int) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = sorted((encoded(tokenizer, pair) for pair in pairs), key=len)
    ids = torch.tensor(rows)  # all of one length: nothing to pad
    classifier = AutoModelForSequenceClassification.from_pretrained(model).eval()

    @torch.inference_mode()
    def scores(part: Any, at_once: int) -> list[float]:
        return [score for batch in part.split(at_once) for score in classifier(batch).logits[:, 0].tolist()]

    def seconds(work: Callable[[], Any]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def speed(count: int) -> dict[str, float]:
        ways = {"one_forward": count, "budget": BATCH_TOKENS // TOKENS}
        return {way: count / seconds(lambda n=n: scores(ids[:count], n)) for way, n in ways.items()}

    matrix = torch.randn(2048, 2048)
    scores(ids[:2], 2)
    while True:
        match pipe.recv():
            case "scores":
                pipe.send(scores(ids, BATCH_TOKENS // TOKENS))
            case "peak":
                pipe.send(2.0 * 2048**3 / min(seconds(lambda: matrix @ matrix) for _ in range(20)))
            case (_, count):
                pipe.send(speed(count))
            case _:
                return


@contextlib.contextmanager
def server(root: Path, threads: int) -> Generator[tuple[str, int]]:
    """`attune reward-server` in a process of its own: its URL and process id."""
    recipe = {
        "reward": {
            "sources": {
                "preference": {
                    "kind": "preference", "model": str(root / "model"), "batch_tokens": BATCH_TOKENS, "threads": threads
                }
            },
            "max_requests": HELD,
            "source_timeout_s": 120,
            "log_level": "warning",
        }
    }  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "cluster", "reward-server", str(root / "recipe.yaml"), "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if "http://" not in line:
                raise RuntimeError("the reward server did not start; its log says why")
            yield next(word for word in line.split() if word.startswith("http://")), process.pid
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def rate(load: Load, cores: int | None = None) -> float:
    """Pairs a second; with `cores`, the generator's share of the machine taken out of the wall time."""
    wrong = [answer for answer in load.answers if answer.status != 200]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(load.answers)} requests were answered {wrong[0].status}")
    return len(load.answers) / (load.wall_s - (load.cpu_s / cores if cores else 0.0))


def percentile(loads: Sequence[Load], q: float) -> float:
    """Of the requests' times, in milliseconds: the median over the rounds."""

    def of(load: Load) -> float:
        times = sorted(answer.done_s - answer.sent_s for answer in load.answers)
        return times[math.ceil(q * len(times)) - 1]

    return 1000 * median(map(of, loads))


def max_error(answers: Sequence[Answered], expected: Sequence[float]) -> float:
    """Largest difference between what was answered and the offline score. Raises where an item of a 200 failed."""
    found = 0.0
    for answer in answers:
        if answer.status != 200:
            continue
        (result,) = json.loads(answer.body)["results"]
        if result["status"] != "ok":
            raise RuntimeError(f"an item failed: {result['error']['code']}")
        found = max(found, abs(result["reward"] - expected[answer.index]))
    return found


def overload(load: Load, capacity: float, resident: Sequence[float]) -> dict[str, Any]:
    ok = [answer for answer in load.answers if answer.status == 200]
    refused = [answer for answer in load.answers if answer.status == 429 and answer.retry_after is not None]
    third = len(resident) // 3
    last = max(answer.done_s for answer in ok)
    waits = sorted(answer.done_s - answer.sent_s for answer in refused)
    return {
        "overload_sent": len(load.answers),
        "overload_scored": len(ok),
        "overload_refused": len(refused),
        "overload_lost": len(load.answers) - len(ok) - len(refused),
        "goodput_kept": len(ok) / last / capacity,
        "overload_p99_ms": percentile([Load(tuple(ok), 0.0, 0.0)], 0.99),
        "overload_refusal_p99_ms": 1000 * waits[math.ceil(0.99 * len(waits)) - 1] if waits else 0.0,
        "memory_mib": max(resident) / 2**20,
        "memory_growth": fmean(resident[2 * third :]) / fmean(resident[third : 2 * third]),
    }


@contextlib.contextmanager
def memory(pid: int) -> Generator[list[float]]:
    """Resident bytes of a process and its children, four times a second."""
    found: list[float] = []
    ended = threading.Event()
    watched = family(pid)

    def watch() -> None:
        while not ended.wait(0.25):
            found.append(float(sum(one.memory_info().rss for one in watched)))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def cpu_s(pid: int) -> dict[str, float]:
    """User and system time so far, in seconds: of the server's own process, and of its model's."""
    server, *models = (sum(one.cpu_times()[:2]) for one in family(pid))
    return {"server": server, "model": sum(models)}


if __name__ == "__main__":
    main()

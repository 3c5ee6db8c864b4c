"""Models that score, on generated data whose truth is known: what each kind has learnt, held out.

A small policy is fine-tuned first: it answers the questions, goes on with days, months and numbers, and says what an
answer shows, in the wordings of training. Then `attune reward-model` trains the preference, absolute, principle and
process model from it, each with the generated data of its kind, and `attune preferences` has it judge pairs of answers.

`principle_turned` is the share of held-out pairs whose preference turns round when their principle is turned round,
both in wordings that no training record has; `principle_right` of those where both are right.
"""

import json
import os
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import Options, finish, parse_options

NAME = "reward_models"
WIDTH, LAYERS, HEADS, CONTEXT, VOCABULARY = 128, 3, 4, 256, 2048
SOURCES = ("generated:preferences", "generated:ratings", "generated:principles", "generated:steps")
FINE_TUNING = {"epochs": 2, "batch_size": 32, "lr": 2e-3, "warmup_share": 0.1, "betas": (0.9, 0.98)}
SETTINGS: dict[str, dict[str, Any]] = {
    "preference": {"source": SOURCES[0]},
    "absolute": {"source": SOURCES[1], "epochs": 4},
    "principle": {
        "source": SOURCES[2],
        "pretrain": {"source": "generated:usual_principles", "epochs": 1},
        "principle_template": "{principles}",
    },
    "process": {"source": SOURCES[3], "epochs": 6, "lr": 3e-3},
}
COMMON = {"batch_size": 16, "lr": 1e-3, "warmup_share": 0.1, "betas": (0.9, 0.98), "evaluations": 2, "patience": 0}
NEGATED = 0.3
"""How many of the principles that the policy reads are worded by a negation: few, as in `SELDOM` of the corpora."""
PRINCIPLES = {
    "schema_version": 1,
    "version": "1",
    "principles": [
        {"id": "brief", "text": "The answer should be brief.", "negative": "The answer should be long."},
        {"id": "polite", "text": "The answer should be polite.", "negative": "The answer should be rude."},
    ],
}


def main() -> None:
    options = parse_options(NAME, "What models that score learn of generated data.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with TemporaryDirectory() as directory:
        finish(NAME, options, measure(Path(directory), options))


def measure(root: Path, options: Options) -> dict[str, Any]:
    from rich.console import Console

    from cluster.model_stage import train_on_ranks
    from cluster.ray_runtime import ray_cluster
    from cluster.reward_model import train_reward_model

    console = Console(stderr=True)
    started = time.perf_counter()
    results: dict[str, Any] = {"parameters": build(root / "base")}
    with ray_cluster(config_of(root / "base").cluster):
        console.print("fine-tuning the policy")
        config = config_of(root / "base")
        section = config.sft.model_validate(FINE_TUNING).model_dump(mode="json")
        policy = root / "policy"
        train_on_ranks(config, policy, "sft", (section, lessons(root / "base"), []), what="fine-tuning")
        results["policy_seconds"] = time.perf_counter() - started
        for kind, settings in SETTINGS.items():
            began = time.perf_counter()
            report = train_reward_model(
                config_of(policy, {**COMMON, **settings, "kind": kind}), root / kind, console=console
            )
            names = ("accuracy", "rank_correlation", "calibration_error")
            results |= {f"{kind}_{name}": report[name] for name in names if report.get(name) is not None}
            results |= {f"{kind}_probes: {name}": share for name, share in report.get("probes", {}).items()}
            results[f"{kind}_seconds"] = time.perf_counter() - began
    results |= turned(root / "principle", 100 if options.quick else 400)
    return results | swaps(root, policy, 60) | {"seconds": time.perf_counter() - started}


def config_of(model: Path, reward_model: dict[str, Any] | None = None) -> Any:
    from cluster.recipe import resolve

    tree = {"data": {}, "policy": {"model": str(model)}, "learner": {"ranks": 1, "microbatch_tokens": 8192}}
    return resolve({**tree, "reward_model": reward_model or {}}, NAME)


def build(directory: Path) -> int:
    """Writes a small model and a tokenizer of the corpora's words; returns its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from services.text.corpora.labelled import generate_labelled
    from services.text.tokenizer import train_tokenizer

    texts: list[str] = []
    for source in SOURCES:
        for row in generate_labelled(source, 0)[:1500]:
            values = row.values
            texts += [values["prompt"], *values.get("principles", ()), *values.get("responses", ())[:3]]
            texts += [values[name] for name in ("response", "chosen", "rejected") if name in values]
    tokenizer = train_tokenizer(texts, VOCABULARY)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


Ids = tuple[int, ...]
Said = tuple[list[str], str]
"""The turns of a conversation, the user's first, and the one after them."""


def lessons(model: Path) -> list[tuple[Ids, Ids]]:
    """What the policy is fine-tuned on, all at once: the easy parts carry the hard ones."""
    found = 3 * answers() + continued(4000) + restated(10_000) + shown(3000)
    return [encoded(model, turns, reply) for turns, reply in found]


def answers() -> list[Said]:
    """Right answers to the training questions."""
    return [([row["prompt"]], row["responses"][0]) for row in _training_questions()]


def continued(count: int) -> list[Said]:
    """Correct ways round the circles of days, months and numbers."""
    from services.text.corpora.labelled import CIRCLES

    draw = Random(0)
    found: list[Said] = []
    for _ in range(count):
        circle = draw.choice(CIRCLES)
        first = draw.randrange(len(circle))
        names = [circle[(first + step) % len(circle)] for step in range(draw.randint(4, 5))]
        lines = [f"After {a} comes {b}." for a, b in pairwise(names)]
        found.append(([f"Go on from {names[0]}."], "\n".join(lines)))
    return found


def restated(count: int) -> list[Said]:
    """Principles in the wordings of training, and in one word what they ask for."""
    from services.text.corpora.labelled import ATTRIBUTES, FRAMES, principle

    draw = Random(1)
    found: list[Said] = []
    for _ in range(count):
        name, turned = draw.choice(sorted(ATTRIBUTES)), draw.random() < 0.5
        found.append(([f"- {principle(name, turned, FRAMES, draw, NEGATED)}"], ATTRIBUTES[name][turned][0]))
    return found


def shown(count: int) -> list[Said]:
    """Conversations in which the user, after an answer, names what the answer shows."""
    from services.text.corpora.labelled import ATTRIBUTES, FRAMES, draw_answer, principle

    rows = _training_questions()
    draw = Random(2)
    found: list[Said] = []
    while len(found) < count:
        row, name = draw.choice(rows), draw.choice(sorted(ATTRIBUTES))
        answer = draw_answer(row["responses"][0], [name], draw)
        # Of brevity: one sentence more is neither brief nor long.
        level = answer.levels[name] + (1.25 if name == "brevity" else 0)
        if abs(level) > 0.5:
            found.append(([row["prompt"], answer.text], f"- {principle(name, level < 0, FRAMES, draw, NEGATED)}"))
    return found


def _training_questions() -> list[dict[str, Any]]:
    from services.text.corpora.labelled import generate_labelled

    return [row.values for row in generate_labelled(SOURCES[0], 0) if row.values["split"] == "train"]


def encoded(model: Path, turns: Sequence[str], last: str) -> tuple[Ids, Ids]:
    """Token ids of a conversation up to its last turn, and of that turn."""
    from services.models import load_tokenizer
    from services.models_config import PolicySection
    from services.scoring_format import ScorerFormat, Turn, chat_text, encode_text

    key = str(model)
    if key not in _TOKENIZERS:
        _TOKENIZERS[key] = load_tokenizer(PolicySection(model=key))
    tokenizer = _TOKENIZERS[key]
    roles = ("user", "assistant")
    said = [Turn(roles[place % 2], text) for place, text in enumerate((*turns, last))]
    form = ScorerFormat(kind="preference")
    whole = encode_text(tokenizer, form, chat_text(tokenizer, said))
    before = chat_text(tokenizer, said[:-1], generation_prompt=said[-1].role == "assistant")
    start = len(encode_text(tokenizer, form, before)) + (said[-1].role == "user")  # <user> is the template's
    return whole[:start], whole[start:]


_TOKENIZERS: dict[str, Any] = {}


def turned(model: Path, count: int) -> dict[str, float]:
    """Pairs whose preference turns round with their principle, in wordings that training never saw."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from services.scoring_format import Example, encode, read_format, turns_of
    from services.text.corpora.labelled import HELD_OUT_FRAMES, generate_labelled, principle

    form = read_format(model)
    assert form is not None
    loader: Any = AutoModelForSequenceClassification
    scorer, tokenizer = loader.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    rows = [row.values for row in generate_labelled(SOURCES[2], 0)]
    # Each pair is there twice; once is enough, for its principle is turned round here.
    ours = [row for row in rows if row["split"] != "train" and len(row["principles"]) == 1 and not row["turned"]]
    held_out = ours[:count]
    draw = Random(2)

    @torch.no_grad()
    def score(row: dict[str, Any], response: str, asked: str) -> float:
        ids = encode(tokenizer, form, Example(turns_of(row["prompt"]), response, principles=(asked,))).ids
        return float(scorer(input_ids=torch.tensor([ids])).logits[0, 0])

    turns, right = 0, 0
    for row in held_out:
        margins: list[float] = []
        for turn in (False, True):
            asked = principle(row["decided_by"], row["turned"] != turn, HELD_OUT_FRAMES, draw)
            margins.append(score(row, row["chosen"], asked) - score(row, row["rejected"], asked))
        turns += (margins[0] > 0) != (margins[1] > 0)
        right += margins[0] > 0 > margins[1]
    return {"principle_turned": turns / len(held_out), "principle_right": right / len(held_out)}


def swaps(root: Path, model: Path, count: int) -> dict[str, Any]:
    """How often the policy, as a judge of `count` held-out pairs, says the same in both orders."""
    import yaml
    from rich.console import Console

    from cluster.preferences import write_preferences
    from cluster.recipe import resolve
    from services.text.corpora.labelled import generate_labelled

    responses, principles = root / "responses.jsonl", root / "principles.yaml"
    rows = {
        row.values["prompt"]: row.values for row in generate_labelled(SOURCES[2], 0) if row.values["split"] != "train"
    }
    pairs = list(rows.values())[:count]
    said = [{"prompt": row["prompt"], "response": row[name]} for row in pairs for name in ("chosen", "rejected")]
    responses.write_text("".join(json.dumps(row) + "\n" for row in said), encoding="utf-8")
    principles.write_text(yaml.safe_dump(PRINCIPLES), encoding="utf-8")
    rubric = "{principles}\n{prompt}\n(A) {first}\n(B) {second}"
    preferences = {
        "method": "principles",
        "responses": str(responses),
        "set": str(principles),
        "principles": 2,
        "judge": {"kind": "judge", "model": str(model), "rubric": rubric, "min_mass": 0.0, "device": "cpu"},
    }
    config = resolve({"data": {}, "policy": {"model": str(model)}, "preferences": preferences}, NAME)
    written = write_preferences(config, root / "pairs.jsonl", console=Console(stderr=True))
    assert written.consistent is not None
    return {"judge_pairs": len(pairs), "judge_swap_consistency": written.consistent}


if __name__ == "__main__":
    main()

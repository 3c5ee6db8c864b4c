"""Models that score, on generated data whose truth is known: what each kind has learnt, held out.

A small policy is fine-tuned first: it answers the questions, goes on with days, months and numbers, and says what an
answer shows, in the wordings of training. Then `attune reward-model` trains the preference, absolute, principle and
process model from it, each with the generated data of its kind, and `attune preferences` has it judge pairs of answers.

`principle_turned` is the share of held-out pairs whose preference turns round when their principle is turned round,
both in wordings that no training record has; `principle_right` of those where both are right.
"""

import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import Options, finish, parse_options

NAME = "reward_models"
WIDTH, LAYERS, HEADS, CONTEXT, VOCABULARY = 96, 3, 4, 256, 2048
SOURCES = ("generated:preferences", "generated:ratings", "generated:principles", "generated:steps")
SETTINGS: dict[str, dict[str, Any]] = {
    "preference": {"source": SOURCES[0], "lr": 1e-3, "batch_size": 16},
    "absolute": {"source": SOURCES[1], "lr": 1e-3, "batch_size": 16, "epochs": 2},
    "principle": {"source": SOURCES[2], "lr": 2e-3, "epochs": 3, "principle_template": "{principles}"},
    "process": {"source": SOURCES[3], "lr": 1e-3, "epochs": 2},
}
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
    results: dict[str, Any] = {"parameters": build(root / "base")}
    with ray_cluster(config_of(root / "base").cluster):
        console.print("fine-tuning the policy")
        # In two goes, for what an answer shows is learnt by a policy that knows answers.
        start = root / "base"
        for name, pairs in (("answers", answers(start)), ("policy", shown(start, 1500 if options.quick else 3000))):
            sft = {"epochs": 3, "batch_size": 32, "lr": 3e-3}
            config = config_of(start)
            section = config.sft.model_validate(sft).model_dump(mode="json")
            train_on_ranks(config, root / name, "sft", (section, pairs, []), what="fine-tuning")
            start = root / name
        for kind, settings in SETTINGS.items():
            chosen = {**settings, "kind": kind, "warmup_share": 0.1, "evaluations": 3, "patience": 0}
            report = train_reward_model(config_of(start, chosen), root / kind, console=console)
            results[f"{kind}_accuracy"] = report["accuracy"]
            results[f"{kind}_calibration_error"] = report["calibration_error"]
            if kind in ("absolute", "process"):
                results[f"{kind}_rank_correlation"] = report["rank_correlation"]
            if kind in ("preference", "absolute"):
                results[f"{kind}_probes_in_order"] = report["probes"]["in_order"]
    results |= turned(root / "principle", 100 if options.quick else 400)
    return results | {"judge_swap_consistency": swaps(root, start, 20 if options.quick else 60)}


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


def answers(model: Path) -> list[tuple[Ids, Ids]]:
    """Right answers to the training questions, and correct ways round the circles of days, months and numbers."""
    from services.text.corpora.labelled import CIRCLES, generate_labelled

    rows = [row.values for row in generate_labelled(SOURCES[0], 0)]
    said = [([row["prompt"]], row["responses"][0]) for row in rows if row["split"] == "train"]
    draw = Random(0)
    for _ in range(2000):
        circle = draw.choice(CIRCLES)
        first = draw.randrange(len(circle))
        names = [circle[(first + step) % len(circle)] for step in range(draw.randint(4, 5))]
        lines = [f"After {a} comes {b}." for a, b in pairwise(names)]
        said.append(([f"Go on from {names[0]}."], "\n".join(lines)))
    return [encoded(model, turns, reply) for turns, reply in said]


def shown(model: Path, count: int) -> list[tuple[Ids, Ids]]:
    """Conversations in which the user, after an answer, names what the answer shows."""
    from services.text.corpora.labelled import ATTRIBUTES, FRAMES, draw_answer, generate_labelled, principle

    rows = [row.values for row in generate_labelled(SOURCES[0], 0)]
    train = [row for row in rows if row["split"] == "train"]
    draw = Random(1)
    found: list[tuple[Ids, Ids]] = []
    while len(found) < count:
        row = draw.choice(train)
        two = draw.sample(sorted(ATTRIBUTES), 2)
        answer = draw_answer(row["responses"][0], two, draw)
        # Of brevity: one sentence more is neither brief nor long.
        levels = {name: answer.levels[name] + (1.25 if name == "brevity" else 0) for name in two}
        known = [name for name in two if abs(levels[name]) > 0.5]
        if known:
            name = draw.choice(known)
            text = principle(name, levels[name] < 0, FRAMES, draw)
            found.append(encoded(model, [row["prompt"], answer.text], text))
    return found


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
    held_out = [row for row in rows if row["split"] != "train" and len(row["principles"]) == 1][:count]
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


def swaps(root: Path, model: Path, count: int) -> float:
    """How often the policy, as a judge of pairs, says the same in both orders."""
    import yaml
    from rich.console import Console

    from cluster.preferences import write_preferences
    from cluster.recipe import resolve
    from services.text.corpora.labelled import generate_labelled

    responses, principles = root / "responses.jsonl", root / "principles.yaml"
    rows = [row.values for row in generate_labelled(SOURCES[2], 0)[:count]]
    said = [{"prompt": row["prompt"], "response": row[name]} for row in rows for name in ("chosen", "rejected")]
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
    return written.consistent


if __name__ == "__main__":
    main()

"""`attune preferences`: synthetic comparisons as JSONL, as `attune reward-model` reads them.

off_topic   {prompt | messages, chosen: the reference, rejected: the reference of another prompt, split}
principles  {prompt | messages, chosen, rejected, principles, decided_by, label_prob?, scores}

By principles (SALMON, arXiv 2310.05910): a judge gives log p(A) - log p(B) for two responses and each principle of the
set, once in either order; the mean is the principle's difference. Some principles are drawn, some of them in their
opposite wording, whose difference has the other sign, and the one with the largest difference decides. `scores` keeps
what the judge said of all of them.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console

from cluster.config import Config
from cluster.files import write_atomically
from cluster.preferences_config import PreferencesSection
from learner.reward_metrics import sigmoid
from reward_server.principle_sets import named_set
from reward_server.schema import Item
from reward_server.scorers.base import Scored, Scorer
from reward_server.scorers.judge import judge_scorer
from services.errors import UserError
from services.principles import Principle, PrincipleSet, draw
from services.records import Prompt
from services.text.config import DataSection
from services.text.readers import read_rows
from services.text.sources import load_prompts, prompt_id_of

CHUNK = 16
"""Pairs of responses that the judge is asked about at once."""


@dataclass(frozen=True)
class Pair:
    """Two different responses to one prompt. `asked` holds `prompt` or `messages`."""

    key: str
    asked: Mapping[str, Any]
    first: str
    second: str


@dataclass(frozen=True)
class Written:
    """`failed`: pairs that the judge could not decide, left out; `consistent`: share of its verdicts that are the same
    in both orders (None: no judge)."""

    comparisons: int
    failed: int
    consistent: float | None


def write_preferences(config: Config, out: Path, *, console: Console) -> Written:
    """Writes the comparisons of the recipe's `preferences` section to `out`.

    Raises:
        UserError: `out` is there already; no prompts with references, or with two responses; a judge that cannot be.
    """
    section = config.preferences
    if out.exists():
        raise UserError(f"--out {out}: is there already; choose another")
    if section.method == "off_topic":
        rows = list(off_topic(config.data, section))
        written = Written(len(rows), 0, None)
    else:
        assert section.judge is not None
        pairs = pairs_of(config.data, section)
        console.print(f"  {len(pairs)} pairs of responses, judged by {section.judge.model}", highlight=False)
        rows, written = judged(pairs, judge_scorer("preferences.judge", section.judge), named_set(section.set), section)
    if not rows:
        raise UserError(f"preferences.method {section.method}: nothing came of it ({written.failed} pairs undecided)")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
    return written


def off_topic(data: DataSection, section: PreferencesSection) -> Iterator[dict[str, Any]]:
    """Every reference against that of another prompt of the same split, drawn by the seed.

    UserError: a split with fewer than two different references.
    """
    splits = load_prompts(data)
    for name in ("train", "validation", "test"):
        known = [prompt for prompt in splits.named(name) if prompt.reference]
        references = sorted({prompt.reference or "" for prompt in known})
        if known and len(references) < 2:
            raise UserError(f"data.source {data.source!r}: the {name} split has one reference; off-topic needs two")
        for prompt in known:
            others = Random(f"{section.seed}:{prompt.prompt_id}")
            drawn: list[str] = []
            while len(drawn) < min(section.negatives, len(references) - 1):
                other = others.choice(references)
                if other != prompt.reference and other not in drawn:
                    drawn.append(other)
            for rejected in drawn:
                yield {**_asked(prompt), "chosen": prompt.reference, "rejected": rejected, "split": name}


def pairs_of(data: DataSection, section: PreferencesSection) -> list[Pair]:
    """The first two different responses of every prompt in `preferences.responses`. UserError: there is none."""
    assert section.responses is not None
    prompts: dict[str, Prompt] = {}
    found: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for row in read_rows(DataSection(source=section.responses)):
        values = row.values
        response, prompt_id = values.get("response"), values.get("prompt_id")
        if not isinstance(response, str) or not response.strip():
            raise UserError(f"{row.where}: response is {response!r}, allowed is a text that is not empty")
        if prompt_id is not None:
            if not prompts:
                splits = load_prompts(data)
                every = (*splits.train, *splits.validation, *splits.test)
                prompts = {prompt.prompt_id: prompt for prompt in every}
            if prompt_id not in prompts:
                raise UserError(f"{row.where}: prompt_id {prompt_id!r} is of no prompt of data.source {data.source!r}")
            key, asked = str(prompt_id), _asked(prompts[prompt_id])
        else:
            asked = {name: values[name] for name in ("prompt", "messages") if values.get(name) is not None}
            if len(asked) != 1:
                raise UserError(f"{row.where}: needs one of prompt, messages and prompt_id")
            key = prompt_id_of(section.responses, json.dumps(asked, ensure_ascii=False, sort_keys=True))
        texts = found.setdefault(key, (asked, []))[1]
        if response not in texts:
            texts.append(response)
    pairs = [Pair(key, asked, *texts[:2]) for key, (asked, texts) in found.items() if len(texts) > 1]
    if not pairs:
        raise UserError(f"preferences.responses: {section.responses} has no prompt with two different responses")
    return pairs


def judged(
    pairs: Sequence[Pair], judge: Scorer, principles: PrincipleSet, section: PreferencesSection
) -> tuple[list[dict[str, Any]], Written]:
    """A comparison of every pair that the judge could decide, and what came of the others."""
    rows: list[dict[str, Any]] = []
    failed, consistent, verdicts = 0, 0, 0
    for start in range(0, len(pairs), CHUNK):
        chunk = pairs[start : start + CHUNK]
        items = [_item(pair, principle) for pair in chunk for principle in principles.principles]
        scored = asyncio.run(_score(judge, items))
        for place, pair in enumerate(chunk):
            count = len(principles.principles)
            answers = scored[place * count : (place + 1) * count]
            decided = [answer for answer in answers if answer.component.status == "ok"]
            consistent += sum(bool(answer.component.detail["consistent"]) for answer in decided)
            verdicts += len(decided)
            row = _row(pair, answers, principles, section) if len(decided) == count else None
            if row is None:
                failed += 1
            else:
                rows.append(row)
    return rows, Written(len(rows), failed, consistent / verdicts if verdicts else None)


async def _score(judge: Scorer, items: Sequence[Item]) -> list[Scored]:
    return list(await judge.score(items))


def _item(pair: Pair, principle: Principle) -> Item:
    asked = Item.model_validate({"id": f"{pair.key}:{principle.id}", **pair.asked})
    update = {"response": pair.first, "reference": pair.second, "principles": (principle.text,)}
    return asked.model_copy(update=update)


def _row(
    pair: Pair, answers: Sequence[Scored], principles: PrincipleSet, section: PreferencesSection
) -> dict[str, Any] | None:
    """None where no drawn principle sees a difference."""
    scores = {
        principle.id: {"value": _log_odds(answer), **answer.component.detail}
        for principle, answer in zip(principles.principles, answers, strict=True)
    }
    named = {text: principle.id for principle in principles.principles for text in (principle.text, principle.negative)}
    drawn = draw(
        principles,
        seed=section.seed,
        sample_id=pair.key,
        revision=principles.revision,
        count=section.principles,
        negated=section.negated,
    )
    differences = {
        named[text]: scores[named[text]]["value"] * (-1 if negated else 1)
        for text, negated in zip(drawn.texts, drawn.negated, strict=True)
    }
    decides = max(differences, key=lambda name: abs(differences[name]))
    difference = differences[decides]
    if difference == 0:
        return None
    chosen, rejected = (pair.first, pair.second) if difference > 0 else (pair.second, pair.first)
    soft = {"label_prob": sigmoid(abs(difference))} if section.soft_labels else {}
    return {
        **pair.asked,
        "chosen": chosen,
        "rejected": rejected,
        "principles": list(drawn.texts),
        "decided_by": decides,
        "first_is_chosen": difference > 0,
        **soft,
        "scores": scores,
    }


def _log_odds(answer: Scored) -> float:
    """Of the first response, whatever `judge.output` makes of it."""
    detail = answer.component.detail
    return (detail["first"] + detail["second"]) / 2


def _asked(prompt: Prompt) -> dict[str, Any]:
    if prompt.text is not None:
        return {"prompt": prompt.text}
    return {"messages": [message.model_dump() for message in prompt.messages or ()]}

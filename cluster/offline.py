"""`attune rollout`: samples with attention statistics from a file of prompts, by either engine, in this process.

A group is written when all its samples are there, in the order in which groups end; a call that was stopped goes on
where it was. What is there must have been made with the same settings: OUT.json beside OUT says which.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.files import drop_torn_line, read_jsonl, write_atomically
from cluster.run_dir import map_to_file
from rollout.config import RolloutSection
from rollout.engine import Engine, Sampling
from rollout.prepare import Preparation, group_of, group_seed, prepare, request_of
from rollout.worker import build_engine, build_renderer
from services.attention.config import CaptureSection
from services.errors import UserError
from services.models_config import PolicySection
from services.records import Group, Lease, Prompt
from services.text.config import DataSection, SalienceSection
from services.text.salience import fit_idf
from services.text.sources import load_prompts


@dataclass(frozen=True)
class OfflineRollout:
    """What the command line asks for."""

    model: str
    prompts: Path
    out: Path
    engine: Literal["vllm", "transformers"]
    samples: int
    max_tokens: int
    temperature: float
    seed: int
    capture_layers: int
    content: Literal["all", "user", "all_user"]
    keep_maps: bool


def roll_out(asked: OfflineRollout, *, console: Console) -> int:
    """Writes the samples that are missing from `asked.out`, and returns how many it holds in the end.

    Raises:
        UserError: a prompt, a model or a setting that cannot be used, or an `out` made with other settings.
    """
    policy = PolicySection(model=asked.model)
    data = DataSection(source=str(asked.prompts), validation_fraction=0.0, test_fraction=0.0)
    salience = SalienceSection(content=asked.content)
    splits = load_prompts(data)
    prompts = [*splits.train, *splits.validation, *splits.test]
    section = RolloutSection(engine=asked.engine, samples=asked.samples, max_tokens=asked.max_tokens)
    renderer = build_renderer(policy, data, section)
    preparation = Preparation(renderer, salience, fit_idf(prompts, renderer, salience))
    _check_settings(asked)
    done = _keep_whole_groups(asked.out, asked.samples)
    left = [(order, prompt) for order, prompt in enumerate(prompts) if _group_id(prompt) not in done]
    if left:
        capture = CaptureSection(last_layers=asked.capture_layers)
        columns = (TextColumn("rollout"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("rollout", total=len(prompts), completed=len(done))
            asyncio.run(_generate(asked, policy, capture, section, preparation, left, lambda: progress.advance(task)))
    return asked.samples * len(prompts)


async def _generate(
    asked: OfflineRollout,
    policy: PolicySection,
    capture: CaptureSection,
    section: RolloutSection,
    preparation: Preparation,
    prompts: Sequence[tuple[int, Prompt]],
    advance: Callable[[], None],
) -> None:
    engine = await build_engine(policy, capture, section)
    limit = asyncio.Semaphore(section.group_limit)
    try:
        with asked.out.open("a", encoding="utf-8") as file:

            async def one(order: int, prompt: Prompt) -> None:
                async with limit:
                    group = await _group(asked, engine, preparation, order, prompt)
                directory = asked.out.with_name(asked.out.name + ".maps")
                rows = [map_to_file(sample, directory, asked.out.parent) for sample in group.samples]
                file.write("".join(row.model_dump_json() + "\n" for row in rows))
                file.flush()
                advance()

            async with asyncio.TaskGroup() as tasks:
                for order, prompt in prompts:
                    tasks.create_task(one(order, prompt))
    except* UserError as errors:
        raise errors.exceptions[0] from None
    finally:
        await engine.close()


async def _group(asked: OfflineRollout, engine: Engine, preparation: Preparation, order: int, prompt: Prompt) -> Group:
    prepared = prepare(prompt, preparation)
    sampling = Sampling(samples=asked.samples, max_tokens=asked.max_tokens, temperature=asked.temperature)
    request = request_of(
        prepared,
        sampling,
        group_seed(asked.seed, 0, prompt.prompt_id, 0),
        asked.samples if asked.keep_maps else 0,
    )
    try:
        (completions,) = await engine.generate([request])
    except UserError as error:  # the engine knows token ids, not prompts
        raise UserError(f"prompt {prompt.prompt_id}: {error}") from error
    lease = Lease(group_id=_group_id(prompt), attempt=1, epoch=0, order=order, prompt=prompt)
    return group_of(
        lease,
        prepared,
        completions,
        tokenizer=preparation.tokenizer,
        layers=engine.layers,
        eos_ids=engine.eos_ids,
        version=engine.version,
    )


def _group_id(prompt: Prompt) -> str:
    return f"0:{prompt.prompt_id}"


def _check_settings(asked: OfflineRollout) -> None:
    """Samples of two settings do not go into one file."""
    settings = {key: str(value) for key, value in asdict(asked).items() if key not in ("out", "prompts")}
    beside = asked.out.with_name(asked.out.name + ".json")
    if asked.out.exists() and asked.out.stat().st_size > 0:
        before = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
        changed = sorted(key for key, value in settings.items() if before.get(key) != value)
        if changed:
            key = changed[0]
            raise UserError(
                f"--out {asked.out}: holds samples made with --{key.replace('_', '-')} {before.get(key)}, not "
                f"{settings[key]}; choose another file, or remove it"
            )
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(beside, json.dumps(settings, indent=2) + "\n")


def _keep_whole_groups(out: Path, samples: int) -> set[str]:
    """The groups that `out` holds in full; what a kill left of others is cut off its end."""
    drop_torn_line(out)
    counts: dict[str, int] = {}
    for row in read_jsonl(out):
        counts[str(row["group_id"])] = counts.get(str(row["group_id"]), 0) + 1
    whole = {group for group, count in counts.items() if count == samples}
    if len(whole) < len(counts):
        rows = [row for row in read_jsonl(out) if row["group_id"] in whole]
        write_atomically(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return whole

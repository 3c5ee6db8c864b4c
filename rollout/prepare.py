"""A lease -> a generation request -> a group: everything a rollout does to a prompt before and after the engine."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rollout.config import RolloutSection
from rollout.engine import AttentionRows, Completion, GenerationRequest, KeySets, Sampling
from services.records import Attention, Group, Lease, PolicyVersion, Prompt, Sample, sample_id_of
from services.text.config import SalienceSection
from services.text.render import Rendered, Renderer
from services.text.salience import Idf, key_positions


@dataclass(frozen=True)
class Preparation:
    """What turns a prompt into token ids and positions; fixed for a run."""

    renderer: Renderer
    salience: SalienceSection
    idf: Idf | None

    @property
    def tokenizer(self) -> Any:
        return self.renderer.tokenizer


@dataclass(frozen=True)
class PreparedPrompt:
    rendered: Rendered
    keys: KeySets


def prepare(prompt: Prompt, preparation: Preparation) -> PreparedPrompt:
    """Renders the prompt and finds its content and salient positions.

    Raises:
        UserError: the prompt is longer than allowed and the rule is `fail`, or its template cannot be followed.
    """
    rendered = preparation.renderer.render(prompt)
    keys = key_positions(rendered, prompt, preparation.salience, preparation.idf)
    return PreparedPrompt(rendered, KeySets(keys.content, keys.salient, keys.salient_weights))


def sampling_of(section: RolloutSection) -> Sampling:
    return Sampling(
        samples=section.samples,
        max_tokens=section.max_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
    )


def group_seed(run_seed: int, epoch: int, prompt_id: str, step: int) -> int:
    """The seed of a group's generator (invariant 5): the same on every actor and at every attempt."""
    digest = hashlib.blake2b(f"{run_seed}:{epoch}:{prompt_id}:{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def request_of(prepared: PreparedPrompt, sampling: Sampling, seed: int, keep_maps: int) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=prepared.rendered.ids, keys=prepared.keys, sampling=sampling, seed=seed, keep_maps=keep_maps
    )


def group_of(
    lease: Lease,
    prepared: PreparedPrompt,
    completions: Sequence[Completion],
    *,
    tokenizer: Any,
    layers: Sequence[int],
    eos_ids: Sequence[int],
    version: PolicyVersion,
) -> Group:
    """The group that goes on the stream; `version` is the one that generation began with."""
    return Group(
        group_id=lease.group_id,
        attempt=lease.attempt,
        epoch=lease.epoch,
        order=lease.order,
        version=version,
        prompt=lease.prompt,
        eos_ids=tuple(eos_ids),
        samples=tuple(
            sample_of(
                completion,
                prepared,
                group_id=lease.group_id,
                index=index,
                prompt_id=lease.prompt.prompt_id,
                attempt=lease.attempt,
                tokenizer=tokenizer,
                layers=layers,
            )
            for index, completion in enumerate(completions)
        ),
    )


def sample_of(
    completion: Completion,
    prepared: PreparedPrompt,
    *,
    group_id: str,
    index: int,
    prompt_id: str,
    attempt: int,
    tokenizer: Any,
    layers: Sequence[int],
) -> Sample:
    truncated = completion.sampling_logprobs
    return Sample(
        sample_id=sample_id_of(group_id, index),
        group_id=group_id,
        prompt_id=prompt_id,
        attempt=attempt,
        policy_versions=completion.versions,
        prompt=prepared.rendered.text,
        prompt_ids=prepared.rendered.ids,
        response=tokenizer.decode(list(completion.response_ids), skip_special_tokens=True),
        response_ids=completion.response_ids,
        finish_reason=completion.finish_reason,
        logprobs=tuple(completion.logprobs.tolist()),
        sampling_logprobs=None if truncated is None else tuple(truncated.tolist()),
        kept_ids=completion.kept_ids,
        attention=attention_of(completion.attention, prepared.keys, layers),
        flags=tuple(flag for flag, raised in (("prompt_truncated", prepared.rendered.truncated),) if raised),
        created_at=time.time(),
    )


def attention_of(rows: AttentionRows, keys: KeySets, layers: Sequence[int]) -> Attention:
    return Attention(
        layers=tuple(layers),
        content=keys.content,
        salient=keys.salient,
        salient_weights=keys.salient_weights,
        mass=tuple(rows.mass.tolist()),
        salient_mass=tuple(rows.salient_mass.tolist()),
        neg_entropy_sum=tuple(rows.neg_entropy_sum.tolist()),
        peak=tuple(rows.peak.tolist()),
        map=None if rows.dense is None else tuple(tuple(row) for row in rows.dense.tolist()),
    )

"""Evaluation: an engine answers held-out prompts, and each answer is measured.

Works over the engine protocol alone, so that every engine is measured by the same code. The draws of a prompt depend
on the seed, the prompt and the decoding, not on the other prompts: two evaluations of the same prompts are paired.

The policy's own attention is also the ruler of the attention reward. `rescore` takes the responses of one evaluation
and measures them by the attention of another policy, the one that training started from: a gain that only the trained
policy's attention sees does not show there.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from cluster.evaluation_config import METRICS, Decoding, EvaluationSection
from cluster.evaluation_metrics import exact_match, repetition, rouge_l, token_f1
from cluster.evaluation_result import (
    LOG_RATIO_METRICS,
    EvaluatedPrompt,
    EvaluatedResponse,
    EvaluationResult,
    summarise,
    without_eos,
)
from rollout.engine import AttentionRows, Completion, GenerationRequest, KeySets, Oracle, Sampling
from rollout.refusals import RequestRefused, check_fits
from services.attention.failures import AttentionFailure
from services.attention.options import AttentionOptions
from services.attention.reward import AttentionReward, score_statistics
from services.errors import UserError

Decode = Callable[[Sequence[int]], str]
"""Token ids -> text, special tokens left out."""
Progress = Callable[[int, int], None]
"""(prompts done, prompts in all), over all decodings."""


@dataclass(frozen=True)
class EvaluationPrompt:
    """A held-out prompt, rendered. `reference_ids` are the tokens of the reference as the policy was taught them, the
    end-of-sequence token included; `text` is the rendered prompt."""

    prompt_id: str
    text: str
    prompt_ids: tuple[int, ...]
    keys: KeySets
    reference: str | None = None
    reference_ids: tuple[int, ...] | None = field(default=None)


async def evaluate(
    engine: Oracle,
    prompts: Sequence[EvaluationPrompt],
    settings: EvaluationSection,
    options: AttentionOptions,
    *,
    max_tokens: int,
    decode: Decode,
    label: str = "policy",
    progress: Progress | None = None,
) -> EvaluationResult:
    """Answers every prompt under every decoding and measures the answers.

    `max_tokens` counts where `settings.max_tokens` is null (rollout.max_tokens). A prompt that does not fit the model's
    context is refused by name in the result; one response that cannot be scored is a failure there.

    Raises:
        UserError: no prompts, or none that fits.
    """
    limit = max_tokens if settings.max_tokens is None else settings.max_tokens
    if not prompts:
        raise UserError(f"evaluation: the {settings.split} split has no prompts")
    refused = {prompt.prompt_id: reason for prompt in prompts if (reason := _misfit(engine, prompt, limit)) is not None}
    answered = [prompt for prompt in prompts if prompt.prompt_id not in refused]
    if not answered:
        raise UserError(f"evaluation: no prompt fits the model's context; the first: {next(iter(refused.values()))}")
    evaluated = [await _evaluated_prompt(engine, prompt, refused.get(prompt.prompt_id)) for prompt in prompts]
    responses: list[EvaluatedResponse] = []
    batches = [answered[i : i + settings.batch_prompts] for i in range(0, len(answered), settings.batch_prompts)]
    done, total = 0, len(answered) * len(settings.decodings)
    for decoding in settings.decodings:
        sampling = sampling_of(decoding, settings, limit)
        for batch in batches:
            requests = [_request(prompt, sampling, settings.seed, decoding) for prompt in batch]
            for prompt, completions in zip(batch, await engine.generate(requests), strict=True):
                responses.extend(
                    _evaluated_response(prompt, decoding, index, completion, engine.eos_ids, options, decode)
                    for index, completion in enumerate(completions)
                )
            done += len(batch)
            if progress is not None:
                progress(done, total)
    figures, failures = summarise(evaluated, responses, settings, engine.eos_ids)
    return EvaluationResult(
        label=label,
        version=engine.version,
        settings=settings,
        max_tokens=limit,
        attention_options=options.model_dump(mode="json"),
        eos_ids=tuple(engine.eos_ids),
        prompts=tuple(evaluated),
        responses=tuple(responses),
        figures=figures,
        failures=failures,
        created_at=time.time(),
    )


async def rescore(
    engine: Oracle, result: EvaluationResult, *, label: str = "starting policy's attention"
) -> EvaluationResult:
    """The same responses under the attention of `engine`'s policy, in one teacher-forced pass each.

    Attention figures are the engine's; figures of the text stay. `log_ratio_token`, `log_ratio_response` and `k3_token`
    are log pi(y) - log pi_0(y), pi the policy that answered and pi_0 the engine's, at the temperature of the decoding:
    for `sample` their means estimate KL(pi || pi_0) without bias; for `greedy` and `nucleus`, whose responses are not
    drawn from pi itself, they are only its mean over those responses.
    """
    options = AttentionOptions.model_validate(result.attention_options)
    prompts = {prompt.prompt_id: prompt for prompt in result.prompts}
    responses = [
        await _rescored(engine, prompts[response.prompt_id], response, result.settings, options)
        for response in result.responses
    ]
    evaluated = [
        prompt.model_copy(update={"reference_logprob": await _reference_logprob(engine, prompt)})
        for prompt in result.prompts
    ]
    figures, failures = summarise(evaluated, responses, result.settings, result.eos_ids, (*METRICS, *LOG_RATIO_METRICS))
    return result.model_copy(
        update={
            "label": label,
            "version": engine.version,
            "prompts": tuple(evaluated),
            "responses": tuple(responses),
            "figures": figures,
            "failures": failures,
            "created_at": time.time(),
        }
    )


def sampling_of(decoding: Decoding, settings: EvaluationSection, max_tokens: int) -> Sampling:
    """How a decoding draws: greedy once a prompt, the others `settings.samples` times."""
    if decoding == "greedy":
        return Sampling(samples=1, max_tokens=max_tokens, temperature=0.0)
    top_p = settings.top_p if decoding == "nucleus" else 1.0
    return Sampling(samples=settings.samples, max_tokens=max_tokens, temperature=settings.temperature, top_p=top_p)


def _misfit(engine: Oracle, prompt: EvaluationPrompt, max_tokens: int) -> str | None:
    """Why the prompt cannot be answered, where it cannot."""
    try:
        check_fits(engine.family, engine.max_context, prompt.prompt_ids, max_tokens)
    except RequestRefused as refusal:
        return f"prompt {prompt.prompt_id}: {refusal}"
    return None


def _request(prompt: EvaluationPrompt, sampling: Sampling, seed: int, decoding: Decoding) -> GenerationRequest:
    digest = hashlib.blake2b(f"evaluation:{seed}:{decoding}:{prompt.prompt_id}".encode(), digest_size=8).digest()
    return GenerationRequest(prompt.prompt_ids, prompt.keys, sampling, seed=int.from_bytes(digest, "little") >> 1)


async def _evaluated_prompt(engine: Oracle, prompt: EvaluationPrompt, refused: str | None) -> EvaluatedPrompt:
    record = EvaluatedPrompt(
        prompt_id=prompt.prompt_id,
        prompt=prompt.text,
        prompt_ids=prompt.prompt_ids,
        content=prompt.keys.content,
        salient=prompt.keys.salient,
        salient_weights=prompt.keys.salient_weights,
        reference=prompt.reference,
        reference_ids=prompt.reference_ids,
        refused=refused,
    )
    return record.model_copy(update={"reference_logprob": await _reference_logprob(engine, record)})


async def _reference_logprob(engine: Oracle, prompt: EvaluatedPrompt) -> float | None:
    if not prompt.reference_ids or prompt.refused is not None:
        return None
    if engine.max_context is not None and len(prompt.prompt_ids) + len(prompt.reference_ids) > engine.max_context:
        return None
    found = await engine.recompute(prompt.prompt_ids, prompt.reference_ids, _keys(prompt), temperature=1.0)
    total = math.fsum(found.logprobs.tolist())
    return total if math.isfinite(total) else None


def _keys(prompt: EvaluatedPrompt) -> KeySets:
    return KeySets(prompt.content, prompt.salient, prompt.salient_weights)


def _evaluated_response(
    prompt: EvaluationPrompt,
    decoding: Decoding,
    index: int,
    completion: Completion,
    eos_ids: Sequence[int],
    options: AttentionOptions,
    decode: Decode,
) -> EvaluatedResponse:
    ids = completion.response_ids
    body = without_eos(ids, eos_ids)
    text = decode(ids)
    values = {
        "repetition": repetition(body),
        "length": float(len(body)),
        "finished": float(completion.finish_reason == "stop"),
    }
    if prompt.reference is not None:
        values |= {
            "exact_match": exact_match(text, prompt.reference),
            "token_f1": token_f1(text, prompt.reference),
            "rouge_l": rouge_l(text, prompt.reference),
        }
    attention, failure, flags = _attention_values(completion.attention, prompt.keys, ids, eos_ids, options)
    return EvaluatedResponse(
        prompt_id=prompt.prompt_id,
        decoding=decoding,
        index=index,
        response=text,
        response_ids=ids,
        finish_reason=completion.finish_reason,
        logprobs=tuple(completion.logprobs.tolist()),
        values=values | attention,
        failure=failure,
        flags=flags,
    )


async def _rescored(
    engine: Oracle,
    prompt: EvaluatedPrompt,
    response: EvaluatedResponse,
    settings: EvaluationSection,
    options: AttentionOptions,
) -> EvaluatedResponse:
    kept = {name: value for name, value in response.values.items() if name in _TEXT_VALUES}
    if not response.response_ids:
        return response.model_copy(update={"values": kept})
    temperature = 1.0 if response.decoding == "greedy" else settings.temperature
    keys = _keys(prompt)
    found = await engine.recompute(prompt.prompt_ids, response.response_ids, keys, temperature=temperature)
    attention, failure, flags = _attention_values(found.attention, keys, response.response_ids, engine.eos_ids, options)
    ratios = _log_ratios(np.asarray(response.logprobs, dtype=np.float64), found.logprobs)
    return response.model_copy(update={"values": kept | attention | ratios, "failure": failure, "flags": flags})


_TEXT_VALUES = frozenset({"exact_match", "token_f1", "rouge_l", "repetition", "length", "finished"})


def _log_ratios(policy: NDArray[np.float64], start: NDArray[np.float32]) -> dict[str, float]:
    ratio = policy - start.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        values = {
            "log_ratio_token": float(ratio.mean()),
            "log_ratio_response": float(ratio.sum()),
            "k3_token": float((np.expm1(-ratio) + ratio).mean()),
        }
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _attention_values(
    rows: AttentionRows, keys: KeySets, ids: Sequence[int], eos_ids: Sequence[int], options: AttentionOptions
) -> tuple[dict[str, float], str | None, tuple[str, ...]]:
    """The figures of the attention, or the code of the failure; and the flags."""
    try:
        scored = score_statistics(
            rows.mass,
            rows.salient_mass,
            rows.neg_entropy_sum,
            rows.peak,
            len(keys.salient),
            len(keys.content),
            ids,
            eos_ids,
            options,
        )
    except AttentionFailure as failure:
        return {}, failure.code, ()
    return attention_figures(scored), None, scored.flags


def attention_figures(scored: AttentionReward) -> dict[str, float]:
    """The reward, its terms and its signs under the names of the metrics."""
    values = asdict(scored)
    names = {"mass": "mass_mean"}
    wanted = ("reward", "coverage", "focus", "repeat", "spike", "mass", "peak_share", "entropy_q05")
    return {metric: float(values[names.get(metric, metric)]) for metric in wanted}

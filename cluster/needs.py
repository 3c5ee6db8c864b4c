"""What each part of a recipe takes, by its name in the plan: the recipe's numbers put into the formulas of `memory`."""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.config import Config
from cluster.memory import (
    Generating,
    Item,
    Need,
    Shape,
    Training,
    checkpoint_bytes,
    kv_token_bytes,
    learner_need,
    published_bytes,
    rollout_need,
)
from cluster.plan import Part, model_part
from learner.zero import BUCKET
from reward_server.placement import placed_models
from rollout.cache_size import cpu_cache_bytes

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROCESS = {"learner": 620 * 2**20, "rollout": 600 * 2**20, "evaluator": 600 * 2**20}
"""Resident bytes of a process that has imported torch and what it needs, before it loads a model: the CPU builds."""
MODEL_PROCESS = 550 * 2**20
THIN_PROCESS = 180 * 2**20
"""The reward server, a scoring worker."""

SHORTEST_PROMPT = 32
"""Tokens of the longest prompt where nothing bounds the model's context, nor the recipe the prompt."""


@dataclass(frozen=True)
class Files:
    """Bytes that a run keeps in files: sets of weights at once, commits, exported policies."""

    published: int
    checkpoints: int
    policies: int

    @property
    def run_dir(self) -> int:
        return self.checkpoints + self.policies


def value_parameters(config: Config, shape: Shape, saved: Mapping[str, int]) -> tuple[int, int]:
    """Parameters of the value function, and how many of them are a trunk of its own.

    `saved`: elements of the models that the recipe names beside the policy, by their name.
    """
    section = config.learner
    if not section.needs_values:
        return 0, 0
    if section.value_function == "from_reward_model":
        whole = saved.get(str(section.value_model), shape.parameters)
        return whole, whole
    width = section.value_hidden or shape.hidden
    head = shape.hidden * width + 2 * width + 1
    trunk = shape.parameters - shape.head  # the copy's own output head is dropped
    return (head, 0) if section.value_function == "shared" else (trunk + head, trunk)


def lengths(config: Config, shape: Shape, context: int | None) -> tuple[int, int]:
    """Tokens of the longest prompt and of the longest response."""
    response = config.rollout.max_tokens
    if config.data.max_prompt_tokens is not None:
        return config.data.max_prompt_tokens, response
    if context is None:
        return max(SHORTEST_PROMPT, response), response
    return (context if shape.encoder_decoder else max(1, context - response)), response


def training_of(config: Config, shape: Shape, ranks: int, context: int | None, saved: Mapping[str, int]) -> Training:
    section = config.learner
    value, trunk = value_parameters(config, shape, saved)
    prompt, response = lengths(config, shape, context)
    return Training(
        trained=shape.parameters + value,
        value=trunk,
        ranks=ranks,
        bytes=BYTES[section.dtype],
        offload=section.offload,
        checkpointing=section.gradient_checkpointing,
        microbatch_tokens=section.microbatch_tokens,
        logit_chunk=section.logit_chunk,
        entropy_gradient=section.entropy_coef > 0,
        replay=config.rollout.truncation == "replay",
        bucket=BUCKET,
        prompt=prompt,
        response=response,
        publish_bytes=int(config.cluster.bucket_mib * 2**20),
    )


def generating_of(config: Config, shape: Shape, context: int | None, captured: int) -> Generating:
    section = config.rollout
    size = BYTES[config.policy.dtype]
    prompt, response = lengths(config, shape, context)
    token = kv_token_bytes(shape.layers, shape.kv_heads, shape.head_dim, size)
    rows, longest = section.max_batch_rows, prompt + response
    if section.engine == "vllm":
        longest = section.context(context) or longest
        given = section.vllm.kv_cache_mib
        cache = given * 2**20 if given is not None else cpu_cache_bytes(token, longest=longest, rows=rows)
    else:
        # A group at a time; evaluation decodes `max_batch_rows` side by side. Cross-attention keeps the prompt's.
        rows = rows if config.evaluation.every else min(rows, section.samples * section.group_limit)
        cache = rows * longest * token
    return Generating(size, section.engine, cache, captured, rows, longest, int(config.cluster.bucket_mib * 2**20))


def needs_of(
    config: Config,
    shape: Shape,
    parts: Mapping[str, Part],
    *,
    captured: int,
    context: int | None = None,
    saved: Mapping[str, int] | None = None,
) -> dict[str, Need]:
    """One actor of each part. `captured`: layers whose attention is; `context`: positions of the model.

    `saved`: elements of the models that the recipe names beside the policy; one that is not among them is not counted.
    """
    saved = saved or {}
    training = training_of(config, shape, parts["learner"].count, context, saved)
    generating = generating_of(config, shape, context, captured)
    needs = {"learner": learner_need(shape, training, PROCESS["learner"])}
    for name in ("rollout", "evaluator"):
        if name in parts:
            needs[name] = rollout_need(shape, generating, PROCESS[name])
    for name, source in placed_models(config.reward).items():
        if model_part(name) in parts:
            weights = saved.get(source.model, 0) * BYTES.get(source.dtype, 4)
            items = (Item("process", MODEL_PROCESS, "host"), Item("weights", weights))
            needs[model_part(name)] = Need(items)
    for name in ("reward_server", "scoring_worker"):
        needs[name] = Need((Item("process", THIN_PROCESS, "host"),))
    return {name: need if parts[name].gpus else need.on_cpu() for name, need in needs.items() if name in parts}


def files_of(config: Config, shape: Shape, steps: int, saved: Mapping[str, int]) -> Files:
    """What a run of so many steps keeps at the most."""
    value, _ = value_parameters(config, shape, saved)
    section = config.checkpoint
    best = 1 if section.keep_best and config.evaluation.every else 0
    kept = section.keep if section.keep else -(-steps // section.every)
    size = BYTES[config.learner.dtype]
    return Files(
        published=published_bytes(shape, size),
        checkpoints=checkpoint_bytes(shape.parameters + value, kept=kept + best + 1),
        policies=(1 + best) * shape.parameters * size,
    )

"""How many bytes the parts of a run take, from a model's shape and a recipe's numbers. Pure; nothing is measured here.

Sources: ZeRO, arXiv 1910.02054 (section 3.1: 2 + 2 + 12 bytes a parameter under mixed precision; 5.3: divided by the
ranks in stage 3); activations counted as in arXiv 2205.05198 (section 4.1), for the layers of today's models; and what
our own learner and engines keep beside that: `learner/zero.py`, `rollout/kv_cache.py` and
`rollout/vllm_capture/buffers.py`.
tests/cluster/test_memory.py holds each figure against what a real model, engine or checkpoint takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Where = Literal["device", "host"]
"""The memory of the part's own GPU, or that of its machine. On CPUs everything is the machine's."""

FLOAT32 = 4
LIVE_PARAMETERS = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at once at the most: DeepSpeed's `stage3_max_live_parameters`."""
SUB_GROUP = 1_000_000_000
"""Parameters of a rank that are updated together: as many float32 gradients exist at that moment."""
LOGIT_COPIES = 4
"""float32 [tokens of a chunk, vocabulary] at once in the backward pass: logits, divided by the temperature, and the
gradients of both."""
LOGIT_COPIES_MORE = 1.25
"""And for each of truncation that is replayed and an entropy with a gradient: one more, and a byte that masks it."""
PUBLISHED = 3
"""Sets of published weights: two are kept (`cluster.training.KEEP_VERSIONS`), a third is being written."""
CHECKPOINT_BYTES = 12
"""Of a committed checkpoint, a trained parameter: float32 master, and Adam's two moments."""


@dataclass(frozen=True)
class Shape:
    """What of a model decides its memory. `mlp_kept`: tensors of the feed-forward's inner width that its backward pass
    needs, a token (4 gated or with GELU, 1 with ReLU). `scores`: whether attention weights are kept (no fused kernel).
    """

    parameters: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    encoder_layers: int = 0
    head: int = 0
    """Parameters of an output head of its own; 0 where it is the embedding."""
    mlp_kept: int = 4
    scores: bool = False

    @property
    def encoder_decoder(self) -> bool:
        return self.encoder_layers > 0


@dataclass(frozen=True)
class Item:
    """Bytes of one thing. `lasting`: from the start to the end; what is not is there while a step runs."""

    name: str
    bytes: int
    where: Where = "device"
    lasting: bool = True


@dataclass(frozen=True)
class Need:
    """What one actor takes. `loading`: bytes of its machine while models come up, beside what lasts."""

    items: tuple[Item, ...]
    loading: int = 0

    def bytes(self, where: Where) -> int:
        """The most at any time."""
        steady = sum(item.bytes for item in self.items if item.where == where)
        if where == "device":
            return steady
        return max(steady, self.loading + sum(i.bytes for i in self.items if i.where == "host" and i.lasting))

    def on_cpu(self) -> "Need":
        """The same where the device is the machine itself."""
        return Need(tuple(Item(i.name, i.bytes, "host", i.lasting) for i in self.items), self.loading)


def share(count: int, ranks: int) -> int:
    """Elements of one rank's partition."""
    return -(-count // ranks)


@dataclass(frozen=True)
class Training:
    """What the recipe says of the learner. `trained`: all trained parameters, those of the value function among them;
    `value`: how many of them are a trunk of its own (0 for a head on the policy's)."""

    trained: int
    value: int
    ranks: int
    bytes: int
    offload: Literal["none", "optimizer", "all"]
    checkpointing: bool
    microbatch_tokens: int
    logit_chunk: int
    entropy_gradient: bool
    replay: bool
    bucket: int
    prompt: int
    response: int
    publish_bytes: int


def learner_need(shape: Shape, training: Training, base: int) -> Need:
    """One rank of the learner; `base` bytes are its process without a model.

    Parameters are in the learner's dtype, gradients as added up, master and moments in float32, all of them
    partitioned; in float32 there is a master beside the parameters all the same. Gathered parameters are the whole
    model up to LIVE_PARAMETERS: ZeRO-3 keeps what it will use again.
    """
    size, ranks = training.bytes, training.ranks
    own = share(training.trained, ranks)
    optimizer: Where = "host" if training.offload != "none" else "device"
    parameters: Where = "host" if training.offload == "all" else "device"
    whole = min(training.trained, LIVE_PARAMETERS)
    chunk = min(training.logit_chunk, training.microbatch_tokens)
    items = (
        Item("process", base, "host"),
        Item("parameters, partition", own * size, parameters),
        Item("gradients, partition", own * FLOAT32, optimizer),
        Item("float32 master, partition", own * FLOAT32, optimizer),
        Item("Adam's moments, partition", own * 2 * FLOAT32, optimizer),
        Item("parameters, gathered", whole * size, lasting=False),
        Item("gradients, float32, in the update", min(own, SUB_GROUP) * FLOAT32, optimizer, lasting=False),
        Item("gradients, bucket", max(min(training.bucket, training.trained), largest(shape)) * size, lasting=False),
        Item("reference, partition", share(shape.parameters, ranks) * size, parameters),
        Item("reference, gathered", min(shape.parameters, LIVE_PARAMETERS) * size, lasting=False),
        Item("activations", activation_bytes(shape, training), lasting=False),
        Item(
            "logits of a chunk",
            int(logit_copies(training) * FLOAT32 * chunk * shape.vocabulary),
            lasting=False,
        ),
        Item("bucket of published weights", min(training.publish_bytes, shape.parameters * size), lasting=False),
    )
    return Need(items, loading=(shape.parameters + training.value) * size)


def logit_copies(training: Training) -> float:
    return LOGIT_COPIES + LOGIT_COPIES_MORE * (training.entropy_gradient + training.replay)


def largest(shape: Shape) -> int:
    """Elements of the largest single parameter: the embedding."""
    return shape.vocabulary * shape.hidden


def activation_bytes(shape: Shape, training: Training) -> int:
    """What the backward pass of one micro-batch needs of the trunk, or trunks, at the longest sample's length.

    With checkpointing: the input of every layer, and one layer in full.
    """
    prompt, response = training.prompt, training.response
    longest = prompt + response
    rows = max(1, training.microbatch_tokens // longest)
    if shape.encoder_decoder:
        encoder, decoder = rows * prompt, rows * (response + 1)
        one_encoder = layer_bytes(shape, encoder, training.bytes, keys=prompt)
        one = layer_bytes(shape, decoder, training.bytes, keys=response + 1, cross=(encoder, prompt))
    else:
        encoder, decoder = 0, rows * longest
        one_encoder, one = 0, layer_bytes(shape, decoder, training.bytes, keys=longest)
    if training.checkpointing:
        inputs = training.bytes * shape.hidden * (shape.layers * decoder + shape.encoder_layers * encoder)
        whole = inputs + max(one, one_encoder)
    else:
        whole = shape.layers * one + shape.encoder_layers * one_encoder
    return whole * (2 if training.value else 1)


def layer_bytes(shape: Shape, tokens: int, size: int, *, keys: int, cross: tuple[int, int] | None = None) -> int:
    """What one layer keeps for its backward pass, over `tokens` that attend to `keys` each.

    Self-attention: the norm's input in float32, its output and the residual; queries, keys, values (of as many heads,
    shared ones are repeated) and the output. Feed-forward: the same three, and `mlp_kept` of the inner width.
    `cross`: the encoder's tokens, and how many of them a token attends to.
    """
    wide = shape.heads * shape.head_dim
    in_float32 = tokens * shape.hidden * FLOAT32
    own = tokens * (2 * shape.hidden + 4 * wide) * size + in_float32
    feed_forward = tokens * (2 * shape.hidden + shape.mlp_kept * shape.inner) * size + in_float32
    scores = tokens * keys * shape.heads * size if shape.scores else 0
    if cross is not None:
        encoder_tokens, encoder_keys = cross
        own += tokens * (2 * shape.hidden + 2 * wide) * size + in_float32 + encoder_tokens * 2 * wide * size
        scores += tokens * encoder_keys * shape.heads * size if shape.scores else 0
    return own + feed_forward + scores


def kv_token_bytes(layers: int, kv_heads: int, head_dim: int, size: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * layers * kv_heads * head_dim * size


def capture_bytes(shape: Shape, captured: int, *, slots: int, longest: int, cached: int, size: int) -> tuple[int, int]:
    """The capture's slots and its shadow of the paged keys, on a CPU.

    A slot has the keys of `captured` layers over `longest` tokens, four float32 statistics and two weights a token; the
    shadow has the keys of the `cached` tokens of the KV cache.
    """
    keys = captured * shape.kv_heads * shape.head_dim * size
    return slots * longest * (keys + 4 * FLOAT32 + 2 * FLOAT32), cached * keys


@dataclass(frozen=True)
class Generating:
    """What the recipe says of a rollout actor. `cache`: bytes of its KV cache; `captured`: layers."""

    bytes: int
    engine: Literal["transformers", "vllm"]
    cache: int
    captured: int
    rows: int
    longest: int
    publish_bytes: int


def rollout_need(shape: Shape, generating: Generating, base: int) -> Need:
    """One rollout actor, or the evaluator; `base` bytes are its process without a model."""
    size = generating.bytes
    token = kv_token_bytes(shape.layers, shape.kv_heads, shape.head_dim, size)
    items = [
        Item("process", base, "host"),
        Item("weights", shape.parameters * size),
        Item("KV cache", generating.cache),
        Item("logits", 2 * FLOAT32 * generating.rows * shape.vocabulary, lasting=False),
        Item("bucket of new weights", min(generating.publish_bytes, shape.parameters * size), lasting=False),
    ]
    if generating.engine == "vllm":
        slots, shadow = capture_bytes(
            shape,
            generating.captured,
            slots=generating.rows,
            longest=generating.longest,
            cached=generating.cache // max(1, token),
            size=size,
        )
        items += [Item("capture, slots", slots), Item("capture, shadow of the keys", shadow)]
    return Need(tuple(items))


def published_bytes(shape: Shape, size: int) -> int:
    """Sets of weights in `cluster.weights_dir`, or in shared memory."""
    return PUBLISHED * shape.parameters * size


def checkpoint_bytes(trained: int, *, kept: int) -> int:
    """So many commits."""
    return kept * CHECKPOINT_BYTES * trained


def add(needs: Sequence[Need], where: Where) -> int:
    return sum(need.bytes(where) for need in needs)

"""The formulas of `attune doctor` against what real models, a real engine and real files take."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from cluster.memory import (
    FLOAT32,
    Item,
    Need,
    Shape,
    Training,
    activation_bytes,
    capture_bytes,
    kv_token_bytes,
    learner_need,
    logit_copies,
)
from cluster.needs import files_of, needs_of
from cluster.plan import parts_of
from cluster.recipe import resolve
from cluster.shapes import saved_parameters, shape_of
from learner.policy import Entropy, ModelInput, PolicyWithValue
from rollout.cache_size import BLOCK_SIZE_CPU, CPU_CACHE_BYTES, cpu_cache_bytes
from rollout.kv_cache import new_cache
from rollout.vllm_capture.buffers import LayerShape
from rollout.vllm_capture.capture import Capture
from services.errors import UserError
from services.models_config import PolicySection

ROWS, PROMPT, RESPONSE = 4, 40, 24


def saved(model: Any, **inputs: torch.Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass of a forward, parameters left out."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.base_model(**inputs, use_cache=False)
        del out
        return sum(storage.nbytes() for storage in kept.values())


def llama(layers: int, dtype: torch.dtype, *, kv_heads: int = 2) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=kv_heads, vocab_size=50, max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).train()


def t5(layers: int) -> T5ForConditionalGeneration:
    config = T5Config(
        d_model=96, d_kv=24, d_ff=256, num_layers=layers, num_heads=4, dropout_rate=0.0, vocab_size=50,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).train()


def shape_of_model(model: Any, directory: Path) -> Shape:
    model.config.save_pretrained(directory)
    return shape_of(PolicySection(model=str(directory)))


def training(bytes: int = 4, **given: Any) -> Training:
    usual: dict[str, Any] = {
        "trained": 1, "value": 0, "ranks": 1, "offload": "none", "checkpointing": False,
        "microbatch_tokens": ROWS * (PROMPT + RESPONSE), "logit_chunk": 64, "entropy_gradient": False,
        "replay": False, "bucket": 10**6, "prompt": PROMPT, "response": RESPONSE, "publish_bytes": 2**20,
    }  # fmt: skip
    return Training(bytes=bytes, **(usual | given))


@pytest.mark.parametrize(("dtype", "kv_heads"), [(torch.float32, 2), (torch.float32, 4), (torch.bfloat16, 4)])
def test_activations_of_a_decoder_are_what_autograd_keeps(tmp_path: Path, dtype: torch.dtype, kv_heads: int) -> None:
    ids = torch.randint(0, 50, (ROWS, PROMPT + RESPONSE))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # Six layers less two: what the embedding and the last norm keep is not the layers'.
    kept = saved(llama(6, dtype, kv_heads=kv_heads), **inputs) - saved(llama(2, dtype, kv_heads=kv_heads), **inputs)
    given = training(dtype.itemsize)
    six, two = (
        activation_bytes(shape_of_model(llama(layers, dtype, kv_heads=kv_heads), tmp_path / str(layers)), given)
        for layers in (6, 2)
    )
    assert six - two == pytest.approx(kept, rel=0.1)


def test_activations_of_an_encoder_decoder_are_what_autograd_keeps(tmp_path: Path) -> None:
    ids = torch.randint(0, 50, (ROWS, PROMPT))
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": torch.randint(0, 50, (ROWS, RESPONSE + 1)),
    }
    kept = saved(t5(5), **inputs) - saved(t5(2), **inputs)
    five, two = (activation_bytes(shape_of_model(t5(layers), tmp_path / str(layers)), training()) for layers in (5, 2))
    assert five - two == pytest.approx(kept, rel=0.1)


class LargestAtOnce(TorchDispatchMode):
    """The most bytes that tensors of at least so many bytes took at one time, a model's parameters left out."""

    def __init__(self, least: int, model: Any) -> None:
        super().__init__()
        self.least, self.peak = least, 0
        self._own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is None or storage.nbytes() < self.least or storage._cdata in self._own:
                continue
            if storage._cdata not in self._alive:
                self._alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, storage._cdata)
                self.peak = max(self.peak, sum(self._alive.values()))
        return out


@pytest.mark.parametrize("entropy", ["figure", "gradient"])
@pytest.mark.parametrize("replay", [False, True])
def test_copies_of_the_logits_are_those_of_a_forward_and_backward(entropy: Entropy, replay: bool) -> None:
    model, tokens, vocabulary = llama(1, torch.float32), 64, 20_000
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        embedding.requires_grad_(False)  # their gradients are as large
    policy = PolicyWithValue(model, value="none")
    ids = torch.randint(0, 50, (1, tokens + 1))
    kept = torch.randint(0, 50, (1, tokens, 5)) if replay else None
    batch = ModelInput(
        input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=None, kept_ids=kept,
        rows=torch.arange(tokens + 1)[None], response_ids=ids[:, 1:],
        response_mask=torch.ones(1, tokens, dtype=torch.bool),
    )  # fmt: skip
    with LargestAtOnce(tokens * vocabulary, model) as seen:
        out = policy(batch, 0.7, chunks=1, entropy=entropy)
        (out.logprobs + out.entropy).sum().backward()
    predicted = logit_copies(training(entropy_gradient=entropy == "gradient", replay=replay))
    assert seen.peak / (FLOAT32 * tokens * vocabulary) == pytest.approx(predicted, abs=0.05)


def test_a_shape_is_the_models_without_its_weights(tmp_path: Path, tiny_decoder: Path) -> None:
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(tiny_decoder)
    shape = shape_of(PolicySection(model=str(tiny_decoder)))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.parameters == saved_parameters(tiny_decoder)
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (2, 4, 2, 32)
    assert saved_parameters(tmp_path) is None
    with pytest.raises(UserError, match=r"policy\.model"):
        shape_of(PolicySection(model=str(tmp_path / "nowhere")))


def test_a_paper_sized_model_is_known_from_its_configuration_alone(tmp_path: Path) -> None:
    """1.3 B parameters, of which nothing is loaded: it takes no 5 GB to say so."""
    directory = tmp_path / "paper"
    directory.mkdir()
    root = Path(__file__).parents[2]
    (directory / "config.json").write_text((root / "recipes/models/cagsr-1.3b.json").read_text())
    shape = shape_of(PolicySection(model=str(directory)))
    assert 1.2e9 < shape.parameters < 1.5e9
    assert (shape.encoder_layers, shape.layers) == (12, 12)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_states_of_training_are_zeros_bytes_a_parameter(ranks: int) -> None:
    """arXiv 1910.02054: 2 (weights) + 12 (master and moments), divided by the ranks; gradients in float32 are 4."""
    shape = Shape(8 * 10**6, 2, 64, 4, 4, 16, 256, 1000)
    need = learner_need(shape, training(2, trained=shape.parameters, ranks=ranks), base=0)
    states = sum(i.bytes for i in need.items if i.lasting and not i.name.startswith("reference"))
    assert states == 18 * shape.parameters // ranks
    offloaded = learner_need(shape, training(2, trained=shape.parameters, ranks=ranks, offload="optimizer"), base=0)
    assert need.bytes("device") - offloaded.bytes("device") >= 16 * shape.parameters // ranks


def test_what_is_there_only_while_models_load_counts_where_it_is_the_most() -> None:
    need = Need((Item("states", 10, "host"), Item("activations", 5, "host", lasting=False)), loading=30)
    assert need.bytes("host") == 40
    assert Need(need.items, loading=2).bytes("host") == 15


def test_a_cache_has_room_for_every_row_at_its_longest() -> None:
    token = kv_token_bytes(2, 2, 32, 4)
    assert token == 2 * 2 * 2 * 32 * 4
    assert cpu_cache_bytes(token, longest=96, rows=8) == 8 * (96 + BLOCK_SIZE_CPU) * token
    assert cpu_cache_bytes(token, longest=10**6, rows=10**4) == CPU_CACHE_BYTES


def test_a_cache_of_the_transformers_engine_is_what_was_predicted() -> None:
    shape = Shape(0, 3, 64, 4, 2, 16, 256, 50)
    rows, capacity = 5, 40
    layers = new_cache(shape.layers, capacity, cross=False).layers
    for layer in layers:
        layer.update(*(torch.zeros(rows, shape.kv_heads, 7, shape.head_dim) for _ in range(2)))  # of seven tokens
    held = sum(each.untyped_storage().nbytes() for layer in layers for each in (layer.keys, layer.values))
    assert held == rows * capacity * kv_token_bytes(shape.layers, shape.kv_heads, shape.head_dim, 4)


def test_the_captures_buffers_are_what_was_predicted() -> None:
    shape = Shape(0, 3, 64, 4, 2, 16, 256, 50)
    slots, longest, cached = 8, 96, 320
    layers = [LayerShape(f"l{i}", shape.heads, shape.kv_heads, shape.head_dim, 1.0, (1.0,) * 4) for i in range(2)]
    capture = Capture(
        layers, total=8.0, dtype=torch.float32, most_requests=slots, longest=longest, block_size=32,
        copied_block_size=32, paged_tokens=cached,
    )  # fmt: skip
    for _ in range(slots):
        capture._slots.take()
    capture._slots.reserve(longest)
    predicted = capture_bytes(shape, len(layers), slots=slots, longest=longest, cached=cached, size=4)
    assert (capture.nbytes["slots"], capture.nbytes["shadow"]) == predicted


def test_every_part_of_a_plan_has_its_need(tiny_decoder: Path) -> None:
    tree = {
        "data": {},
        "policy": {"model": str(tiny_decoder)},
        "rollout": {"engine": "vllm"},
        "reward": {"sources": {"judge": {"kind": "preference", "model": "m", "gpus": 1}}},
        "learner": {"value_function": "separate"},
        "evaluation": {"every": 2},
    }
    config = resolve(tree, "test")
    parts = parts_of(config)
    shape = shape_of(config.policy)
    needs = needs_of(config, shape, parts, captured=1, context=96, saved={"m": 1000})
    assert needs.keys() == parts.keys()
    assert needs["learner"].bytes("device") == 0  # it has no GPU: everything is the machine's
    assert needs["model of judge"].bytes("device") == 4000
    # A trunk of its own is trained as the policy is.
    alone = needs_of(resolve({**tree, "learner": {"value_function": "shared"}}, "test"), shape, parts, captured=1)
    assert needs["learner"].bytes("host") > alone["learner"].bytes("host")
    files = files_of(config, shape, steps=100, saved={})
    assert files.published == 3 * 4 * shape.parameters

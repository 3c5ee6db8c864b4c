"""The policy with its value against transformers' own forward, one sample at a time, in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learner.microbatch import Tokens, collate
from learner.policy import ModelInput, PolicyWithValue, enable_gradient_checkpointing, parameter_groups, verify_head
from services.errors import UserError

TEMPERATURE = 0.7
SAMPLES = [
    Tokens((5, 6, 7, 8), (9, 10, 11)),
    Tokens((12, 13), (14, 15, 16, 17, 18)),
    Tokens((20, 21, 22, 23, 24, 25), (26,)),
]


def inputs_of(lm: Any, samples: list[Tokens] = SAMPLES) -> ModelInput:
    family = "encoder-decoder" if lm.config.is_encoder_decoder else "decoder"
    start = lm.config.decoder_start_token_id if lm.config.is_encoder_decoder else None
    return collate(samples, family=family, pad_id=1, decoder_start_id=start)


def reference(lm: Any, sample: Tokens) -> tuple[Tensor, Tensor]:
    """Logits [T, V] that predict the response, and the hidden states [T+1, d], of one sample without padding."""
    prompt, response = list(sample.prompt_ids), list(sample.response_ids)
    if lm.config.is_encoder_decoder:
        out = lm(
            input_ids=torch.tensor([prompt]),
            decoder_input_ids=torch.tensor([[lm.config.decoder_start_token_id, *response]]),
            output_hidden_states=True,
        )
        return out.logits[0, :-1], out.decoder_hidden_states[-1][0]
    out = lm(input_ids=torch.tensor([prompt + response]), output_hidden_states=True)
    first = len(prompt) - 1
    return out.logits[0, first:-1], out.hidden_states[-1][0, first:]


def reference_logprobs(
    logits: Tensor, response: tuple[int, ...], kept: Any = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Token by token, by the definition; `kept` [T] sets of ids."""
    logprobs, entropies = [], []
    for t, token in enumerate(response):
        ids = list(range(logits.shape[-1])) if kept is None or not kept[t] else list(kept[t])
        p = torch.exp(logits[t, ids] / TEMPERATURE)
        p = p / p.sum()
        logprobs.append(torch.log(p[ids.index(token)]))
        entropies.append(-(p * torch.log(p)).sum())
    return logprobs, entropies


@pytest.mark.parametrize("chunks", [1, 3, 20])
def test_logprobs_entropy_values_and_gradients(lm: Any, chunks: int) -> None:
    policy = PolicyWithValue(lm, value="shared").double().train()
    nn.init.normal_(policy.value_head.down.weight)
    out = policy(inputs_of(lm), TEMPERATURE, chunks=chunks, entropy="gradient")
    expected = torch.zeros((), dtype=torch.float64)
    for i, sample in enumerate(SAMPLES):
        n = len(sample.response_ids)
        logits, hidden = reference(lm, sample)
        logprobs, entropies = reference_logprobs(logits, sample.response_ids)
        values = policy.value_head(hidden)
        for t in range(n):
            assert out.logprobs[i, t].item() == pytest.approx(logprobs[t].item(), abs=1e-10)
            assert out.entropy[i, t].item() == pytest.approx(entropies[t].item(), abs=1e-10)
            assert out.values[i, t].item() == pytest.approx(values[t].item(), abs=1e-10)
            expected = expected + (t + 1) * logprobs[t] + 0.3 * entropies[t] + values[t] ** 2
        assert out.next_values[i].item() == pytest.approx(values[n].item(), abs=1e-10)
        assert not out.logprobs[i, n:].any()
        assert not out.entropy[i, n:].any()
        assert not out.values[i, n:].any()
    steps = torch.arange(1, 6, dtype=torch.float64)
    loss = (out.logprobs * steps).sum() + 0.3 * out.entropy.sum() + (out.values**2).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    # Gemma's norms round to float32 on the way, in the gradient too.
    rtol, atol = (1e-4, 1e-5) if type(lm).__name__ == "Gemma2ForCausalLM" else (1e-8, 1e-9)
    names, parameters = zip(*policy.named_parameters(), strict=True)
    got = torch.autograd.grad(loss, parameters, allow_unused=True)
    want = torch.autograd.grad(expected, parameters, allow_unused=True)
    for name, a, b in zip(names, got, want, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def test_replay_of_truncated_sampling(lm: Any) -> None:
    kept = ((9, 3, 40), (), (11,))
    samples = [Tokens(SAMPLES[0].prompt_ids, SAMPLES[0].response_ids, kept), SAMPLES[1]]
    policy = PolicyWithValue(lm, value="none").double()
    out = policy(inputs_of(lm, samples), TEMPERATURE, chunks=2, entropy="gradient")
    for i, sample in enumerate(samples):
        logprobs, entropies = reference_logprobs(reference(lm, sample)[0], sample.response_ids, sample.kept_ids)
        for t in range(len(sample.response_ids)):
            assert out.logprobs[i, t].item() == pytest.approx(logprobs[t].item(), abs=1e-10)
            assert out.entropy[i, t].item() == pytest.approx(entropies[t].item(), abs=1e-10)
    assert out.logprobs[0, 2].item() == pytest.approx(0.0, abs=1e-12)  # one id kept: certain
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in policy.parameters())


@pytest.mark.parametrize("chunks", [1, 2, 7])
def test_the_head_is_called_as_often_as_agreed(lm: Any, chunks: int) -> None:
    policy = PolicyWithValue(lm, value="none").double().train()
    widths: list[int] = []
    lm.get_output_embeddings().register_forward_hook(lambda _m, _i, out: widths.append(out.shape[0]))
    for samples in (SAMPLES, SAMPLES[2:]):  # nine tokens, and one
        widths.clear()
        out = policy(inputs_of(lm, samples), chunks=chunks)
        assert len(widths) == chunks
        tokens = sum(len(sample.response_ids) for sample in samples)
        assert max(widths) == -(-tokens // chunks)  # never more logits than a chunk's at once
        out.logprobs.sum().backward()
        assert len(widths) == 2 * chunks  # once more each, recomputed
    with torch.no_grad():
        widths.clear()
        policy(inputs_of(lm), chunks=chunks)
        assert len(widths) == chunks


def test_training_mode_has_no_dropout_and_company_does_not_matter(lm: Any) -> None:
    policy = PolicyWithValue(lm, value="shared").double().train()
    together = policy(inputs_of(lm), TEMPERATURE, chunks=2).logprobs
    again = policy(inputs_of(lm), TEMPERATURE, chunks=2).logprobs
    assert torch.equal(together, again)
    for i, sample in enumerate(SAMPLES):
        alone = policy(inputs_of(lm, [sample]), TEMPERATURE).logprobs[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, rtol=0, atol=1e-10)


def test_verify_head_accepts_what_it_knows(lm: Any) -> None:
    verify_head(PolicyWithValue(lm, value="none").double())


def test_verify_head_refuses_a_model_that_changes_its_logits(build_lm: Callable[[str], Any]) -> None:
    lm = build_lm("gemma2")
    policy = PolicyWithValue(lm, value="none").double()
    lm.config.final_logit_softcapping = 0.3  # after the rule was read: as a model whose rule is unknown
    with pytest.raises(UserError, match=r"policy\.model: Gemma2ForCausalLM changes its logits"):
        verify_head(policy)


def test_a_separate_value_function_has_its_own_trunk(build_lm: Callable[[str], Any]) -> None:
    for name in ("gpt2", "t5"):
        lm = build_lm(name)
        policy = PolicyWithValue(lm, value="separate", value_lm=build_lm(name)).double()
        nn.init.normal_(policy.value_head.down.weight)
        shared = PolicyWithValue(build_lm(name), value="shared").double()
        shared.value_head.load_state_dict(policy.value_head.state_dict())
        out = policy(inputs_of(lm), chunks=2)
        torch.testing.assert_close(out.values, shared(inputs_of(lm)).values)
        out.values.sum().backward()
        assert all(p.grad is None for p in lm.parameters())
        assert all(p.grad is not None for n, p in policy.value_trunk.named_parameters() if "bias" not in n)
        groups = parameter_groups(policy)
        assert {n.split(".")[0] for n, _ in groups["value"]} == {"value_trunk", "value_head"}
        assert {n.split(".")[0] for n, _ in groups["policy"]} == {"lm"}
        assert not any("lm_head" in n for n, _ in groups["value"])


def test_tied_weights_are_named_once(build_lm: Callable[[str], Any]) -> None:
    for name, tied in (("gpt2", True), ("llama", False), ("t5", True), ("t5_untied", False), ("bart", True)):
        lm = build_lm(name)
        names = [n for n, _ in parameter_groups(PolicyWithValue(lm, value="shared"))["policy"]]
        assert (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight) == tied
        assert ("lm.lm_head.weight" in names) != tied


def test_gradient_checkpointing_changes_nothing(lm: Any) -> None:
    policy = PolicyWithValue(lm, value="shared").double().train()
    gradients = []
    for on in (False, True):
        if on:
            enable_gradient_checkpointing(policy)
        policy.zero_grad()
        policy(inputs_of(lm), chunks=2).logprobs.sum().backward()
        gradients.append({n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_bfloat16_gives_float32(build_lm: Callable[[str], Any]) -> None:
    lm = build_lm("llama").bfloat16()
    policy = PolicyWithValue(lm, value="shared").bfloat16()
    verify_head(policy)
    out = policy(inputs_of(lm), entropy="gradient")
    for x in (out.logprobs, out.entropy, out.values, out.next_values):
        assert x.dtype == torch.float32
        assert bool(x.isfinite().all())


def test_the_value_starts_at_zero_and_temperature_zero_means_one(build_lm: Callable[[str], Any]) -> None:
    lm = build_lm("llama")
    policy = PolicyWithValue(lm, value="shared").double()
    out = policy(inputs_of(lm), 0.0)
    assert not out.values.any()
    assert torch.equal(out.logprobs, policy(inputs_of(lm), 1.0).logprobs)
    assert math.isfinite(out.logprobs.sum().item())


def test_the_wrong_family_is_refused(build_lm: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="decoder_input_ids"):
        PolicyWithValue(build_lm("llama"), value="none")(inputs_of(build_lm("bart")))
    with pytest.raises(ValueError, match="value_lm"):
        PolicyWithValue(build_lm("llama"), value="separate")

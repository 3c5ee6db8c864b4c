"""What training of a model that scores starts from, by family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5ForSequenceClassification

from learner.reward_examples import encode_records
from learner.reward_model_config import RewardModelSection
from learner.scoring_model import ScoringInput, start_scoring_model
from services.errors import UserError
from services.models import load_tokenizer
from services.models_config import PolicySection
from services.text.preference_data import labelled_of
from services.text.readers import Row

PLAIN = {"input_template": "{prompt} {response}"}


def start(path: Path, **section: Any) -> Any:
    policy = PolicySection(model=str(path))
    settings = RewardModelSection.model_validate(section)
    return start_scoring_model(policy, settings, load_tokenizer(policy), dtype=torch.float32, seed=5)


def test_an_encoder_decoder_keeps_its_trunk_and_gets_a_head(tiny_encoder_decoder: Path) -> None:
    model = start(tiny_encoder_decoder, **PLAIN)
    assert isinstance(model.lm, T5ForSequenceClassification)
    assert model.lm.config.num_labels == 1
    ids = torch.tensor([[7, 8, 9, 2, 0], [7, 10, 11, 12, 2]])
    mask = (ids != 0).long()
    together = model(ScoringInput(ids, mask))
    alone = model(ScoringInput(ids[:1, :4], mask[:1, :4]))
    assert together.shape == (2,)
    assert together[0].item() == pytest.approx(alone[0].item(), abs=1e-6)
    assert together[0].item() != together[1].item()
    again = start(tiny_encoder_decoder, **PLAIN)
    assert torch.equal(again(ScoringInput(ids, mask)), together)  # the new head is drawn by the seed


def test_adapters_leave_an_encoder_decoders_head_to_be_trained(tiny_encoder_decoder: Path) -> None:
    model = start(tiny_encoder_decoder, **PLAIN, lora={"rank": 2})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"lm.classification_head.dense.weight", "lm.classification_head.out_proj.weight"} <= trained
    rest = {name for name in trained if not name.startswith("lm.classification_head.")}
    assert rest
    assert all(".lora_" in name for name in rest)
    assert not [name for name in trained if "classification_head" in name and ".lora_" in name]


def test_steps_and_a_second_end_of_sequence_are_refused(tiny_encoder_decoder: Path) -> None:
    with pytest.raises(UserError, match="process labels steps, and starts from a decoder"):
        start(tiny_encoder_decoder, kind="process", **PLAIN)
    section = RewardModelSection.model_validate(PLAIN)
    tokenizer = load_tokenizer(PolicySection(model=str(tiny_encoder_decoder)))
    end = tokenizer.eos_token_id

    def encoded(response: str) -> Any:
        row = Row("f:1", {"prompt": "Where?", "chosen": response, "rejected": "There."}, None)
        return encode_records([labelled_of(row, "comparisons", "f")], tokenizer, section.format(None), section, end=end)

    assert all(ids[-1] == end for ids in encoded("Here.").examples[0].inputs)
    with pytest.raises(UserError, match="f:1: the input has 2 end-of-sequence tokens"):
        encoded(f"Here.{tokenizer.eos_token}")

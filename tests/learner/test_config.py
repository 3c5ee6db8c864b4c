from typing import Any

import pytest
from pydantic import ValidationError

from learner.config import LearnerSection

SCORER = {"value_function": "from_reward_model", "value_model": "scorer"}


def test_defaults_are_the_papers() -> None:
    section = LearnerSection.model_validate({})
    assert (section.objective, section.advantage, section.clip) == ("ppo", "paper", 0.2)
    assert section.lr == section.value_lr == 1e-5
    assert section.kl.place == "none"
    assert section.normalise_advantages == section.standardise_rewards == "none"


def test_every_field_says_why() -> None:
    for model in (LearnerSection, type(LearnerSection.model_validate({}).kl)):
        for name, field in model.model_fields.items():
            assert field.description, name


def test_a_saved_section_reads_back() -> None:
    section = LearnerSection.model_validate(
        {"objective": "policy_gradient", "baseline": "batch_mean", "betas": [0.8, 0.9]}
    )
    assert LearnerSection.model_validate_json(section.model_dump_json()) == section


@pytest.mark.parametrize(
    ("fields", "values", "reference", "fewest"),
    [
        ({}, True, False, 1),
        ({"advantage": "gae", "kl": {"place": "reward"}}, True, True, 1),
        ({"advantage": "rloo"}, False, False, 2),
        ({"advantage": "grpo", "kl": {"place": "loss"}}, False, True, 2),
        ({"normalise_advantages": "group"}, True, False, 2),
        ({"objective": "policy_gradient"}, True, False, 1),
        ({"objective": "policy_gradient", "baseline": "none"}, False, False, 1),
    ],
)
def test_what_a_section_needs(fields: dict[str, Any], values: bool, reference: bool, fewest: int) -> None:
    section = LearnerSection.model_validate(fields)
    assert (section.needs_values, section.needs_reference, section.min_ok) == (values, reference, fewest)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"baseline": "none"}, "with ppo set `advantage`"),
        ({"objective": "policy_gradient", "advantage": "rloo"}, "set `baseline`"),
        ({"kl": {"controller": "adaptive"}}, "needs kl.place"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"clip": 0}, "greater than 0"),
        ({"value_function": "from_reward_model"}, "learner.value_model"),
        ({"value_model": "scorer"}, "only with it"),
        ({**SCORER, "advantage": "grpo"}, "need no values"),
        ({**SCORER, "value_hidden": 8}, "learner.value_hidden"),
        ({"learning_rate": 1e-5}, "Extra inputs"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LearnerSection.model_validate(fields)

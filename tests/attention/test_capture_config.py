"""Which layers and heads a section names, for a model of a given shape."""

import pytest
from pydantic import ValidationError

from services.attention.config import CaptureSection, resolve_capture
from services.errors import UserError


def test_last_layers_by_default() -> None:
    assert resolve_capture(CaptureSection(), 4, 2).layers == (3,)
    resolved = resolve_capture(CaptureSection(last_layers=3), 4, 2)
    assert resolved.layers == (1, 2, 3)
    assert resolved.weights == ((1.0, 1.0),) * 3
    assert resolved.total == 6.0


def test_layers_heads_and_weights() -> None:
    assert resolve_capture(CaptureSection(layers=(-1, 0)), 4, 2).layers == (0, 3)
    assert resolve_capture(CaptureSection(heads=(1,)), 4, 3).weights == ((0.0, 1.0, 0.0),)
    by_weight = resolve_capture(CaptureSection(layers=(-1, 0), weights=((1, 2), (3, 4))), 4, 2)
    assert by_weight.weights == ((3, 4), (1, 2))


@pytest.mark.parametrize(
    ("section", "names"),
    [
        (CaptureSection(last_layers=5), "attention.last_layers: 5"),
        (CaptureSection(layers=(4,)), "attention.layers: 4"),
        (CaptureSection(layers=(3, -1)), "twice"),
        (CaptureSection(heads=(2,)), "attention.heads: 2"),
        (CaptureSection(weights=((1.0,),)), "attention.weights"),
        (CaptureSection(weights=((0.0, 0.0),)), "add up to 0"),
    ],
)
def test_what_the_model_has_not_is_refused(section: CaptureSection, names: str) -> None:
    with pytest.raises(UserError, match=names):
        resolve_capture(section, 4, 2)


def test_heads_and_weights_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="either"):
        CaptureSection(heads=(0,), weights=((1.0,),))

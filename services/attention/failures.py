"""Why attention could not be scored: a failure has a name and never becomes a number (invariant 2)."""

from typing import Literal, get_args

FailureCode = Literal[
    "empty_response",
    "no_content_tokens",
    "length_mismatch",
    "ragged_rows",
    "index_out_of_range",
    "duplicate_position",
    "salient_outside_content",
    "invalid_weights",
    "non_finite_attention",
    "negative_attention",
    "no_attention_mass",
]
"""In the order in which they are checked: the specification's four in its order, what is wrong with shapes and
positions between `no_content_tokens` and `non_finite_attention`, as numbers cannot be read before it."""

FAILURE_CODES: tuple[FailureCode, ...] = get_args(FailureCode)


class AttentionFailure(ValueError):  # noqa: N818 - a failure is the word of the design, as in `services.records`
    """This sample's attention cannot be scored. `code` is one of `FAILURE_CODES`; all are faults of the data."""

    def __init__(self, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.code: FailureCode = code
        self.message = message

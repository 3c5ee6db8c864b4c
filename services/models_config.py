"""Which model is the policy."""

from typing import Literal

from pydantic import Field

from services.config_base import Section


class PolicySection(Section):
    """The policy: an ordinary Hugging Face model directory, or a name on the hub."""

    model: str = Field(
        default="policy", min_length=1, description="directory or hub name of the model; a directory of that name wins"
    )
    tokenizer: str | None = Field(
        default=None, description="directory or hub name of the tokenizer; null: the model's own"
    )
    family: Literal["auto", "decoder", "encoder-decoder"] = Field(
        default="auto", description="what the model must be; auto takes what its configuration says"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the weights in generation; float32 is what reproducibility and CPUs need"
    )
    revision: str | None = Field(
        default=None, description="branch, tag or commit of a hub model; null: its main branch"
    )

"""The `rollout` section: how responses are drawn, by how many actors, and what is kept of them."""

from typing import Literal, Self

from pydantic import Field, model_validator

from services.config_base import Section


class RolloutSection(Section):
    engine: Literal["transformers"] = Field(
        default="transformers",
        description="What generates. `transformers` captures exactly for every supported family.",
    )
    actors: int = Field(
        default=2,
        ge=1,
        description="Rollout actors. Two, as many as the small machine that a first run meets has cores.",
    )
    threads: int = Field(
        default=1,
        ge=1,
        description="CPU threads of an actor. One: small models gain nothing from more, and results stay reproducible.",
    )
    samples: int = Field(default=4, ge=1, description="Samples N of a prompt (CAGSR, arXiv 2502.10482: N = 4).")
    max_tokens: int = Field(
        default=64, ge=1, description="Longest response, in tokens, the end-of-sequence token included."
    )
    temperature: float = Field(
        default=1.0, gt=0, description="Softmax temperature. 1: the distribution that is trained is the model's own."
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Nucleus mass. 1 (off): truncation biases the importance ratio (invariant 7).",
    )
    top_k: int = Field(default=0, ge=0, description="Most likely tokens kept; 0 is off, for the reason of `top_p`.")
    truncation: Literal["none", "replay"] = Field(
        default="none",
        description="How the learner treats the tokens that top-p and top-k left out. `replay`: the kept set is "
        "recorded and both sides of the ratio are renormalised over it. `none` refuses a recipe that truncates.",
    )
    finish_length: Literal["bootstrap", "mask"] = Field(
        default="bootstrap",
        description="A response cut at `max_tokens`: `bootstrap` trains on it, taking the cut as no end of the "
        "episode; `mask` gives its tokens no loss.",
    )
    keep_maps: int = Field(
        default=0,
        ge=0,
        description="Samples of a group whose dense attention rows are kept in the run directory. 0: they are large.",
    )
    max_batch_rows: int = Field(
        default=64,
        ge=1,
        description="Rows decoded together in evaluation and offline rollouts; bounds memory, not results.",
    )
    lease_s: float = Field(
        default=300.0,
        gt=0,
        description="A lease not renewed for this long (s) is given to another actor. Renewed every third of it.",
    )
    poll_s: float = Field(default=0.05, gt=0, description="Pause (s) before an idle actor asks for a lease again.")

    @model_validator(mode="after")
    def _one_distribution(self) -> Self:
        truncates = self.top_p < 1 or self.top_k > 0
        if truncates and self.truncation == "none":
            raise ValueError(
                f"top_p {self.top_p} and top_k {self.top_k} truncate the sampling distribution: set truncation to "
                "'replay', or top_p to 1 and top_k to 0"
            )
        if self.keep_maps > self.samples:
            raise ValueError(f"keep_maps {self.keep_maps} is more than samples {self.samples}")
        return self

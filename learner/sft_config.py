"""The settings of supervised fine-tuning (`attune sft`)."""

from typing import Literal

from pydantic import Field

from learner.config import LearnerSection
from services.config_base import Section


class SftSection(Section):
    """How a policy is fine-tuned on reference responses. Ranks, device and dtype are the `learner` section's."""

    epochs: int = Field(default=3, ge=1, description="Passes over the training pairs. 3: usual for instruction tuning.")
    batch_size: int = Field(
        default=32, ge=1, description="Pairs of one update, all ranks together. 32: usual at this scale."
    )
    lr: float = Field(
        default=1e-5,
        gt=0,
        description="Largest learning rate. 1e-5: pretrained models; a model from scratch needs about 1e-3.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="After the warm-up, down to 0 at the end. Cosine: usual for fine-tuning."
    )
    warmup_share: float = Field(
        default=0.03, ge=0, le=1, description="Share of the updates over which the rate rises from 0. 3 %: usual."
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="Adam's moment decays, arXiv 1412.6980's.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay. 0: few epochs need none.")
    grad_clip: float = Field(default=1.0, ge=0, description="Largest global gradient norm; 0 switches clipping off.")
    microbatch_tokens: int = Field(
        default=4096, ge=1, description="Padded tokens of one forward on one rank. Bounds activation memory."
    )

    def learner(self, base: LearnerSection, updates: int) -> LearnerSection:
        """The engine's section: `base` with what fine-tuning says of the optimiser and the batches."""
        return base.model_copy(
            update={
                "lr": self.lr,
                "schedule": self.schedule,
                "warmup": round(self.warmup_share * updates),
                "betas": self.betas,
                "weight_decay": self.weight_decay,
                "grad_clip": self.grad_clip,
                "microbatch_tokens": self.microbatch_tokens,
            }
        )

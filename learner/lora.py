"""Low-rank adapters (LoRA, arXiv 2106.09685): put into a model, and merged into the weights that leave it.

Adapters are injected into the model's own linear layers, so its class and its forward stay what they are. What is
written is W + (alpha / rank) B A under the layer's own name: a model directory knows nothing of adapters.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from learner.reward_model_config import LoraSection
from services.errors import UserError


@dataclass(frozen=True)
class Adapter:
    """`down` [rank, in], `up` [out, rank] of one linear layer; the layer's weight is W + scale up down."""

    down: nn.Parameter
    up: nn.Parameter
    scale: float

    def change(self) -> Tensor:
        """What is added to the weight; both parts are gathered."""
        return self.scale * (self.up.data.float() @ self.down.data.float())


def adapt(lm: nn.Module, section: LoraSection, *, head: str) -> None:
    """Puts adapters into `lm` in place: they and the module `head` are trained, everything else is frozen.

    Raises UserError for a target that the model has not, naming those it has.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("reward_model.lora: peft is not installed: pip install 'attune[learner]'") from error
    every = [name for name, part in lm.named_modules() if isinstance(part, nn.Linear)]
    linear = [name for name in every if name.split(".", 1)[0] != head]
    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
    unknown = sorted(set(section.targets) - set(known))
    if unknown:
        raise UserError(f"reward_model.lora.targets: {unknown[0]} is no linear layer here; allowed: {', '.join(known)}")
    targets = [name for name in linear if not section.targets or name.rsplit(".", 1)[-1] in section.targets]
    config = LoraConfig(r=section.rank, lora_alpha=section.alpha, lora_dropout=0.0, target_modules=targets)  # pyright: ignore[reportArgumentType]
    inject_adapter_in_model(config, lm)
    lm.get_submodule(head).requires_grad_(True)


def plain_name(name: str) -> str | None:
    """The name that a tensor has without adapters; None for an adapter's own."""
    return None if ".lora_" in name else name.replace(".base_layer.", ".")


def adapters_of(lm: nn.Module) -> dict[str, Adapter]:
    """Plain name of an adapted weight -> its adapter; empty where there is none."""
    found: dict[str, Adapter] = {}
    for name, part in lm.named_modules():
        if hasattr(part, "lora_A"):
            layer: Any = part
            for key in layer.lora_A:
                found[f"{name}.weight"] = Adapter(
                    layer.lora_A[key].weight, layer.lora_B[key].weight, float(layer.scaling[key])
                )
    return found

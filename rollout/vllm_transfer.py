"""vLLM's weight-transfer engine `attune`: the receiving end of services/transfer, in each worker of vLLM.

Registered by rollout/vllm_plugin.py, chosen by `WeightTransferConfig(backend="attune")`. One offer is one update:

    init_weight_transfer_engine({"offer": JSON, "owner": NAME})     which transfer, and under which name it is joined
    start_weight_update, update_weights({}), finish_weight_update   joins; takes all buckets and says so; nothing more

vLLM's own NCCL engine waits for a dead peer without an end and verifies nothing, and it has no counterpart on a CPU.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from rollout.vllm_weights import end_reload, tied_heads
from services.transfer.offer import Broken, read_offer, receiver_of
from services.transfer.receiver import receiving


@dataclass
class AttuneInitInfo(WeightTransferInitInfo):
    """`offer`: a `services.transfer.offer.Offer` as JSON; `owner`: the engine's name in it, without the rank."""

    offer: str
    owner: str


@dataclass
class AttuneUpdateInfo(WeightTransferUpdateInfo):
    """Nothing: which tensors come, the sender says."""


class AttuneTransferEngine(WeightTransferEngine[AttuneInitInfo, AttuneUpdateInfo]):
    """Raises services.transfer.offer.Broken where a transfer does not end; the model is then torn until another has."""

    init_info_cls = AttuneInitInfo
    update_info_cls = AttuneUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._info: AttuneInitInfo | None = None
        self._open = ExitStack()

    def init_transfer_engine(self, init_info: AttuneInitInfo) -> None:
        self._info = init_info

    def start_weight_update(self) -> None:
        """Joins the transfer; the model is untouched until the first bucket."""
        if self._info is None:
            raise Broken("no offer of weights was given: init_weight_transfer_engine was not called")
        name = receiver_of(self._info.owner, get_tensor_model_parallel_rank())
        self._incoming = self._open.enter_context(receiving(read_offer(self._info.offer), name, self.device))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """`receive_weights`; the base class asks torch for an accelerator to wait for, which a CPU has not."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: AttuneUpdateInfo) -> None:
        """Takes every bucket, and tells the sender that it has them. Raises Broken too where a weight is not sent.

        All is done here, nothing in `finish_weight_update`: after an error there vLLM's worker takes no other update.
        """
        del update_info
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        expected = {name for name, _ in self.model.named_parameters()}
        tie = tied_heads(self.model)
        with self._open.pop_all():
            initialize_layerwise_reload(self.model)
            try:
                load: Any = self.model.load_weights
                loaded = load(self._incoming.tensors)
            finally:
                end_reload(self.model, self.model_config)
            tie()
            if loaded is not None and self.model_config.quantization is None and expected - loaded:
                raise Broken(f"no tensor was sent for {sorted(expected - loaded)[0]} of vLLM's model")

    def finish_weight_update(self) -> None:
        """`update_weights` has done it all."""

    def shutdown(self) -> None:
        """Leaves a transfer that was joined and not taken."""
        gone = Broken("the engine was shut down")
        self._open.__exit__(type(gone), gone, None)

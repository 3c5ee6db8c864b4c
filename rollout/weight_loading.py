"""Published weights into a model: all of them or a refusal, tied weights by any one of their names."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from services.records import PolicyVersion
from services.transfer.incoming import incoming_weights


def lay_out_for_decoding(model: nn.Module) -> None:
    """Stores the weights of linear layers column by column; names, shapes and values stay as they are.

    A decode step multiplies a few rows by each weight's transpose, which the CPU's matrix product does up to twice as
    fast when the transpose is what lies contiguous in memory. Weights loaded later are copied into it.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()


@torch.no_grad()
def take_weights(
    model: PreTrainedModel, published: str, owner: str, *, before_first: Callable[[], None]
) -> PolicyVersion:
    """Replaces the model's parameters by the published ones and returns their version.

    Names are checked against the model before the first tensor is replaced, and so are the checksums of files; of a
    transfer that `owner` joins, each bucket's is before its first tensor. `before_first` is called between. Buffers may
    be absent: they are no part of what is trained.
    Raises ValueError for unexpected or missing names or a shape that differs, services.weights.Corrupt for the files,
    services.transfer.offer.Broken for a transfer that does not end.
    """
    with incoming_weights(published, owner, model.device) as incoming:
        targets: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        unexpected = sorted(set(incoming.names) - set(targets))
        if unexpected:
            raise ValueError(
                f"published weights hold {len(unexpected)} tensors that the model lacks, as {unexpected[0]}"
            )
        given = {targets[name].data_ptr() for name in incoming.names}
        missing = [name for name, parameter in model.named_parameters() if parameter.data_ptr() not in given]
        if missing:
            raise ValueError(f"published weights lack {len(missing)} of the model's tensors, as {missing[0]}")
        before_first()
        for name, tensor in incoming.tensors:
            target = targets[name]
            if target.shape != tensor.shape:
                raise ValueError(f"{name} is published as {list(tensor.shape)}, the model's is {list(target.shape)}")
            target.copy_(tensor)
    return incoming.version

"""A transfer of weights into one worker of vLLM, by the worker's own calls; the answer is plain, and nothing raises."""

from typing import Any

import torch

from services.transfer.offer import Broken, read_offer


def receive_weights(worker: Any, offer: str, owner: str) -> dict[str, Any]:
    """Returns {"version": (incarnation, step)}, or {"refused": why, "kind": "Broken", "torn": whether a tensor may have
    been replaced already}. An error that a worker raised would end vLLM.
    """
    torn = False
    try:
        version = read_offer(offer).version
        worker.init_weight_transfer_engine({"offer": offer, "owner": owner})
        worker.start_weight_update()
        torn = True
        worker.update_weights({})
        worker.finish_weight_update()
    except (Broken, ValueError, KeyError, torch.OutOfMemoryError) as error:
        return {"refused": str(error), "kind": "Broken", "torn": torn}
    return {"version": [version.incarnation, version.step]}

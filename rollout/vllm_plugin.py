"""What vLLM loads at its start, by the entry point `vllm.general_plugins`: it makes our weight-transfer engine known.

The worker extension calls it too, for a vLLM whose plugins are restricted by `VLLM_PLUGINS`.
"""

BACKEND = "attune"


def register() -> None:
    """Any number of times, in any process of vLLM."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "rollout.vllm_transfer", "AttuneTransferEngine")

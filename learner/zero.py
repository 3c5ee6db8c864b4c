"""How DeepSpeed ZeRO-3 is set up: the process group, and the configuration for a model of a given size.

On the CPU the ranks talk over gloo, and nothing is compiled: DeepSpeed would build a shared-memory operator (some 20 s
of g++) that only its inference collectives use, so it is told that it cannot be built. The optimiser is torch's AdamW.
"""

import os
from datetime import timedelta
from typing import Any

from learner.config import LearnerSection
from services.errors import Deadline, UserError

GATHER_ABOVE = 50_000_000
"""A model of more parameters stays partitioned between uses. A smaller one is gathered once after each update and kept
(200 MB at most in float32): gathering it layer by layer in every forward and backward pass doubles the time of a step
on two CPU ranks (measured: 4 M parameters, 640 tokens a rank: 0.81 s against 0.38 s). Optimiser state and gradients
are partitioned at any size."""

SMALL_PARAMETER = 100_000
"""Elements up to which a single parameter of a large model is kept gathered (norms, biases); DeepSpeed's default."""

BUCKET = 50_000_000
"""Elements that are reduced or prefetched together; 200 MB in float32. A small model goes in one collective."""


def device_of(section: LearnerSection) -> str:
    """ "cpu" or "cuda", by `learner.device` and what this process sees.

    Raises:
        UserError: `cuda` is asked for and there is none.
    """
    import torch

    if section.device == "cpu" or os.environ.get("DS_ACCELERATOR") == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if section.device == "cuda":
        raise UserError("learner.device: cuda, but this process sees no CUDA device; allowed here: cpu, auto")
    return "cpu"


def join_ranks(*, rank: int, world_size: int, address: str, port: int, device: str, timeout_s: float) -> None:
    """Makes this process one of the learner's ranks, for as long as it lives; does nothing where it is one already.

    `timeout_s` is also the deadline of every collective afterwards.

    Raises:
        Deadline: the other ranks did not come.
    """
    import torch

    if torch.distributed.is_initialized():
        return
    # A scheduler that gives each rank its own GPU shows it that one alone.
    visible = torch.cuda.device_count() if device == "cuda" else world_size
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % visible),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": device,
    }
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # see the module's first lines
    try:
        deepspeed.init_distributed(
            "nccl" if device == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout_s),
        )
    except torch.distributed.DistStoreError as error:
        raise Deadline(
            waited_for=f"the learner's {world_size} ranks to meet at {address}:{port}",
            who=f"another rank (this is rank {rank}; {error})",
            seconds=timeout_s,
        ) from error


def deepspeed_config(section: LearnerSection, parameters: int, *, trained: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for a model of so many parameters; `trained` False for one that is only read.

    Every key that matters is set, for DeepSpeed's defaults are not neutral (`gradient_clipping` 1.0 for one). Losses
    arrive normalised by global counts, so nothing is left to its batch-size arithmetic.
    """
    small = parameters <= GATHER_ABOVE
    zero: dict[str, Any] = {
        "stage": 3,
        "contiguous_gradients": True,
        "overlap_comm": False,  # on the CPU there is no second stream to overlap on
        "reduce_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": max(1, parameters) if small else SMALL_PARAMETER,
    }
    if section.offload != "none" and trained:
        zero["offload_optimizer"] = {"device": "cpu"}
    if section.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": section.grad_clip,
        "bf16": {"enabled": section.dtype == "bfloat16"},
        # In bfloat16 a sum over micro-batches stops to grow at 256 of them.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 10**12,
    }

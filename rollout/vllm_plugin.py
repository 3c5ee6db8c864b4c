"""What vLLM loads at its start, by the entry point `vllm.general_plugins`: it makes our weight-transfer engine known,
and ends the processes of vLLM whose owner is gone.

The worker extension calls it too, for a vLLM whose plugins are restricted by `VLLM_PLUGINS`.
"""

import os
import threading
import time

import psutil

BACKEND = "attune"
OWNER = "ATTUNE_ENGINE_OWNER"
"""The pid of the process that started this vLLM and that its own processes are to end with; absent: none."""
LOOK_EVERY_S = 1.0


def register() -> None:
    """Any number of times, in any process of vLLM."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    end_with_owner()
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "rollout.vllm_transfer", "AttuneTransferEngine")


def own_processes() -> None:
    """From now on, what this process starts of vLLM ends with it."""
    os.environ[OWNER] = str(os.getpid())


def end_with_owner() -> None:
    """Ends this process once its owner is gone. vLLM's engine process does not look: where its owner is killed, it
    would keep the GPU's memory from the one that comes in its place."""
    pid = int(os.environ.get(OWNER, os.getpid()))
    if pid == os.getpid() or any(thread.name == OWNER for thread in threading.enumerate()):
        return

    def watch() -> None:
        try:
            owner = psutil.Process(pid)
            while owner.is_running() and owner.status() != psutil.STATUS_ZOMBIE:
                time.sleep(LOOK_EVERY_S)
        except psutil.NoSuchProcess:
            pass
        os._exit(1)  # it may be in a kernel that never ends: nothing is asked of it

    threading.Thread(target=watch, name=OWNER, daemon=True).start()

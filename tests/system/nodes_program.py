"""A run on a Ray cluster of a head without work and two nodes, all on this machine; one node is lost in mid-run.

    python nodes_program.py RECIPE RUN_DIR ADD_BACK

A program of its own: the suite's process has its own cluster. `ADD_BACK` 1: another node comes once the run says that
it waits. Prints, as JSON, where the ranks and the rollout actors were, the run's exit code and what it printed.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 900.0
TRIES = 4
MEMORY = {"object_store_memory": 80 * 2**20}


def until(what: str, condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise TimeoutError(what)


def events(run: Path) -> list[str]:
    file = run / "events.jsonl"
    return [json.loads(line)["event"] for line in file.read_text().splitlines()] if file.exists() else []


def places(of: str) -> list[str]:
    """The node of every living actor of a class."""
    from ray._private.state import actors

    return [
        str(actor["Address"]["NodeID"])
        for actor in actors().values()
        if actor["ActorClassName"] == of and actor["State"] == "ALIVE"
    ]


def start_cluster() -> tuple[Any, list[Any]]:
    """The head and its two nodes. Ray gives a raylet 30 s to come up, whatever the machine has to do: a few tries."""
    from ray.cluster_utils import Cluster

    for left in reversed(range(TRIES)):
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=0, include_dashboard=False, **MEMORY)
            return cluster, [cluster.add_node(num_cpus=2, **MEMORY) for _ in range(2)]
        except Exception as error:  # Ray raises no narrower one
            cluster.shutdown()
            if not left or "timed out during startup" not in str(error):
                raise
    raise AssertionError(TRIES)


def main(recipe: str, run: Path, add_back: bool) -> dict[str, Any]:
    cluster, nodes = start_cluster()
    import ray

    ray.init(address=cluster.address, log_to_driver=False)
    driver = subprocess.Popen(
        [sys.executable, "-m", "cluster", "train", recipe, "--run-dir", str(run)],
        env={**os.environ, "RAY_ADDRESS": cluster.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until("a commit", lambda: "committed" in events(run) or driver.poll() is not None)
        ranks, rollouts = places("LearnerWorker"), places("RolloutWorker")
        lost = next(node for node in nodes if node.node_id == ranks[1])
        cluster.remove_node(lost, allow_graceful=False)
        if add_back:
            until(
                "the run to say that it waits", lambda: "waiting_for_room" in events(run) or driver.poll() is not None
            )
            cluster.add_node(num_cpus=2, **MEMORY)
        said, _ = driver.communicate(timeout=SECONDS)
    finally:
        if driver.poll() is None:
            driver.terminate()
            driver.wait(60)
        ray.shutdown()
        cluster.shutdown()
    return {
        "ranks": ranks,
        "rollouts": rollouts,
        "nodes": [n.node_id for n in nodes],
        "code": driver.returncode,
        "said": said,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "1")))

"""What scorers ask of a model: rows of token ids in, numbers out. Knows no model library.

A `ModelRunner` stands for a model of this process (`reward_server.local_model`, `reward_server.vllm_model`) or for
other processes that hold copies of one (`reward_server.replicas`). Its outputs do not depend on which rows run together
(design, invariant 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, Protocol

Task = Literal["sequence", "token", "steps", "likelihood", "choice"]
"""What a model is loaded for.

sequence: the outputs of the classification head for the whole row, one vector [labels].
token: the head's outputs at the positions `at`, vectors [labels].
steps: token or sequence, whichever the model was saved for.
likelihood: log-probability of the ids at the positions `at` given those before, one vector [at].
choice: log-probabilities of the ids `choices` after the row's last one, one vector [choices].
"""
ModelEngine = Literal["transformers", "vllm"]
"""What runs a model. vllm: the task `choice` alone."""


@dataclass(frozen=True)
class Row:
    """One input: `ids` [n], and what is asked of it."""

    ids: tuple[int, ...]
    at: tuple[int, ...] = ()
    choices: tuple[int, ...] = ()


Output = list[list[float]]


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and for what. `labels` of a model that classifies come back with `ModelFacts`."""

    model: str
    revision: str | None
    task: Task
    dtype: str
    device: str
    field: str
    """Name of the recipe's key, for messages."""
    engine: ModelEngine = "transformers"
    max_tokens: int | None = None
    """Longest input that is asked for; what vLLM makes room for."""
    kv_cache_mib: int | None = None
    """vllm: memory of the KV cache; None: its own choice."""


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a loaded model: the task it runs, the revision of its files, its longest input (None: nothing
    bounds it), its labels where it classifies."""

    task: Task
    revision: str
    max_tokens: int | None
    labels: tuple[str, ...]


class ModelRunner(Protocol):
    @property
    def facts(self) -> ModelFacts: ...

    @property
    def lanes(self) -> int:
        """Batches that may run at once: the number of replicas."""
        ...

    def living(self) -> int:
        """Replicas that can run a batch now."""
        ...

    def run(self, rows: Sequence[Row]) -> list[Output]:
        """An output for each row, in order; called from as many threads as there are lanes. An exception fails all
        rows."""
        ...


def load_model(spec: ModelSpec) -> ModelRunner:
    """The model in this process. Raises UserError for what an operator can get wrong, ImportError without the model
    library."""
    if spec.engine == "vllm":
        return import_module("reward_server.vllm_model").VllmModel(spec)
    return import_module("reward_server.local_model").LocalModel(spec)

"""The whole configuration: the sections that the rooms own, composed into one tree, and what must hold across them."""

from typing import Literal, Self

from pydantic import Field, model_validator

from cluster.evaluation_config import EvaluationSection
from cluster.preferences_config import PreferencesSection
from learner.checkpoint_config import CheckpointSection
from learner.config import LearnerSection
from learner.reward_model_config import RewardModelSection
from learner.sft_config import SftSection
from reward_server.config import RewardSection
from rollout.config import RolloutSection
from services.attention.config import CaptureSection
from services.config_base import Section
from services.models_config import PolicySection
from services.stream.config import StreamSection
from services.text.config import DataSection, SalienceSection


class RunSection(Section):
    name: str = Field(default="attune", description="The run's name in trackers and logs.")
    seed: int = Field(
        default=0, ge=0, description="Seeds the order of prompts, sampling and initial values of new parameters."
    )
    epochs: int = Field(
        default=1, ge=1, description="Passes over the training prompts; `steps` may end the run earlier."
    )
    steps: int | None = Field(default=None, ge=1, description="Steps to run; null: until the epochs are used up.")
    groups_per_step: int = Field(default=64, ge=1, description="Prompts a step, B (CAGSR, arXiv 2502.10482: 64).")
    max_staleness: int = Field(
        default=0,
        ge=0,
        description="Steps that a sample's policy may lie behind the one that trains on it. 0 is synchronous and "
        "reproducible; 1 generates the next batch while this one trains.",
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        default=("tensorboard",),
        description="Where metrics go beside metrics.jsonl. TensorBoard needs no account and no network.",
    )


class ClusterSection(Section):
    address: str | None = Field(
        default=None,
        description="Ray address to join; null: the cluster of RAY_ADDRESS, or one started on this machine.",
    )
    open_dashboard: bool = Field(
        default=False,
        description="Go on with a Ray cluster whose dashboard listens beyond loopback and asks for no token. Whoever "
        "reaches such a dashboard runs code on every node. Default: the run is refused.",
    )
    rollout_cpus: float = Field(
        default=0.25,
        ge=0,
        description="CPUs that Ray reserves for a rollout actor. A fraction: the parts take turns on a small machine.",
    )
    rollout_gpus: float = Field(default=0, ge=0, description="GPUs that Ray reserves for a rollout actor.")
    learner_cpus: float = Field(default=0.25, ge=0, description="CPUs that Ray reserves for a learner rank.")
    learner_gpus: float = Field(default=0, ge=0, description="GPUs that Ray reserves for a learner rank.")
    service_cpus: float = Field(
        default=0.1, ge=0, description="CPUs that Ray reserves for each of the reward server and the scoring workers."
    )
    learner_placement: Literal["any", "pack", "spread", "strict_spread"] = Field(
        default="any",
        description="Where the learner's ranks go, as one reservation of Ray's (a placement group). `pack`: together "
        "where that fits, for fast collectives; `spread`: over the nodes as far as that fits; `strict_spread`: never "
        "two on one node. `any`: each where Ray finds room, without a reservation.",
    )
    memory_gb: float = Field(
        default=0.0,
        ge=0,
        description="Memory (GB) that Ray reserves for each rollout actor and learner rank; 0 reserves none.",
    )
    start_s: float = Field(
        default=300.0, gt=0, description="Deadline (s) for the parts of a run to come up. Large models load in minutes."
    )
    batch_s: float = Field(
        default=1800.0,
        gt=0,
        description="Deadline (s) without any progress of a batch: no group generated, scored or failed. It does not "
        "run while no rollout actor is up.",
    )
    step_s: float = Field(
        default=3600.0,
        gt=0,
        description="Deadline (s) for the learner's part of a step, for an evaluation, for an update of `attune sft`, "
        "and from one evaluation of `attune reward-model` to the next.",
    )
    publish_s: float = Field(
        default=300.0, gt=0, description="Deadline (s) for gathering and writing, or sending, a set of weights."
    )
    stop_s: float = Field(
        default=20.0,
        gt=0,
        description="Grace (s) after a signal in which a last commit may be written. Whoever sends the signal has to "
        "wait longer than that before it kills: `ray job stop` does where RAY_JOB_STOP_WAIT_TIME_S says so (Ray's "
        "default is 3).",
    )
    restarts: int = Field(
        default=3,
        ge=0,
        description="Times between two commits that a part (each rollout actor, each scoring worker, the reward "
        "server, the learner with all its ranks, the evaluator) may die or stand still and is started again; once "
        "more ends the run with its error. 0: the first death of any part ends it.",
    )
    restart_pause_s: float = Field(
        default=1.0,
        ge=0,
        description="Pause (s) before the first of these restarts; each further one waits twice as long, at most 60 s.",
    )
    progress_s: float = Field(
        default=900.0,
        gt=0,
        description="Longest (s) that a part with work may make no progress (no group finished, no weights loaded, no "
        "answer) before it is ended and started again. Above the time that the longest responses take, and above "
        "`reward.worker.outage_s`, for which a scoring worker may wait.",
    )
    weights: Literal["files", "collective"] = Field(
        default="files",
        description="How weights reach the rollout actors. `files`: buckets in `weights_dir`, read by each when it is "
        "ready. `collective`: sent to all at once; no file, and no shared file system for it. The learner waits until "
        "the actors are there.",
    )
    transfer_backend: Literal["auto", "gloo"] = Field(
        default="auto",
        description="`weights: collective`: what brings the bytes. `auto`: a buffer that all look at where learner and "
        "actors share one GPU (CUDA IPC) or one machine without any, NCCL where each has a GPU of its own, gloo "
        "otherwise. `gloo`: over TCP from host memory to host memory, always.",
    )
    rendezvous_s: float = Field(
        default=300.0,
        gt=0,
        description="`weights: collective`: deadline (s) for the actors to join a transfer. Under `weight_sync: wait` "
        "they finish first what they generate.",
    )
    transfer_s: float = Field(
        default=60.0,
        gt=0,
        description="`weights: collective`: deadline (s) of each wait after that: a bucket, an answer.",
    )
    bucket_mib: float = Field(
        default=256.0,
        gt=0,
        description="Weights that are gathered, and written or sent, at once (MiB); a larger tensor goes alone. Bounds "
        "the memory that publishing takes; smaller buckets mean more collectives.",
    )
    weights_dir: str | None = Field(
        default=None,
        description="`weights: files`: where sets of weights are published; null: shared memory. Several nodes need a "
        "path that all of them see.",
    )

    @model_validator(mode="after")
    def _something_to_reserve(self) -> Self:
        if self.learner_placement != "any" and not (self.learner_cpus or self.learner_gpus):
            raise ValueError(
                f"learner_placement: {self.learner_placement} reserves learner_cpus and learner_gpus, and both are 0; "
                "allowed with any"
            )
        return self


class Config(Section):
    """A recipe. `data` and `policy` have no defaults: the prompts and the model are the user's."""

    run: RunSection = Field(default_factory=RunSection, description="Length, order and seed of the run.")
    data: DataSection = Field(description="Prompts: source, columns, template, splits, lengths.")
    salience: SalienceSection = Field(default_factory=SalienceSection, description="Which tokens of a prompt matter.")
    policy: PolicySection = Field(description="The model that is trained.")
    attention: CaptureSection = Field(
        default_factory=CaptureSection, description="Which layers and heads are captured."
    )
    rollout: RolloutSection = Field(default_factory=RolloutSection, description="How responses are drawn.")
    reward: RewardSection = Field(default_factory=RewardSection, description="What scores them.")
    learner: LearnerSection = Field(default_factory=LearnerSection, description="How the policy is trained.")
    sft: SftSection = Field(default_factory=SftSection, description="Fine-tuning before reinforcement learning.")
    preferences: PreferencesSection = Field(default_factory=PreferencesSection, description="Synthetic comparisons.")
    reward_model: RewardModelSection = Field(
        default_factory=RewardModelSection, description="Training a model that scores."
    )
    stream: StreamSection = Field(default_factory=StreamSection, description="The Redis that holds stream and ledger.")
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection, description="When commits are written.")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="Metrics on held-out prompts.")
    cluster: ClusterSection = Field(default_factory=ClusterSection, description="Resources and deadlines.")

    @model_validator(mode="after")
    def _across_sections(self) -> Self:
        if self.rollout.samples < self.learner.min_ok:
            compares = (
                "normalise_advantages 'group'"
                if self.learner.normalise_advantages == "group"
                else f"advantage {self.learner.advantage!r}"
            )
            raise ValueError(
                f"learner.{compares} compares the samples of a group: rollout.samples is {self.rollout.samples}, "
                f"allowed are {self.learner.min_ok} and more"
            )
        part = self.cluster.rollout_gpus
        if self.rollout.engine == "vllm" and 0 < part < 1 and self.rollout.vllm.kv_cache_mib is None:
            raise ValueError(
                f"cluster.rollout_gpus: {part:g} and rollout.vllm.kv_cache_mib: null, but beside others on its GPU "
                "vLLM cannot find out how much is free; allowed are 1 MiB and more, or rollout_gpus of 1 and more"
            )
        outage_s = self.reward.worker.outage_s
        if self.cluster.progress_s <= outage_s:
            raise ValueError(
                f"cluster.progress_s is {self.cluster.progress_s:g}, allowed is more than reward.worker.outage_s "
                f"({outage_s:g}): a scoring worker that waits for scores would be ended before it may say so"
            )
        return self

    @property
    def actors_rollout(self) -> RolloutSection:
        """`rollout` as an actor gets it: vLLM counts its memory by whole GPUs, of which the actor may have a part."""
        part = self.cluster.rollout_gpus
        if not 0 < part < 1:
            return self.rollout
        vllm = self.rollout.vllm.model_copy(update={"gpu_memory": part * self.rollout.vllm.gpu_memory})
        return self.rollout.model_copy(update={"vllm": vllm})

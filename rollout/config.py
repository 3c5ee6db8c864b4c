"""The `rollout` section: how responses are drawn, by how many actors, and what is kept of them."""

from typing import Literal, Self

from pydantic import Field, model_validator

from services.config_base import Section


class VllmSection(Section):
    """vLLM's own settings; those that both engines have stand in `rollout`."""

    tensor_parallel: int = Field(default=1, ge=1, description="GPUs that share one engine's heads. 1: a small policy.")
    kv_cache_mib: int | None = Field(
        default=None,
        ge=1,
        description="Memory of the KV cache (MiB); null: on GPUs what vLLM finds "
        "free; on a CPU room for `max_batch_rows` responses at full length, 4 GiB at most. An actor that has a part of "
        "a GPU (`cluster.rollout_gpus` below 1) needs it.",
    )
    gpu_memory: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Share of its GPU's memory, or of the part that an actor has (`cluster.rollout_gpus` below 1) that "
        "is free for vLLM: it takes weights and cache within it, where `kv_cache_mib` does not bound the cache.",
    )
    max_context: int | None = Field(
        default=None,
        ge=2,
        description="Longest prompt plus response; null: the model's, which is the most. Smaller saves memory.",
    )
    max_batched_tokens: int | None = Field(
        default=None, ge=1, description="Tokens of a step, prefill included; longer prompts are chunked. null: vLLM's."
    )
    weight_sync: Literal["wait", "keep"] = Field(
        default="wait",
        description="New weights in mid-generation: `wait` finishes what is under way with the old ones; `keep` goes "
        "on with the new ones, and each token records its version.",
    )
    call_s: float = Field(
        default=120.0, gt=0, description="Longest wait (s) for a call to vLLM's workers (invariant 6)."
    )


class RolloutSection(Section):
    engine: Literal["transformers", "vllm"] = Field(
        default="transformers",
        description="What generates. `transformers` captures exactly for every supported family, and reproduces a run "
        "bit for bit; `vllm` is faster, for decoder-only models.",
    )
    vllm: VllmSection = Field(default_factory=VllmSection, description="Settings of `engine: vllm`.")
    actors: int = Field(
        default=2,
        ge=1,
        description="Rollout actors. Two, as many as the small machine that a first run meets has cores.",
    )
    min_actors: int | None = Field(
        default=None,
        ge=1,
        description="Fewest rollout actors that the run starts with where the cluster has no room for all; the others "
        "join when it has. null: all of them.",
    )
    threads: int = Field(
        default=1,
        ge=1,
        description="CPU threads of an actor. One: small models gain nothing from more, and results stay reproducible.",
    )
    samples: int = Field(default=4, ge=1, description="Samples N of a prompt (CAGSR, arXiv 2502.10482: N = 4).")
    max_tokens: int = Field(
        default=64, ge=1, description="Longest response, in tokens, the end-of-sequence token included."
    )
    temperature: float = Field(
        default=1.0, gt=0, description="Softmax temperature. 1: the distribution that is trained is the model's own."
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Nucleus mass. 1 (off): truncation biases the importance ratio (invariant 7).",
    )
    top_k: int = Field(default=0, ge=0, description="Most likely tokens kept; 0 is off, for the reason of `top_p`.")
    truncation: Literal["none", "replay"] = Field(
        default="none",
        description="How the learner treats the tokens that top-p and top-k left out. `replay`: the kept set is "
        "recorded and both sides of the ratio are renormalised over it. `none` refuses a recipe that truncates.",
    )
    finish_length: Literal["bootstrap", "mask"] = Field(
        default="bootstrap",
        description="A response cut at `max_tokens`: `bootstrap` trains on it, taking the cut as no end of the "
        "episode; `mask` gives its tokens no loss.",
    )
    keep_maps: int = Field(
        default=0,
        ge=0,
        description="Samples of a group whose dense attention rows are kept in the run directory. 0: they are large.",
    )
    max_batch_rows: int = Field(
        default=64,
        ge=1,
        description="Rows decoded together in evaluation and offline rollouts; bounds memory, not results.",
    )
    groups_in_flight: int | None = Field(
        default=None,
        ge=1,
        description="Groups that an actor generates side by side. null: with `vllm` as many as `max_batch_rows` holds; "
        "with `transformers` 1, for a group alone is reproduced bit for bit.",
    )
    lease_s: float = Field(
        default=300.0,
        gt=0,
        description="A lease not renewed for this long (s) is given to another actor. Renewed every third of it.",
    )
    lease_losses: int = Field(
        default=2,
        ge=0,
        description="Leases in a row that a group may lose to actors that die or fall silent; then an actor has it "
        "alone, and one more lost lease fails it, with its reason. Below `cluster.restarts`: a prompt that kills its "
        "actors fails before the run does. 0 fails at once all that a dead actor held.",
    )
    poll_s: float = Field(default=0.05, gt=0, description="Pause (s) before an idle actor asks for a lease again.")

    def context(self, models: int | None) -> int | None:
        """Positions for a prompt and its response: the model's (None: no bound), or fewer where vLLM is given fewer."""
        own = self.vllm.max_context if self.engine == "vllm" else None
        return min((bound for bound in (own, models) if bound is not None), default=None)

    @property
    def group_limit(self) -> int:
        """Groups that an actor generates side by side."""
        if self.groups_in_flight is not None:
            return self.groups_in_flight
        return max(1, self.max_batch_rows // self.samples) if self.engine == "vllm" else 1

    @property
    def loads_in_flight(self) -> bool:
        """Whether new weights are taken while groups are being generated."""
        return self.engine == "vllm" and self.vllm.weight_sync == "keep"

    @model_validator(mode="after")
    def _one_distribution(self) -> Self:
        truncates = self.top_p < 1 or self.top_k > 0
        if truncates and self.truncation == "none":
            raise ValueError(
                f"top_p {self.top_p} and top_k {self.top_k} truncate the sampling distribution: set truncation to "
                "'replay', or top_p to 1 and top_k to 0"
            )
        if self.min_actors is not None and self.min_actors > self.actors:
            raise ValueError(f"min_actors {self.min_actors} is more than actors {self.actors}")
        if self.keep_maps > self.samples:
            raise ValueError(f"keep_maps {self.keep_maps} is more than samples {self.samples}")
        return self

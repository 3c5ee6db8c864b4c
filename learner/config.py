"""The `learner` section of a recipe: objective, advantages, KL, optimiser, batching, and how the ranks run.

"the paper" is Kiruluta, Lemos, Burity, arXiv 2502.10482 (CAGSR).
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from services.config_base import Section


class DriftSection(Section):
    """The watch over two programs that must agree: what the rollouts recorded, and what the learner computes."""

    share: float = Field(
        default=0.02,
        ge=0,
        le=1,
        description="Share of a step's responses that the learner recomputes before it trains: log-probabilities and "
        "attention statistics, metrics `drift/*`. Only responses of the weights it holds can be compared. 0.02 costs "
        "less than a hundredth of a step, one response at least; 0 is off.",
    )
    logprob_limit: float | None = Field(
        default=None,
        gt=0,
        description="Largest difference of a log-probability (nats) before the run stops. null: it is watched alone; "
        "what is normal depends on dtype and kernels (1e-5 in float32 on a CPU, 1e-1 in bfloat16).",
    )
    attention_limit: float | None = Field(
        default=None,
        gt=0,
        description="The same for M, C and X of the attention statistics (1e-5 in float32).",
    )


class BadBatchSection(Section):
    """What is no batch to train on, and what becomes of it.

    A loss, gradient or recorded log-probability that is not finite always counts, and a batch of which nothing carries
    a loss (`rollout.finish_length: mask`, and every response was cut).
    """

    action: Literal["stop", "skip"] = Field(
        default="stop",
        description="`stop` ends the run, with the step's number. `skip` goes on without the update (nor "
        "those that would follow it in the step): the step is counted, named in events.jsonl and in the manifest "
        "(`skipped`). Either way the samples are kept in `bad_batches/`.",
    )
    most: int = Field(default=3, ge=0, description="`skip`: steps in a row that may be skipped; one more ends the run.")
    kl_limit: float | None = Field(
        default=None,
        gt=0,
        description="Largest KL to the reference, nats a response, mean of the batch and without its sign. null: none; "
        "what is much depends on the length of the responses.",
    )
    flat_limit: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Largest share of prompts whose samples all have the same reward (metric `reward/flat_share`). "
        "null: none; rewards that are right or wrong are often all alike.",
    )


class KLSection(Section):
    """The penalty for leaving the frozen reference policy."""

    place: Literal["none", "reward", "loss"] = Field(
        default="none",
        description=(
            "Where the KL to the reference stands: `reward` subtracts coef*k1 from the reward (Ziegler 2019; "
            "summed into R where the advantage is one number a response), `loss` adds coef*k3 to the loss (GRPO, "
            "arXiv 2402.03300). Default none: the paper has no KL term."
        ),
    )
    coef: float = Field(
        default=0.05,
        ge=0,
        description=(
            "Coefficient, reward units a nat; the first value where the controller is adaptive. 0.05: Stiennon "
            "2020 and TRL's PPO; 0.04 in GRPO."
        ),
    )
    controller: Literal["fixed", "adaptive"] = Field(
        default="fixed",
        description=(
            "`adaptive` moves the coefficient towards `target` after each step (Ziegler 2019, section 2.2). "
            "Default fixed: one thing less that moves."
        ),
    )
    target: float = Field(
        default=6.0,
        gt=0,
        description="Adaptive: the KL a response, in nats, that is aimed at. 6: Ziegler 2019, sentiment task.",
    )
    horizon: int = Field(
        default=10_000,
        gt=0,
        description=("Adaptive: the larger, the slower the coefficient moves, samples. 10,000: Ziegler 2019's code."),
    )


class LearnerSection(Section):
    """How scored groups become new weights."""

    # What is optimised
    objective: Literal["ppo", "policy_gradient"] = Field(
        default="ppo",
        description="`ppo`: clipped surrogate (arXiv 1707.06347, eq. 7), the paper's. `policy_gradient`: -A log pi.",
    )
    baseline: Literal["none", "batch_mean", "value"] = Field(
        default="value",
        description=(
            "Only with `policy_gradient`: A = R, R - mean of the batch, or R - V(x). Default: the paper's value "
            "baseline."
        ),
    )
    advantage: Literal["paper", "gae", "rloo", "grpo"] = Field(
        default="paper",
        description=(
            "Only with `ppo`. `paper`: R - V_old(x), one for all tokens. `gae`: arXiv 1506.02438. `rloo`: minus "
            "the mean of the group's other rewards (arXiv 2402.14740). `grpo`: (R - mean)/std in the group (arXiv "
            "2402.03300)."
        ),
    )
    gamma: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Discount a token, `gae` only. 1: a response is one episode scored at its end (Stiennon 2020).",
    )
    lam: float = Field(
        default=0.95, ge=0, le=1, description="Lambda of `gae`. 0.95: arXiv 1707.06347 table 3, and Stiennon 2020."
    )
    normalise_advantages: Literal["none", "batch", "group"] = Field(
        default="none",
        description=(
            "Subtract the mean and divide by the standard deviation of the tokens' advantages in the step's "
            "batch, or in each group. Default none: the paper does not whiten."
        ),
    )
    standardise_rewards: Literal["none", "running"] = Field(
        default="none",
        description=(
            "`running`: rewards minus running mean, divided by running deviation, over all samples ever taken "
            "(invariant 8). Default none: the paper's reward is used as it is."
        ),
    )
    clip: float = Field(
        default=0.2, gt=0, lt=1, description="PPO clip range of the ratio, on both sides. 0.2: the paper."
    )
    value_clip: float | None = Field(
        default=None,
        gt=0,
        description=(
            "Clip range of V around V_old in the value loss, reward units. Default none: the paper has no such term."
        ),
    )
    value_coef: float = Field(
        default=0.5,
        ge=0,
        description=(
            "Weight of the value loss (itself half a squared error). 0.5: arXiv 1707.06347's public implementations."
        ),
    )
    entropy_coef: float = Field(
        default=0.0, ge=0, description="Weight of the entropy bonus, a nat. 0: the paper has none."
    )
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] = Field(
        default="token_mean",
        description=(
            "Tokens to loss: mean over all tokens of the minibatch; mean over samples of the mean over tokens "
            "(GRPO); mean over samples of the sum over tokens (the log-likelihood of the response, REINFORCE). "
            "Default: no length bias between samples."
        ),
    )
    kl: KLSection = Field(
        default_factory=lambda: KLSection.model_validate({}),
        description="KL to the frozen reference. Default: none, as in the paper.",
    )
    drift: DriftSection = Field(
        default_factory=lambda: DriftSection.model_validate({}),
        description="What the rollouts recorded against what the learner computes.",
    )
    bad_batch: BadBatchSection = Field(
        default_factory=lambda: BadBatchSection.model_validate({}),
        description="Batches that must not be trained on.",
    )
    value_function: Literal["shared", "separate", "from_reward_model"] = Field(
        default="shared",
        description=(
            "`shared`: a small feed-forward head on the policy's trunk, the paper's. `separate`: a trunk of its "
            "own, started from the policy's weights (twice the memory). `from_reward_model`: trunk and score head of "
            "`value_model` (arXiv 2009.01325); a score head cannot read the policy's trunk."
        ),
    )
    value_model: str | None = Field(
        default=None,
        min_length=1,
        description=(
            "For `from_reward_model`: a directory of `attune reward-model`, kind preference or absolute, with the "
            "policy's tokenizer. Read at the start of a run; its width may be another than the policy's."
        ),
    )
    value_hidden: int | None = Field(
        default=None,
        gt=0,
        description="Width of the value head's hidden layer, units; not with from_reward_model. Default: the trunk's "
        "hidden size.",
    )

    # Optimiser
    lr: float = Field(default=1e-5, ge=0, description="Adam's learning rate of the policy. 1e-5: the paper.")
    value_lr: float = Field(
        default=1e-5, ge=0, description="Adam's learning rate of the value function. 1e-5: the paper."
    )
    betas: tuple[float, float] = Field(
        default=(0.9, 0.999), description="Adam's moment decays. arXiv 1412.6980's; the paper names no others."
    )
    eps: float = Field(default=1e-8, gt=0, description="Adam's epsilon. arXiv 1412.6980's.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay. 0: the paper uses plain Adam.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="After the warm-up, over the run's updates, down to 0 at its end. constant: the paper's one rate.",
    )
    warmup: int = Field(
        default=0, ge=0, description="Optimiser updates of linear warm-up from 0. 0: the paper has none."
    )
    grad_clip: float = Field(
        default=1.0,
        ge=0,
        description=(
            "Largest global gradient norm; 0 switches clipping off. 1: guards against a single bad batch (usual "
            "in RLHF)."
        ),
    )

    # Batches
    epochs: int = Field(
        default=1,
        ge=1,
        description="PPO epochs over a step's batch. 1: one update a batch, the paper's 10,000 updates.",
    )
    minibatches: int = Field(
        default=1, ge=1, description="Optimiser updates an epoch; a batch is cut into so many parts. 1: as `epochs`."
    )
    microbatch_tokens: int = Field(
        default=4096,
        ge=1,
        description="Padded tokens of one forward on one rank (at least one sample is taken). Bounds memory.",
    )
    logit_chunk: int = Field(
        default=512,
        ge=1,
        description=(
            "Tokens whose logits exist at once; a chunk costs tokens x vocabulary x 4 bytes (512 x 128k: 256 "
            "MiB). Recomputed in the backward pass."
        ),
    )

    # Ranks
    ranks: int = Field(default=2, ge=1, description="ZeRO-3 processes. 2: the least that shards, for a 2-core machine.")
    min_ranks: int | None = Field(
        default=None,
        ge=1,
        description="Fewest ranks that the run starts with, or goes on with after a rank was lost, where the cluster "
        "has no room for all. null: all of them.",
    )
    threads: int = Field(
        default=1, ge=1, description="CPU threads a rank. 1: results do not depend on the machine's core count."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="`auto`: cuda where there is one for each rank, else cpu."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description=(
            "Weights and activations in forward and backward; the optimiser's masters are always float32. "
            "float32: exact on the CPU (invariant 5); bfloat16 for GPUs."
        ),
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description=(
            "Recompute the trunk's layers in the backward pass: a third more time, far less memory. Off: small models."
        ),
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        default="none",
        description=(
            "What ZeRO-3 keeps in host memory: nothing, the optimiser's state, or that and the parameters. None: "
            "fastest."
        ),
    )

    @property
    def needs_values(self) -> bool:
        """Whether the advantages are built on a value function (and one is trained)."""
        if self.objective == "policy_gradient":
            return self.baseline == "value"
        return self.advantage in ("paper", "gae")

    @property
    def needs_reference(self) -> bool:
        """Whether training (not only the metrics) needs the frozen reference."""
        return self.kl.place != "none"

    @property
    def min_ok(self) -> int:
        """The fewest ok samples of a group the advantages can use (invariant 2)."""
        in_group = self.objective == "ppo" and self.advantage in ("rloo", "grpo")
        return 2 if in_group or self.normalise_advantages == "group" else 1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: each must be in [0, 1), got {self.betas}")
        if self.objective == "ppo" and self.baseline != "value":
            raise ValueError(
                f"learner.baseline: {self.baseline} is for objective: policy_gradient; with ppo set `advantage`"
            )
        if self.objective == "policy_gradient" and self.advantage != "paper":
            raise ValueError(
                f"learner.advantage: {self.advantage} is for objective: ppo; with policy_gradient set `baseline`"
            )
        if self.min_ranks is not None and self.min_ranks > self.ranks:
            raise ValueError(f"learner.min_ranks: {self.min_ranks} is more than learner.ranks {self.ranks}")
        own = self.value_function == "from_reward_model"
        if own != (self.value_model is not None):
            raise ValueError(
                f"learner.value_model: is given with value_function: from_reward_model, and only with it; got "
                f"{self.value_model!r} with {self.value_function}"
            )
        if own and not self.needs_values:
            raise ValueError(
                "learner.value_function: from_reward_model, but these advantages need no values; allowed with "
                "advantage: paper or gae, or baseline: value"
            )
        if own and self.value_hidden is not None:
            raise ValueError(
                f"learner.value_hidden: {self.value_hidden}, but from_reward_model has the reward model's head"
            )
        if self.kl.controller == "adaptive" and (self.kl.place == "none" or self.kl.coef == 0):
            raise ValueError("kl.controller: adaptive needs kl.place: reward or loss, and kl.coef > 0")
        return self

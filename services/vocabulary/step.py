"""The vocabulary of a step: what a line of metrics.jsonl may have, in the order of docs/metrics.md."""

from services.vocabulary.metric import Metric
from services.vocabulary.step_flow import FLOW_METRICS
from services.vocabulary.step_learning import LEARNING_METRICS

REWARD_BOUNDS = (
    -10.0, -5.0, -2.0, -1.0, -0.5, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 5.0, 10.0
)  # fmt: skip
"""Of rewards and of every source's scores: fine where shares and attention rewards lie, coarse beyond."""

REWARD_METRICS: tuple[Metric, ...] = (
    Metric(
        "reward/mean", "reward", "gauge", "attune_reward_mean",
        "Mean reward (the recipe's combination) of the samples that have one.",
        "It falls, or rises while evaluation does not: the reward is being gamed.",
    ),
    Metric(
        "reward/std", "reward", "gauge", "attune_reward_std",
        "Standard deviation of these rewards, over all samples of the step.",
        "It goes to 0: the samples are all alike.",
    ),
    Metric(
        "reward/within_prompt_std", "reward", "gauge", "attune_reward_within_prompt_std",
        "Standard deviation of the rewards within a group, mean over groups.",
        "It goes to 0: group advantages have nothing to compare.",
    ),
    Metric(
        "reward/histogram", "reward", "histogram", "attune_reward",
        "How the rewards are distributed: samples by bucket.",
        "All in one bucket; a second heap far from the first.",
        bounds=REWARD_BOUNDS,
    ),
    Metric(
        "reward/flat_share", "share", "gauge", "attune_reward_flat_ratio",
        "Share of groups whose samples all have the same reward: nothing is to be learnt from them.",
        "Above a half: prompts are too easy or too hard, or the reward cannot tell samples apart.",
    ),
    Metric(
        "reward/ok", "samples", "counter", "attune_reward_samples_total",
        "Samples that have a reward and are trained on.",
        "Fewer than groups x samples.",
        labels=(("status", "ok"),),
    ),
    Metric(
        "reward/failed", "samples", "counter", "attune_reward_samples_total",
        "Samples of the step's groups that have no reward and are left out.",
        "Above 0 for long: failures/samples/{code} says why.",
        labels=(("status", "failed"),),
    ),
    Metric(
        "reward/revisions", "names", "gauge", "attune_reward_revisions",
        "Revisions of the reward's recipe, interventions among them, that the samples were scored under: a list.",
        "More than one in a step, where nobody intervened.",
        "always, not a number",
    ),
    Metric(
        "reward/{source}/mean", "score", "gauge", "attune_reward_source_mean",
        "Mean score of a source, before its weight.",
        "One source rises while the others fall.",
        "a source scored",
    ),
    Metric(
        "reward/{source}/std", "score", "gauge", "attune_reward_source_std",
        "Standard deviation of a source's scores.",
        "0: the source tells nothing apart.",
        "a source scored",
    ),
    Metric(
        "reward/{source}/histogram", "score", "histogram", "attune_reward_source",
        "How a source's scores are distributed: samples by bucket.",
        "All in one bucket, or in the outermost.",
        "a source scored",
        bounds=REWARD_BOUNDS,
    ),
    Metric(
        "reward/{source}/failed", "samples", "counter", "attune_reward_source_failed_samples_total",
        "Samples trained on that an optional source did not score.",
        "All of them: the reward is without this source (event source_silent).",
    ),
    Metric(
        "reward/coverage", "reward", "gauge", "attune_reward_attention_coverage",
        "Mean coverage term of the attention reward: attention mass on salient positions.",
        "It goes to 1 with entropy falling: attention is put on salient tokens for show.",
        "attention source",
    ),
    Metric(
        "reward/focus", "reward", "gauge", "attune_reward_attention_focus",
        "Mean focus term of the attention reward: negative entropy of attention over the content.",
        "It jumps to its maximum: attention has collapsed onto single tokens.",
        "attention source",
    ),
    Metric(
        "reward/repeat", "reward", "gauge", "attune_reward_attention_repeat",
        "Mean repetition term of the attention reward: repeated n-grams of the response.",
        "It rises: the policy repeats itself.",
        "attention source",
    ),
)  # fmt: skip

FAILURE_METRICS: tuple[Metric, ...] = (
    Metric(
        "failures/samples/{code}", "samples", "counter", "attune_failed_samples_total",
        "Samples of the step's groups without a reward, by the failure's code.",
        "Any code that stays.",
        "a failure",
    ),
    Metric(
        "failures/scores/{source}/{code}", "scores", "counter", "attune_failed_scores_total",
        "Scores that a source did not give to the step's samples, by its failure's code.",
        "Any code that stays.",
        "a failure",
    ),
    Metric(
        "failures/groups/{code}", "groups", "gauge", "attune_failed_groups",
        "Groups that failed for good since the run began, by the failure's code. Others took their places.",
        "It grows with every step: prompts are lost.",
        "a failure",
    ),
)  # fmt: skip

EVALUATION_METRICS: tuple[Metric, ...] = (
    Metric(
        "evaluation/{decoding}/{metric}", "see docs/evaluation.md", "gauge", "attune_evaluation",
        "A figure of held-out prompts, by decoding: rewards, overlap with references, repetition, length, perplexity; "
        "failed is the number of responses without a score.",
        "It falls while reward/mean rises.",
        "evaluation",
    ),
)  # fmt: skip

STEP_METRICS: tuple[Metric, ...] = (
    *REWARD_METRICS,
    *FAILURE_METRICS,
    *LEARNING_METRICS,
    *FLOW_METRICS,
    *EVALUATION_METRICS,
)

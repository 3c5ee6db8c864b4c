"""What an actor exports of itself, from its own process, while a step is still under way. In no file: metrics.jsonl has
what they come to in a step.
"""

from services.vocabulary.metric import Metric

ACTOR_METRICS: tuple[Metric, ...] = (
    Metric(
        None, "groups", "counter", "attune_rollout_groups_total",
        "Groups that a rollout actor generated.",
        "No growth while the gate is open: the actor hangs, or has no prompts.",
        labels=(("actor", ""),),
    ),
    Metric(
        None, "samples", "counter", "attune_rollout_samples_total",
        "Samples that a rollout actor generated.",
        "As above.",
        labels=(("actor", ""),),
    ),
    Metric(
        None, "tokens", "counter", "attune_rollout_tokens_total",
        "Tokens into a rollout actor's engine (direction in: prompts, once a group) and out of it (out: responses).",
        "A rate far below the other actors'.",
        labels=(("actor", ""), ("direction", "")),
    ),
    Metric(
        None, "seconds", "counter", "attune_rollout_busy_seconds_total",
        "Time in which a rollout actor's engine generated or took weights.",
        "Its rate, a share of 1, is small: the actor waits for prompts or for the gate.",
        labels=(("actor", ""),),
    ),
    Metric(
        None, "seconds", "counter", "attune_rollout_capture_seconds_total",
        "Time that a rollout actor spent taking attention while it generated; on a GPU, what the host spent on it.",
        "More than a tenth of the busy time.",
        labels=(("actor", ""),),
    ),
    Metric(
        None, "loads", "counter", "attune_rollout_weight_loads_total",
        "Policy versions that a rollout actor took.",
        "Fewer than the other actors': it missed versions.",
        labels=(("actor", ""),),
    ),
    Metric(
        None, "seconds", "counter", "attune_rollout_weight_load_seconds_total",
        "Time that a rollout actor spent taking weights.",
        "More than a tenth of the busy time.",
        labels=(("actor", ""),),
    ),
    Metric(
        None, "groups", "counter", "attune_scoring_groups_total",
        "Groups that a scoring worker wrote back, by result: scored, failed, late (another attempt was first).",
        "Failed grows: attune_scoring_failures_total says why. Late grows: leases end too soon.",
        labels=(("actor", ""), ("result", "")),
    ),
    Metric(
        None, "samples", "counter", "attune_scoring_samples_total",
        "Samples that a scoring worker had scored, by result: ok, failed.",
        "A growing share of failed.",
        labels=(("actor", ""), ("result", "")),
    ),
    Metric(
        None, "samples", "counter", "attune_scoring_failures_total",
        "Samples that got no reward, by the failure's code.",
        "source_error, source_timeout, source_down, upstream_unavailable: something is down. Other codes: look at the "
        "samples.",
        labels=(("actor", ""), ("code", "")),
    ),
    Metric(
        None, "seconds", "counter", "attune_scoring_busy_seconds_total",
        "Time in which a scoring worker had groups at hand.",
        "Its rate is near 1: scoring holds the run up.",
        labels=(("actor", ""),),
    ),
    Metric(
        None, "seconds", "counter", "attune_reward_server_busy_seconds_total",
        "Time in which the run's reward server scored at least one request.",
        "Its rate is near 1: scoring holds the run up.",
        labels=(("actor", ""),),
    ),
    Metric(
        None, "seconds", "counter", "attune_model_busy_seconds_total",
        "Time in which the replicas of a source's model ran batches, added up.",
        "Its rate is near the number of replicas: the model is what scoring waits for.",
        labels=(("actor", ""), ("source", "")),
    ),
)  # fmt: skip

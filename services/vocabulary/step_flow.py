"""The vocabulary of the flow: lengths, staleness, the ledger, where time goes, who idles."""

from services.vocabulary.metric import Metric, When

LENGTH_BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)
"""Response tokens."""

STALENESS_BOUNDS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0)
"""Steps."""

_RUN: tuple[Metric, ...] = (
    Metric(
        "step", "steps", "gauge", "attune_step",
        "Number of the step, from 0.",
        "It stands still.",
    ),
    Metric(
        "incarnation", "starts", "gauge", "attune_incarnation",
        "How often the learner has begun: 1 at first, one more at each start again.",
        "It grows while nobody restarts the run: look for learner_died in events.jsonl.",
        clock=True,
    ),
    Metric(
        "version/incarnation_max", "starts", "gauge", "attune_version_incarnation_max",
        "Largest incarnation among the policy versions that drew the batch.",
        "Smaller than incarnation for many steps.",
        clock=True,
    ),
)  # fmt: skip

_LENGTHS: tuple[Metric, ...] = (
    Metric(
        "length/mean", "tokens", "gauge", "attune_response_length_mean_tokens",
        "Mean length of the responses.",
        "It runs to rollout.max_tokens or to 1: the reward pays for length, or for silence.",
    ),
    Metric(
        "length/min", "tokens", "gauge", "attune_response_length_min_tokens",
        "Shortest response.",
        "1 for most steps.",
    ),
    Metric(
        "length/max", "tokens", "gauge", "attune_response_length_max_tokens",
        "Longest response.",
        "",
    ),
    Metric(
        "length/histogram", "tokens", "histogram", "attune_response_length_tokens",
        "How long the responses are: samples by bucket.",
        "A heap at rollout.max_tokens.",
        bounds=LENGTH_BOUNDS,
    ),
    Metric(
        "length/truncated_share", "share", "gauge", "attune_response_truncated_ratio",
        "Share of the responses that rollout.max_tokens cut.",
        "It rises past a tenth: raise rollout.max_tokens, or penalise length.",
    ),
    Metric(
        "length/response_tokens", "tokens", "counter", "attune_trained_tokens_total",
        "Response tokens of the step's batch.",
        "",
        labels=(("direction", "out"),),
    ),
    Metric(
        "length/prompt_tokens", "tokens", "counter", "attune_trained_tokens_total",
        "Prompt tokens of the step's batch, a prompt counted once a sample, as the learner reads it.",
        "",
        labels=(("direction", "in"),),
    ),
    Metric(
        "length/prompt_mean", "tokens", "gauge", "attune_prompt_length_mean_tokens",
        "Mean length of the prompts, over samples.",
        "Near the context's end.",
    ),
)  # fmt: skip

_STALENESS: tuple[Metric, ...] = (
    Metric(
        "staleness/mean", "steps", "gauge", "attune_staleness_mean_steps",
        "Steps between the policy that drew a token and the one that trains on it, mean over tokens.",
        "At run.max_staleness in every step: rollouts are far ahead of the learner.",
    ),
    Metric(
        "staleness/max", "steps", "gauge", "attune_staleness_max_steps",
        "The same, of the oldest token. Never above run.max_staleness.",
        "As staleness/mean.",
    ),
    Metric(
        "staleness/histogram", "steps", "histogram", "attune_staleness_steps",
        "How stale the tokens are: tokens by bucket.",
        "As staleness/mean.",
        bounds=STALENESS_BOUNDS,
    ),
)  # fmt: skip


def _state(name: str, state: str, meaning: str, bad: str, *, clock: bool = True) -> Metric:
    return Metric(
        name, "groups", "gauge", "attune_ledger_groups", meaning, bad, labels=(("state", state),), clock=clock
    )


def _event(event: str, meaning: str, bad: str) -> Metric:
    return Metric(
        f"stream/{event}", "events", "counter", "attune_stream_events_total", meaning, bad,
        labels=(("event", event),), total=True, clock=True,
    )  # fmt: skip


_LEDGER: tuple[Metric, ...] = (
    _state("ledger/pending", "pending", "Groups that wait for a rollout actor.", "0 before the last steps."),
    _state(
        "ledger/leased", "leased", "Groups that a rollout actor has in hand.",
        "0 with groups pending: no actor takes work.",
    ),
    _state(
        "queue/generated", "generated", "Queue depth: groups that were generated and wait to be scored.",
        "It grows: scoring is too slow (idle/scoring, idle/models).",
    ),
    _state(
        "queue/scored", "scored", "Queue depth: groups that were scored and wait for the learner.",
        "0 with idle/learner high: generating or scoring is too slow.",
    ),
    _state(
        "ledger/consumed", "consumed", "Groups that were trained on since the last commit.",
        "It grows past checkpoint.every x run.groups_per_step: commits fail.",
    ),
    _state("ledger/committed", "committed", "Groups that a commit contains.", "It stands still."),
    _state(
        "ledger/failed", "failed", "Groups that failed for good; others took their places.",
        "It grows with every step: failures/groups/{code} says why.", clock=False,
    ),
    _event("late", "Generated groups that came too late and were dropped.", "It grows: leases end too soon."),
    _event("late_scores", "Scored groups that came too late and were dropped.", "It grows with every step."),
    _event("late_failures", "Failures that were told too late and dropped.", "It grows with every step."),
    _event(
        "regenerated", "Groups that had grown too old for their step and were generated again.",
        "It grows without restarts.",
    ),
    _event("expired", "Leases that ended because their actor fell silent.", "It grows: actors hang (rollout.lease_s)."),
    _event("released", "Leases that ended because their actor died.", "It grows: actors die."),
    _event("failures_infra", "Failures of groups that were tried again elsewhere.", "It grows: something is down."),
    _event("failures_data", "Failures of groups that their prompt or samples are the cause of.", "It grows."),
    _event("uncommitted", "Groups taken back from a step that no commit contains.", "It grows without restarts."),
)  # fmt: skip


def _phase(name: str, phase: str, meaning: str, bad: str, when: When = "always") -> Metric:
    return Metric(
        name, "seconds", "gauge", "attune_step_phase_seconds", meaning, bad, when,
        labels=(("phase", phase),), clock=True,
    )  # fmt: skip


_TIME: tuple[Metric, ...] = (
    Metric(
        "time_s", "seconds", "gauge", "attune_run_seconds",
        "Since this start of the run.",
        "",
        clock=True,
    ),
    Metric(
        "time/step_s", "seconds", "gauge", "attune_step_seconds",
        "The whole step, without commit and evaluation.",
        "It grows from step to step.",
        clock=True,
    ),
    _phase("time/wait_batch_s", "wait_batch", "The learner's wait for the batch.", "The largest part: see idle/*."),
    _phase("time/train_s", "train", "Training on the batch.", "It grows while length/response_tokens does not."),
    _phase("time/publish_s", "publish", "Publishing the weights.", "More than a tenth of time/step_s."),
    _phase(
        "time/commit_s", "commit", "Writing the commit that followed the step before.",
        "Near checkpoint.timeout_s.", "after a commit",
    ),
    _phase(
        "time/evaluation_s", "evaluation", "Evaluating.",
        "Most of the run's time: raise evaluation.every.", "evaluation",
    ),
    Metric(
        "time/weight_load_s", "seconds", "gauge", "attune_weight_load_seconds",
        "Time that a rollout actor spent taking new weights since the last line, mean over actors.",
        "More than a tenth of time/step_s.",
        clock=True,
    ),
    Metric(
        "time/capture_s", "seconds", "gauge", "attune_capture_seconds",
        "Time that a rollout actor spent taking attention since the last line, mean over actors; on a GPU, what the "
        "host spent on it.",
        "More than a tenth of time/step_s.",
        clock=True,
    ),
    Metric(
        "throughput/tokens_per_s", "tokens a second", "gauge", "attune_trained_tokens_per_second",
        "Response tokens trained on a second, over the step.",
        "It falls while lengths do not.",
        labels=(("direction", "out"),), clock=True,
    ),
    Metric(
        "throughput/prompt_tokens_per_s", "tokens a second", "gauge", "attune_trained_tokens_per_second",
        "Prompt tokens trained on a second, over the step.",
        "It falls while lengths do not.",
        labels=(("direction", "in"),), clock=True,
    ),
    Metric(
        "throughput/generated_tokens_per_s", "tokens a second", "gauge", "attune_rollout_tokens_per_second",
        "Response tokens that all rollout actors generated a second, since the last line.",
        "Below throughput/tokens_per_s for long.",
        labels=(("direction", "out"),), clock=True,
    ),
    Metric(
        "throughput/read_tokens_per_s", "tokens a second", "gauge", "attune_rollout_tokens_per_second",
        "Prompt tokens that all rollout actors read a second, a prompt counted once a group.",
        "It falls while lengths do not.",
        labels=(("direction", "in"),), clock=True,
    ),
)  # fmt: skip


def _idle(part: str, meaning: str, bad: str, when: When = "always") -> Metric:
    return Metric(
        f"idle/{part}", "share", "gauge", "attune_idle_ratio", meaning, bad, when, labels=(("part", part),), clock=True
    )


_IDLE: tuple[Metric, ...] = (
    _idle(
        "learner", "Share of the step in which the learner waited for its batch.",
        "Above a half: more rollout actors, or run.max_staleness 1.",
    ),
    _idle(
        "rollouts", "Share of the step in which a rollout actor's engine had nothing to do, mean over actors.",
        "Above a half: the learner holds the run up, or there are too many actors.",
    ),
    _idle(
        "scoring", "Share of the step in which a scoring worker had no groups at hand, mean over workers.",
        "Near 0: more reward.worker.workers, or a faster source.",
    ),
    _idle(
        "reward_server", "Share of the step in which the run's reward server scored no request.",
        "Near 0: scoring holds the run up.", "own reward server",
    ),
    _idle(
        "models", "Share of the step in which a replica of the models that score ran no batch, mean over replicas.",
        "Near 0: the models are what scoring waits for (replicas).", "models that score",
    ),
    Metric(
        "actors/rollouts", "actors", "gauge", "attune_actors",
        "Rollout actors that answered at the end of the step.",
        "Fewer than rollout.actors.",
        labels=(("part", "rollouts"),), clock=True,
    ),
    Metric(
        "actors/scoring", "actors", "gauge", "attune_actors",
        "Scoring workers that answered at the end of the step.",
        "Fewer than reward.worker.workers.",
        labels=(("part", "scoring"),), clock=True,
    ),
)  # fmt: skip

FLOW_METRICS: tuple[Metric, ...] = (*_RUN, *_LENGTHS, *_STALENESS, *_LEDGER, *_TIME, *_IDLE)

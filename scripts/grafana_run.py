"""The dashboards of a run, from what Ray's exporter tells Prometheus."""

from grafana_panels import RUN, WINDOW, Board, Panel, heatmap, quantile, rate, series, stat

from services.vocabulary import RAY_PREFIX

TRAINING = Board(
    "attune-training",
    "Attune: training run",
    "Is it learning, is it stable, what does it write, what failed, where does time go.",
    RUN,
    (
        (
            "Now",
            (
                stat("Step", series("attune_step")),
                stat("Reward", series("attune_reward_mean")),
                stat("KL to the reference", series("attune_kl_reference_nats")),
                stat("Trained tokens a second", series("attune_trained_tokens_per_second", direction="out")),
                stat("Learner idle", series("attune_idle_ratio", part="learner"), unit="percentunit"),
                stat("Groups that failed", series("attune_ledger_groups", state="failed")),
            ),
        ),
        (
            "Is it learning?",
            (
                Panel(
                    "Does the reward rise?", (series("attune_reward_mean", "mean"), series("attune_reward_std", "std"))
                ),
                Panel("Which source does it come from?", (series("attune_reward_source_mean", "{{source}}"),)),
                Panel("Does each source tell samples apart?", (series("attune_reward_source_std", "{{source}}"),)),
                heatmap("How are the rewards distributed?", "attune_reward", "short"),
                Panel(
                    "How are the scores of each source distributed?",
                    (quantile(0.1, "attune_reward_source", "source"), quantile(0.9, "attune_reward_source", "source")),
                ),
                Panel(
                    "Do prompts have something to learn from?",
                    (
                        series("attune_reward_flat_ratio", "groups without variance"),
                        series("attune_reward_within_prompt_std", "std within prompts"),
                    ),
                    low=0,
                ),
                Panel(
                    "Is the attention reward earned, or gamed?",
                    (
                        series("attune_reward_attention_coverage", "coverage"),
                        series("attune_reward_attention_focus", "focus"),
                        series("attune_reward_attention_repeat", "repeat"),
                    ),
                ),
                Panel("Does held-out evaluation agree?", (series("attune_evaluation", "{{decoding}} {{metric}}"),)),
            ),
        ),
        (
            "Is it stable?",
            (
                Panel(
                    "How far is it from the reference?",
                    (series("attune_kl_reference_nats", "a response"), series("attune_kl_coefficient", "coefficient")),
                ),
                Panel(
                    "Does it still explore?", (series("attune_policy_entropy_nats", "entropy, nats a token"),), low=0
                ),
                Panel(
                    "Are the steps too large?",
                    (
                        series("attune_policy_clip_ratio", "clip fraction"),
                        series("attune_policy_approx_kl_nats", "approximate KL"),
                    ),
                    low=0,
                ),
                Panel(
                    "Do rollout and learner agree?",
                    (
                        series("attune_drift_logprob_max_nats", "log-probability"),
                        series("attune_drift_attention_max", "attention"),
                        series("attune_policy_first_log_ratio_max_nats", "first log ratio"),
                    ),
                    low=0,
                ),
                Panel(
                    "Does the gradient spike?",
                    (
                        series("attune_policy_gradient_norm", "gradient norm"),
                        series("attune_policy_importance_max", "largest ratio"),
                    ),
                    low=0,
                ),
                Panel(
                    "Does the value function follow?",
                    (
                        series("attune_value_explained_variance_ratio", "explained variance"),
                        series("attune_value_loss", "value loss"),
                    ),
                ),
                Panel(
                    "Is the learning rate as it should be?",
                    (
                        series("attune_policy_learning_rate", "policy"),
                        series("attune_value_learning_rate", "value function"),
                    ),
                    unit="sci",
                ),
                Panel("Are batches skipped?", (series("attune_step_skipped", "skipped"),), low=0, high=1),
            ),
        ),
        (
            "What does it write?",
            (
                Panel(
                    "How long are responses?",
                    (
                        series("attune_response_length_mean_tokens", "mean"),
                        series("attune_response_length_min_tokens", "shortest"),
                        series("attune_response_length_max_tokens", "longest"),
                        series("attune_prompt_length_mean_tokens", "prompts, mean"),
                    ),
                    low=0,
                ),
                heatmap("How are lengths distributed?", "attune_response_length_tokens", "short"),
                Panel(
                    "How many are cut?",
                    (series("attune_response_truncated_ratio", "truncated"),),
                    "percentunit",
                    low=0,
                    high=1,
                ),
            ),
        ),
        (
            "What failed?",
            (
                Panel("Samples without a reward, by code", (rate("attune_failed_samples_total", "code"),), low=0),
                Panel("Scores that sources did not give", (rate("attune_failed_scores_total", "source, code"),), low=0),
                Panel("Groups that failed for good", (series("attune_failed_groups", "{{code}}"),), low=0),
            ),
        ),
        (
            "Where does time go?",
            (
                Panel(
                    "Which part of a step is longest?",
                    (series("attune_step_phase_seconds", "{{phase}}"),),
                    "s",
                    stack=True,
                    low=0,
                ),
                Panel("How long is a step?", (series("attune_step_seconds", "step"),), "s", low=0),
                Panel(
                    "How many tokens a second?",
                    (series("attune_trained_tokens_per_second", "{{direction}}"),),
                    low=0,
                ),
            ),
        ),
    ),
    (),
)

FLOW = Board(
    "attune-flow",
    "Attune: rollouts and stream",
    "Who waits for whom: staleness, queues, leases, idle shares, and each actor's own work.",
    RUN,
    (
        (
            "Who waits for whom?",
            (
                Panel("Who idles?", (series("attune_idle_ratio", "{{part}}"),), "percentunit", low=0, high=1),
                Panel(
                    "How deep are the queues?",
                    (
                        series("attune_ledger_groups", "wait to be scored", state="generated"),
                        series("attune_ledger_groups", "wait for the learner", state="scored"),
                    ),
                    low=0,
                ),
                Panel(
                    "How stale is the batch?",
                    (
                        series("attune_staleness_mean_steps", "mean"),
                        series("attune_staleness_max_steps", "oldest token"),
                    ),
                    low=0,
                ),
                heatmap("How is staleness distributed?", "attune_staleness_steps", "short"),
                Panel(
                    "Where are the groups?",
                    (
                        (
                            RAY_PREFIX + 'attune_ledger_groups{%,state=~"pending|leased|generated|scored|consumed"}',
                            "{{state}}",
                        ),
                    ),
                    stack=True,
                    low=0,
                ),
                Panel("What came too late, or again?", (rate("attune_stream_events_total", "event"),), low=0),
            ),
        ),
        (
            "Rollout actors",
            (
                Panel("Are all there?", (series("attune_actors", "{{part}}"),), low=0),
                Panel(
                    "How many tokens a second, in and out?",
                    (series("attune_rollout_tokens_per_second", "{{direction}}"),),
                    low=0,
                ),
                Panel(
                    "Does one fall behind?",
                    (rate("attune_rollout_tokens_total", "actor", direction="out"),),
                    low=0,
                ),
                Panel(
                    "Is its engine busy?",
                    (
                        rate("attune_rollout_busy_seconds_total", "actor"),
                        rate("attune_rollout_weight_load_seconds_total", "actor", "{{actor}}, with new weights"),
                    ),
                    "percentunit",
                    low=0,
                ),
                Panel(
                    "What does capture cost?",
                    (
                        (
                            f"sum by (actor) (rate({RAY_PREFIX}attune_rollout_capture_seconds_total{{%}}[{WINDOW}]))"
                            f" / sum by (actor) (rate({RAY_PREFIX}attune_rollout_busy_seconds_total{{%}}[{WINDOW}]))",
                            "{{actor}}",
                        ),
                    ),
                    "percentunit",
                    low=0,
                ),
                Panel(
                    "What do new weights cost?",
                    (
                        series("attune_weight_load_seconds", "taking them, mean over actors"),
                        series("attune_step_phase_seconds", "publishing them", phase="publish"),
                    ),
                    "s",
                    low=0,
                ),
                Panel(
                    "Groups and samples",
                    (
                        rate("attune_rollout_groups_total", "actor", "{{actor}} groups"),
                        rate("attune_rollout_samples_total", "actor", "{{actor}} samples"),
                    ),
                    low=0,
                ),
                Panel("Does an actor miss versions?", (rate("attune_rollout_weight_loads_total", "actor"),), low=0),
            ),
        ),
        (
            "Scoring",
            (
                Panel("Groups scored, failed, late", (rate("attune_scoring_groups_total", "result"),), low=0),
                Panel("Samples scored and failed", (rate("attune_scoring_samples_total", "result"),), low=0),
                Panel("Why did samples fail?", (rate("attune_scoring_failures_total", "code"),), low=0),
                Panel(
                    "Are the workers busy?", (rate("attune_scoring_busy_seconds_total", "actor"),), "percentunit", low=0
                ),
                Panel(
                    "Are the server and its models busy?",
                    (
                        rate("attune_reward_server_busy_seconds_total", "run", "reward server"),
                        rate("attune_model_busy_seconds_total", "source", "model of {{source}}"),
                    ),
                    "percentunit",
                    low=0,
                ),
            ),
        ),
        (
            "Faults",
            (
                Panel("How often did the learner begin?", (series("attune_incarnation", "incarnation"),), low=0),
                Panel(
                    "Does the run get on?",
                    ((f"changes({RAY_PREFIX}attune_step{{%}}[10m])", "steps in 10 minutes"),),
                    low=0,
                ),
            ),
        ),
    ),
    (),
)


RUN_VARIABLES = (
    ("SessionName", "Ray session", f"label_values({RAY_PREFIX}attune_step, SessionName)"),
    ("run", "Run", f'label_values({RAY_PREFIX}attune_step{{SessionName=~"$SessionName"}}, run)'),
    ("run_id", "Run id", f'label_values({RAY_PREFIX}attune_step{{SessionName=~"$SessionName",run=~"$run"}}, run_id)'),
)

"""The vocabulary of learning: KL, advantages, the policy's and the value function's update, drift."""

from services.vocabulary.metric import Metric

LEARNING_METRICS: tuple[Metric, ...] = (
    Metric(
        "kl/reference", "nats a response", "gauge", "attune_kl_reference_nats",
        "KL of the policy that drew the batch to the reference: k1 summed over a response, mean over responses.",
        "It grows without bound: the policy leaves the reference. Negative for long: too few samples to tell.",
        "trained",
    ),
    Metric(
        "kl/reference_token", "nats a token", "gauge", "attune_kl_reference_token_nats",
        "The same a token (k1).",
        "As kl/reference.",
        "trained",
    ),
    Metric(
        "kl/reference_k3", "nats a token", "gauge", "attune_kl_reference_k3_nats",
        "The same by the estimator k3, which is never negative.",
        "As kl/reference.",
        "trained",
    ),
    Metric(
        "kl/coef", "1", "gauge", "attune_kl_coefficient",
        "Coefficient of the KL in this step; 0 where learner.kl.place is none.",
        "The adaptive controller drives it to extremes.",
        "trained",
    ),
    Metric(
        "kl/loss", "nats a token", "gauge", "attune_kl_loss_nats",
        "KL term of the loss (k3), before its coefficient; mean over updates.",
        "As kl/reference.",
        "KL in the loss",
    ),
    Metric(
        "advantage/mean", "advantage", "gauge", "attune_advantage_mean",
        "Mean advantage over the tokens that carry loss.",
        "Far from 0 where a baseline is in use.",
        "trained",
    ),
    Metric(
        "advantage/std", "advantage", "gauge", "attune_advantage_std",
        "Standard deviation of the same.",
        "0: there is nothing to learn from.",
        "trained",
    ),
    Metric(
        "policy/entropy_sampled", "nats a token", "gauge", "attune_policy_entropy_nats",
        "Mean of -log pi over the tokens that were drawn: an estimate of the policy's entropy.",
        "It falls towards 0: the policy no longer explores.",
        "trained",
    ),
    Metric(
        "policy/entropy", "nats a token", "gauge", "attune_policy_entropy_exact_nats",
        "Entropy of the policy's distribution at each token, mean over updates: over the vocabulary, or the kept set.",
        "As policy/entropy_sampled.",
        "trained",
    ),
    Metric(
        "policy/loss", "1", "gauge", "attune_policy_loss",
        "Policy loss, mean over updates.",
        "Its level says little; look for jumps.",
        "trained",
    ),
    Metric(
        "policy/clip_share", "share", "gauge", "attune_policy_clip_ratio",
        "Share of tokens whose ratio the PPO clip cut (the clip fraction).",
        "Above 0.3: steps are too large (learner.lr, learner.epochs).",
        "trained",
    ),
    Metric(
        "policy/approx_kl", "nats a token", "gauge", "attune_policy_approx_kl_nats",
        "KL of the policy before the step to that during its updates, mean over tokens (k3).",
        "Above 0.05: steps are too large.",
        "trained",
    ),
    Metric(
        "policy/ratio_mean", "1", "gauge", "attune_policy_importance_mean",
        "Mean importance ratio over the step's updates.",
        "Away from 1 by more than a few hundredths.",
        "trained",
    ),
    Metric(
        "policy/ratio_max", "1", "gauge", "attune_policy_importance_max",
        "Largest importance ratio of the step.",
        "In the hundreds: stale samples, or rollout and learner do not agree.",
        "trained",
    ),
    Metric(
        "policy/first_log_ratio_max", "nats", "gauge", "attune_policy_first_log_ratio_max_nats",
        "Largest |log ratio| in the first update, before any weight has changed.",
        "Above rounding at staleness 0: engine and learner compute different policies.",
        "trained",
    ),
    Metric(
        "policy/grad_norm", "1", "gauge", "attune_policy_gradient_norm",
        "Norm of the gradient before clipping, mean over updates.",
        "Spikes of ten times its usual value.",
        "trained",
    ),
    Metric(
        "policy/lr", "1", "gauge", "attune_policy_learning_rate",
        "Learning rate of the policy at the step's first update.",
        "Not what the schedule was meant to be.",
        "trained",
    ),
    Metric(
        "policy/updates", "updates", "gauge", "attune_policy_updates",
        "Updates of the weights since the run began.",
        "It stands still while steps go on: steps are skipped.",
        "trained",
    ),
    Metric(
        "policy/loss_tokens", "tokens", "gauge", "attune_policy_loss_tokens",
        "Tokens of the step that carry loss.",
        "Far below length/response_tokens: rollout.finish_length masks most responses.",
        "trained",
    ),
    Metric(
        "policy/skipped", "0 or 1", "gauge", "attune_step_skipped",
        "1 where the step's batch was not trained on (learner.bad_batch).",
        "1; events.jsonl says why.",
    ),
    Metric(
        "value/mean", "return", "gauge", "attune_value_mean",
        "Mean of the value function before the update.",
        "It does not follow reward/mean.",
        "value function",
    ),
    Metric(
        "value/explained_variance", "share", "gauge", "attune_value_explained_variance_ratio",
        "1 - Var(return - value) / Var(return), before the update.",
        "Below 0: worse than a constant. It should rise in the first steps.",
        "value function",
    ),
    Metric(
        "value/loss", "1", "gauge", "attune_value_loss",
        "Value loss, mean over updates.",
        "It grows.",
        "value function",
    ),
    Metric(
        "value/lr", "1", "gauge", "attune_value_learning_rate",
        "Learning rate of the value function at the step's first update.",
        "Not what the schedule was meant to be.",
        "value function",
    ),
    Metric(
        "drift/responses", "responses", "gauge", "attune_drift_responses",
        "Responses that the learner computed again, to compare with what the engine recorded.",
        "0 for long: nothing is watched (samples are all of older versions).",
    ),
    Metric(
        "drift/logprob_max", "nats", "gauge", "attune_drift_logprob_max_nats",
        "Largest difference of a token's log-probability, engine against learner.",
        "A jump after new weights; a steady value points at dtype or kernels. Limit: learner.drift.logprob_limit.",
        "drift watched",
    ),
    Metric(
        "drift/attention_max", "attention", "gauge", "attune_drift_attention_max",
        "Largest difference of an attention statistic, engine against learner.",
        "As drift/logprob_max. Limit: learner.drift.attention_limit.",
        "drift watched",
    ),
    Metric(
        "drift/ratio_mean", "1", "gauge", "attune_drift_importance_mean",
        "Mean ratio of the learner's probability of a token to the engine's.",
        "Away from 1 by more than a hundredth.",
        "drift watched",
    ),
)  # fmt: skip

"""The dashboard of a reward server of its own, from its /metrics."""

from grafana_panels import SERVER, WINDOW, Board, Panel, Query, quantile


def spread(title: str, name: str, *shares: float, by: str = "", unit: str = "s") -> Panel:
    """Quantiles of a histogram."""
    return Panel(title, tuple(quantile(share, name, by, "") for share in shares), unit, low=0 if unit == "s" else None)


def per_second(name: str, by: str) -> Query:
    shown = " ".join("{{" + label.strip() + "}}" for label in by.split(","))
    return f"sum by ({by}) (rate({name}{{%}}[{WINDOW}]))", shown


LOAD = (
    Panel("Requests by status", (per_second("attune_reward_requests_total", "route, status"),), "reqps", low=0),
    Panel(
        "Is it overloaded?",
        (
            ("sum(attune_reward_admitted_requests{%})", "admitted"),
            ("sum(attune_reward_waiting_requests{%})", "waiting"),
            ("sum(attune_reward_scoring_requests{%})", "being scored"),
        ),
        low=0,
    ),
    spread("How long do requests take?", "attune_reward_request_seconds", 0.5, 0.99),
    spread("How long do they wait for their turn?", "attune_reward_queue_seconds", 0.5, 0.99),
    Panel("Items by result", (per_second("attune_reward_items_total", "status"),), low=0),
    spread("Items of a request", "attune_reward_batch_items", 0.5, unit="short"),
    Panel(
        "When was an item last scored?",
        (("time() - attune_reward_last_success_timestamp_seconds{%}", "{{instance}}"),),
        "s",
        low=0,
    ),
    Panel("Answered from memory", (per_second("attune_reward_repeated_requests_total", "instance"),), "reqps", low=0),
)

SOURCES = (
    spread("Which source is slow?", "attune_reward_source_seconds", 0.5, 0.99, by="source"),
    Panel("What fails, and why?", (per_second("attune_reward_failures_total", "source, code"),), low=0),
    spread("How are scores distributed?", "attune_reward_score", 0.1, 0.5, 0.9, by="source", unit="short"),
    Panel("Calls under way", (("sum by (source) (attune_reward_source_calls{%})", "{{source}}"),), low=0),
    spread("Items of a call", "attune_reward_source_items", 0.5, by="source", unit="short"),
    spread("Do sources disagree?", "attune_reward_disagreement", 0.5, 0.95, unit="short"),
    Panel(
        "When did a source last score?",
        (("time() - attune_reward_source_last_success_timestamp_seconds{%}", "{{source}} {{instance}}"),),
        "s",
        low=0,
    ),
)

MODELS = (
    Panel("Do all replicas live?", (("sum by (source) (attune_reward_source_replicas{%})", "{{source}}"),), low=0),
    spread("Rows of a batch", "attune_reward_model_batch_rows", 0.5, by="source", unit="short"),
    spread("Seconds of a batch", "attune_reward_model_batch_seconds", 0.5, 0.99, by="source"),
)

REWARD_SERVER = Board(
    "attune-reward-server",
    "Attune: reward server",
    "A reward server of its own: load, latency, scores and failures by source, its models.",
    SERVER,
    (("Load", LOAD), ("Sources", SOURCES), ("Models", MODELS)),
    (
        ("job", "Job", "label_values(attune_reward_admitted_requests, job)"),
        ("instance", "Instance", 'label_values(attune_reward_admitted_requests{job=~"$job"}, instance)'),
    ),
)

"""What a panel and a dashboard are, and the few forms of PromQL that they use."""

from dataclasses import dataclass

from services.vocabulary import RAY_PREFIX

RUN = 'run=~"$run",run_id=~"$run_id",SessionName=~"$SessionName"'
SERVER = 'job=~"$job",instance=~"$instance"'
WINDOW = "$__rate_interval"


Query = tuple[str, str]
"""PromQL and a legend."""


@dataclass(frozen=True)
class Panel:
    """`queries` are (PromQL, legend); `%` in a query stands for the dashboard's label filter."""

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: str = "timeseries"
    stack: bool = False
    low: float | None = None
    high: float | None = None
    width: int = 8


@dataclass(frozen=True)
class Board:
    uid: str
    title: str
    about: str
    filter: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]
    variables: tuple[tuple[str, str, str], ...]
    """(name, label, query); of the rest of the filter's labels."""


def series(name: str, legend: str = "", **labels: str) -> Query:
    chosen = "".join(f',{label}="{value}"' for label, value in labels.items())
    return f"{RAY_PREFIX}{name}{{%{chosen}}}", legend or next(iter(labels.values()), name.removeprefix("attune_"))


def rate(name: str, by: str, legend: str = "", **labels: str) -> Query:
    chosen = "".join(f',{label}="{value}"' for label, value in labels.items())
    shown = legend or " ".join("{{" + label.strip() + "}}" for label in by.split(","))
    return f"sum by ({by}) (rate({RAY_PREFIX}{name}{{%{chosen}}}[{WINDOW}]))", shown


def quantile(q: float, name: str, by: str = "", prefix: str = RAY_PREFIX) -> Query:
    inside = f"le, {by}" if by else "le"
    legend = f"p{q * 100:g}" + (" {{" + by + "}}" if by else "")
    buckets = f"sum by ({inside}) (rate({prefix}{name}_bucket{{%}}[{WINDOW}]))"
    return f"histogram_quantile({q}, {buckets})", legend


def heatmap(title: str, name: str, unit: str) -> Panel:
    return Panel(
        title, ((f"sum by (le) (increase({RAY_PREFIX}{name}_bucket{{%}}[{WINDOW}]))", "{{le}}"),), unit, "heatmap"
    )


def stat(title: str, *queries: Query, unit: str = "short") -> Panel:
    return Panel(title, queries, unit, "stat", width=4)

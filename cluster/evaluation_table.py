"""Evaluations as tables for a terminal."""

from collections.abc import Iterable

from rich.table import Table

from cluster.evaluation_result import LOG_RATIO_METRICS, REWARD, Change, EvaluationResult, Figure, compare

_NAMES = {
    "reward": "attention reward",
    "mass": "attention mass",
    "peak_share": "peak share",
    "entropy_q05": "entropy, 5 % quantile",
    "exact_match": "exact match",
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
    "length": "length (tokens)",
    "finished": "ended by itself",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "perplexity": "perplexity of the reference",
    "log_ratio_token": "log ratio to the start, a token",
    "log_ratio_response": "log ratio to the start, a response",
    "k3_token": "k3 to the start, a token",
}


def summary_table(result: EvaluationResult) -> Table:
    """One evaluation: a row a metric, a column a decoding, each with its interval."""
    level = f"{result.settings.level:.0%}"
    table = Table(title=f"{result.label}: {_prompts(result)}, {level} intervals over prompts", title_justify="left")
    table.add_column("metric")
    for decoding in result.figures:
        table.add_column(decoding, justify="right")
    metrics = dict.fromkeys(metric for figures in result.figures.values() for metric in figures)
    for metric in metrics:
        table.add_row(_NAMES.get(metric, metric), *(_cell(figures.get(metric)) for figures in result.figures.values()))
    if any(result.failures.values()):
        table.add_section()
        codes = dict.fromkeys(code for failed in result.failures.values() for code in failed)
        for code in codes:
            table.add_row(f"failed: {code}", *(str(failed.get(code, 0)) for failed in result.failures.values()))
    return table


def comparison_table(
    before: EvaluationResult, after: EvaluationResult, rescored: EvaluationResult | None = None
) -> Table:
    """Before against after, prompts paired; `rescored` adds what `rescore` found of the responses after."""
    level = f"{before.settings.level:.0%}"
    table = Table(title=f"{before.label} -> {after.label}: {_prompts(before)}", title_justify="left")
    table.add_column("decoding")
    table.add_column("metric")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column(f"change [{level} interval]", justify="right")
    table.add_column("in within-prompt sd", justify="right")
    changes = compare(before, after)
    again = [] if rescored is None else [change for change in compare(before, rescored) if change.metric == REWARD]
    for decoding in before.figures:
        for change in _of(changes, decoding):
            table.add_row(decoding, _NAMES.get(change.metric, change.metric), *_change_cells(change))
            if change.metric == REWARD:
                for other in _of(again, decoding):
                    table.add_row(decoding, "  under the start's attention", *_change_cells(other))
        if rescored is not None:
            for metric in LOG_RATIO_METRICS:
                figure = rescored.figures.get(decoding, {}).get(metric)
                if figure is not None:
                    table.add_row(decoding, _NAMES[metric], "", _cell(figure), "", "")
        failed = tuple(sum(result.failures.get(decoding, {}).values()) for result in (before, after))
        if any(failed):
            table.add_row(decoding, "responses without a score", str(failed[0]), str(failed[1]), "", "")
        table.add_section()
    return table


def _of(changes: Iterable[Change], decoding: str) -> list[Change]:
    return [change for change in changes if change.decoding == decoding]


def _prompts(result: EvaluationResult) -> str:
    refused = sum(prompt.refused is not None for prompt in result.prompts)
    return f"{len(result.prompts) - refused} prompts" + (f" ({refused} do not fit the context)" if refused else "")


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    if figure.low is None or figure.high is None:
        return _number(figure.value)
    return f"{_number(figure.value)} [{_number(figure.low)}, {_number(figure.high)}]"


def _change_cells(change: Change) -> tuple[str, str, str, str]:
    difference = f"{change.difference:+.4g}"
    if change.low is not None and change.high is not None:
        difference += f" [{change.low:+.3g}, {change.high:+.3g}]"
    in_sd = ""
    if change.in_sd is not None and change.in_sd_low is not None and change.in_sd_high is not None:
        in_sd = f"{change.in_sd:+.2f} [{change.in_sd_low:+.2f}, {change.in_sd_high:+.2f}]"
    return _number(change.before), _number(change.after), difference, in_sd


def _number(value: float) -> str:
    return f"{value:.4g}"

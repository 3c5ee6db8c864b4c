"""The progress of a run: one live line where there is a terminal, else one line a step; and what status.json says."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.status import StatusFile

SHOWN = (
    ("reward", "reward/mean", "{:.3f}"),
    ("KL", "kl/reference", "{:.3f}"),
    ("length", "length/mean", "{:.1f}"),
    ("tokens/s", "throughput/tokens_per_s", "{:.0f}"),
    ("staleness", "staleness/mean", "{:.1f}"),
)


class RunProgress:
    """Shows the state between steps (`phase`) and the figures of each finished step."""

    def __init__(self, console: Console, total: int, done: int, status: StatusFile) -> None:
        self._console = console
        self._status = status
        self._figures = ""
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("[dim]{task.fields[phase]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("step", total=total, completed=done, figures="", phase="starting")
        self._total = total

    def __enter__(self) -> "RunProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def phase(self, text: str) -> None:
        self._progress.update(self._task, phase=text)
        self._status.phase(text)

    def back_to(self, steps: int) -> None:
        """The run goes on from an earlier commit of `steps` steps."""
        self._progress.update(self._task, completed=steps)
        if not self._console.is_terminal:
            self._console.print(f"going on from the commit of step {steps}", soft_wrap=True, highlight=False)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows the figures of step `step`, counted from 0."""
        figures = "  ".join(f"{name} {form.format(metrics[key])}" for name, key, form in SHOWN if key in metrics)
        self._progress.update(self._task, completed=step + 1, figures=figures)
        if not self._console.is_terminal:
            self._console.print(f"step {step + 1}/{self._total}  {figures}", soft_wrap=True, highlight=False)

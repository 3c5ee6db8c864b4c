"""Curves and histograms as SVG, for the report: numbers in, markup of ours out. Titles are escaped."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 360, 150
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 20


def curve_svg(
    curve: Mapping[str, Any], *, spread: Sequence[float] | None, steps: int, marks: Sequence[int], title: str
) -> str:
    """A line over steps 0 .. steps - 1 with its band (`spread` around it, else min to max of the points), and marks."""
    xs: list[int] = curve["step"]
    ys: list[float] = curve["mean"]
    lows, highs = ys, ys
    if spread is not None and len(spread) == len(ys):
        lows = [y - s for y, s in zip(ys, spread, strict=True)]
        highs = [y + s for y, s in zip(ys, spread, strict=True)]
    elif "min" in curve:
        lows, highs = curve["min"], curve["max"]
    bottom, top = min(lows), max(highs)
    if bottom == top:
        bottom, top = (0.0, 1.0) if bottom == 0 else (bottom - abs(bottom) / 2, top + abs(top) / 2)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(1, steps - 1)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (top - value) / (top - bottom)

    def points(values: Sequence[float], order: int = 1) -> str:
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in list(zip(xs, values, strict=True))[::order])

    band = ""
    if lows is not ys:
        band = f'<polygon points="{points(highs)} {points(lows, -1)}" fill="var(--line)" opacity=".16"/>'
    upright = f'y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="var(--bad)" opacity=".6"'
    lines = "".join(
        f'<line x1="{x(mark):.1f}" x2="{x(mark):.1f}" {upright}/>' for mark in sorted(set(marks)) if 0 <= mark < steps
    )
    dot = "" if len(xs) > 1 else f'<circle cx="{x(xs[0]):.1f}" cy="{y(ys[0]):.1f}" r="2" fill="var(--line)"/>'
    ends = f"{ys[0]:.4g} at step {xs[0]}, {ys[-1]:.4g} at step {xs[-1]}"
    said = f"{title}: {ends}, lowest {min(ys):.4g}, highest {max(ys):.4g}"
    return (
        f"{_open(said)}{_axes(f'{bottom:.3g}', f'{top:.3g}', '0', str(max(0, steps - 1)))}{lines}{band}"
        f'<polyline points="{points(ys)}" fill="none" stroke="var(--line)" stroke-width="1.5"/>{dot}</svg>'
    )


def bars_svg(found: Mapping[str, Any], title: str) -> str:
    """A histogram as `queries.histogram` gives it."""
    if not found["count"]:
        return ""
    counts: list[int] = found["counts"]
    most = max(counts)
    width = (WIDTH - LEFT - RIGHT) / len(counts)
    high = HEIGHT - TOP - BOTTOM
    bars = "".join(
        f'<rect x="{LEFT + i * width + 0.5:.1f}" width="{max(0.5, width - 1):.1f}" '
        f'y="{TOP + high * (1 - count / most):.1f}" height="{high * count / most:.1f}" '
        'fill="var(--line)" opacity=".8"/>'
        for i, count in enumerate(counts)
        if count
    )
    said = f"Histogram of {title}: {found['count']} samples from {found['min']:.4g} to {found['max']:.4g}"
    left, right = f"{found['min']:.3g}", f"{found['max']:.3g}"
    return f"{_open(said)}{_axes('0', str(most), left, right)}{bars}</svg>"


def _open(said: str) -> str:
    shown = escape(said, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{shown}"><title>{shown}</title>'


def _axes(bottom: str, top: str, left: str, right: str) -> str:
    base = HEIGHT - BOTTOM
    return (
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}" stroke="var(--edge)"/>'
        f'<text x="{LEFT - 4}" y="{base}" text-anchor="end">{escape(bottom)}</text>'
        f'<text x="{LEFT - 4}" y="{TOP + 8}" text-anchor="end">{escape(top)}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 5}">{escape(left)}</text>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{escape(right)}</text>'
    )

"""What `attune doctor` prints, and the same as plain values."""

from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.doctor import Report
from cluster.health import Finding, size

WORDS = {"ok": "ok", "note": "note", "short": "MISSING", "broken": "BROKEN"}


def print_report(report: Report, console: Console) -> None:
    console.print(_machines(report))
    if report.shape is not None:
        console.print(_needs(report))
    if report.placed:
        console.print(_plan(report))
    for finding in report.findings:
        console.print(_line(finding), highlight=False, soft_wrap=True, markup=False)
    if report.sizes:
        console.print(_sizes(report))


def plain(report: Report) -> dict[str, Any]:
    """JSON's types: machines, what each part needs by item, where it goes, and every finding."""
    return {
        "machines": [
            {"name": m.name, "cpus": m.cpus, "memory": m.memory, "gpus": list(m.gpus), "shared_memory": m.shared_free}
            for m in report.machines
        ],
        "joined": report.joined,
        "parameters": None if report.shape is None else report.shape.parameters,
        "needs": {
            name: {
                "count": report.parts[name].count,
                "host": need.bytes("host"),
                "device": need.bytes("device"),
                "loading": need.loading,
                "items": {item.name: item.bytes for item in need.items},
            }
            for name, need in report.needs.items()
        },
        "plan": {name: list(places) for name, places in report.placed.items()},
        "sizes": [finding.plain() for finding in report.sizes],
        "findings": [finding.plain() for finding in report.findings],
        "exit_code": report.exit_code,
    }


def _line(finding: Finding) -> str:
    return f"{WORDS[finding.status]:>8}  {finding.subject}: {finding.said}"


def _machines(report: Report) -> Table:
    table = Table(title="The cluster" if report.joined else "This machine", title_justify="left")
    for column in ("node", "CPUs", "memory", "GPUs", "shared memory, free"):
        table.add_column(column)
    for machine in report.machines:
        gpus = ", ".join(size(each) for each in machine.gpus) or "none"
        table.add_row(machine.name, f"{machine.cpus:g}", size(machine.memory), gpus, size(machine.shared_free))
    return table


def _sizes(report: Report) -> Table:
    table = Table(title="Decoders of usual shapes, trained by reinforcement learning here", title_justify="left")
    table.add_column("parameters")
    table.add_column("fits")
    table.add_column("memory, or what is too little")
    for finding in report.sizes:
        table.add_row(finding.subject, "yes" if finding.status == "ok" else "no", finding.said)
    return table


def _needs(report: Report) -> Table:
    """Every item of an actor; the most that it takes at a time is less where not all are there at once."""
    assert report.shape is not None
    title = f"What one actor takes ({report.shape.parameters / 1e6:,.1f} M parameters)"
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    table.add_column("what")
    table.add_column("where")
    table.add_column("bytes", justify="right")
    for name, need in report.needs.items():
        first = f"{report.parts[name].count} x {name}"
        for item in need.items:
            if item.bytes:
                table.add_row(first, item.name, "GPU" if item.where == "device" else "memory", size(item.bytes))
                first = ""
        table.add_row("", "the most at a time", "memory", size(need.bytes("host")))
        if need.bytes("device"):
            table.add_row("", "the most at a time", "GPU", size(need.bytes("device")))
        table.add_section()
    return table


def _plan(report: Report) -> Table:
    table = Table(title="Where it goes", title_justify="left")
    table.add_column("node")
    table.add_column("actors")
    for machine in report.machines:
        here = {name: list(places).count(machine.name) for name, places in report.placed.items()}
        table.add_row(machine.name, ", ".join(f"{count} x {name}" for name, count in here.items() if count) or "none")
    return table

"""What `attune ledger` prints: the counts by state, and a line a prompt that is not committed."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from cluster.ledger_account import Named, RunAccount

COLUMNS = ("GROUP", "STATE", "ATTEMPTS", "OWNER", "LEASE AGE", "WHY")


def print_account(account: RunAccount, console: Console) -> None:
    console.print(
        f"Run {account.run_id}, from {account.source}; the last commit holds {account.committed_steps} steps",
        highlight=False,
        soft_wrap=True,
    )
    table = Table()
    table.add_column("state")
    table.add_column("groups", justify="right")
    for state, groups in account.counts.items():
        table.add_row(state, str(groups))
    console.print(table)
    counters = account.counters
    console.print(
        f"Late answers, dropped: {account.late} (samples {counters.get('late', 0)}, scores "
        f"{counters.get('late_scores', 0)}, failures {counters.get('late_failures', 0)}). Leases lost: "
        f"{counters.get('released', 0)} to dead actors, {counters.get('expired', 0)} not renewed. Failures met: "
        f"{counters.get('failures_infra', 0)} infra, {counters.get('failures_data', 0)} data. Generated again as too "
        f"old: {counters.get('regenerated', 0)}",
        highlight=False,
        soft_wrap=True,
    )
    for note in account.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)


def lines_of(rows: tuple[Named, ...]) -> Iterator[str]:
    """One line a row, in columns: plain text, since there may be a hundred thousand of them."""
    cells = [
        (
            row.group_id,
            row.state,
            str(row.attempts),
            row.owner or "-",
            "-" if row.leased_s is None else f"{row.leased_s:.0f} s",
            " ".join(row.why.split()),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
    for line in (COLUMNS, *cells):
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()

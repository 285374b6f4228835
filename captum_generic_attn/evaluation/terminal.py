"""Prints a report in the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from captum_generic_attn.evaluation.report import Report
from captum_generic_attn.evaluation.sheets import Sheet


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the tables of a report, then their legend and the notes.

    Args:
        report: the report of an evaluation.
        console: the console to print to; `None`: stdout.
    """
    console = console or Console(highlight=False)
    for sheet in report.sheets():
        console.print()
        # Not the table's own title, which would be as narrow as the table.
        console.print(Padding(sheet.title, (0, 1)), style="bold")
        console.print(_table(sheet))
    for line in report.legend():
        console.print(Padding(line, (0, 1)), style="dim")
    reasons: dict[str, list[str]] = {}
    for name, why in report.left_out.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        console.print(Padding(f"Left out: {', '.join(names)}: {why}.", (0, 1)))
    for note in report.notes:
        console.print(Padding(f"Note: {note}", (0, 1)))


def _table(sheet: Sheet) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, footer_style="dim")
    table.add_column("method", footer="examples", no_wrap=True)
    for head, count in zip(sheet.heads, sheet.counts, strict=True):
        table.add_column(head, footer=str(count), justify="right")
    ours = [name for name in sheet.rows if name not in sheet.controls]
    for name, row in sheet.rows.items():
        # A narrow terminal breaks a cell between the figure and its interval.
        cells = [cell.replace("± ", "±") for cell in row]
        table.add_row(
            name,
            *cells,
            style="dim" if name in sheet.controls else None,
            end_section=bool(ours) and name == ours[-1],
        )
    return table

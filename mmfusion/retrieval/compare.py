"""Runs side by side on the terminal."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmfusion.retrieval.comparison import Comparison, QueryValues
from mmfusion.retrieval.report import SHOWN, number, results_table
from mmfusion.retrieval.significance import Paired


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Views side by side, the primary one first, best values bold; tests, single queries, and what differs."""
    console = console or Console()
    for run in comparison.runs:
        _print(f"{run.letter}  {run.path}", console)
    _print(f"{comparison.split}, with 95 % intervals", console)
    console.print(results_table(comparison.sections, mark_best=len(comparison.runs) > 1))
    for note in comparison.notes:
        _print(note, console, style="yellow")
    _print_tests(comparison.paired, console)
    if comparison.per_query:
        _print_queries(comparison.per_query, console)
    if len(comparison.configured) > 1:
        _print_differences(comparison.differences, comparison.configured, console)


def _print_tests(tests: Sequence[Paired], console: Console) -> None:
    if not tests:
        return
    _print(f"against {tests[0].baseline}, query by query", console)
    if len(tests) > 1:
        _print(f"p by Holm's method for {len(tests)} tests; intervals are of each test alone, not corrected", console)
    for column in dict.fromkeys(test.metric.rpartition("/")[0] for test in tests):
        own = [test for test in tests if test.metric.rpartition("/")[0] == column]
        counts = sorted({test.queries for test in own})
        queries = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        _print(f"{column}, {queries} queries", console, style="bold")
        for test in own:
            _print(f"  {SHOWN[test.metric.rpartition('/')[2]]:<10}  {test.verdict}", console)


def _print_queries(values: QueryValues, console: Console) -> None:
    """The queries that each later run gains and loses most on."""
    baseline, *others = values.values
    for letter in others:
        gains, losses = values.extremes(letter)
        if not gains and not losses:
            continue
        table = Table(box=None, pad_edge=False)
        table.add_column(Text(values.metric), overflow="ellipsis", no_wrap=True, max_width=60)
        for header in (baseline, letter):
            table.add_column(header, justify="right")
        for title, rows in ((f"{letter} gains most on", gains), (f"{letter} loses most on", losses)):
            table.add_row(Text(title if rows else f"{title} no query", style="bold"))
            for row in rows:
                numbers = (number(values.values[run][row]) for run in (baseline, letter))
                table.add_row(Text(f"  {_visible(values.queries[row])}"), *numbers)
        console.print(table)


def _print_differences(rows: Mapping[str, Sequence[Any]], names: Sequence[str], console: Console) -> None:
    if not rows:
        console.print("Their configurations, as far as they are known, do not differ.")
        return
    table = Table(box=None, pad_edge=False)
    for header in ("what differs", *names):
        table.add_column(Text(header), overflow="fold")
    for key, values in rows.items():
        table.add_row(Text(key), *(Text("-" if value is None else str(value)) for value in values))
    console.print(table)


def _visible(text: str) -> str:
    """On one line, without control characters: what somebody typed into a search box must not steer the terminal."""
    return "".join(char for char in " ".join(text.split()) if unicodedata.category(char) != "Cc")


def _print(line: str, console: Console, style: str = "") -> None:
    """A line as it is: no markup, no highlighting, not broken."""
    console.print(Text(line), style=style, highlight=False, soft_wrap=True)

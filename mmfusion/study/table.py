"""A study on the terminal, from what report.json holds."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmfusion.retrieval.html.numbers import interval, metric_title, number, signed
from mmfusion.retrieval.significance import p_text

COSTS = {"minutes": "min", "samples_per_s": "samples/s", "head": "head", "all": "all"}
WIDE = 100  # columns of a terminal that has room for all costs beside the arms' names; the report has them always


def print_study(report: Mapping[str, Any], console: Console) -> None:
    """A table per variant, then the claims and what is missing."""
    title = metric_title(report["metric"].rpartition("/")[2])
    seeds = len(report["seeds"])
    console.print(
        f"study {report['study']}: {report['metric']} on {report['split']}, mean over {seeds} seed{'s'[: seeds != 1]}; "
        f"difference to {report['reference']}; 95 % intervals; p corrected for "
        f"the {report['tests']['table']} tests of the table, in claims for their {report['tests']['claims']}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for variant, rows in report["variants"].items():
        costs = list(COSTS)[: None if console.width >= WIDE else 1]
        console.print(_table(variant, title, rows, report["seeds"], costs))
    for line in [*report["notes"], *(claim["sentence"] for claim in report["claims"])]:
        console.print(Text(line), soft_wrap=True)
    for one in report["missing"]:
        console.print(Text(f"missing: {one['arm']} {one['variant']} seed {one['seed']}: {one['why']}"), soft_wrap=True)


def _table(
    variant: str, title: str, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int], costs: Sequence[str]
) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(variant, overflow="fold")
    for name in (title, "difference", "p"):
        table.add_column(name, no_wrap=True)
    for name in costs:
        table.add_column(COSTS[name], no_wrap=True, justify="right")
    for row in rows:
        difference = row["difference"]
        few = f" ({len(row['seeds'])} of {len(seeds)} seeds)" if 0 < len(row["seeds"]) < len(seeds) else ""
        table.add_row(
            Text(row["arm"] + few),
            f"{number(row['mean']['value'])} {interval(row['mean'])}" if row["mean"] else "–",
            f"{signed(difference['value'])} {interval(difference)}" if difference else "",
            bare_p(difference["p_holm"]) if difference else "",
            *(brief(row["cost"][name]) for name in costs),
        )
    return table


def bare_p(value: float) -> str:
    """.012 or < .0001."""
    return p_text(value).removeprefix("= ")


def brief(value: float | None) -> str:
    """1.4, 38, 1,250, 82k, 23.4M; nothing for None."""
    if value is None:
        return ""
    if value < 10:
        return f"{value:.1f}"
    if value < 10_000:
        return f"{value:,.0f}"
    return f"{value / 1e3:,.0f}k" if value < 999_500 else f"{value / 1e6:.1f}M"

"""results.json and the table on the terminal.

results[split][view][metric] = {"value", "low", "high"}; beside the splits stand the keys RESERVED.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmfusion.retrieval.files import replaced

RESERVED = ("run", "slices", "calibration", "gates", "exclusive")
FIRST = ("text", "image", "fused")  # the order of views in tables; others follow
SHOWN = {"ndcg@10": "nDCG@10", "recall@100": "Recall@100", "mrr": "MRR"}

Cell = Mapping[str, Any]
View = Mapping[str, Cell]


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """A reader sees the old file or the new one, whole. A NaN (a mean over no query) becomes null, so it is JSON."""
    with replaced(path) as beside:
        beside.write_text(json.dumps(_without_nan(results), indent=2, allow_nan=False), encoding="utf-8")


def read_results(path: Path) -> dict[str, Any]:
    """Reads what `write_results` wrote. Raises ValueError on a file that is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); write it anew with `make eval RUN={path.parent}`") from None


def splits(results: Mapping[str, Any]) -> list[str]:
    return [key for key in results if key not in RESERVED]


def primary_view(views: Iterable[str]) -> str:
    """`fused`, or else the only view that the run trained; the first one where none has such a name."""
    views = list(views)
    return next((view for view in reversed(FIRST) if view in views), views[0])


def print_table(results: Mapping[str, Any], split: str, console: Console | None = None) -> None:
    """Prints a split's views, one section per label column: text, image and fused first, then the others."""
    if split not in splits(results):
        raise ValueError(f"no split {split!r} in the results; there are: {', '.join(splits(results)) or 'none'}")
    views: dict[str, View] = results[split]
    columns = label_columns(views.values())
    sections = {column: {view: in_column(views[view], column) for view in ordered(views)} for column in columns}
    console = console or Console()
    console.print(f"{split}, with 95 % intervals", highlight=False)
    console.print(results_table(sections))


def ordered(views: Iterable[str]) -> list[str]:
    """text, image and fused first, then the others as they come."""
    views = list(views)
    return [view for view in FIRST if view in views] + [view for view in views if view not in FIRST]


def label_columns(views: Iterable[View]) -> list[str]:
    """The label columns of `<label column>/<name>` metrics, in order of appearance."""
    return list(dict.fromkeys(metric.rpartition("/")[0] for view in views for metric in view))


def in_column(view: View, column: str) -> dict[str, Cell]:
    """A view's metrics in one label column, by their bare names."""
    return {metric.rpartition("/")[2]: cell for metric, cell in view.items() if metric.rpartition("/")[0] == column}


def results_table(sections: Mapping[str, Mapping[str, Mapping[str, Cell]]], mark_best: bool = False) -> Table:
    """sections[title][row][metric]; the metrics are nDCG@10, Recall@100 and MRR, or all where none of those is there.

    mark_best: the best values of each section and metric in bold.
    """
    metrics = dict.fromkeys(name for rows in sections.values() for cells in rows.values() for name in cells)
    shown = {name: title for name, title in SHOWN.items() if name in metrics} or {name: name for name in metrics}
    table = Table(box=None, pad_edge=False)
    table.add_column(overflow="fold")
    for title in shown.values():
        table.add_column(title, no_wrap=True)
    for title, rows in sections.items():
        table.add_row(Text(title, style="bold"))
        best = {name: _best(cells.get(name) for cells in rows.values()) if mark_best else None for name in shown}
        for row, cells in rows.items():
            table.add_row(Text(f"  {row}"), *(_cell(cells.get(name), best[name]) for name in shown))
    return table


def _cell(cell: Cell | None, best: float | None) -> Text:
    if cell is None or not counts(cell["value"]):
        return Text("-")
    text = Text(number(cell["value"]), style="bold" if cell["value"] == best else "")
    return text.append(f" [{number(cell['low'])}, {number(cell['high'])}]", style="dim not bold")


def _best(cells: Iterable[Cell | None]) -> float | None:
    return max((cell["value"] for cell in cells if cell and counts(cell["value"])), default=None)


def counts(value: float | None) -> bool:
    """Whether there is a number: the mean over no query is NaN, null in a file."""
    return value is not None and not math.isnan(value)


def number(value: float) -> str:
    """.543, without the zero in front: three metrics with their intervals fit into 80 columns."""
    return f"{value:.3f}".removeprefix("0")


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What metrics.csv holds: curves over optimizer steps, and the stages that they went through."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from jaxtyping import Float


@dataclass(frozen=True)
class Curve:
    """Values at steps, in the order of the log; spread: their standard deviations, where they were logged."""

    steps: Float[np.ndarray, "row"]
    values: Float[np.ndarray, "row"]
    spread: Float[np.ndarray, "row"] | None = None


@dataclass(frozen=True)
class Stage:
    """A stage and the steps it was logged at; it ends where the next one starts."""

    name: str
    first: float
    last: float


def read_curves(path: Path) -> dict[str, Curve]:
    """Every numeric column of Lightning's CSV log but `epoch` and `step`, without its blank cells."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("step")]
    names = [name for name in (rows[0] if rows else {}) if name and name not in ("epoch", "step")]
    return {name: curve for name in names if len((curve := _column(rows, name)).steps)}


def stages(log: Mapping[str, Curve], config: Path) -> list[Stage]:
    """The stages in the order of the run, named as in config.yaml; the last one ends with the log."""
    if "stage" not in log:
        return []
    names = _stage_names(config)
    steps, values = log["stage"].steps, log["stage"].values
    order = list(dict.fromkeys(values.tolist()))
    starts = [float(steps[values == stage].min()) for stage in order]
    ends = [*starts[1:], float(max(curve.steps.max() for curve in log.values()))]
    return [Stage(_name(names, int(stage)), *span) for stage, *span in zip(order, starts, ends, strict=True)]


def clipped(spans: Sequence[Stage], curves: Mapping[str, Curve]) -> list[Stage]:
    """The stages in which the curves were logged, cut to where they begin and end."""
    first = min(curve.steps.min() for curve in curves.values())
    last = max(curve.steps.max() for curve in curves.values())
    met = [span for span in spans if span.first < last and span.last > first]
    return [Stage(span.name, float(max(span.first, first)), float(min(span.last, last))) for span in met]


def under(log: Mapping[str, Curve], prefix: str) -> dict[str, Curve]:
    """The curves of a group, by what follows the prefix: {"query_text": ...} under train/."""
    return {name.removeprefix(prefix): curve for name, curve in log.items() if name.startswith(prefix)}


def gates(log: Mapping[str, Curve]) -> dict[str, Curve]:
    """The mean of each gate or expert over products, with its standard deviation."""
    found = under(log, "gates/")
    means = {name.removesuffix("/mean"): curve for name, curve in found.items() if name.endswith("/mean")}
    return {name: _with_spread(curve, found.get(f"{name}/std")) for name, curve in means.items()}


def _with_spread(curve: Curve, spread: Curve | None) -> Curve:
    known = spread is not None and np.array_equal(curve.steps, spread.steps)
    return Curve(curve.steps, curve.values, spread.values if spread is not None and known else None)


def _column(rows: Sequence[Mapping[str, str]], name: str) -> Curve:
    cells = [(float(row["step"]), _value(row.get(name))) for row in rows]
    points = np.array([cell for cell in cells if np.isfinite(cell[1])]).reshape(-1, 2)
    return Curve(points[:, 0], points[:, 1])


def _value(cell: str | None) -> float:
    """NaN for a blank cell or one that holds no number."""
    try:
        return float(cell or "nan")
    except ValueError:
        return np.nan


def _stage_names(config: Path) -> list[str]:
    if not config.is_file():
        return []
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    return [str(name) for name in (settings.get("model") or {}).get("stages") or {}]


def _name(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else f"stage {index}"

"""Label columns of a judgments table: from letters or numbers to gains."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from datamodules.importing.staged import Table
from datamodules.manifest import Label

ESCI = {"E": 1.0, "S": 0.1, "C": 0.01, "I": 0.0}
IDS = ("query_id", "product_id")
RESERVED = ("query", "product")  # columns of judgments.parquet and of a sample's judgments
Gains = Mapping[str, Mapping[str, float]]


def label_columns(
    table: Table, gains: Gains, positive_from: Mapping[str, float], primary: str | None, folder: Path
) -> tuple[dict[str, Label], dict[str, np.ndarray]]:
    """Every column besides the ids is one, `label` by the name of `relevance`; the primary one comes first.

    Gains are float64, NaN where a cell is blank, mapped from files that are written to `folder`. Raises ValueError for
    a label that is not known, numbers and letters in one column, a row without any label, and options that name no
    column.
    """
    columns = _named(table)
    _check_options(columns, {"gains": gains, "positive_from": positive_from, "primary": [primary] if primary else []})
    first = primary or ("relevance" if "relevance" in columns else next(iter(columns)))
    ordered = sorted(columns, key=lambda name: name != first)
    labels, gain = {}, {}
    blank = np.ones(len(table), bool)
    for number, name in enumerate(ordered):
        shape = (len(table),)
        gain[name] = np.lib.format.open_memmap(folder / f"gain-{number}.npy", "w+", np.float64, shape).view(np.ndarray)
        worth = _fill(gain[name], table, columns[name], gains.get(name))
        labels[name] = Label(worth, _threshold(name, positive_from.get(name, 1.0)))
        blank &= np.isnan(gain[name])
    if blank.any():
        row = int(np.argmax(blank))
        raise table.error(row, f"no label in {', '.join(columns.values())}; leave out pairs nobody judged")
    return labels, gain


def _named(table: Table) -> dict[str, str]:
    """Our names of the label columns, with the table's own."""
    columns: dict[str, str] = {}
    for theirs in table.names:
        name = "relevance" if theirs == "label" else theirs.lower()
        if theirs in IDS:
            continue
        if name in columns or name in RESERVED or not name or set(name) & set("/@"):
            raise ValueError(
                f"{table.path}: the column {theirs!r} would be the label {name!r}, which is taken or not allowed "
                f"(allowed are lower-case names without / and @, once each, and not {' or '.join(RESERVED)}): rename it"
            )
        columns[name] = theirs
    if not columns:
        raise ValueError(f"{table.path} has no label column; its columns are: {', '.join(table.names)}")
    return columns


def _check_options(columns: Mapping[str, str], options: Mapping[str, Iterable[str]]) -> None:
    for option, names in options.items():
        for name in names:
            if name not in columns:
                raise ValueError(f"{option} names the label column {name!r}; there are: {', '.join(columns)}")


def _threshold(name: str, value: float) -> float:
    if not 0 < float(value) < np.inf:
        raise ValueError(f"positive_from of {name!r} is {value}; expected a gain above 0")
    return float(value)


def _fill(
    values: np.ndarray, table: Table, column: str, override: Mapping[str, float] | None
) -> dict[str, float] | None:
    """Sets the gain of every row; returns what the column's labels are worth (None: numbers, worth themselves)."""
    worth = ESCI if override is None else _table(column, override)
    first: dict[str, tuple[int, str]] = {}  # row and label where each kind of label occurs first
    for start, chunk in table.chunks(column):
        encoded = pc.dictionary_encode(pc.utf8_trim_whitespace(chunk))
        codes, labels = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
        gains = np.full(len(labels), np.nan)
        for code, label in enumerate(labels):
            number = _number(label)
            kind = _kind(label, worth, number)
            if kind not in first:
                first[kind] = start + int(np.argmax(codes == code)), label
            gains[code] = worth.get(label, np.nan if number is None else number)
        values[start : start + len(chunk)] = gains[codes]
    letters = override is not None or "known" in first or not {"number", "negative"} & set(first)
    wrong = [first[kind] for kind in ("negative", "unknown", *(["number"] * letters)) if kind in first]
    if wrong:
        row, label = min(wrong)
        raise table.error(row, _problem(column, label, worth if letters else None, _number(label)))
    return dict(worth) if letters else None


def _kind(label: str, worth: Mapping[str, float], number: float | None) -> str:
    if not label or label in worth:
        return "known" if label else "blank"
    if number is None:
        return "unknown"
    return "negative" if number < 0 else "number"


def _table(column: str, override: Mapping[str, float]) -> dict[str, float]:
    worth = {str(label): float(gain) for label, gain in override.items()}
    bad = [f"{label}: {gain}" for label, gain in worth.items() if not 0 <= gain < np.inf]
    if bad or not worth:
        raise ValueError(f"gains of {column!r}: {', '.join(bad) or 'no label'}; expected label: gain, none below 0")
    if odd := [label for label in worth if set(label) & set("/@")]:
        raise ValueError(
            f"gains of {column!r}: the label {odd[0]!r} is not allowed; metrics are named by it: no / and @"
        )
    return worth


def _number(label: str) -> float | None:
    try:
        value = float(label)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def _problem(column: str, label: str, worth: Mapping[str, float] | None, number: float | None) -> str:
    found = f"the label {label!r} in column {column!r}"
    if worth is None and number is not None:
        return f"{found} is negative; a gain is 0 or more"
    if worth is None:
        return f"{found} is not known; other labels there are numbers: a column holds numbers or letters, not both"
    mixed = "; a column holds numbers or letters, not both" if number is not None else ""
    return f"{found} is not known; known are {', '.join(worth)}{mixed}"

"""Label columns of a judgments table: from letters or numbers to gains."""

from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow.compute as pc

from datamodules.manifest import Label
from datamodules.tables import Table

ESCI = {"E": 1.0, "S": 0.1, "C": 0.01, "I": 0.0}
IDS = ("query_id", "product_id")
RESERVED = ("query", "product")  # columns of judgments.parquet and of a sample's judgments
Gains = Mapping[str, Mapping[str, float]]


def label_columns(
    table: Table, gains: Gains, positive_from: Mapping[str, float], primary: str | None
) -> tuple[dict[str, Label], dict[str, np.ndarray]]:
    """Every column besides the ids is one, `label` by the name of `relevance`; the primary one comes first.

    Gains are float64, NaN where a cell is blank. Raises ValueError for a label that is not known, numbers and letters
    in one column, a row without any label, and options that name no column.
    """
    columns = _named(table)
    _check_options(columns, {"gains": gains, "positive_from": positive_from, "primary": [primary] if primary else []})
    first = primary or ("relevance" if "relevance" in columns else next(iter(columns)))
    ordered = sorted(columns, key=lambda name: name != first)
    labels, gain = {}, {}
    for name in ordered:
        worth, gain[name] = _gains(table, columns[name], gains.get(name))
        labels[name] = Label(worth, _threshold(name, positive_from.get(name, 1.0)))
    empty = np.flatnonzero(np.all([np.isnan(values) for values in gain.values()], axis=0))
    if len(empty):
        raise table.error(int(empty[0]), f"no label in {', '.join(columns.values())}; leave out pairs nobody judged")
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


def _gains(
    table: Table, column: str, override: Mapping[str, float] | None
) -> tuple[dict[str, float] | None, np.ndarray]:
    """What the column's labels are worth (None: numbers, worth themselves), and the gain of every row."""
    encoded = pc.dictionary_encode(pc.utf8_trim_whitespace(table[column])).combine_chunks()
    codes, labels = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
    numbers = {label: _number(label) for label in labels}
    letters = override is not None or any(label in ESCI for label in labels)
    worth: dict[str, float] | None = None
    if letters or not any(number is not None for number in numbers.values()):
        worth = ESCI if override is None else _table(column, override)
    values = np.full(len(labels), np.nan)
    for code, label in enumerate(labels):
        gain = worth.get(label) if worth else numbers[label]
        if label and (gain is None or gain < 0):
            raise table.error(int(np.argmax(codes == code)), _problem(column, label, worth, numbers[label]))
        values[code] = np.nan if gain is None else gain
    return worth, values[codes]


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

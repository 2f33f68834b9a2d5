"""What an import found, printed at its end: nothing that was left out goes unsaid."""

import csv
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from rich.console import Console
from rich.table import Table

from datamodules.catalogue import Catalogue
from datamodules.importing.outputs import MISSING
from datamodules.manifest import SPLITS, Label, Manifest

FEW = 6  # distinct numbers that are listed one by one
WORST = 3  # hosts that are listed


def print_summary(catalogue: Catalogue, manifest: Manifest, out: Path, console: Console | None = None) -> None:
    """Products, photos, queries and judgments per split with a histogram of labels, and the trainable part."""
    console = console or Console(soft_wrap=True)
    trainable, pairs = (sum(getattr(shard, name) for shard in manifest.shards) for name in ("trainable", "pairs"))
    console.print(_splits(catalogue, manifest), _histograms(catalogue, manifest), sep="\n")
    console.print(
        f"{manifest.products:,} products in {len(manifest.shards)} shards; {manifest.photos:,} with a photo, "
        f"{manifest.missing_photos:,} name one that could not be had, {manifest.broken_photos:,} photos are "
        f"broken and left out\n{_reasons(out / MISSING)}"
        f"text fields: {', '.join(manifest.fields)}\n"
        f"to train on, by {manifest.primary}: {trainable:,} products in {pairs:,} pairs",
        highlight=False,
        markup=False,
    )
    if repeated := len(catalogue.judgments) - len(catalogue.query):
        told = f"judged more than once: {repeated:,} judgments left out; the highest gain of a pair counts"
        console.print(told, highlight=False)
    console.print(f"source: {_told(manifest.source)}", highlight=False, markup=False)
    if catalogue.shared_queries:
        console.print(
            "query texts in two splits: " + ", ".join(catalogue.shared_queries), highlight=False, markup=False
        )
    console.print(f"shards: {out}", highlight=False, markup=False)


def _reasons(path: Path) -> str:
    """Why photos are missing, and which hosts most of them were to come from; a line, or "" when none is missing."""
    if not path.is_file():  # shards of an earlier version
        return ""
    with path.open(encoding="utf-8", newline="") as file:
        missing = [(row["reason"], _host(row["image"])) for row in csv.DictReader(file)]
    told = [f"why: {_counted(reason for reason, _ in missing)}"]
    if hosts := [host for _, host in missing if host]:
        told.append(f"hosts: {_counted(hosts, WORST)}")
    return f"{'; '.join(told)} (all in {path.name})\n" if missing else ""


def _host(address: str) -> str | None:
    """None for a file's name, and for an address that is none."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _told(source: Mapping[str, Any]) -> str:
    """What the importer says of itself, and of what it left out."""
    parts = [
        f"{key}: {{{_told(value)}}}" if isinstance(value, Mapping) else f"{key}: {value}"
        for key, value in source.items()
    ]
    return ", ".join(parts)


def _counted(words: Iterable[str], most: int | None = None) -> str:
    return ", ".join(f"{word} {count:,}" for word, count in Counter(words).most_common(most))


def _splits(catalogue: Catalogue, manifest: Manifest) -> Table:
    table = Table("split", "queries", "no positive", "judgments", "not listed is")
    positive = catalogue.positive(manifest.primary)
    for name, split in manifest.splits.items():
        rows = catalogue.split_of_judgment == SPLITS.index(name)
        satisfied = len(np.unique(catalogue.query[rows & positive]))
        counts = [f"{count:,}" for count in (split.queries, split.queries - satisfied, split.judgments)]
        table.add_row(name, *counts, split.unlisted)
    return table


def _histograms(catalogue: Catalogue, manifest: Manifest) -> Table:
    table = Table("label", "split", "judgments")
    for (column, label), split in itertools.product(manifest.labels.items(), manifest.splits):
        rows = catalogue.split_of_judgment == SPLITS.index(split)
        table.add_row(column, split, histogram(catalogue.gain[column][rows], label))
    return table


def histogram(gain: np.ndarray, label: Label) -> str:
    """How often each label occurs: by its letter, by its number when there are few, else the quartiles."""
    known = gain[~np.isnan(gain)]
    values, counts = np.unique(known, return_counts=True)
    if label.gains is None and len(values) > FEW:
        return f"{len(known):,} numbers, quartiles " + " ".join(f"{q:g}" for q in np.quantile(known, np.arange(5) / 4))
    names = {value: f"{value:g}" for value in values.tolist()}
    if label.gains is not None:
        names = {
            value: "/".join(name for name, worth in label.gains.items() if worth == value) for value in values.tolist()
        }
    found = zip(values.tolist()[::-1], counts.tolist()[::-1], strict=True)
    return ", ".join(f"{names[value]} {count:,}" for value, count in found)

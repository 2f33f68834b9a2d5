"""Catalogue -> shards: deterministic tars, the tables and the manifest, or nothing at all."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.catalogue import Catalogue
from datamodules.manifest import SPLITS, UNLISTED, Manifest, Split, Unlisted, read_manifest
from datamodules.partial import partial_folder, publish
from datamodules.samples import DenseJudgments, write_samples

LEAST_SHARDS, MOST_PRODUCTS = 16, 2048
TABLES = ("index.parquet", "judgments.parquet", "queries.parquet")


def write_shards(
    catalogue: Catalogue,
    out: str | Path,
    seed: int = 0,
    *,
    shard_size: int | None = None,
    unlisted: Mapping[str, Unlisted] | None = None,
    on_broken_photo: Literal["error", "drop"] = "error",
) -> Manifest:
    """Writes the catalogue's shards into the folder `out`; the same input and seed give the same bytes.

    Everything is written to `<out>.partial` and renamed at the end, so `out` is whole or absent. An `out` that holds
    these very shards is left as it is; any other one raises ValueError.

    seed: of the permutation that deals products to shards (a catalogue sorted by category would defeat the stream's
        shuffle, which sees only a window).
    shard_size: most products of a shard; products are spread evenly. Default: 2048, less if that makes under 16 shards.
    unlisted: per split, what a pair means that is not judged; default: unknown in train, irrelevant in val and test.
    on_broken_photo: what to do about a photo that is no image: an error, or the product goes without (and is counted).
    """
    out = Path(out)
    if on_broken_photo not in ("error", "drop"):
        raise ValueError(f"on_broken_photo is {on_broken_photo!r}; expected 'error' or 'drop'")
    plan = _plan(catalogue, seed, unlisted or {})
    shards = _shard_count(len(catalogue.products), shard_size)
    existing = _existing(out, plan, shards)
    with partial_folder(out) as folder:
        judgments = _dense(catalogue, seed)
        written = write_samples(catalogue, judgments, folder, shards, on_broken_photo == "drop")
        _write_queries(catalogue, judgments, folder / "queries.parquet")
        _write_judgments(judgments, folder / "judgments.parquet")
        manifest = Manifest(**plan, **written, tables={name: _sha256(folder / name) for name in TABLES})
        (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
        if existing and existing.hash != manifest.hash:
            raise ValueError(f"{out} holds other shards (tables or photos differ); choose another OUT or delete it")
        if not existing:
            publish(folder, out)
    return manifest


def _plan(catalogue: Catalogue, seed: int, unlisted: Mapping[str, Unlisted]) -> dict[str, Any]:
    """What the manifest will say that is known before anything is written."""
    if seed < 0:
        raise ValueError(f"seed is {seed}; expected 0 or more")
    for split, meaning in unlisted.items():
        if split not in SPLITS or meaning not in ("irrelevant", "unknown"):
            expected = f"expected {', '.join(SPLITS)}, each irrelevant or unknown"
            raise ValueError(f"unlisted says {split}: {meaning}; {expected}")
    queries = catalogue.queries.texts("split")
    judged = np.bincount(catalogue.split_of_judgment, minlength=len(SPLITS)).tolist()
    return {
        "name": catalogue.name,
        "seed": seed,
        "source": catalogue.source,
        "fields": catalogue.fields,
        "labels": catalogue.labels,
        "splits": {
            split: Split(queries.count(split), judged[number], {**UNLISTED, **unlisted}[split])
            for number, split in enumerate(SPLITS)
            if split in queries
        },
        "products": len(catalogue.products),
    }


def _shard_count(products: int, shard_size: int | None) -> int:
    if shard_size is None:
        return min(products, max(LEAST_SHARDS, -(-products // MOST_PRODUCTS)))
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}; expected at least 1 product per shard")
    return -(-products // shard_size)


def _existing(out: Path, plan: Mapping[str, Any], shards: int) -> Manifest | None:
    """The manifest at `out`, None when nothing is there; ValueError when it is not what would be written."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        manifest = read_manifest(out)
    except ValueError as error:
        raise ValueError(f"{out} exists and is not these shards; choose another OUT or delete it. {error}") from error
    there = {**{name: getattr(manifest, name) for name in plan}, "shards": len(manifest.shards)}
    for name, value in {**plan, "shards": shards}.items():
        if there[name] != value or (name == "labels" and list(there[name]) != list(value)):
            found = f"{name} there: {there[name]}, now: {value}"
            raise ValueError(f"{out} holds other shards ({found}); choose another OUT or delete it")
    return manifest


def _dense(catalogue: Catalogue, seed: int) -> DenseJudgments:
    order = np.random.default_rng(seed).permutation(len(catalogue.products))
    dense = np.empty_like(order)
    dense[order] = np.arange(len(order))
    query, product = catalogue.query, dense[catalogue.product]
    rows = np.lexsort((product, query))
    return DenseJudgments(
        order=order,
        query=query[rows],
        product=product[rows],
        gain={name: gain[rows] for name, gain in catalogue.gain.items()},
        positive=catalogue.positive(next(iter(catalogue.labels)))[rows],
        train=(catalogue.split_of_judgment == SPLITS.index("train"))[rows],
    )


def _write_queries(catalogue: Catalogue, judgments: DenseJudgments, path: Path) -> None:
    count = len(catalogue.queries)
    positives = np.bincount(judgments.query[judgments.positive], minlength=count).astype(np.int32)
    texts = {name: catalogue.queries[name].cast(pa.string()) for name in catalogue.queries.names}
    first = {"query_id": texts.pop("query_id"), "id": np.arange(count)}
    pq.write_table(pa.table({**first, **texts, "positives": positives}), path)


def _write_judgments(judgments: DenseJudgments, path: Path) -> None:
    # from_pandas: NaN, not judged, becomes null
    gains = {name: pa.array(gain, from_pandas=True) for name, gain in judgments.gain.items()}
    pq.write_table(pa.table({"query": judgments.query, "product": judgments.product, **gains}), path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

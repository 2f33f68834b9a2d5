"""Catalogue -> shards: deterministic tars, the tables and the manifest. A stopped import goes on where it was."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from datamodules.catalogue import Catalogue
from datamodules.importing.dense import dense_judgments, store_judged
from datamodules.importing.fetching import chunks_ahead
from datamodules.importing.jobs import Jobs, run_map, workers
from datamodules.importing.outputs import write_tables
from datamodules.importing.partial import DONE, IMPORT, LOCK, STAGING, discard, partial_folder, publish, tidy
from datamodules.importing.records import Done, differences, import_record, read_record, write_whole
from datamodules.importing.samples import ShardWriter
from datamodules.manifest import SPLITS, UNLISTED, Manifest, Split, Unlisted, read_manifest
from datamodules.photos.options import PhotoOptions

LEAST_SHARDS, MOST_PRODUCTS = 16, 2048
ENOUGH, HOPELESS = 1000, 5  # failed downloads, and times max_failed, from which on an import stops in between


@dataclass(frozen=True)
class Writing:
    """How a catalogue becomes shards.

    seed: of the permutation that deals products to shards (a catalogue sorted by category would defeat the stream's
        shuffle, which sees only a window).
    shard_size: most products of a shard; products are spread evenly. Default: 2048, less if that makes under 16 shards.
    unlisted: per split, what a pair means that is not judged; default: the data set's own, else unknown in train,
        irrelevant in val and test.
    on_broken_photo: what to do about a photo on disk that is no image: an error, or the product goes without.
    jobs: see jobs.run_map.
    """

    seed: int = 0
    shard_size: int | None = None
    unlisted: Mapping[str, Unlisted] = field(default_factory=dict)
    on_broken_photo: Literal["error", "drop"] = "error"
    jobs: Jobs = 1
    photos: PhotoOptions = field(default_factory=PhotoOptions)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; expected 0 or more")
        if self.shard_size is not None and self.shard_size < 1:
            raise ValueError(f"shard_size is {self.shard_size}; expected at least 1 product per shard")
        if self.on_broken_photo not in ("error", "drop"):
            raise ValueError(f"on_broken_photo is {self.on_broken_photo!r}; expected 'error' or 'drop'")
        for split, meaning in self.unlisted.items():
            if split not in SPLITS or meaning not in ("irrelevant", "unknown"):
                expected = f"expected {', '.join(SPLITS)}, each irrelevant or unknown"
                raise ValueError(f"unlisted says {split}: {meaning}; {expected}")


def write_shards(catalogue: Catalogue, out: str | Path, seed: int = 0, **options: Any) -> Manifest:
    """Writes the catalogue's shards into the folder `out`; the same input and seed give the same bytes. `options`: of
    `Writing`.

    Everything is written to `<out>.partial` and renamed at the end, so `out` is whole or absent. An `out` that holds
    these very shards is left as it is; any other one raises ValueError.
    """
    writing = Writing(seed, **{name: value for name, value in options.items() if value is not None})
    with partial_folder(Path(out)) as folder:
        return write_into(folder, catalogue, Path(out), writing)


def write_into(folder: Path, catalogue: Catalogue, out: Path, writing: Writing) -> Manifest:
    """As `write_shards`, into the partial folder of `out`."""
    shards = _shard_count(len(catalogue.products), writing.shard_size)
    plan, record = _plan(catalogue, writing), _record(catalogue, writing, shards)
    existing = _existing(out, plan, shards)
    (folder / STAGING).mkdir(exist_ok=True)
    judgments = dense_judgments(catalogue, writing.seed, folder / STAGING)
    store_judged(judgments, folder / STAGING)
    writer = _shard_writer(folder, catalogue, writing, shards)
    if existing and _is_the_same(out, record, catalogue, writer):
        print(f"{out} holds these shards already: nothing is written", file=sys.stderr)
        tidy(out)
        return existing
    _take_over(folder, record, shards, catalogue.by_url)
    written = sorted(_written(writer, len(catalogue.products), writing), key=lambda done: done.number)
    _check_failed(written, writing.photos.max_failed, folder)
    tables = write_tables(folder, catalogue, judgments, written)
    known = {**plan, **_photo_counts(written)}
    manifest = Manifest(**known, tables=tables, shards=[done.shard for done in written])
    if existing:
        discard(folder)
        if existing.hash != manifest.hash:
            raise _other_shards(out, "tables or photos differ")
        tidy(out)
        return existing
    record["signature"] = _digest(done.sizes for done in written)
    write_whole(folder / IMPORT, json.dumps(record, indent=1) + "\n")
    write_whole(folder / "manifest.json", manifest.to_json())
    publish(folder, out)
    return manifest


def _plan(catalogue: Catalogue, writing: Writing) -> dict[str, Any]:
    """What the manifest will say that is known before anything is written."""
    queries = np.bincount(catalogue.split_of_query, minlength=len(SPLITS)).tolist()
    judged = np.bincount(catalogue.split_of_judgment, minlength=len(SPLITS)).tolist()
    unlisted = {**UNLISTED, **catalogue.unlisted, **writing.unlisted}
    return {
        "name": catalogue.name,
        "seed": writing.seed,
        "source": catalogue.source,
        "fields": catalogue.fields,
        "labels": catalogue.labels,
        "splits": {
            split: Split(queries[number], judged[number], unlisted[split])
            for number, split in enumerate(SPLITS)
            if queries[number]
        },
        "products": len(catalogue.products),
    }


def _shard_count(products: int, shard_size: int | None) -> int:
    if shard_size is None:
        return min(products, max(LEAST_SHARDS, -(-products // MOST_PRODUCTS)))
    return -(-products // shard_size)


def _record(catalogue: Catalogue, writing: Writing, shards: int) -> dict[str, Any]:
    """What decides the bytes of shards, for import.json. What to do about broken photos does not: none is in them."""
    tables = {name: getattr(catalogue, name) for name in ("products", "queries", "judgments")}
    return import_record(
        {
            "tables": {name: table.digest for name, table in tables.items()},
            "seed": writing.seed,
            "shards": shards,
            "labels": [[name, asdict(label)] for name, label in catalogue.labels.items()],
            "photos": {name: getattr(writing.photos, name) for name in ("max_side", "quality", "max_mib")},
        }
    )


def _shard_writer(folder: Path, catalogue: Catalogue, writing: Writing, shards: int) -> ShardWriter:
    return ShardWriter(
        products=(catalogue.folder / "products.arrow").resolve(),
        published=catalogue.products.path,
        folder=folder.resolve(),
        fields=catalogue.fields,
        labels=list(catalogue.labels),
        shards=shards,
        photos=catalogue.photos,
        drop_broken=writing.on_broken_photo == "drop",
        max_side=writing.photos.max_side,
        quality=writing.photos.quality,
        ahead=chunks_ahead(writing.photos, workers(writing.jobs)),
    )


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
            raise _other_shards(out, f"{name} there: {there[name]}, now: {value}")
    for shard in manifest.shards:
        if not (out / shard.name).is_file() or (out / shard.name).stat().st_size != shard.bytes:
            raise ValueError(f"{out} is damaged: {shard.name} is missing or short; delete it and import again")
    return manifest


def _other_shards(out: Path, difference: str) -> ValueError:
    return ValueError(f"{out} holds other shards ({difference}); choose another OUT or delete it")


def _is_the_same(out: Path, record: Mapping[str, Any], catalogue: Catalogue, writer: ShardWriter) -> bool:
    """Whether the same tables, options and photos made `out`; if not, writing everything may still show that it is the
    same. That would download all photos again, so then another record is a ValueError."""
    there = read_record(out)
    if there.get("fingerprint") == record["fingerprint"]:
        shards, imported = writer.shards, (out / IMPORT).stat().st_mtime_ns
        unchanged = all(writer.newest(number) <= imported for number in range(shards))
        return unchanged and there.get("signature") == _digest(map(writer.sizes, range(shards)))
    if there and catalogue.by_url:
        raise _other_shards(out, f"different are {differences(there, record) or 'files of photos'}")
    return False


def _take_over(folder: Path, record: Mapping[str, Any], shards: int, by_url: bool) -> None:
    """Keeps the shards that an import of the same data finished before it was stopped, and nothing else.

    Raises ValueError where that would throw downloads away.
    """
    there = read_record(folder)
    kept = set[str]()
    if there.get("fingerprint") == record["fingerprint"]:
        finished = [done for number in range(shards) if (done := Done.read(folder, number))]
        kept = {name for done in finished for name in (done.shard.name, done.record)}
        print(f"going on with {len(finished)} of {shards} shards that were finished before", file=sys.stderr)
    elif by_url and (finished_before := len(list(folder.glob(f"*{DONE}")))):
        raise ValueError(
            f"{folder} keeps {finished_before} shards with downloaded photos of another import (different are "
            f"{differences(there, record)}): delete the folder or choose another OUT"
        )
    elif there:
        print(
            f"starting afresh: since the import that was stopped, {differences(there, record)} changed", file=sys.stderr
        )
    for path in folder.iterdir():
        if path.is_file() and path.name not in (LOCK, *kept):
            path.unlink()
    write_whole(folder / IMPORT, json.dumps(record, indent=1) + "\n")


def _written(writer: ShardWriter, products: int, writing: Writing) -> Iterator[Done]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("products", total=products)
        named, reasons = 0, Counter[str]()
        for done in run_map(writer, range(writer.shards), writing.jobs):
            progress.advance(task, done.shard.products)
            named += int(done.photo.sum()) + len(done.failed)
            reasons.update(photo.reason for photo in done.failed if photo.web)
            if reasons.total() > max(ENOUGH, HOPELESS * writing.photos.max_failed * named):
                raise _too_many(reasons, named, writing.photos.max_failed, "This cannot end well, so it stops here")
            yield done


def _check_failed(written: list[Done], limit: float, folder: Path) -> None:
    """Raises ValueError when more than the fraction `limit` of the photos named could not be downloaded."""
    named = sum(int(done.photo.sum()) + len(done.failed) for done in written)
    reasons = Counter(failed.reason for done in written for failed in done.failed if failed.web)
    if reasons.total() > limit * named:
        kept = f"{folder} keeps the others: the same command tries again what failed for the moment"
        raise _too_many(reasons, named, limit, kept)


def _too_many(reasons: Counter[str], named: int, limit: float, what_now: str) -> ValueError:
    told = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
    return ValueError(
        f"{reasons.total():,} of {named:,} photos could not be downloaded: {told}. At most {limit:.1%} may "
        f"(photos.max_failed). {what_now}"
    )


def _photo_counts(written: list[Done]) -> dict[str, int]:
    failed = [failed.broken for done in written for failed in done.failed]
    photos = sum(int(done.photo.sum()) for done in written)
    return {"photos": photos, "missing_photos": len(failed) - sum(failed), "broken_photos": sum(failed)}


def _digest(signatures: Iterable[str]) -> str:
    return blake2b("\n".join(signatures).encode(), digest_size=16).hexdigest()

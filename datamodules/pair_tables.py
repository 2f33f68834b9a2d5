"""Tables of (query, product, score) that are made after an import: negatives that were mined, scores of a teacher.

`<shards>/pairs/<name>.parquet`: query and product (int64, dense ids), score (float32), sorted by (query, product), each
pair once. The manifest lists them under `pairs`, outside of its hash, with their sha256 and what they were made by.
"""

import dataclasses
import difflib
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Integer

from datamodules.importing.records import write_whole
from datamodules.manifest import Manifest, PairKind, PairTable, pair_file, read_manifest
from datamodules.stores.store import LocalStore, Store, open_store
from datamodules.stores.transfer import ShardError

RESERVED = ("judged", "random")  # what data.hard_from and TupleBatch.hard call other sources
COLUMNS = {"query": pa.int64(), "product": pa.int64(), "score": pa.float32()}
MADE_FOR = b"manifest"  # the file says which shards its ids are of: those of other shards may be in range as well


@dataclass(frozen=True)
class PairRows:
    """Rows of a table, sorted by (query, product), each pair once; `query` and `product` are dense ids."""

    query: Integer[np.ndarray, "row"]
    product: Integer[np.ndarray, "row"]
    score: Float[np.ndarray, "row"]

    def __len__(self) -> int:
        return len(self.query)

    def sorted(self) -> "PairRows":
        order = np.lexsort((self.product, self.query))
        return PairRows(self.query[order], self.product[order], self.score[order])

    def problem(self, manifest: Manifest) -> str | None:
        """Why these rows are no table of that manifest's shards."""
        queries = sum(split.queries for split in manifest.splits.values())
        for name, ids, count in (("query", self.query, queries), ("product", self.product, manifest.products)):
            wrong = ids[(ids < 0) | (ids >= count)]
            if len(wrong):
                return (
                    f"it has the {name} {wrong[0]}, the shards have {count:,}: are its ids those of another catalogue?"
                )
        unfit = self.score[~np.isfinite(self.score)]
        if len(unfit):
            return f"it has the score {unfit[0]}; expected finite numbers"
        step = np.diff(self.query.astype(np.int64) * manifest.products + self.product)
        if (step == 0).any():
            row = int(np.flatnonzero(step == 0)[0])
            return f"it has query {self.query[row]} with product {self.product[row]} twice"
        return "its rows are not sorted by (query, product)" if (step < 0).any() else None


def write_pair_table(
    folder: str | Path,
    name: str,
    kind: PairKind,
    query: Integer[np.ndarray, "row"],
    product: Integer[np.ndarray, "row"],
    score: Float[np.ndarray, "row"],
    made_by: Mapping[str, Any],
    replace: bool = False,
) -> Path:
    """Puts a table beside the shards in `folder`, rows in any order, and its name into their manifest.

    Whoever reads meanwhile, or after this process was killed, finds the manifest as it was, or with the table. Raises
    ValueError when the name is none or taken by other content (unless `replace`), and when the rows or `made_by` (JSON)
    are no such table's. The same rows again restore a file that is missing or damaged. `replace` takes the old table
    off the manifest first: killed there, neither is listed.
    """
    folder = _local(folder)
    path = folder / pair_file(name)
    if name in RESERVED:
        raise ValueError(f"a table of pairs cannot be called {name!r}: that is another source's name")
    manifest = read_manifest(folder)
    if kind == "scores" and name in manifest.labels:
        raise ValueError(
            f"a table of scores cannot be called {name!r}: that is one of the shards' label columns "
            f"({', '.join(manifest.labels)}), which losses name too"
        )
    _check_columns(query, product, score)
    ids = np.asarray(query, np.int64), np.asarray(product, np.int64)
    rows = PairRows(*ids, np.asarray(score, np.float32)).sorted()
    if problem := rows.problem(manifest):
        raise ValueError(f"the table of pairs {name!r} cannot be written: {problem}")
    content = _to_parquet(rows, manifest)
    table = PairTable(kind, hashlib.sha256(content).hexdigest(), len(rows), _as_json(made_by))
    with _locked(path.parent):
        manifest = read_manifest(folder)  # another process may have written a table
        if name in manifest.pairs:
            if _is_the_same(folder, name, kind, rows):
                return path
            listed = manifest.pairs[name]
            if (listed.kind, listed.sha256) == (kind, table.sha256):  # but its file is missing or damaged
                _write(path, content)
                return path
            if not replace:
                raise ValueError(f"{path} exists with other content: choose another name, or replace it (--replace)")
            _list(folder, manifest, {pair: of for pair, of in manifest.pairs.items() if pair != name})
        _write(path, content)
        _list(folder, manifest, {**manifest.pairs, name: table})
    return path


def read_pair_table(source: str | Path | Store, name: str, kind: PairKind, option: str) -> PairRows:
    """A table of some shards, whole and checked. `option` is what named it, for the message.

    Raises ValueError when there is no such table of that kind, its file cannot be had or is not what the manifest says,
    or its ids are those of another catalogue.
    """
    store = open_store(source) if isinstance(source, str | Path) else source
    table = find_pair_table(store, name, kind, option)
    where = f"{store.address}/{pair_file(name)}"
    try:
        content = store.path(pair_file(name)).read_bytes()
    except ShardError as error:
        raise ValueError(f"{error}. {option} names it: write or copy that table again") from None
    if (found := hashlib.sha256(content).hexdigest()) != table.sha256:
        raise ValueError(
            f"{where} has the sha256 {found[:12]}..., the manifest says {table.sha256[:12]}...: it was changed or "
            "replaced after it was listed; write or copy it again"
        )
    rows, made_for = _from_parquet(content, where)
    problem = rows.problem(store.manifest)
    if made_for != store.manifest.hash:
        problem = (
            problem or f"it was made for other shards (manifest {made_for[:12]}..., here {store.manifest.hash[:12]}...)"
        )
    if len(rows) != table.rows:
        problem = problem or f"it has {len(rows):,} rows, the manifest says {table.rows:,}"
    if problem:
        raise ValueError(f"{where} does not belong to these shards: {problem}")
    return rows


def find_pair_table(store: Store, name: str, kind: PairKind, option: str) -> PairTable:
    """What the manifest says of it. Raises ValueError, with those there are, when it lists no such table."""
    tables = store.manifest.pairs
    there = [known for known, table in tables.items() if table.kind == kind]
    if kind == "scores" and name in there and name in store.manifest.labels:
        raise ValueError(
            f"{option} names {name!r}, a table that is called as one of the label columns of {store.address} "
            f"({', '.join(store.manifest.labels)}): write it again under another name"
        )
    if name in there:
        return tables[name]
    near = difflib.get_close_matches(name, there, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    hint = f"that is a table of {tables[name].kind}; " if name in tables else hint
    has = f"{store.address} has {', '.join(there) or 'none'}"
    raise ValueError(f"{option} names {name!r}; {hint}expected a table of {kind}, of which {has}")


def _local(folder: str | Path) -> Path:
    """Raises ValueError unless `folder` is one on this machine."""
    if isinstance(folder, str) and (folder.startswith("pipe:") or "://" in folder):
        store = open_store(folder) if folder.lower().startswith(("file://", "local://")) else None
        if not isinstance(store, LocalStore):
            raise ValueError(
                f"a table of pairs is written into a local folder of shards, not to {folder.partition(':')[0]}:...: "
                "copy the shards here, write it, and copy pairs/ and manifest.json back"
            )
        return store.folder
    return Path(folder)


def _as_json(made_by: Mapping[str, Any]) -> dict[str, Any]:
    try:
        said: dict[str, Any] = json.loads(json.dumps(dict(made_by), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"made_by cannot be written as JSON ({error}): {made_by}") from error
    return said


def _to_parquet(rows: PairRows, manifest: Manifest) -> bytes:
    schema = pa.schema(list(COLUMNS.items()), metadata={MADE_FOR: manifest.hash.encode()})
    table = pa.table([pa.array(getattr(rows, name), kind) for name, kind in COLUMNS.items()], schema=schema)
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    return content.getvalue()


def _from_parquet(content: bytes, where: str) -> tuple[PairRows, str]:
    """The rows, and the hash of the manifest that they were made for."""
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{where} is no Parquet file of such a table ({error}): write it again") from error
    found = [(field.name, field.type) for field in table.schema]
    if found != list(COLUMNS.items()) or any(column.null_count for column in table.columns):
        expected = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
        has = ", ".join(f"{name} {kind}" for name, kind in found)
        raise ValueError(f"{where} has the columns {has}; expected {expected}, without gaps")
    made_for = (table.schema.metadata or {}).get(MADE_FOR, b"unknown").decode(errors="replace")
    return PairRows(*(table[name].to_numpy() for name in COLUMNS)), made_for


def _is_the_same(folder: Path, name: str, kind: PairKind, rows: PairRows) -> bool:
    """Whether the table that the manifest lists has these rows; one that is damaged has not."""
    try:
        there = read_pair_table(folder, name, kind, "write_pair_table")
    except ValueError:
        return False
    return all(np.array_equal(getattr(there, column), getattr(rows, column)) for column in COLUMNS)


def _check_columns(query: np.ndarray, product: np.ndarray, score: np.ndarray) -> None:
    """Raises ValueError unless the columns are equally long, and the ids integers."""
    if not len(query) == len(product) == len(score):
        raise ValueError(f"a table of pairs of {len(query)} queries, {len(product)} products and {len(score)} scores")
    for name, ids in (("query", query), ("product", product)):
        if not np.issubdtype(np.asarray(ids).dtype, np.integer):
            raise ValueError(f"the {name} column holds {np.asarray(ids).dtype}; expected dense ids, which are integers")


def _write(path: Path, content: bytes) -> None:
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(content)
    os.replace(aside, path)


def _list(folder: Path, manifest: Manifest, pairs: dict[str, PairTable]) -> None:
    write_whole(folder / "manifest.json", dataclasses.replace(manifest, pairs=pairs).to_json())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """As the only process that writes tables there."""
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

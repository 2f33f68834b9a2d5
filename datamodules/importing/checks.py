"""What staged tables must fulfil before anything is written. Every mistake is named with its file and row."""

from collections.abc import Iterator, Mapping
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datamodules.importing.splits import normalised
from datamodules.importing.staged import Table, positions
from datamodules.manifest import SPLITS, Label
from datamodules.photos.files import ADDRESS, Photos
from datamodules.photos.options import ABSENT

SHOWN = 3  # examples in a message
OURS = ("id", "positives")  # columns that queries.parquet adds
WEB = r"(?i)^https?://"  # what is downloaded
FORBIDDEN = rf"(?i)^({ADDRESS.pattern})|^/|(^|/)\.\.(/|$)"  # unless it is downloaded


def check_products(products: Table, photos: bool) -> None:
    """`photos`: whether the data set can have any; then the column image is needed."""
    products.require(["product_id", "title", *(["image"] if photos else [])])
    products.require_ids("product_id")


def check_queries(queries: Table) -> None:
    queries.require(["query_id", "query", "split"])
    queries.require_ids("query_id")
    queries.require_filled("query")
    for name in OURS:
        if name in queries.names:
            raise ValueError(f"{queries.path} has a column {name!r}, which the shards add themselves: rename it")


def split_codes(queries: Table) -> np.ndarray:
    """int8 position in SPLITS of each query. Raises ValueError for another text."""
    codes = positions(queries["split"], pa.chunked_array([SPLITS], pa.string()))
    unknown = np.flatnonzero(codes < 0)
    if len(unknown):
        row = int(unknown[0])
        found = queries["split"][row].as_py()
        raise queries.error(row, f"the split is {found!r}; expected one of {', '.join(SPLITS)}")
    return codes.astype(np.int8)


def rows_of(judgments: Table, column: str, of: Table) -> np.ndarray:
    """int32 row of each judgment's query or product. Raises ValueError where there is none."""
    rows = positions(judgments[column], of[column])
    unknown = np.flatnonzero(rows < 0)
    if len(unknown):
        row = int(unknown[0])
        more = f" ({len(unknown)} such rows)" if len(unknown) > 1 else ""
        raise judgments.error(row, f"{column} {judgments[column][row].as_py()!r} is not in {of.path.name}{more}")
    return rows


def check_pairs(judgments: Table, query: np.ndarray, product: np.ndarray, products: int) -> None:
    """Raises ValueError when a (query, product) pair is judged twice."""
    pairs = query.astype(np.int64) * products + product
    ordered = np.sort(pairs)
    if (ordered[1:] != ordered[:-1]).all():
        return
    order = np.argsort(pairs, kind="stable")
    twice = np.flatnonzero(np.diff(pairs[order]) == 0)
    row, other = int(order[twice[0] + 1]), int(order[twice[0]])
    names = f"query {judgments['query_id'][row].as_py()!r} and product {judgments['product_id'][row].as_py()!r}"
    raise judgments.error(
        row,
        f"{names} are already judged in {judgments.place(other)}; a pair is judged once. Leave one out, or let the "
        "highest gain count with repeated_pairs=best",
    )


def best_of_pairs(
    query: np.ndarray, product: np.ndarray, gain: Mapping[str, np.ndarray], products: int
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Each (query, product) pair once, with its highest gain in every column; NaN where all say nothing."""
    pairs = query.astype(np.int64) * products + product
    order = np.argsort(pairs, kind="stable")
    first = np.flatnonzero(np.diff(pairs[order], prepend=-1))
    kept = order[first]
    return query[kept], product[kept], {name: np.fmax.reduceat(values[order], first) for name, values in gain.items()}


def shared_queries(queries: Table, split: np.ndarray, limit: float) -> list[str]:
    """Descriptions of the val and test queries whose text is also in an earlier split; ValueError above the limit.

    Texts are compared as `normalised` leaves them; where queries have a locale, it is part of the text. `split`: as
    `split_codes` gives it.
    """
    if not 0 <= limit <= 1:
        raise ValueError(f"max_shared_queries is {limit}; expected a fraction between 0 and 1")
    keys = _keys(queries)
    order = np.lexsort((split, keys))  # stable: in a split, the first row stays the first
    new = np.append(True, keys[order][1:] != keys[order][:-1])
    first = np.empty_like(order)
    first[order] = order[np.flatnonzero(new)[np.cumsum(new) - 1]]
    shared = np.flatnonzero(split[first] != split)
    shared = shared[np.argsort(split[shared], kind="stable")]
    evaluated = int((split > SPLITS.index("train")).sum())
    found = [_described(queries, row, int(first[row])) for row in shared[:SHOWN].tolist()]
    found += [f"and {len(shared) - SHOWN} more"] * (len(shared) > SHOWN)
    if len(shared) > limit * evaluated:
        raise ValueError(
            f"{queries.path}: {len(shared)} of {evaluated} val and test queries have a text that another split has, "
            f"too: {', '.join(found)}. Results on them measure memory: give each text one split (at most "
            f"{limit:.1%} is let through, max_shared_queries)"
        )
    return found


def _keys(queries: Table) -> np.ndarray:
    """8 bytes for each query's text: half a million texts themselves would take a hundred times as much."""
    keys = np.empty(len(queries), np.uint64)
    names = ["query", *(["locale"] if "locale" in queries.names else [])]
    row = 0
    for batch in queries.columns.select(names).to_batches():
        for cells in zip(*(batch[name].to_pylist() for name in names), strict=True):
            text = "\0".join([normalised(cells[0]), *cells[1:]])
            keys[row] = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
            row += 1
    return keys


def _described(queries: Table, row: int, other: int) -> str:
    split, text = queries["split"], normalised(queries["query"][row].as_py())
    places = (f"{split[number].as_py()}, {queries.place(number)}" for number in (row, other))
    return f"{text!r} ({'; '.join(places)})"


def check_images(products: Table, has_photos: bool) -> None:
    """Raises ValueError for an address that is not downloaded or a path that leaves the folder of photos, and
    FileNotFoundError for names of files where there is no such folder."""
    files = 0
    for start, names, web in _photo_names(products):
        forbidden = pc.match_substring_regex(names, FORBIDDEN)
        wrong = np.flatnonzero(pc.and_not(forbidden, web).to_numpy(zero_copy_only=False))
        if len(wrong):
            row = start + int(wrong[0])
            found = products["image"][row].as_py()
            raise products.error(
                row, f"image is {found!r}; expected a file's name below the folder of photos, or a URL of http or https"
            )
        files += _count(_local(names, web))
    if files and not has_photos:
        raise FileNotFoundError(
            f"{products.path.parent} has neither images/ nor images.tar, but {products.path.name} names {files:,} "
            "photos; add them, or leave the column image blank"
        )


def check_photos(products: Table, photos: Photos) -> None:
    """Raises ValueError when photos are named by their files, and not a single one is there: another folder's."""
    first = None
    for start, names, web in _photo_names(products):
        for row in np.flatnonzero(_local(names, web).to_numpy(zero_copy_only=False)).tolist():
            name = names[row].as_py()
            first = first or (start + row, name)
            try:
                if photos.get([name]) != [ABSENT]:
                    return
            except ValueError:  # the link leads out of the folder: told when it is read for its shard
                return
    if first:
        row, name = first
        raise products.error(
            row,
            f"there is no photo {name!r}, nor any other that {products.path.name} names; it was looked for at "
            f"{photos.place(name)}. Leave the column image blank to do without",
        )


def check_trainable(
    judgments: Table, labels: Mapping[str, Label], gain: Mapping[str, np.ndarray], train: np.ndarray
) -> None:
    """Raises ValueError unless a judgment of a train query is positive in the primary column. `train`: per judgment."""
    column: str = next(iter(labels))
    known = gain[column][train]
    known = known[~np.isnan(known)]
    threshold = labels[column].positive_from
    if not (known >= threshold).any():
        best = f"the highest gain there is {known.max():g}" if len(known) else "there are none"
        raise ValueError(
            f"{judgments.path}: no judgment of a train query is positive in column {column!r}: positive is a gain of "
            f"at least {threshold:g}, {best}; nothing could be trained. Set positive_from for {column!r}, or primary"
        )


def web_rows(products: Table) -> int:
    """How many products name a photo by URL."""
    return sum(_count(web) for _, _, web in _photo_names(products))


def _photo_names(products: Table) -> Iterator[tuple[int, pa.Array, pa.Array]]:
    """Pieces of the column image: the first row, the names without blanks around them, and which are URLs of http or
    https. Nothing without that column."""
    for start, chunk in products.chunks("image") if "image" in products.names else ():
        names = pc.utf8_trim_whitespace(chunk)
        yield start, names, pc.match_substring_regex(names, WEB)


def _local(names: pa.Array, web: pa.Array) -> pa.Array:
    """Which of the names are those of files."""
    return pc.and_not(pc.not_equal(names, ""), web)


def _count(rows: pa.Array) -> int:
    return int(pc.sum(rows).as_py() or 0)

"""Addresses of photos for products of ESCI, as SQID (Crossing-Minds, MIT) and ESCI-S (shuttie/esci-s) publish them."""

import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from datamodules.importers.published import batches_of, joined, require
from datamodules.importing.tables import csv_batches

NO_PHOTO = "Default_Background_Art"  # one picture that stands for 442 products of SQID
BUCKET = re.compile(r"/images/W/[^/]+/images/I/")  # half of ESCI-S's addresses; they fail unless shortened
SUPPLEMENT = "supp_product_image_urls.csv"
LINES = (".json", ".jsonl")
PACKED = (".gz", ".zst")


@dataclass(frozen=True)
class Addresses:
    """`ids` are `locale:product_id`, `urls` their photos' addresses (the first counts); `options`: for the manifest."""

    ids: pa.Array
    urls: pa.Array
    options: dict[str, Any] = field(default_factory=dict)

    def of(self, products: pa.Array) -> pa.Array:
        """Address of each product's photo, "" without one."""
        return pc.fill_null(self.urls.take(pc.index_in(products, value_set=self.ids)), "")


def photo_addresses(path: Path, locales: Sequence[str]) -> Addresses:
    """Reads SQID's CSV (with the supplement beside it) or ESCI-S's JSON lines; held as two Arrow arrays.

    Raises FileNotFoundError, and ValueError for another kind of file or one whose columns or lines are not those.
    """
    if not path.is_file():
        raise FileNotFoundError(f"images is {str(path)!r}, which is no file; expected a file, or none")
    counts: Counter[str] = Counter()
    batches: Iterator[pa.RecordBatch]
    if path.suffix == ".csv":
        if "us" not in locales:
            raise ValueError(f"SQID ({path}) has photos of us products only; the locales are {', '.join(locales)}")
        files = [path, *(p for p in [path.with_name(SUPPLEMENT)] if p.is_file() and p != path)]
        batches = (batch for file in files for batch in _sqid(file, counts))
        kind = {"from": "sqid", "files": [file.name for file in files]}
    elif _ending(path) in LINES:
        rows = _esci_s(path, locales, counts)
        batches, kind = batches_of(rows, ("id", "url")), {"from": "esci-s", "files": [path.name]}
    else:
        endings = ", ".join(LINES)
        raise ValueError(
            f"images is {str(path)!r}; expected SQID's .csv or ESCI-S's {endings} (also .gz, .zst), or none"
        )
    schema = pa.schema([("id", pa.string()), ("url", pa.string())])
    table = pa.Table.from_batches(batches, schema).combine_chunks()
    ids, urls = (pc.cast(table[name].combine_chunks(), pa.string()) for name in ("id", "url"))
    return Addresses(ids, urls, {**kind, "left_out": dict(counts)})


def _ending(path: Path) -> str:
    """Without that of compression."""
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def _sqid(path: Path, counts: Counter[str]) -> Iterator[pa.RecordBatch]:
    require(path, ["product_id", "image_url"])
    for batch in csv_batches(path):
        stands_for_none = pc.match_substring(batch["image_url"], NO_PHOTO)
        counts["default picture"] += pc.sum(stands_for_none).as_py() or 0
        url = pc.if_else(stands_for_none, "", pc.utf8_trim_whitespace(batch["image_url"]))
        yield pa.RecordBatch.from_pydict({"id": joined(pa.scalar("us"), batch["product_id"]), "url": url})


def _esci_s(path: Path, locales: Sequence[str], counts: Counter[str]) -> Iterator[dict[str, str]]:
    for number, line in enumerate(_lines(path), 1):
        try:
            product = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(product, dict) or "type" not in product:
            raise ValueError(f"{path}, line {number} has no key 'type'; expected one product of ESCI-S per line")
        if product["type"] == "error":
            counts["type error"] += 1
            continue
        if missing := [key for key in ("asin", "locale") if not product.get(key)]:
            raise ValueError(f"{path}, line {number} has no {', '.join(missing)}; its keys are: {', '.join(product)}")
        if product["locale"] in locales:
            url = product.get("image") or product.get("img") or ""
            if not isinstance(url, str):
                raise ValueError(f"{path}, line {number}: the image is {url!r}; expected its address as a string")
            url = url.strip()
            default = NO_PHOTO in url
            counts["default picture"] += default
            yield {"id": f"{product['locale']}:{product['asin']}", "url": "" if default else repaired(url)}


def repaired(url: str) -> str:
    """`.../images/W/<bucket>/images/I/x.jpg` -> `.../images/I/x.jpg`."""
    return BUCKET.sub("/images/I/", url)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with pa.input_stream(str(path)) as stream:  # unpacks by the file's ending
            yield from io.BufferedReader(stream, 1 << 20)
    except OSError as error:
        raise ValueError(f"{path} cannot be unpacked: {error}") from error

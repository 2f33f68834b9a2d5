"""Marqo-GS-10M (marqo-ai/GCL): queries of Google Shopping, the products it listed, a score of 1 to 100 by their rank.

The data set is cut in two along queries (80 % seen, 20 % novel) and along products (corpus 1 and 2). Training pairs are
the seen queries on corpus 1. Each of the four parts has a ground truth of dev and of test queries; what becomes of it:

- `novel_query` (novel queries on corpus 1) is the default: dev is val, test is test, and corpus 1 is what is searched.
  This is the published protocol. A text that is in dev and in test is in test only.
- `zero_shot` (novel queries on corpus 2) brings in corpus 2. Since we always search all products, an evaluated query is
  then judged in both corpora, by the triplets of both parts: otherwise the products that Google listed for it in the
  other corpus would count as irrelevant. So this is "novel queries, half of the products never trained on"; it is not
  the published number, which searches corpus 2 alone.
- `in_domain` (seen queries on corpus 1) and `novel_corpus` (seen queries on corpus 2) evaluate train queries, by design
  of the data set; in_domain even evaluates the very pairs that are trained on. They are evaluated only when named, as
  queries of their own, and max_shared_queries is then 1 by default.

Products have the column `corpus` (1 or 2), queries the column `part` (train, or the parts whose ground truth has them)
to slice by. Judgments are the triplets; the ground truth files, made from them, tell which queries are dev and test.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from datamodules.importers.json_entries import json_entries
from datamodules.importers.marqo_queries import FILES, PARTS, Judged, Queries, read_queries, triplets
from datamodules.importers.options import Import
from datamodules.importers.published import batches_of, published_files, require
from datamodules.importing.staging import Source, Stream
from datamodules.importing.tables import csv_batches
from datamodules.photos.files import Photos, photos_of, web_photos

Part = Literal["novel_query", "zero_shot", "in_domain", "novel_corpus"]
SCORE = "score_linear"
SEEN = ("in_domain", "novel_corpus")
IMAGE = ("image_local", "image")
LISTED = 1e-6  # least score of a positive: every product that Google listed, as in GCL's training and evaluation


@dataclass(kw_only=True)
class MarqoGS(Import):
    """Marqo-GS into shards. Every column score_* of the triplets is a label column; scores are their own gains.

    Every listed product is positive, as in GCL: what Google ranked 100th is an answer, and the score says how good.

    Args:
        src: One of the folders marqo_gs_wfash_1m, marqo_gs_fashion_5m, marqo_gs_full_10m.
        evaluate: Part whose dev and test queries become val and test, or a list of them.
        images: Folder of the photos (images_wfash, ...), which the last part of `image_local` names; by default images/
            or images.tar in src. none: products without photos.
    """

    evaluate: Part | list[Part] = "novel_query"
    images: str = ""

    def __post_init__(self) -> None:
        if not self._parts or len(set(self._parts)) < len(self._parts):
            raise ValueError(f"evaluate is {self.evaluate!r}; expected one or more of {', '.join(PARTS)}, each once")
        if set(self._parts) & set(SEEN) and not self.max_shared_queries:
            self.max_shared_queries = 1.0

    @property
    def _parts(self) -> list[str]:
        return [self.evaluate] if isinstance(self.evaluate, str) else list(self.evaluate)

    def source(self) -> Source:
        """Raises FileNotFoundError or ValueError that names what is missing. Reads the ground truth files."""
        folder = Path(self.src)
        products = Stream(self._corpora[0][0], self._products)
        positive_from = dict.fromkeys(self._scores, LISTED)
        left_out = {"dev queries that are test queries, too": self._queries.in_both}
        options = {"importer": "marqo_gs", "evaluate": self._parts, "images": self.images != "none"}
        return Source(
            name=folder.resolve().name,
            options={**options, "left_out": left_out},
            products=products,
            queries=Stream(folder, self._query_rows),  # of several files
            judgments=Stream(folder, self._judgments),
            photos=self._photos(),
            positive_from=positive_from,
        )

    @cached_property
    def _corpora(self) -> list[tuple[Path, str]]:
        """The files of products, with the corpus that each is."""
        needed = sorted({"1", *(PARTS[part][1] for part in self._parts)})
        return list(
            zip(published_files(self.src, [f"corpus_{name}.json" for name in needed], FILES), needed, strict=True)
        )

    @cached_property
    def _queries(self) -> Queries:
        return read_queries(Path(self.src), self._parts, [corpus for _, corpus in self._corpora])

    @cached_property
    def _scores(self) -> list[str]:
        """Label columns, the primary one first."""
        names = require(triplets(Path(self.src), "0", "1"), ["query", "product_id", SCORE])
        return [SCORE, *(name for name in names if name.startswith("score_") and name != SCORE)]

    def _photos(self) -> Photos | None:
        if self.images == "none":
            return None
        if self.images and not Path(self.images).is_dir():
            raise FileNotFoundError(
                f"images is {self.images!r}, which is no folder; expected the photos' folder, or none"
            )
        return web_photos(self.photos, Path(self.images)) if self.images else photos_of(Path(self.src), self.photos)

    def _products(self) -> Iterator[pa.RecordBatch]:
        for path, corpus in self._corpora:
            columns = ("product_id", "title", "corpus", *(["image"] if self.images != "none" else []))
            yield from batches_of(self._product_rows(path, corpus), columns)

    def _product_rows(self, path: Path, corpus: str) -> Iterator[dict[str, str]]:
        for product_id, entry in json_entries(path):
            keys = list(entry) if isinstance(entry, dict) else []
            image = next((name for name in IMAGE if name in keys), None)
            if "title" not in keys or (image is None and self.images != "none"):
                raise ValueError(
                    f"{path}: product {product_id!r} has no title or no {' or '.join(IMAGE)}; its keys are: "
                    f"{', '.join(keys) or 'none'}" + ("" if image else "; images=none takes products without photos")
                )
            # the publisher's folders are not ours: only the file's name counts
            photo = _text(entry[image]).rpartition("/")[2] if image else ""
            yield {"product_id": product_id, "title": _text(entry["title"]), "corpus": corpus, "image": photo}

    def _query_rows(self) -> Iterator[pa.RecordBatch]:
        yield from batches_of(self._queries.rows(), ("query_id", "query", "split", "part"))

    def _judgments(self) -> Iterator[pa.RecordBatch]:
        for judged in self._queries.judged:
            yield from self._triplets(judged)

    def _triplets(self, judged: Judged) -> Iterator[pa.RecordBatch]:
        """Those of the wanted queries. Raises ValueError when a query has fewer than its ground truth lists."""
        names = require(judged.path, ["query", "product_id", SCORE])
        texts, ids = (pa.array(list(column), pa.string()) for column in (judged.ids.keys(), judged.ids.values()))
        found: Counter[str] = Counter()
        for batch in csv_batches(judged.path):
            rows = pc.index_in(batch["query"], value_set=texts)
            kept = batch.filter(pc.is_valid(rows))
            scores = {name: kept[name] if name in names else pa.nulls(len(kept), pa.string()) for name in self._scores}
            found.update(dict(zip(*(c.to_pylist() for c in pc.value_counts(kept["query"]).flatten()), strict=True)))
            query_id = ids.take(rows.drop_null())
            yield pa.RecordBatch.from_pydict({"query_id": query_id, "product_id": kept["product_id"], **scores})
        for text, least in judged.least.items():
            if found[text] < least:
                raise ValueError(
                    f"{judged.path} has {found[text]} products for the query {text!r}, whose ground truth lists "
                    f"{least}; the files are not of one release"
                )


def _text(value: Any) -> str:
    """ "" for null, and for NaN, which a missing title was written as."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)

"""ESCI, the Shopping Queries data set of Amazon (amazon-science/esci-data, Apache-2.0), with photos of SQID or ESCI-S.

Products and queries are told apart by locale: ids are `locale:id`. The published train and test stay as they are; val
is taken out of train by a hash of the query. Product texts: title, description (published as HTML, here the text it
shows), bullet_point, brand, color. Queries keep their locale and source. Labels: E, S, C, I, with the usual gains.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from datamodules.importers.amazon_photos import Addresses, photo_addresses
from datamodules.importers.html_text import shown_text
from datamodules.importers.options import Import
from datamodules.importers.published import joined, not_empty, numbered, published_files, require
from datamodules.importing.splits import in_val, with_val
from datamodules.importing.staging import Source, Stream, texts
from datamodules.importing.tables import csv_batches, parquet_batches
from datamodules.photos.files import web_photos

Locale = Literal["us", "es", "jp"]
FILES = tuple(f"shopping_queries_dataset_{name}" for name in ("examples.parquet", "products.parquet", "sources.csv"))
TEXTS = ("title", "description", "bullet_point", "brand", "color")  # each published with product_ in front


@dataclass(kw_only=True)
class Esci(Import):
    """Shopping Queries into shards.

    Args:
        locale: us, es or jp, or a list of them.
        version: Judgments of the small version (hard queries, the ranking task) or the large one (all).
        images: File with addresses of photos: SQID's product_image_urls.csv (supp_product_image_urls.csv is read, too,
            when it lies beside), or ESCI-S as JSON lines (.json, .jsonl, also .gz or .zst); none: products without.
        corpus: All published products of the locales, or those that the version judges.
        val_fraction: Of the train queries, by a hash of seed and text.
    """

    locale: Locale | list[Locale] = "us"
    version: Literal["small", "large"] = "small"
    images: str = "none"
    corpus: Literal["all", "judged"] = "all"
    val_fraction: float = 0.05

    def source(self) -> Source:
        """Raises FileNotFoundError or ValueError that names what is missing."""
        self._check_options()
        examples, products, sources = self._files
        flag = f"{self.version}_version"
        require(examples, ["query", "query_id", "product_id", "product_locale", "esci_label", flag, "split"])
        require(products, ["product_id", "product_locale", *(f"product_{name}" for name in TEXTS)])
        require(sources, ["query_id", "source"])
        return Source(
            name="-".join(["esci", *self._locales, self.version]),
            options=self._options(),
            products=self._stream(products, self._products),
            queries=self._stream(examples, self._queries),
            judgments=self._stream(examples, self._judgments),
            photos=web_photos(self.photos) if self._addresses else None,
        )

    def _stream(self, path: Path, batches: Callable[[], Iterator[pa.RecordBatch]]) -> Stream:
        problem = (
            f"{path} has no rows of locale {', '.join(self._locales)}, or none that the {self.version} version judges"
        )
        return Stream(path, lambda: not_empty(batches(), problem))

    @cached_property
    def _files(self) -> list[Path]:
        return published_files(self.src, FILES, "amazon-science/esci-data")

    @property
    def _locales(self) -> list[str]:
        return [self.locale] if isinstance(self.locale, str) else list(self.locale)

    @cached_property
    def _addresses(self) -> Addresses | None:
        return None if self.images == "none" else photo_addresses(Path(self.images), self._locales)

    def _check_options(self) -> None:
        if not self._locales or len(set(self._locales)) < len(self._locales):
            raise ValueError(f"locale is {self.locale!r}; expected us, es or jp, or a list of them, each once")
        in_val("", self.seed, self.val_fraction)

    def _options(self) -> dict[str, Any]:
        options = {"importer": "esci", "locale": self._locales, "version": self.version, "corpus": self.corpus}
        images = self._addresses.options if self._addresses else "none"
        return {**options, "val_fraction": self.val_fraction, "images": images}

    def _products(self) -> Iterator[pa.RecordBatch]:
        ids, wanted = self._product_ids()
        images = self._addresses.of(ids) if self._addresses else None
        for batch in numbered(parquet_batches(self._files[1], [f"product_{name}" for name in TEXTS])):
            chosen = batch.filter(wanted.take(batch["#row"]))
            row, fields = chosen["#row"], {name: texts(chosen[f"product_{name}"]) for name in TEXTS}
            shown = [shown_text(html) for html in fields["description"].to_pylist()]
            image = {"image": images.take(row)} if images is not None else {}
            fields["description"] = pa.array(shown, pa.string())
            yield pa.RecordBatch.from_pydict({"product_id": ids.take(row), **fields, **image, "#row": row})

    def _product_ids(self) -> tuple[pa.Array, pa.Array]:
        """Of every row that is published, and whether it is wanted: looked up at once, not batch by batch."""
        ids = _ids_of(parquet_batches(self._files[1], ["product_locale", "product_id"]))
        if self.corpus == "judged":
            return ids, pc.is_in(ids, value_set=pc.unique(_ids_of(self._examples(["product_id"]))))
        return ids, pc.match_substring_regex(ids, f"^({'|'.join(self._locales)}):")

    def _examples(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The chosen version's rows in the chosen locales."""
        flag = f"{self.version}_version"
        for batch in numbered(parquet_batches(self._files[0], [*columns, "product_locale", flag])):
            in_version = pc.equal(batch[flag].cast(pa.int8()), 1)
            in_locale = pc.is_in(texts(batch["product_locale"]), value_set=pa.array(self._locales))
            yield batch.filter(pc.and_(in_version, in_locale))

    def _queries(self) -> Iterator[pa.RecordBatch]:
        """Each (query id, text, split) once: an id with two texts or splits comes twice, which the checks refuse."""
        sources = {row["query_id"]: row["source"] for batch in csv_batches(self._files[2]) for row in batch.to_pylist()}
        seen: set[str] = set()
        for batch in self._examples(["query", "query_id", "split"]):
            ids = joined(texts(batch["product_locale"]), texts(batch["query_id"]))
            key = joined(ids, texts(batch["split"]), texts(batch["query"]), by="\0")
            distinct = pc.unique(key)
            new = [text not in seen for text in distinct.to_pylist()]
            seen.update(distinct.to_pylist())
            rows = pc.index_in(distinct.filter(pa.array(new, pa.bool_())), value_set=key)
            chosen = batch.take(rows)
            source = [sources.get(id, "") for id in texts(chosen["query_id"]).to_pylist()]
            yield pa.RecordBatch.from_pydict(
                {
                    "query_id": ids.take(rows),
                    "query": texts(chosen["query"]),
                    "split": self._split(chosen),
                    "locale": texts(chosen["product_locale"]),
                    "source": pa.array(source, pa.string()),
                    "#row": chosen["#row"],
                }
            )

    def _split(self, queries: pa.RecordBatch) -> pa.Array:
        query, split = (queries[name].to_pylist() for name in ("query", "split"))
        return pa.array(with_val(query, split, self.seed, self.val_fraction), pa.string())

    def _judgments(self) -> Iterator[pa.RecordBatch]:
        for batch in self._examples(["query_id", "product_id", "esci_label"]):
            locale = texts(batch["product_locale"])
            yield pa.RecordBatch.from_pydict(
                {
                    "query_id": joined(locale, texts(batch["query_id"])),
                    "product_id": joined(locale, texts(batch["product_id"])),
                    "label": texts(batch["esci_label"]),
                    "#row": batch["#row"],
                }
            )


def _ids_of(batches: Iterator[pa.RecordBatch]) -> pa.Array:
    found = [joined(texts(batch["product_locale"]), texts(batch["product_id"])) for batch in batches]
    return pa.chunked_array(found, pa.string()).combine_chunks()

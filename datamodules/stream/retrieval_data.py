"""What a model and its evaluation ask of shards besides batches: texts, ids, judgments, thumbnails."""

import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from datamodules.manifest import PairKind, pair_file
from datamodules.pair_tables import RESERVED, write_pair_table
from datamodules.photos.decode import DECODING, PhotoError, thumbnail
from datamodules.plan import draws
from datamodules.shards import ShardError, Shards
from datamodules.stores.store import LocalStore, shown
from datamodules.stream.batches import Look, Reader
from datamodules.stream.failures import Failed, Failures
from datamodules.stream.loaders import EVALUATION, CorpusLoader, Share
from mmfusion.batch import Judgments, ProductBatch

DECODERS = ("simplejpeg", "pillow")  # torch resizes; mmfusion names its version


class ShardsData:
    """The part of mmfusion.batch.RetrievalData that needs neither an order nor a trainer.

    A product that cannot be read has no texts and no photo here, and is warned of.
    """

    shards: Shards
    reader: Reader
    look: Look
    path: str
    seed: int
    workers: int
    eval_batch_size: int
    max_broken: float
    _texts: dict[str, np.ndarray]  # by field

    @property
    def address(self) -> str:
        """Where the shards lie, without user, password, query string or keys."""
        return shown(self.path)

    def products(self, ids: Int64[np.ndarray, "product"]) -> ProductBatch:
        """Any products, as evaluation sees them."""
        batch, failed = self.reader.products(ids, draws(self.seed, EVALUATION, ids))
        self._tell("products", len(ids), failed)
        return batch

    def product_batches(self, ids: Int64[np.ndarray, "product"]) -> Iterator[ProductBatch]:
        """Raises ValueError as soon as more of these failed than data.max_broken of all products."""
        loader = CorpusLoader(
            self.reader,
            Share(ids, np.ones(len(ids), bool)),
            self.eval_batch_size,
            self.seed,
            self.workers,
            products=len(self.shards),
            max_broken=self.max_broken,
            what="products",
            mark_unread=True,
        )
        yield from loader
        loader.failures.warn()

    @property
    def shows(self) -> dict[str, Any]:
        modalities = [name for name, shown in (("text", self.look.text), ("image", self.look.image)) if shown]
        fields, size = list(self.look.text_fields), list(self.look.image_size)
        decoding = {"decode_photo": DECODING} | {name: version(name) for name in DECODERS}
        return {"text_fields": fields, "image_size": size, "modalities": modalities, "decoding": decoding}

    def queries(self) -> int:
        return len(self.shards.queries)

    def query_texts(self, ids: Int64[np.ndarray, "query"]) -> list[str]:
        return self.reader.queries(ids).text

    def query_ids(self, ids: Int64[np.ndarray, "query"]) -> list[str]:
        return self.shards.queries.query_id[ids].tolist()

    def train_queries(self) -> list[str]:
        return self.shards.queries.query[self.shards.queries.of("train")].tolist()

    def query_columns(self) -> list[str]:
        return self.shards.query_columns()

    def query_column(self, name: str) -> np.ndarray:
        return self.shards.query_column(_known(name, self.query_columns(), f"the queries of {self.address} have"))

    def product_columns(self) -> list[str]:
        return list(self.shards.manifest.fields)

    def product_column(self, name: str) -> np.ndarray:
        return self._fields([_known(name, self.product_columns(), f"the products of {self.address} have")])[0]

    def product_texts(self) -> list[str]:
        """The chosen fields as the text tower is given them; also when `modalities` shows it nothing."""
        fields = self.look.text_fields
        rows = zip(*self._fields(fields), strict=True)
        return [self.reader.text(dict(zip(fields, row, strict=True))) for row in rows]

    def _fields(self, names: Sequence[str]) -> list[np.ndarray]:
        """Columns of texts, kept; the shards are read once for those of the towers, and once more for all others."""
        missing = set(names) - set(self._texts)
        if missing:
            shown = missing <= set(self.look.text_fields)
            wanted = self.look.text_fields if shown else [n for n in self.product_columns() if n not in self._texts]
            self._texts |= self.shards.texts(wanted)
        return [self._texts[name] for name in names]

    def has_photo(self) -> np.ndarray:
        return self.shards.index.photo

    def train_positives(self) -> np.ndarray:
        return self.shards.index.pairs

    def thumbnails(self, ids: Int64[np.ndarray, "product"], side: int) -> list[bytes | None]:
        """None also for a photo that cannot be decoded."""
        failed: list[Failed] = []
        self.shards.tars.fetch(self.shards.index.shard[ids].tolist())
        thumbnails = [self._thumbnail(int(id), side, failed) for id in ids]
        self._tell("thumbnails", len(ids), failed)
        return thumbnails

    def _thumbnail(self, id: int, side: int, failed: list[Failed]) -> bytes | None:
        try:
            sample = self.shards.read(id)
            return None if sample.photo is None else thumbnail(sample.photo, side, sample.product_id)
        except (ShardError, PhotoError) as error:
            failed.append(self.shards.failed(id, error.reason))
            return None

    def texts(self) -> Iterator[str]:
        trainable = np.flatnonzero(self.shards.index.trainable).tolist()
        failures = Failures("texts of trainable products", len(trainable), instead="taken as empty")
        for id in trainable:
            yield self.reader.text(self.shards.texts_of(id, failures))
        failures.warn()
        yield from self.train_queries()

    def judgments(self, split: str) -> Judgments:
        return self.shards.judgments(split)

    def product_ids(self) -> list[str]:
        return self.shards.index.product_id.tolist()

    @property
    def gains(self) -> dict[str, Any]:
        """Per label column: what its labels are worth (None: numbers, their own gains), and the least positive gain."""
        return {name: asdict(label) for name, label in self.shards.manifest.labels.items()}

    def pair_tables(self) -> dict[str, dict[str, Any]]:
        return {name: asdict(table) for name, table in self.shards.manifest.pairs.items()}

    def check_pair_table(self, name: str) -> None:
        pair_file(name)
        self._folder_of_pairs()
        if name in RESERVED:
            raise ValueError(f"a table of pairs cannot be called {name!r}, another source's name: choose another name")

    def add_pair_table(
        self,
        name: str,
        kind: PairKind,
        query: Int64[np.ndarray, "row"],
        product: Int64[np.ndarray, "row"],
        score: Float32[np.ndarray, "row"],
        made_by: dict[str, Any],
        replace: bool = False,
    ) -> Path:
        return write_pair_table(self._folder_of_pairs(), name, kind, query, product, score, made_by, replace)

    def _folder_of_pairs(self) -> Path:
        """Raises ValueError where none can be written."""
        store = self.shards.store
        if not isinstance(store, LocalStore):
            raise ValueError(
                f"tables of pairs are written into a local folder of shards, not to {self.address}: copy the shards"
            )
        if not os.access(store.folder, os.W_OK):
            raise ValueError(f"tables of pairs are written beside the shards: {store.folder} cannot be written to")
        return store.folder

    def _tell(self, what: str, products: int, failed: list[Failed]) -> None:
        failures = Failures(what, products, instead="taken without text and photo")
        failures.add(failed)
        failures.warn()


def _known(name: str, names: Sequence[str], has: str) -> str:
    """The name; ValueError when it is not among the names."""
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]!r}? {has}" if near else has
        raise ValueError(f"no column {name!r}; {hint} {', '.join(names) or 'none'}")
    return name

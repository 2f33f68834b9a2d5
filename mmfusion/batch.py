"""The contract between data and model: what a step, a corpus pass and an evaluation receive.

Legend of axis names, here and everywhere:
  tuple    (query, product, photo) tuples of one step on one rank (equal on all ranks)
  query    query vectors: of one step (one per tuple, then the extra ones; a query may occur twice) or of a split
  product  product vectors: of one step (one per tuple, then the hard negatives) or of the corpus
  hard     hard negatives of one step on one rank: k per tuple, those of the first tuple first
  token    positions of an encoder's output;  width  an encoder's own size;  dim  the shared embedding space
  listed   entries of ragged lists;  pair  (query row, product row) coordinates;  k  ranks of a result list
Ids are dense int64: `id` of a product is its row in index.parquet, of a query its row in queries.parquet.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

Batch = TypeVar("Batch", bound="_Movable")


def _map_tensors(value: Any, function: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: _map_tensors(getattr(value, f.name), function) for f in fields(value)})
    return value


class _Movable:
    """A dataclass whose tensors move together, as Lightning's device transfer and DataLoader's pinning expect."""

    def to(self: Batch, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: Batch) -> Batch:
        return _map_tensors(self, Tensor.pin_memory)


@dataclass
class QueryBatch(_Movable):
    """Queries as text; `valid` is False on rows that only pad an evaluation batch to the size of the other ranks'."""

    text: list[str]
    id: Int[Tensor, "query"]
    valid: Bool[Tensor, "query"]


@dataclass
class ProductBatch(_Movable):
    """Products as text and photo.

    text: the chosen fields joined by a space, "" when absent. photo: RGB, zeros when absent.
    present: column 0 text, column 1 photo; what fills an absent modality must not matter.
    draw: a random 63-bit number that depends on (seed, epoch, product id) alone; augmentation and modality dropout
    derive from it, so that they do not depend on ranks, workers or resumption.
    shown: False where the batch has no content, for a model that knows what its encoders make of each product (see
    RetrievalData.leave_out): every text is "" and every photo of 0 x 0 pixels, so that a network fails on it, while
    `present` still says what the product has.
    """

    text: list[str]
    photo: UInt8[Tensor, "product 3 height width"]
    present: Bool[Tensor, "product 2"]
    id: Int[Tensor, "product"]
    draw: Int[Tensor, "product"]
    valid: Bool[Tensor, "product"]
    shown: bool = True


@dataclass
class Known:
    """What reading every product of the catalogue has told; row is the dense id, on CPU.

    present: as in ProductBatch, with the same text fields and modalities. readable: the sample could be read; one that
    could not is replaced in training, and has neither text nor photo in evaluation.
    """

    present: Bool[Tensor, "product 2"]
    readable: Bool[Tensor, "product"]


@dataclass
class Judged(_Movable):
    """The train judgments with gain > 0 of a batch's products (rows ascending), in one label column, as ragged lists.

    Entry e says: the product in row `product[e]` of this rank's batch has gain `gain[e]` for the query with dense id
    `query_id[e]` (whether or not that query is in the batch); `positive[e]` is gain >= positive_from. Entries that
    are not positive are ignored by losses that do not grade them. Everything unlisted is negative.
    """

    product: Int[Tensor, "listed"]
    query_id: Int[Tensor, "listed"]
    gain: Float[Tensor, "listed"]
    positive: Bool[Tensor, "listed"]


@dataclass
class TupleBatch(_Movable):
    """One rank's share of a step: row i of `query` and of `product` are one tuple, for each of its tuples.

    `query` goes on with the extra queries (data.extra_queries), that have no row of their own in `product`.
    With k hard negatives per tuple, `product` has b (1 + k) rows for b tuples: row b + i k + j is the j-th of tuple i.
    What is listed is of all rows. judged: per label column, the first being the primary one. scores: per table of
    data.scores what a teacher gives a pair, any finite number, `positive` nowhere. hard: where each hard negative comes
    from, 0 at random, 1 and more: 1 + the position in data.hard_from (RetrievalData.hard_sources names all).
    """

    query: QueryBatch
    product: ProductBatch
    judged: dict[str, Judged]
    scores: dict[str, Judged] = field(default_factory=dict)
    hard: Int[Tensor, "hard"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        """The number of tuples."""
        return len(self.product.id) - len(self.hard)


@dataclass
class Judgments:
    """All judgments of one split, on dense ids. `gain[column]` is NaN where a pair is not judged in that column.

    Entries are unique (query, product) pairs, sorted by (query, product). A product is relevant when its gain is at
    least `positive_from[column]`. `unlisted` says what a pair that is not listed means: known to be worth nothing, or
    not known. `labels[column]` is what each label is worth, empty where labels are numbers.
    """

    query: np.ndarray
    product: np.ndarray
    gain: dict[str, np.ndarray]
    positive_from: dict[str, float]
    unlisted: Literal["irrelevant", "unknown"]
    labels: dict[str, dict[str, float]] = field(default_factory=dict)


@runtime_checkable
class RetrievalData(Protocol):
    """What a model asks of a datamodule besides batches; datamodules.tuples.TupleDataModule is one."""

    @property
    def address(self) -> str:
        """Where the data lie, without passwords, keys and tokens."""

    manifest_hash: str
    val_loaders: list[str]  # what each validation loader yields: "queries/<split>" or "corpus"
    test_loaders: list[str]
    val_corpus: str  # "all", or "judged+N": a sample that metrics must name
    gains: dict[str, Any]  # per label column, what its labels are worth and from where on they are relevant
    hard_sources: list[str]  # what TupleBatch.hard counts: "random" and data.hard_from; empty without hard negatives
    hard_max_gain: float  # the most that those from judgments are worth in the primary label column; 0 without any
    extra_queries: int  # of a global batch, beside those of its tuples
    score_tables: list[str]  # the keys of TupleBatch.scores
    # text_fields, image_size, decoding (how photos become pixels), modalities: with manifest_hash, each product's text
    # and photo. JSON.
    shows: dict[str, Any]
    max_broken: float  # of all products, the fraction that may fail

    def queries(self) -> int:
        """How many there are, of all splits; their dense ids are 0 ... n - 1."""

    def product_batches(self, ids: np.ndarray) -> Iterator[ProductBatch]:
        """These products (int64, a rank's own choice), in this order, as evaluation sees them; always with content.

        `valid` is False where the sample could not be read. When they are through: warns of what failed, and raises
        ValueError when it is more than data.max_broken of all products, these or not.
        """

    def leave_out(self, known: Known | None, until: int) -> None:
        """From now on training's batches of steps below `until` have no content; None: all have it again.

        `until` counts the run's optimizer steps. Content-free batches are made without reading any shard; in all but
        text, photo and `shown` they equal those that are read. All ranks call it at the same step, at any time;
        batches that were asked for already keep what they have. So a step that needs content has it always, one that
        does not may. A training batch is made before its on_train_batch_start. What `known` says could not be read
        counts as failed in each pass (see failures), as if it were read. Raises ValueError when `known` is of other
        products.
        """

    def leave_out_of_evaluation(self, known: Known | None) -> None:
        """The same of evaluations that begin from now on; one that has begun keeps what it has."""

    def texts(self) -> Iterator[str]:
        """Product texts of trainable products and train queries: what a tokenizer from scratch is trained on."""

    def pair_tables_in_use(self) -> dict[str, str]:
        """Of each table of pairs that training reads besides judgments, the sha256; a resumed fit needs the same."""

    def pair_tables(self) -> dict[str, dict[str, Any]]:
        """All tables of pairs beside the data: name to kind ("negatives" or "scores"), sha256, rows and made_by."""

    def check_pair_table(self, name: str) -> None:
        """Raises ValueError where a new table of that name cannot be written."""

    def add_pair_table(
        self,
        name: str,
        kind: Literal["negatives", "scores"],
        query: np.ndarray,
        product: np.ndarray,
        score: np.ndarray,
        made_by: dict[str, Any],
        replace: bool = False,
    ) -> Path:
        """Writes a table of dense ids beside the data. made_by: where it comes from, as JSON. replace: one so named."""

    def judgments(self, split: str) -> Judgments: ...

    def product_ids(self) -> list[str]:
        """The catalogue's own ids; position is the dense id."""

    def products(self, ids: np.ndarray) -> ProductBatch:
        """Any products by dense id, as evaluation sees them."""

    def query_texts(self, ids: np.ndarray) -> list[str]:
        """Any queries by dense id."""

    def query_ids(self, ids: np.ndarray) -> list[str]:
        """The catalogue's own ids of any queries."""

    def train_queries(self) -> list[str]: ...

    def query_columns(self) -> list[str]:
        """What the catalogue says of queries besides id, text and split."""

    def query_column(self, name: str) -> np.ndarray:
        """One string per query; position is the dense id, here and in all that follow."""

    def product_columns(self) -> list[str]: ...

    def product_column(self, name: str) -> np.ndarray:
        """One string per product, "" where there is none."""

    def product_texts(self) -> list[str]:
        """The texts that the text tower is given."""

    def has_photo(self) -> np.ndarray: ...

    def train_positives(self) -> np.ndarray:
        """How many train queries each product is a positive of, in the primary label column."""

    def thumbnails(self, ids: np.ndarray, side: int) -> list[bytes | None]:
        """Photos of any products as JPEG, `side` pixels at most; None where there is none."""

    def failures(self, stage: Literal["fit", "val", "test"]) -> dict[str, int]:
        """What failed in the stage's last pass on all ranks, by reason: the same keys always, 0 where nothing did.

        fit: the training epoch; val, test: the corpus. With several ranks, all call this at once, at the pass's end.
        Raises ValueError, on all of them, when it is more than allowed.
        """

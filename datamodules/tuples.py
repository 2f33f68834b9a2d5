"""The LightningDataModule: training tuples in the plan's order, and evaluation of queries against a whole corpus."""

import re
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Int64
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loops.progress import _ProcessedTracker

from datamodules.plan import Plan, Slots, hashed
from datamodules.shards import Shards
from datamodules.stores.store import open_store
from datamodules.stream.batches import Look, Reader
from datamodules.stream.failures import REASONS
from datamodules.stream.known import KnownReader, LeftOut
from datamodules.stream.loaders import EVALUATION, CorpusLoader, QueryLoader, Share, TupleLoader
from datamodules.stream.pairs import PairOptions
from datamodules.stream.retrieval_data import ShardsData
from datamodules.stream.verify import check_unusable, find_unusable, gathered
from mmfusion.batch import Known

Modality = Literal["text", "image"]
Stage = Literal["fit", "val", "test"]
ORDER = ("seed", "batch_size", "epoch", "streams", "window", "damping", "manifest")  # what decides who comes when
PAIRS = {  # and with whom
    "hard_negatives": 0, "hard_from": ["judged"], "hard_max_gain": 0.0, "extra_queries": 0, "pair_tables": {},
}  # fmt: skip


class TupleDataModule(ShardsData, LightningDataModule):
    """Implements mmfusion.batch.RetrievalData. `val_loaders` and `test_loaders` say what each evaluation loader yields.

    Args:
        path: folder of shards, or their address: s3://, gs://, http(s):// or another protocol of fsspec.
        batch_size: the global contrastive batch; each rank takes batch_size / ranks. A multiple of `streams`.
        text_fields: fields of the products' texts, joined by a space.
        image_size: of the photos, in pixels: both sides, or (height, width). Photos are squashed into it.
        modalities: what is shown of a product; the other is absent everywhere.
        epoch: what an epoch counts: each trainable product once, or each of its (query, product) pairs.
        damping: a query is drawn in proportion to gain x frequency ^ -damping; 0: by gain alone.
        seed: of the order, the queries and hard negatives drawn, and the products' draws.
        streams: runs that an epoch is cut into; a multiple of the number of ranks.
        window: samples among which a run is shuffled.
        workers: processes per rank that read and decode; 0: the training process itself.
        photo_cache_mib: memory per rank for decoded photos, so that they are decoded once a run; 0: none.
        max_broken: fraction of an epoch's or a corpus's products of which the sample or the photo may fail before
            the run stops. A training sample that fails is replaced; in evaluation it has neither text nor photo.
        verify: hash all shards of a folder at the start, each rank a part of those that it sees; those that have
            changed count as failed.
        cache: folder for shards from an address; by default $MMFUSION_CACHE or ~/.cache/mmfusion.
        cache_gib: GiB of shards that the cache keeps; by default all.
        allow_pipe: let `path` be pipe:COMMAND, a shell command that writes file {name} to its output.
        eval_batch_size: rows per rank of an evaluation batch.
        val_corpus: what is searched in validation: "all" products, or "judged+N": those judged in val and N others.
        test_splits: splits that a test evaluates; by default all but train.
        hard_negatives: products per tuple that its query is not to find, drawn anew in each epoch, never a positive of
            it; one that fails is replaced, and counts as failed, like any other. They lie in any shard: the cache of an
            address should have room for all.
        hard_from: where they are drawn from: "judged", and tables of negatives beside the shards (`make mine`). A query
            of which these name too few gets others at random; [] draws all at random.
        hard_max_gain: the most that a judgment's primary label may be worth to be drawn as "judged": by default those
            worth nothing; .1 takes C and S as well. What is positive is never drawn.
        extra_queries: train queries per global batch beside those of its tuples, drawn anew for each step: each product
            is told from more queries, at the cost of encoding these. A multiple of `streams`.
        scores: tables beside the shards with a teacher's scores of pairs, for losses that learn from them.
    """

    def __init__(
        self,
        path: str = "data/demo",
        *,
        batch_size: int = 512,
        text_fields: Sequence[str] = ("title",),
        image_size: int | tuple[int, int] = 64,
        modalities: Sequence[Modality] = ("text", "image"),
        epoch: Literal["products", "pairs"] = "products",
        damping: float = 0.5,
        seed: int = 0,
        streams: int = 8,
        window: int = 16384,
        workers: int = 0,
        photo_cache_mib: int = 1024,
        max_broken: float = 0.01,
        verify: bool = False,
        cache: str | None = None,
        cache_gib: float | None = None,
        allow_pipe: bool = False,
        eval_batch_size: int = 512,
        val_corpus: str = "all",
        test_splits: Sequence[str] | None = None,
        hard_negatives: int = 0,
        hard_from: Sequence[str] = ("judged",),
        hard_max_gain: float = 0.0,
        extra_queries: int = 0,
        scores: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.path, self.batch_size, self.seed = path, batch_size, seed
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.look = Look(tuple(text_fields), size, "text" in modalities, "image" in modalities)
        self.epoch, self.damping, self.streams, self.window = epoch, damping, streams, window
        self.workers, self.photo_cache_mib, self.max_broken = workers, photo_cache_mib, max_broken
        self.verify, self.cache, self.cache_gib, self.allow_pipe = verify, cache, cache_gib, allow_pipe
        self.eval_batch_size, self.val_corpus, self.test_splits = eval_batch_size, val_corpus, test_splits
        self.pairs = PairOptions(hard_negatives, tuple(hard_from), hard_max_gain, tuple(scores), extra_queries)
        self._pair_tables: dict[str, str] = {}
        self._check_options(modalities)
        self._left_out = LeftOut()
        self._loaders: dict[Stage, Callable[[], TupleLoader | CorpusLoader | None]] = {}  # of products, the last made

    def _check_options(self, modalities: Sequence[str]) -> None:
        least = {"image_size": (min(self.look.image_size), 1), "eval_batch_size": (self.eval_batch_size, 1)}
        least |= {"workers": (self.workers, 0), "photo_cache_mib": (self.photo_cache_mib, 0)}
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise ValueError(f"data.{name} is {value}; expected at least {minimum}")
        if not 0 <= self.max_broken <= 1:
            raise ValueError(f"data.max_broken is {self.max_broken}; expected a fraction from 0 to 1")
        if not modalities or set(modalities) - {"text", "image"}:
            raise ValueError(f"data.modalities is {list(modalities)}; expected text, image or both")
        if not re.fullmatch(r"all|judged\+\d+", self.val_corpus):
            raise ValueError(f"data.val_corpus is {self.val_corpus!r}; expected all, or judged+N such as judged+10000")
        self.pairs.check()

    def setup(self, stage: str) -> None:
        """Opens the shards; raises ValueError when they do not have what the options ask for."""
        if "shards" not in self.__dict__:
            self._open()
        if stage == "fit":
            shards = len(self.shards.manifest.shards)
            self.slots = Slots.of(self.shards.index.shard, self.shards.index.pairs, self.epoch)
            self.plan = Plan(self.slots.per_shard(shards), self.seed, self.batch_size, self.streams, self.window)
            self.plan.check(self._ranks)
            if self.extra_queries % self.streams:
                near = max(self.extra_queries // self.streams, 1) * self.streams
                raise ValueError(
                    f"data.extra_queries is {self.extra_queries}; ranks share them as they share the {self.streams} "
                    f"streams: make it a multiple of them, such as {near}, or change data.streams"
                )
            self._pair_tables = self.pairs.tables(self.shards.store)  # training alone needs them
            self.reader.prepare()

    def _open(self) -> None:
        cache = None if self.cache is None else Path(self.cache)
        store = open_store(self.path, cache=cache, cache_gib=self.cache_gib, allow_pipe=self.allow_pipe)
        shards = Shards.open(store)
        unknown = [name for name in self.look.text_fields if name not in shards.manifest.fields]
        if unknown or not self.look.text_fields:
            raise ValueError(
                f"data.text_fields is {list(self.look.text_fields)}; "
                f"{store.address} has {', '.join(shards.manifest.fields)}"
            )
        splits = list(shards.manifest.splits)
        for split in self.test_splits or []:
            if split not in splits:
                raise ValueError(
                    f"data.test_splits names {split!r}; {store.address} has the splits {', '.join(splits)}"
                )
        shards.tars.unusable = find_unusable(shards, self._rank, self._ranks, self.verify)
        check_unusable(shards, self.max_broken)
        tested = [split for split in splits if split != "train"] if self.test_splits is None else self.test_splits
        self.val_loaders = ["queries/val", "corpus"] if "val" in splits else []
        self.test_loaders = ["corpus", *(f"queries/{split}" for split in tested)]
        self.reader = Reader(shards, self.look, self.damping, self.photo_cache_mib, self.pairs)
        self.shards, self.manifest_hash = shards, shards.manifest.hash
        self._texts: dict[str, np.ndarray] = {}

    @property
    def hard_sources(self) -> list[str]:
        return ["random", *self.pairs.hard_from] if self.pairs.hard_negatives else []

    @property
    def hard_max_gain(self) -> float:
        return self.pairs.hard_max_gain

    @property
    def extra_queries(self) -> int:
        return self.pairs.extra_queries

    @property
    def score_tables(self) -> list[str]:
        return list(self.pairs.scores)

    def pair_tables_in_use(self) -> dict[str, str]:
        """Set up for fit; before, and for evaluation, there are none."""
        return dict(self._pair_tables)

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _ranks(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _progress(self) -> tuple[int, int]:
        """Epoch, and steps of it that are done."""
        if self.trainer is None:
            return 0, 0
        done = cast(_ProcessedTracker, self.trainer.fit_loop.epoch_loop.batch_progress.current)
        return self.trainer.current_epoch, done.processed

    def _optimizer(self) -> tuple[int, int]:
        """The optimizer step with which the epoch under way began, and batches per optimizer step."""
        if self.trainer is None:
            return 0, 1
        _, done = self._progress()
        each = self.trainer.accumulate_grad_batches
        return self.trainer.global_step - done // each, each

    def leave_out(self, known: Known | None, until: int) -> None:
        """See RetrievalData."""
        self._left_out.known = None if known is None else KnownReader(self.reader, known)
        self._left_out.until = until

    def leave_out_of_evaluation(self, known: Known | None) -> None:
        """See RetrievalData. Set up for fit, or for evaluation alone."""
        self._left_out.evaluation = None if known is None else KnownReader(self.reader, known)

    def train_dataloader(self) -> TupleLoader:
        loader = TupleLoader(
            self.plan,
            self.slots,
            self.reader,
            self._progress,
            rank=self._rank,
            ranks=self._ranks,
            workers=self.workers,
            max_broken=self.max_broken,
            left_out=self._left_out,
            optimizer=self._optimizer,
        )
        # Weak, as the loader refers to this module: in a cycle its workers would be collected by force, 5 s each.
        self._loaders["fit"] = weakref.ref(loader)
        return loader

    def teardown(self, stage: str) -> None:
        loader = self._loaders.get("fit", lambda: None)()
        if stage == "fit" and isinstance(loader, TupleLoader):
            loader.close()
        if "shards" in self.__dict__:
            self.shards.close()

    def failures(self, stage: Stage = "fit") -> dict[str, int]:
        """Per reason, the samples and photos of the stage's last pass that failed, on all ranks, and rank 0 warns.

        All ranks call this at once, at the pass's end. Raises ValueError, on every rank, where they are together more
        than data.max_broken allows.
        """
        loader = self._loaders.get(stage, lambda: None)()
        if loader is None:
            return dict.fromkeys(REASONS, 0)
        whole, *others = gathered(loader.failures, self._ranks)
        whole.merge(others)
        if self._rank == 0:
            whole.warn()
        return whole.counts()

    def val_dataloader(self) -> list[QueryLoader | CorpusLoader]:
        return [self._evaluation("val", name, self.val_corpus) for name in self.val_loaders]

    def test_dataloader(self) -> list[QueryLoader | CorpusLoader]:
        return [self._evaluation("test", name, "all") for name in self.test_loaders]

    def _evaluation(self, stage: Stage, name: str, corpus: str) -> QueryLoader | CorpusLoader:
        if name != "corpus":
            return self.query_loader(name.removeprefix("queries/"))
        loader = self.corpus_loader(corpus)
        self._loaders[stage] = weakref.ref(loader)
        return loader

    def query_loader(self, split: str) -> QueryLoader:
        """This rank's queries of a split; over all ranks each once, in batches of equal length on every rank."""
        ids = Share.of(self.shards.queries.of(split).astype(np.int64), self._rank, self._ranks)
        return QueryLoader(self.reader, ids, self.eval_batch_size)

    def corpus_loader(self, corpus: str = "all") -> CorpusLoader:
        """This rank's products of the corpus; over all ranks each once, in batches of equal length on every rank."""
        ids = self.corpus_ids(corpus)
        share = Share.of(ids, self._rank, self._ranks)
        return CorpusLoader(
            self.reader,
            share,
            self.eval_batch_size,
            self.seed,
            self.workers,
            products=len(ids),
            max_broken=self.max_broken,
            left_out=self._left_out,
        )

    def corpus_ids(self, corpus: str) -> Int64[np.ndarray, "product"]:
        """Dense ids of a corpus, ascending: "all", or "judged+N" with N products that no val query is judged on."""
        products = np.arange(len(self.shards))
        if corpus == "all":
            return products
        judged = np.unique(self.shards.judgments("val").product)
        others = np.setdiff1d(products, judged)
        drawn = others[np.argsort(hashed(self.seed, EVALUATION, others), kind="stable")]
        return np.union1d(judged, drawn[: int(corpus.removeprefix("judged+"))])

    def state_dict(self) -> dict[str, Any]:
        """What decides the order, the same on every rank; the position in it is the trainer's."""
        return {name: self._order(name) for name in (*ORDER, *PAIRS)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError when a resumed fit would not continue in the same order."""
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        state_dict = {**PAIRS, **state_dict}  # checkpoints from before there were these had none
        for name in (*ORDER, *PAIRS):
            if state_dict[name] != self._order(name):
                what = "tables of pairs (sha256) " if name == "pair_tables" else f"data.{name}="
                raise ValueError(
                    f"the checkpoint was trained with {what}{state_dict[name]}, this run has "
                    f"{self._order(name)}: resume with the same, or start a new run"
                )

    def _order(self, name: str) -> Any:
        if name == "manifest":
            return self.manifest_hash
        if name == "pair_tables":
            return self.pair_tables_in_use()
        value = getattr(self.pairs if name in PAIRS else self, name)
        return list(value) if isinstance(value, tuple) else value

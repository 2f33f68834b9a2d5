"""The feature cache of a run: opens or builds what a stage uses, says so, and knows when batches need no content."""

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from mmfusion.batch import Known, RetrievalData
from mmfusion.encoders import TextEncoder
from mmfusion.feature_cache.build import Advance, Job, Table, build, crew, together
from mmfusion.feature_cache.identity import described
from mmfusion.feature_cache.room import CacheOptions, make_room
from mmfusion.feature_cache.store import VERSION, FeatureFolder, bytes_needed, folder_of
from mmfusion.feature_cache.stored import Stored, open_stored
from mmfusion.feature_cache.uses import PRODUCT
from mmfusion.features import Features
from mmfusion.memo import ROWS, FeatureMemo, encode_photos, encode_texts
from mmfusion.progress import RunProgress
from mmfusion.ranks import checksum
from mmfusion.retrieval.ranking import gathered

TABLES: dict[str, Table] = {"query": "queries", "text": "products", "image": "products"}
NAMES = {"query": "query.encoder", "text": "product.text.encoder", "image": "product.image.encoder"}
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """What a row of outputs takes; tokens as a sample of texts has them on average."""

    width: int
    dtype_size: int
    tokens: float
    token_width: int


class FeatureCache:
    """Puts stored outputs into `features`, where an encoder is frozen.

    Args:
        features: of the towers
        options: where, and how much
        compiled: backend of the encoders' networks, which rounds in its own way
    """

    def __init__(self, features: Features, options: CacheOptions, compiled: str | None) -> None:
        self.features, self.options, self.compiled = features, options, compiled
        self._rows: dict[nn.Module, Row] = {}
        self._described: dict[nn.Module, tuple[Tensor, dict[str, Any]]] = {}
        self._said: set[str] = set()

    @property
    def off(self) -> bool:
        return self.options.use == "off"

    # ---- before the first step ---------------------------------------------------------------------------------------

    def announce(self, spans: Mapping[str, Sequence[tuple[str, str]]], trainer: Trainer, data: RetrievalData) -> None:
        """Tells, by side and span of stages, what will be stored. Raises ValueError where it is more than the limit."""
        if self.off:
            return
        total = 0
        for side, stretches in spans.items():
            for first, last in stretches:
                needed = self._needed(side, trainer, data)
                total += needed
                stages = f"stage {first}" if first == last else f"stages {first} to {last}"
                told = f"{_gib(needed)} in {self.options.root()}; used in {stages}"
                rank_zero_info(f"feature cache: {NAMES[side]}: {_count(data, side)}, {told}")
        if total > self.options.limit_gib * GIB:
            raise ValueError(
                f"the feature cache of this run takes {_gib(total)}, and model.cache.limit_gib is "
                f"{self.options.limit_gib:g}: raise it, or encode anew in each epoch by model.cache.use=off"
            )

    # ---- stages and evaluations --------------------------------------------------------------------------------------

    def enter(self, stage: str, sides: Set[str], trainer: Trainer, data: RetrievalData) -> None:
        """Has the outputs of the encoders that are frozen now for the sides that a stage uses: opened, or built.

        All ranks call this at once. Raises ValueError where there is no room.
        """
        if self.off:
            return
        for side in self._sides(sides):
            if reason := why_not(self.features.encoders[side]):
                self.features.use(side, None)
                self._say(f"{NAMES[side]}: not in stage {stage}: {reason}")
        wanted = [side for side in self._sides(sides) if not why_not(self.features.encoders[side])]
        self._open([side for side in wanted if side not in self.features.stored], trainer, data)
        if lacking := [side for side in wanted if side not in self.features.stored]:
            self._build(lacking, trainer, data)
        for encoder in {encoder for side, encoder in self.features.encoders.items() if side in self.features.stored}:
            if all(side in self.features.stored for side in self._sides_of(encoder)):
                self.features.memos[encoder].clear()

    def look(self, trainer: Trainer, data: RetrievalData) -> bool:
        """Opens, for an evaluation, what lies there already of encoders as they are; whether that is all of a product.

        Builds nothing. All ranks call this at once.
        """
        if self.off:
            return False
        self.features.sync()
        own = self.features.encoders
        closed = [side for side in own if side not in self.features.stored]
        if trainer.training or trainer.validating or trainer.sanity_checking:  # what trains has never been stored
            closed = [side for side in closed if not any(p.requires_grad for p in own[side].parameters())]
        self._open(closed, trainer, data)
        return all(side in self.features.stored for side in PRODUCT if side in own)

    def known(self) -> Known:
        """What the stored outputs of products tell of them."""
        flags = [stored.flags for side in PRODUCT if (stored := self.features.stored.get(side)) is not None]
        text, image = flags[0], flags[-1]
        assert text is not None
        assert image is not None
        return Known(torch.stack([text[:, 0], image[:, 1]], 1), text[:, 2] & image[:, 2])

    # ---- folders -----------------------------------------------------------------------------------------------------

    def _open(self, sides: Sequence[str], trainer: Trainer, data: RetrievalData) -> None:
        """Those that all ranks see."""
        found: dict[str, Stored] = {}
        for side in sides:
            key = self._key(side, trainer, data)
            if (stored := open_stored(folder_of(self.options.root(), key), key)) is not None:
                found[side] = stored
        for side in sorted(set.intersection(*map(set, gathered(sorted(found))))):
            self.features.use(side, found[side])
            told = f"{_count(data, side)}, {_gib(found[side].bytes)}, read from {found[side].folder}"
            self._say(f"{NAMES[side]}: {told}, where they lay already")

    def _build(self, sides: Sequence[str], trainer: Trainer, data: RetrievalData) -> None:
        keys = {side: self._key(side, trainer, data) for side in sides}
        together(self._make_root)
        first = crew(self.options.root())[0] == 0
        together(lambda: self._make_room(keys, trainer, data) if first else None)
        memos = {
            encoder: FeatureMemo(self.features.keep_tokens, self.features.limit_gib * isinstance(encoder, TextEncoder))
            for encoder in map(self.features.encoders.__getitem__, sides)
        }
        jobs = {}
        for side, key in keys.items():
            folder = folder_of(self.options.root(), key)
            whole = FeatureFolder(folder, key, _size(data, side), self.features.keep_tokens)
            jobs[side] = Job(self.features.encoders[side], TABLES[side], whole, memos[self.features.encoders[side]])
            self._say(f"{NAMES[side]}: encodes {_count(data, side)} into {folder}")
        with computing(trainer):
            build(list(jobs.values()), data, trainer.strategy.root_device, _counting(trainer))
        for side, job in jobs.items():
            stored = job.folder.stored()
            assert stored is not None, "of a folder that is finished"
            self.features.use(side, stored)

    def _make_root(self) -> None:
        try:
            self.options.root().mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"the feature cache cannot be made: {error}; name another folder by model.cache.folder, or do without "
                "by model.cache.use=off"
            ) from error

    def _make_room(self, keys: Mapping[str, Mapping[str, Any]], trainer: Trainer, data: RetrievalData) -> None:
        root = self.options.root()
        folders = {side: folder_of(root, key) for side, key in keys.items()}
        keep = {*folders.values(), *(stored.folder for stored in self.features.stored.values())}
        there = {side: sum(part.stat().st_size for part in folder.glob("*.part")) for side, folder in folders.items()}
        needed = sum(max(self._needed(side, trainer, data) - there[side], 0) for side in keys)
        for folder in make_room(root, needed, keep, self.options):
            self._say(f"deleted the least recently used {folder}, to make room")

    def _key(self, side: str, trainer: Trainer, data: RetrievalData) -> dict[str, Any]:
        """All that the outputs depend on; what products show does not touch queries."""
        return {
            "store": VERSION,
            "manifest": data.manifest_hash,
            "table": TABLES[side],
            "shows": data.shows if TABLES[side] == "products" else {},
            "encoder": self._description(self.features.encoders[side]),
            "precision": str(trainer.precision),
            "device": trainer.strategy.root_device.type,
            "compiled": self.compiled,
            "tokens": self.features.keep_tokens,
        }

    def _description(self, encoder: nn.Module) -> dict[str, Any]:
        """Anew only where the weights have changed."""
        now = checksum([*encoder.parameters(), *encoder.buffers()]).cpu()
        before = self._described.get(encoder)
        if before is None or not torch.equal(before[0], now):
            self._described[encoder] = before = now, described(encoder)
        return before[1]

    # ---- sizes -------------------------------------------------------------------------------------------------------

    def _needed(self, side: str, trainer: Trainer, data: RetrievalData) -> int:
        row = self._row(side, trainer, data)
        return bytes_needed(_size(data, side), row.width, row.dtype_size, row.tokens, row.token_width)

    def _row(self, side: str, trainer: Trainer, data: RetrievalData) -> Row:
        """Of a few texts, or of a grey photo."""
        encoder = self.features.encoders[side]
        if encoder not in self._rows:
            memo = FeatureMemo(self.features.keep_tokens, 0)
            with computing(trainer), evaluating(encoder):
                if isinstance(encoder, TextEncoder):
                    encoded = encode_texts(memo, encoder, list(islice(data.texts(), ROWS)) or [""])
                else:
                    size, device = data.shows["image_size"], trainer.strategy.root_device
                    photo = torch.zeros((1, 3, *size), dtype=torch.uint8, device=device)
                    encoded = encode_photos(memo, encoder, photo, torch.zeros(1, dtype=torch.int64, device=device))
            tokens = float(encoded.mask.sum()) / len(encoded.mask)
            width, token_width = encoded.pooled.shape[1], encoded.tokens.shape[2]
            self._rows[encoder] = Row(width, encoded.pooled.element_size(), tokens, token_width)
        return self._rows[encoder]

    def _sides(self, sides: Set[str]) -> list[str]:
        return [side for side in self.features.encoders if side in sides]

    def _sides_of(self, encoder: nn.Module) -> list[str]:
        return [side for side, other in self.features.encoders.items() if other is encoder]

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            rank_zero_info(f"feature cache: {what}")


def why_not(encoder: nn.Module) -> str | None:
    """Why an encoder's outputs cannot be stored now, if so."""
    if any(p.requires_grad for p in encoder.parameters()):
        return "it trains"
    training = [name for name, part in encoder.named_modules() if part.training]
    return f"its part {training[0] or 'as a whole'!r} is in train mode" if training else None


@contextmanager
def computing(trainer: Trainer) -> Iterator[None]:
    """As a step computes, without gradient."""
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        yield


@contextmanager
def evaluating(encoder: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards as it was."""
    modes = {part: part.training for part in encoder.modules()}
    encoder.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _counting(trainer: Trainer) -> Any:
    """A bar where the trainer shows bars."""

    @contextmanager
    def counting(description: str, total: int, unit: str) -> Iterator[Advance]:
        bar = trainer.progress_bar_callback
        if not isinstance(bar, RunProgress):
            yield lambda _: None
            return
        with bar.counting(description, total, unit) as shown:
            yield shown.update

    return counting


def _size(data: RetrievalData, side: str) -> int:
    return data.queries() if TABLES[side] == "queries" else len(data.has_photo())


def _count(data: RetrievalData, side: str) -> str:
    return f"{_size(data, side):,} {TABLES[side]}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size > GIB / 100 else f"{size / 2**20:.2f} MiB"

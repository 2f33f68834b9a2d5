"""The feature cache of a run: opens or builds what a stage uses, says so, and knows when batches need no content."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from mmfusion.batch import Known, RetrievalData
from mmfusion.encoders import TextEncoder
from mmfusion.feature_cache.build import Advance, Job, Table, build, crew, together
from mmfusion.feature_cache.identity import described
from mmfusion.feature_cache.plain import NoIdentityError
from mmfusion.feature_cache.room import GIB, CacheOptions, make_room
from mmfusion.feature_cache.store import VERSION, FeatureFolder, bytes_needed, folder_of
from mmfusion.feature_cache.stored import Stored, open_stored
from mmfusion.feature_cache.uses import PRODUCT, Use, spans
from mmfusion.features import Features
from mmfusion.memo import ROWS, FeatureMemo, encode_photos, encode_texts
from mmfusion.progress import RunProgress
from mmfusion.retrieval.ranking import gathered
from mmfusion.stages import evaluating

TABLES: dict[str, Table] = {"query": "queries", "text": "products", "image": "products"}
NAMES = {"query": "query.encoder", "text": "product.text.encoder", "image": "product.image.encoder"}
SHOWN = {"text": ("text_fields",), "image": ("image_size", "decoding")}  # of data.shows, what a side is given
LIBRARIES = {name: version(name) for name in ("torch", "transformers", "timm")}


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
        self._read_again: set[Path] = set()  # folders whose unreadable products this run has tried

    @property
    def off(self) -> bool:
        return self.options.use == "off"

    # ---- before the first step ---------------------------------------------------------------------------------------

    def announce(self, uses: Sequence[Use], trainer: Trainer, data: RetrievalData) -> None:
        """Tells, by side and span of stages, what will be stored, or lies there already.

        Raises ValueError where all that the run stores is more than the limit.
        """
        self.features.sync()
        if self.off:
            return
        self._rows.clear()  # of a fit before, with another precision or tokenizer
        self._described.clear()
        total = 0
        for side, encoder in self.features.encoders.items():
            if (reason := self._no_identity(side)) is not None:
                self._say(f"{NAMES[side]}: never: {reason}")
                continue
            for first, last in spans(uses, side, encoder):
                needed = self._needed(side, trainer, data)
                total += needed
                names = [use.stage for use in uses]
                changed = any(encoder in use.trains for use in uses[: names.index(first)])
                found = None if changed else self._found(side, trainer, data)
                there = f"{_gib(needed)} in {self.options.root()}" if found is None else f"already in {found.folder}"
                stages = f"stage {first}" if first == last else f"stages {first} to {last}"
                rank_zero_info(f"feature cache: {NAMES[side]}: {_count(data, side)}, {there}; used in {stages}")
        if total > self.options.limit_gib * GIB:
            raise ValueError(
                f"the feature cache of this run takes {_gib(total)}, and model.cache.limit_gib is "
                f"{self.options.limit_gib:g}: raise it, or encode anew in each epoch by model.cache.use=off"
            )

    # ---- stages and evaluations --------------------------------------------------------------------------------------

    def enter(self, use: Use, trainer: Trainer, data: RetrievalData) -> None:
        """Has the outputs of the encoders that are frozen now for the sides that a stage uses: opened, or built.

        What `announce` did not tell is never built. All ranks call this at once. Raises ValueError where there is no
        room.
        """
        self.features.sync()
        if self.off:
            return
        self._forget_others(trainer, data)
        reasons = {side: self._why_not(side, use) for side in self.features.encoders if side in use.sides}
        for side, reason in reasons.items():
            if reason is not None:
                self.features.use(side, None)
                self._say(f"{NAMES[side]}: not in stage {use.stage}: {reason}")
        wanted = [side for side, reason in reasons.items() if reason is None]
        self._open([side for side in wanted if side not in self.features.stored], trainer, data, can_build=True)
        if lacking := [side for side in wanted if side not in self.features.stored]:
            self._build(lacking, trainer, data)
        shown = [NAMES[side] for side in reasons if side in PRODUCT and side not in self.features.stored]
        if shown and wanted:
            self._say(f"stage {use.stage} still reads texts and photos, for {' and '.join(shown)}")
        for encoder in {encoder for side, encoder in self.features.encoders.items() if side in self.features.stored}:
            if all(side in self.features.stored for side in self._sides_of(encoder)):
                self.features.memos[encoder].clear()

    def look(self, trainer: Trainer, data: RetrievalData) -> bool:
        """Opens, for an evaluation, what lies there already of encoders as they are; whether that is all of a product.

        Builds nothing. All ranks call this at once.
        """
        self.features.sync()
        if self.off:
            return False
        self._forget_others(trainer, data)
        own = self.features.encoders
        closed = [side for side in own if side not in self.features.stored]
        if trainer.training or trainer.validating or trainer.sanity_checking:  # what trains has never been stored
            closed = [side for side in closed if not any(p.requires_grad for p in own[side].parameters())]
        self._open(closed, trainer, data)
        return all(side in self.features.stored for side in PRODUCT if side in own)

    def known(self, data: RetrievalData) -> Known:
        """What the stored outputs of products tell of them: each of its own modality, which it has in its key.

        A modality that no stored output is of is taken to be there where the data show it and the index has it.
        """
        flags = {side: self.features.stored[side].flags for side in PRODUCT if side in self.features.stored}
        assert flags
        there = {"text": torch.ones(_size(data, "text"), dtype=torch.bool), "image": torch.from_numpy(data.has_photo())}
        columns, readable = [], torch.ones_like(there["text"])
        for column, side in enumerate(PRODUCT):
            own = flags.get(side)
            columns.append(there[side] & (side in data.shows["modalities"]) if own is None else own[:, column])
            readable = readable if own is None else readable & own[:, 2]
        return Known(torch.stack(columns, 1), readable)

    # ---- folders -----------------------------------------------------------------------------------------------------

    def _no_identity(self, side: str) -> str | None:
        """Why it cannot be told whose outputs a side's are, if so: they are neither read nor stored then."""
        try:
            self._description(self.features.encoders[side])
        except NoIdentityError as error:
            return str(error)
        return None

    def _forget_others(self, trainer: Trainer, data: RetrievalData) -> None:
        """Of what is open, what was made from other data, or by other means: a fit may be followed by another one."""
        for side, stored in list(self.features.stored.items()):
            if stored.folder != folder_of(self.options.root(), self._key(side, trainer, data)):
                self.features.use(side, None)

    def _found(self, side: str, trainer: Trainer, data: RetrievalData) -> Stored | None:
        if self._no_identity(side) is not None:
            return None
        key = self._key(side, trainer, data)
        return open_stored(folder_of(self.options.root(), key), key)

    def _open(self, sides: Sequence[str], trainer: Trainer, data: RetrievalData, can_build: bool = False) -> None:
        """Those that all ranks see; where it can be built, not those, once per run, that lack unreadable products."""

        def look() -> dict[str, Stored]:
            every = {side: self._found(side, trainer, data) for side in sides}
            return {side: stored for side, stored in every.items() if stored is not None}

        found = together(look)
        if can_build:
            lacks = {side for side, stored in found.items() if stored.unread and stored.folder not in self._read_again}
            self._read_again |= {found[side].folder for side in lacks}
            found = {side: stored for side, stored in found.items() if side not in lacks}
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

        def made(side: str) -> Job:
            folder, encoder = folder_of(self.options.root(), keys[side]), self.features.encoders[side]
            whole = FeatureFolder(folder, keys[side], _size(data, side), self.features.keep_tokens)
            if whole.missing():
                self._say(f"{NAMES[side]}: encodes {_count(data, side)} into {folder}; not with model.cache.use=off")
            return Job(encoder, TABLES[side], whole, memos[encoder])

        jobs = together(lambda: {side: made(side) for side in keys})
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
        """All that the outputs depend on; of what products show, what the side is given."""
        return {
            "store": VERSION,
            "manifest": data.manifest_hash,
            "table": TABLES[side],
            "shows": {name: data.shows[name] for name in SHOWN[side]} | {"at all": side in data.shows["modalities"]}
            if side in PRODUCT
            else {},
            "encoder": self._description(self.features.encoders[side]),
            "precision": str(trainer.precision),
            "device": trainer.strategy.root_device.type,
            "compiled": self.compiled,
            "matmul": torch.get_float32_matmul_precision(),
            "libraries": LIBRARIES,
            "tokens": self.features.keep_tokens,
        }

    def _description(self, encoder: nn.Module) -> dict[str, Any]:
        """Anew only where the weights have changed."""
        now = self.features.weights[encoder]
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

    def _why_not(self, side: str, use: Use) -> str | None:
        """Why a side's outputs cannot be stored in a stage, if so; the same as `uses.spans` has it."""
        encoder = self.features.encoders[side]
        if (reason := why_not(encoder)) is None and encoder in use.trains:
            return "its rates train parts that no loss reaches; give them the rate frozen"
        return reason or self._no_identity(side)

    def _sides_of(self, encoder: nn.Module) -> list[str]:
        return [side for side, other in self.features.encoders.items() if other is encoder]

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            rank_zero_info(f"feature cache: {what}")


def why_not(encoder: nn.Module) -> str | None:
    """Why an encoder's outputs cannot be stored now, if so."""
    if not any(True for _ in encoder.parameters()):
        return "it has no weights to freeze"
    if any(p.requires_grad for p in encoder.parameters()):
        return "it trains"
    training = [name for name, part in encoder.named_modules() if part.training]
    return f"its part {training[0] or 'as a whole'!r} is in train mode" if training else None


@contextmanager
def computing(trainer: Trainer) -> Iterator[None]:
    """As a step computes, without gradient."""
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        yield


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

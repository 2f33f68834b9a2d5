"""The feature cache in a run: nothing changes but the time it takes, and what is stale is never read."""

import logging
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback

from mmfusion.encoders import ScratchTextEncoder, TimmEncoder
from mmfusion.feature_cache import CacheOptions, store
from mmfusion.feature_cache.cache import why_not
from mmfusion.feature_cache.uses import Use, sides_used, spans, without_content
from mmfusion.fusion import CrossAttention, Gated
from mmfusion.memo import weights_of
from mmfusion.stages import LossWeights, Stage, Until
from tests.datamodules.small import convert, small_catalogue
from tests.ddp import run_ranks
from tests.small_run import ENCODERS_FROZEN, small_data, small_module, small_shards, small_trainer, weights

OFF = CacheOptions(use="off")
ATTENTION = partial(CrossAttention, heads=2, dropout=0.0)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


class Watch(Callback):
    """Losses and gradients of every step, whether its batch had content, and how often encoders were called."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.shown: list[bool] = []
        self.evaluated: list[bool] = []
        self.calls = Counter[str]()

    def setup(self, trainer, pl_module, stage):
        for name in ("text", "image"):
            encoder = getattr(pl_module.product, name).encoder
            encoder.register_forward_hook(lambda *_, name=name: self.calls.update([name]))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].detach().clone())
        self.shown.append(batch.product.shown)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        found = pl_module.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in found if p.grad is not None})

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if hasattr(batch, "product") or hasattr(batch, "photo"):
            self.evaluated.append(batch.shown)

    on_test_batch_start = on_validation_batch_start


def run(shards: Path, folder: Path, steps: int = 8, trainer: dict | None = None, data: dict | None = None,
        **options: Any) -> Any:  # fmt: skip
    """A run and what was seen of it."""
    watch = Watch()
    module = small_module(**{"modality_dropout": 0.3, **options})
    chosen = {"limit_val_batches": 1.0, "check_val_every_n_epoch": 1, **(trainer or {})}
    small_trainer(folder, watch, steps=steps, **chosen).fit(module, small_data(shards, **(data or {})))
    return module, watch


def check_equal(one: tuple[Any, Watch], other: tuple[Any, Watch]) -> None:
    """Bit for bit."""
    assert [float(loss) for loss in one[1].losses] == [float(loss) for loss in other[1].losses]
    assert len(one[1].gradients) == len(other[1].gradients) > 0
    for mine, theirs in zip(one[1].gradients, other[1].gradients, strict=True):
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    ours, others = weights(one[0]), weights(other[0])
    assert [name for name in ours if not torch.equal(ours[name], others[name])] == []
    for split, views in one[0].results.items():
        for view, result in views.items():
            told = {name: cell["value"] for name, cell in result.metrics.items()}
            assert told == {n: c["value"] for n, c in other[0].results[split][view].metrics.items()}, view


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "nothing kept in memory": {"memo_gib": 0.0},
    "tokens": {"fusion": ATTENTION},
    "tokens, nothing kept in memory": {"fusion": ATTENTION, "memo_gib": 0.0},
    "micro-batches": {"micro_batch": 5},
    "micro-batches of tokens": {"micro_batch": 5, "fusion": ATTENTION},
    "a query encoder of its own": {"query": "copy"},
    "dropout and augmentation until they are frozen": {"dropout": 0.1, "augment": "light"},
    "accumulation": {"trainer": {"accumulate_grad_batches": 2, "max_epochs": -1}},
    "bf16": {"trainer": {"precision": "bf16-mixed"}},
    "hard negatives": {"data": {"hard_negatives": 2, "hard_from": []}},
    "extra queries": {"data": {"extra_queries": 16}, "micro_batch": 5},
    "workers": {"data": {"workers": 2}},
}


@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_weights_and_results_are_the_same_to_the_bit(shards, tmp_path, case):
    plain, cached = run(shards, tmp_path, cache=OFF, **CASES[case]), run(shards, tmp_path, **CASES[case])
    check_equal(plain, cached)
    assert all(plain[1].shown)
    assert plain[1].evaluated
    assert cached[1].shown[0]
    assert not cached[1].shown[-1]
    assert not cached[1].evaluated[-1]


def on_ranks(rank: int, world: int, shards: Path, folder: Path, apart: bool) -> tuple[list[bool], int]:
    """One rank sees what the other does not where they are apart, as on two machines."""
    options = {"trainer": {"devices": world, "strategy": "ddp"}}
    root = folder / (f"cache-{rank}" if apart else "cache")
    plain = run(shards, folder, cache=OFF, **options)
    cached = run(shards, folder, cache=CacheOptions(folder=str(root)), **options)
    check_equal(plain, cached)
    return cached[1].shown, len(list(root.glob("features/*/complete.json")))


@pytest.mark.parametrize("apart", [False, True])
def test_two_ranks_share_a_folder_or_have_one_each(shards, tmp_path, apart):
    for shown, folders in run_ranks(on_ranks, 2, shards, tmp_path, apart, timeout=180):
        assert shown[0]
        assert not shown[-1]
        assert folders == 3, "of queries, texts and photos"


FROZEN = {
    "photos": Stage(Until(steps=1), LossWeights(query_image=1.0), dict(ENCODERS_FROZEN)),
    "all": Stage(Until(fraction=1.0), LossWeights(query_product=1.0), dict(ENCODERS_FROZEN)),
}


def frozen_run(shards: Path, folder: Path, **options: Any) -> tuple[Any, Watch]:
    """Encoders are frozen from the first step on: what they give can be shared by any two of these runs."""
    return run(shards, folder, steps=2, **{"stages": FROZEN, "trainer": {"limit_val_batches": 0}, **options})


def folders(root: Path) -> set[str]:
    return {path.parent.name for path in root.glob("features/*/complete.json")}


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MMFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


ALWAYS = 1 + len(FROZEN)  # calls of the image encoder: to see what a row takes, and each stage's reach


def test_a_second_run_builds_nothing_and_says_so(shards, tmp_path, root, caplog):
    first = frozen_run(shards, tmp_path)
    made = {path: path.stat().st_mtime_ns for path in root.glob("features/*/*.part")}
    assert len(made) == 3, "of queries, texts and photos"
    with caplog.at_level(logging.INFO):
        caplog.clear()
        second = frozen_run(shards, tmp_path, fusion=Gated)
    assert {path: path.stat().st_mtime_ns for path in root.glob("features/*/*.part")} == made
    assert first[1].calls["image"] > ALWAYS
    assert second[1].calls["image"] == ALWAYS
    assert caplog.text.count("where they lay already") == 3
    assert "encodes" not in caplog.text


@pytest.fixture(scope="session")
def branded(tmp_path_factory) -> Path:
    """The small catalogue with a second field of text."""
    folder = tmp_path_factory.mktemp("branded")
    catalogue = small_catalogue(folder / "catalogue") / "products.csv"
    rows = catalogue.read_text().splitlines()
    catalogue.write_text("\n".join([f"{rows[0]},brand", *(f"{row},acme" for row in rows[1:])]) + "\n")
    convert(str(folder / "catalogue"), str(folder / "shards"))
    return folder / "shards"


def reseeded() -> ScratchTextEncoder:
    torch.manual_seed(5)
    return ScratchTextEncoder(width=16, layers=1, heads=2, vocabulary=300)


def resized() -> TimmEncoder:
    torch.manual_seed(5)
    return TimmEncoder("mobilenetv3_small_050", augment="none")


OTHERS: dict[str, tuple[int, Callable[[], dict[str, Any]], Callable[[], dict[str, Any]]]] = {
    "text field": (2, dict, lambda: {"data": {"text_fields": ["title", "brand"]}}),
    "weights": (2, dict, lambda: {"text": reseeded()}),
    "image size": (1, lambda: {"image": resized()}, lambda: {"image": resized(), "data": {"image_size": 40}}),
    "tokens": (3, dict, lambda: {"fusion": ATTENTION}),
    "tokens no more": (3, lambda: {"fusion": ATTENTION}, dict),
    "precision": (3, dict, lambda: {"trainer": {"limit_val_batches": 0, "precision": "bf16-mixed"}}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_others_have_made_is_never_read(branded, tmp_path, root, what):
    """How many folders are new, and that the run is the one that reads none."""
    new, before, after = OTHERS[what]
    frozen_run(branded, tmp_path, **before())
    made = folders(root)
    cached = frozen_run(branded, tmp_path, **after())
    assert len(folders(root) - made) == new
    check_equal(frozen_run(branded, tmp_path, cache=OFF, **after()), cached)


class WithoutWeights(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_an_encoder_without_weights_is_not_stored():
    assert why_not(WithoutWeights().eval()) == "it has no weights to freeze"
    assert weights_of(WithoutWeights()).tolist() == []


@pytest.mark.parametrize("what", ["data", "precision"])
def test_a_module_that_is_fitted_again_reads_nothing_of_before(branded, tmp_path, root, what):
    """It ends as a module that never saw the first fit."""
    data = {"text_fields": ["title", "brand"]} if what == "data" else {}
    precision = {"precision": "bf16-mixed"} if what == "precision" else {}

    def fitted(module: Any) -> dict[str, torch.Tensor]:
        small_trainer(tmp_path, steps=2, **precision).fit(module, small_data(branded, **data))
        return weights(module)

    again = small_module(stages=FROZEN)
    before = weights(again)
    small_trainer(tmp_path, steps=2).fit(again, small_data(branded))
    again.load_state_dict(before, strict=False)
    alone, after = fitted(small_module(stages=FROZEN, cache=OFF)), fitted(again)
    assert [name for name in alone if not torch.equal(alone[name], after[name])] == []


def test_another_catalogue_has_its_own(shards, branded, tmp_path, root):
    frozen_run(shards, tmp_path)
    frozen_run(branded, tmp_path)
    assert len(folders(root)) == 6


class InterruptedByTestError(Exception):
    pass


def test_an_interrupted_build_is_completed_and_a_damaged_part_made_anew(shards, tmp_path, root, monkeypatch):
    monkeypatch.setattr(store, "PART", 16)

    class Interrupt(Callback):
        """In the third part of the photos."""

        def setup(self, trainer, pl_module, stage):
            self.calls = 0
            pl_module.product.image.encoder.register_forward_hook(self.count)

        def count(self, _, args, __):
            self.calls += 1
            if self.calls == 1 + 1 + 3:  # its size, its reach
                raise InterruptedByTestError

    with pytest.raises(InterruptedByTestError):
        small_trainer(tmp_path, Interrupt(), steps=2).fit(
            small_module(stages=FROZEN), small_data(shards, eval_batch_size=16)
        )
    assert len(folders(root)) == 0
    photos = next(path.parent for path in root.glob("features/*/00001.part") if b"TimmEncoder" in about(path))
    before = {path.name: path.stat().st_mtime_ns for path in photos.glob("*.part")}
    assert sorted(before) == ["00000.part", "00001.part"]
    damaged = bytearray((photos / "00000.part").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (photos / "00000.part").write_bytes(damaged)
    cached = frozen_run(shards, tmp_path)
    after = {path.name: path.stat().st_mtime_ns for path in photos.glob("*.part")}
    assert len(after) == 4
    assert after["00001.part"] == before["00001.part"]
    assert len(folders(root)) == 3
    check_equal(frozen_run(shards, tmp_path, cache=OFF), cached)


def about(part: Path) -> bytes:
    return (part.parent / "description.json").read_bytes()


def test_more_than_the_limit_is_refused_before_the_first_step(shards, tmp_path, root):
    trainer = small_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"takes .* MiB, and model.cache.limit_gib is 1e-06.*model.cache.use=off"):
        trainer.fit(small_module(cache=CacheOptions(limit_gib=1e-6)), small_data(shards))
    assert trainer.global_step == 0
    assert not root.exists()


def test_a_run_goes_on_in_the_middle_of_a_cached_stage(shards, tmp_path, root):
    class Save(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    straight = small_module(modality_dropout=0.3)
    small_trainer(tmp_path, Save()).fit(straight, small_data(shards))
    made = folders(root)
    for step in (3, 6):
        again = small_module(modality_dropout=0.3)
        path = tmp_path / f"{step}.ckpt"
        small_trainer(tmp_path).fit(again, small_data(shards), ckpt_path=path, weights_only=True)
        expected = weights(straight)
        assert [name for name, weight in weights(again).items() if not torch.equal(weight, expected[name])] == []
    assert folders(root) == made


def test_an_evaluation_of_the_run_encodes_nothing_and_reads_no_photo(shards, tmp_path, root):
    module = small_module()
    trainer = small_trainer(tmp_path)
    trainer.fit(module, small_data(shards))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    found = []
    for cache in (CacheOptions(), OFF):
        watch, again = Watch(), small_module(cache=cache)
        tester = small_trainer(tmp_path, watch)
        tester.test(again, small_data(shards), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False)
        views = again.results["test"].items()
        values = {view: {name: cell["value"] for name, cell in found.metrics.items()} for view, found in views}
        found.append((values, watch))
    assert found[0][0] == found[1][0]
    assert not any(found[0][1].evaluated)
    assert all(found[1][1].evaluated)
    assert not found[0][1].calls
    assert found[1][1].calls["image"]
    assert found[1][1].calls["text"]


def test_what_the_log_says(shards, tmp_path, root, caplog):
    with caplog.at_level(logging.INFO):
        small_trainer(tmp_path).fit(small_module(), small_data(shards))
    said = [line.split("feature cache: ")[1] for line in caplog.text.splitlines() if "feature cache: " in line]
    size = next(path.stat().st_size for path in root.glob("features/*/*.part") if b"TimmEncoder" in about(path))
    told = re.fullmatch(
        rf"product.image.encoder: 64 products, (.*) MiB in {root}/features; used in stages align to fuse", said[2]
    )
    assert float(told[1]) == pytest.approx(size / 2**20, abs=0.02)
    assert "product.image.encoder: not in stage adapt: it trains" in said
    assert sum("encodes" in line for line in said) == 3
    caplog.clear()
    with caplog.at_level(logging.INFO):
        small_trainer(tmp_path).fit(small_module(cache=OFF), small_data(shards))
    assert "feature cache" not in caplog.text


# ---- what is used when, by hand --------------------------------------------------------------------------------------

TEXT, IMAGE, QUERY = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
ENCODERS = {"query": QUERY, "text": TEXT, "image": IMAGE}
BOTH = {"query", "text", "image"}
USES = [
    Use("photos", {"query", "image"}, {IMAGE}),
    Use("words", {"query", "text"}, set()),
    Use("align", BOTH, set()),
    Use("again", BOTH, {TEXT}),
    Use("fuse", BOTH, set()),
]
ENDS = [10, 20, 30, 40, 50]


def test_stages_share_outputs_until_their_encoder_trains():
    assert spans(USES, "query", QUERY) == [("photos", "fuse")]
    assert spans(USES, "text", TEXT) == [("words", "align"), ("fuse", "fuse")]
    assert spans(USES, "image", IMAGE) == [("align", "fuse")]


@pytest.mark.parametrize(
    ("index", "stored", "until"),
    [(0, set(), 0), (1, {"text"}, 20), (1, {"text", "image"}, 30), (2, {"text"}, 20), (2, BOTH, 30), (4, BOTH, 50)],
)
def test_content_is_needed_again_where_a_stage_trains_or_uses_what_is_not_stored(index, stored, until):
    assert without_content(USES, index, ENDS, ENCODERS, stored) == until


def test_a_fused_view_uses_text_and_photo():
    assert sides_used({"query", "fused"}) == BOTH
    assert sides_used({"text", "image"}) == {"text", "image"}
    assert sides_used({"query", "image"}) == {"query", "image"}

"""What the module wires: terms by hand, modality dropout, kept features, precision, logging, and refusals."""

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback

from mmfusion.batch import QueryBatch
from mmfusion.feature_cache import CacheOptions
from mmfusion.features import after_dropout
from mmfusion.loggers import AppendingCSVLogger
from mmfusion.losses import InfoNCE
from mmfusion.memo import photo_keys
from mmfusion.optim import rate_at
from mmfusion.stages import Group, LossWeights, Stage, Until
from mmfusion.terms import TERM_VIEWS, Losses
from tests.ddp import run_ranks
from tests.small_run import GROUPS, small_data, small_module, small_shards, small_trainer, three_stages


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


@pytest.fixture
def batch(shards):
    data = small_data(shards)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


@pytest.fixture
def module(shards):
    module = small_module(dropout=0.0)
    module.query.encoder.fit(["red cup", "blue hat", "number 12 lamp", "green shoe", "yellow"])
    return module


def test_a_products_vectors_do_not_depend_on_the_batch_that_it_is_evaluated_in(shards):
    """To the last bit: equal products tie, and an evaluation repeats, whatever eval_batch_size is."""
    module, data = small_module().eval(), small_data(shards)
    module.query.encoder.fit(["red cup", "blue hat", "number 12 lamp", "green shoe", "yellow"])
    data.setup("test")
    with torch.no_grad():
        views = [
            [
                module.views(data.products(ids), {"text", "image", "fused"})
                for ids in np.array_split(np.arange(64), parts)
            ]
            for parts in (1, 3, 64)
        ]
        texts = data.query_texts(np.arange(16))
        queries = [
            torch.cat(
                [
                    module.features.queries(QueryBatch(texts[i : i + n], torch.arange(n), torch.ones(n) > 0))
                    for i in range(0, 16, n)
                ]
            )
            for n in (1, 16)
        ]
    for view in ("text", "image", "fused"):
        whole, thirds, single = (torch.cat([part[view] for part in parts]) for parts in views)
        assert torch.equal(whole, thirds)
        assert torch.equal(whole, single)
    assert torch.equal(*queries)


@pytest.mark.parametrize("extra", [0, 5])
def test_every_term_by_a_slow_loop(module, batch, extra):
    """Labels straight from the judged lists; a photo that is missing takes its row and column out of photo terms."""
    judged = batch.judged["relevance"]
    more = judged.query_id.unique()[:extra]  # of which some are queries of the batch as well
    query = QueryBatch([*batch.query.text, *(f"query {id}" for id in more)], torch.cat([batch.query.id, more]),
                       torch.ones(len(batch) + extra, dtype=torch.bool))  # fmt: skip
    batch = replace(batch, query=query)
    terms = module.terms(batch, set(TERM_VIEWS))
    vectors = module.product(batch.product) | {"query": module.query(batch.query.text)}
    rows, scale = range(len(batch)), module.losses["query_text"].scale
    gains = {(int(p), int(q)): float(g) for p, q, g in zip(judged.product, judged.query_id, judged.gain, strict=True)}
    photo = batch.product.present[:, 1].tolist()
    assert not all(photo), "the batch must have a product without photo"

    def kind(i: int, j: int, same_product: bool) -> str:
        if same_product:
            return "positive" if batch.product.id[i] == batch.product.id[j] else "negative"
        gain = gains.get((j, int(batch.query.id[i])), 0.0)
        return "positive" if gain >= 1 else "ignored" if gain > 0 else "negative"

    for name, left, right in (("query_product", "query", "fused"), ("query_text", "query", "text"),
                              ("query_image", "query", "image"), ("text_image", "text", "image")):  # fmt: skip
        seen = [j for j in rows if right != "image" or photo[j]]
        logits = (scale * vectors[left] @ vectors[right].T).double()
        lines = range(len(logits))
        matrix = {(i, j): (kind(i, j, name == "text_image"), logits[i, j]) for i in lines for j in seen}
        ways = []
        for turned in (False, True):
            losses = []
            for i in rows if turned else lines:
                line = [cell for place, cell in matrix.items() if place[turned] == i]
                positive = [logit for label, logit in line if label == "positive"]
                if positive:
                    counted = [logit for label, logit in line if label != "ignored"]
                    losses.append(torch.stack(counted).logsumexp(0) - torch.stack(positive).logsumexp(0))
            ways.append(torch.stack(losses).mean())
        assert terms[name].item() == pytest.approx((ways[0] + ways[1]).item() / 2, rel=1e-5), name


def test_modality_dropout_hides_one_of_two_and_never_the_only_one(batch):
    visible = after_dropout(batch.product, 0.9)
    assert visible.any(1).all()
    whole = batch.product.present.all(1)
    assert (visible[whole].sum(1) == 1).float().mean() > 0.5
    assert torch.equal(visible[~whole], batch.product.present[~whole])
    assert torch.equal(after_dropout(batch.product, 0.0), batch.product.present)


class Encodings(Callback):
    """How often each encoder's network saw a text or a photo, per stage; repetitions within a call do not count."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str], Counter] = {}

    def on_fit_start(self, trainer, pl_module):
        text, image = pl_module.product.text.encoder, pl_module.product.image.encoder
        text.register_forward_hook(lambda _, args, __: self.count(pl_module.stage_name, "text", args[0]))
        image.register_forward_hook(lambda _, args, __: self.count(pl_module.stage_name, "image", photo_keys(args[0])))

    def count(self, stage: str, name: str, keys: list) -> None:
        self.seen.setdefault((stage, name), Counter()).update(set(keys))


def test_frozen_encoders_run_once_per_text_and_photo_and_the_test_reuses_them(shards, tmp_path):
    module, encodings = small_module(), Encodings()
    trainer = small_trainer(tmp_path, encodings, steps=40, limit_val_batches=1.0)
    trainer.fit(module, small_data(shards))
    frozen = encodings.seen["align", "image"] + encodings.seen.get(("fuse", "image"), Counter())
    probes = 2  # of the stages' reach, two products each
    assert sum(frozen.values()) <= len(frozen) + 2 * probes
    assert max(encodings.seen["adapt", "image"].values()) > 1
    before = sum(encodings.seen.values(), Counter())
    trainer.test(module, small_data(shards), verbose=False)
    after = sum(encodings.seen.values(), Counter())
    assert set(after - before) <= {"yellow shoe", "red lamp"}, "the test's queries alone are new"


def test_kept_features_change_nothing(shards, tmp_path):
    kept, fresh = (small_module(memo_gib=size, cache=CacheOptions(use="off")) for size in (4.0, 0.0))
    for module in (kept, fresh):
        small_trainer(tmp_path, steps=20).fit(module, small_data(shards))
    assert kept.features.memos[kept.product.image.encoder].slot
    assert not fresh.features.memos[fresh.product.image.encoder].slot
    for (name, a), (_, b) in zip(kept.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2, "steps": 8}])
def test_other_ways_to_train(shards, tmp_path, options):
    module = small_module()
    trainer = small_trainer(tmp_path, **{"limit_val_batches": 1.0, "max_epochs": -1, **options})
    trainer.fit(module, small_data(shards))
    assert trainer.global_step == 8
    assert module.stage_name == "fuse"
    assert 0 <= module.results["val"]["fused"].metrics["relevance/ndcg@10"]["value"] <= 1


@pytest.mark.slow
def test_torch_compile_gives_the_same_weights(shards, tmp_path):
    """Traced and differentiated ahead of time, run by the eager backend: inductor's C++ takes minutes on two cores."""
    plain, compiled = small_module(), small_module(compile="aot_eager")
    for module in (plain, compiled):
        small_trainer(tmp_path, steps=8).fit(module, small_data(shards))
    for (name, a), (other, b) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
        assert name == other
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5), name


def test_what_a_run_logs(shards, tmp_path):
    logger = AppendingCSVLogger(tmp_path, name="exp", version="1")
    trainer = small_trainer(tmp_path, logger=logger, log_every_n_steps=4, limit_val_batches=1.0)
    module = small_module()
    trainer.fit(module, small_data(shards))
    with (tmp_path / "exp/1/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns = set(rows[0])
    steps = [row for row in rows if row["train/loss"]]
    assert [int(row["step"]) for row in steps] == [3, 7]
    for row in steps:
        for group in GROUPS:
            true = rate_at(int(row["step"]), group, module.groups, module.stages, module.stage_plan)
            assert float(row[f"lr/{group}"]) == pytest.approx(true, rel=1e-4), (row["step"], group)
    assert [float(row["stage"]) for row in steps] == [1, 2]
    assert [bool(row["train/query_product"]) for row in steps] == [False, True]
    wanted = {f"train/{term}" for term in ("query_product", "query_text", "query_image")}
    wanted |= {f"lr/{group}" for group in ("text_encoder", "image_encoder", "projection", "fusion", "scale")}
    wanted |= {"stage", "train/loss", "train/scale/query_text", "gates/expert_0/mean", "val/primary"}
    wanted |= {
        f"val/{view}/relevance/{name}"
        for view in ("text", "image", "fused")
        for name in ("ndcg@10", "recall@100", "mrr")
    }
    assert wanted <= columns


def test_a_single_view_of_what_is_absent_is_zero_whatever_fills_the_gap(module, batch):
    views = module.product(batch.product)
    gap = ~batch.product.present[:, 1]
    assert gap.any()
    assert not views["image"][gap].any()
    batch.product.photo[gap] = 77
    again = module.product(batch.product)
    assert all(torch.equal(views[name], again[name]) for name in views)


def test_a_label_that_the_shards_lack_is_named(shards, tmp_path):
    module = small_module(losses=Losses(query_text=InfoNCE(label="relevanz")))
    with pytest.raises(ValueError, match=r"label 'relevanz'.*relevance.*Did you mean relevance"):
        small_trainer(tmp_path).fit(module, small_data(shards))


def test_a_stage_that_trains_nothing_is_an_error(shards, tmp_path):
    stages = {"all": Stage(Until(fraction=1.0), LossWeights(query_text=1.0))}
    groups = {name: Group(group.match, "frozen") for name, group in GROUPS.items()}
    with pytest.raises(ValueError, match="stage 'all' trains nothing"):
        small_trainer(tmp_path).fit(small_module(stages=stages, groups=groups), small_data(shards))


def test_a_loss_that_is_not_finite_stops_the_run_with_its_place(shards, tmp_path):
    module = small_module()
    with torch.no_grad():
        module.query.projection.network.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite at step 0, stage adapt"):
        small_trainer(tmp_path).fit(module, small_data(shards))


def test_a_copy_of_the_text_encoder_trains_apart_and_a_shared_one_does_not(shards, tmp_path):
    shared, apart = small_module(), small_module(query="copy")
    assert shared.query.encoder is shared.product.text.encoder
    small_trainer(tmp_path).fit(apart, small_data(shards))
    own, products = (e.network.embedding.weight for e in (apart.query.encoder, apart.product.text.encoder))
    assert own.requires_grad == products.requires_grad
    assert not torch.equal(own, products)


def batch_norm(rank: int, world: int, shards: Path, folder: Path) -> list[torch.Tensor]:
    from mmfusion.encoders import TimmEncoder

    image = TimmEncoder("mobilenetv3_small_050", augment="none")
    stages = {"all": Stage(Until(fraction=1.0), LossWeights(query_image=1.0, query_product=1.0))}
    module = small_module(image=image, stages=stages)
    trainer = small_trainer(folder, devices=world, strategy="ddp", steps=3, limit_val_batches=1.0)
    trainer.fit(module, small_data(shards))
    return [b.clone() for b in image.buffers()] + [
        torch.tensor(module.results["val"]["image"].metrics["relevance/ndcg@10"]["value"])
    ]


def test_batch_norms_statistics_are_rank_zeros_when_ranks_evaluate(shards, tmp_path):
    first, second = run_ranks(batch_norm, 2, shards, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_stages_may_be_any_list(shards, tmp_path):
    frozen = dict(three_stages()["align"].rates)
    stages = {
        "adapt": Stage(Until(steps=2), LossWeights(text_image=1.0)),
        "words": Stage(Until(epochs=1.5), LossWeights(query_text=1.0), frozen),
        "photos": Stage(Until(fraction=0.75), LossWeights(query_image=1.0), frozen),
        "fuse": Stage(Until(fraction=1.0), LossWeights(query_product=1.0), frozen),
    }
    module = small_module(stages=stages)
    small_trainer(tmp_path, steps=8).fit(module, small_data(shards))
    assert module.stage_plan.ends == [2, round(1.5 * 3), 6, 8]

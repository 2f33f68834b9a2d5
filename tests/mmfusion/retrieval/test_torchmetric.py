import pickle
from typing import Any

import jaxtyping
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection

from mmfusion.batch import Judgments
from mmfusion.retrieval.metrics import parse_metric, ranked_gains, with_policy
from mmfusion.retrieval.torchmetric import RankingMetric
from tests.ddp import run_ranks
from tests.mmfusion.retrieval.test_metrics import DEPTH, ESCI, QUERIES, drawn, lists

NAMES = ("ndcg@10", "ndcg_exp@5", "recall@10", "precision@3", "mrr", "map", "hit_rate@3", "err@10", "judged@10",
         "share_s@10", "share_unjudged@10")  # fmt: skip


def judgments() -> Judgments:
    return drawn(list(ESCI.values()), unlisted="unknown", **ESCI)


def data() -> tuple[Tensor, Tensor]:
    ids, query_ids = lists()
    return torch.from_numpy(ids), torch.from_numpy(query_ids)


def expected(name: str, unjudged: str = "zero", no_positive: str = "skip") -> float:
    ids, query_ids = lists()
    ranked = ranked_gains(ids, query_ids, judgments(), "relevance", unjudged)
    return float(np.nanmean(with_policy(parse_metric(name, DEPTH, ESCI)(ranked), no_positive)))


def metric(name: str = "ndcg@10", **options: Any) -> RankingMetric:
    return RankingMetric(name, judgments(), "relevance", **{"depth": DEPTH} | options)


def collection() -> MetricCollection:
    return MetricCollection({name: metric(name) for name in NAMES})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unjudged", ["zero", "condensed"])
@pytest.mark.parametrize("no_positive", ["skip", "zero"])
def test_updates_add_up_to_the_pure_functions(name: str, unjudged: str, no_positive: str) -> None:
    ours = metric(name, unjudged=unjudged, no_positive=no_positive)
    ids, query_ids = data()
    for part in torch.arange(QUERIES).split([1, 20, 0, 19]):
        ours.update(ids[part], query_ids[part])
    value = ours.compute()
    assert (value.shape, value.dtype) == ((), torch.float32)
    assert float(value) == pytest.approx(expected(name, unjudged, no_positive), rel=1e-6)


def test_a_query_counts_once() -> None:
    ours, (ids, query_ids) = metric(), data()
    for part in (slice(0, 30), slice(10, None), slice(0, 3)):
        ours.update(ids[part], query_ids[part])
    assert float(ours.compute()) == pytest.approx(expected("ndcg@10"), rel=1e-6)


def test_lists_are_cut_or_padded_to_the_depth() -> None:
    ids, query_ids = data()
    cut, wide = metric("map@5", depth=5), metric("map@5", depth=DEPTH + 7)
    cut.update(ids, query_ids)
    wide.update(ids[:20], query_ids[:20])
    wide.update(ids[20:, :5].int(), query_ids[20:].int())
    assert float(cut.compute()) == float(wide.compute()) == pytest.approx(expected("map@5"), rel=1e-6)


def test_nothing_to_average_is_no_number() -> None:
    ours = metric()
    ours.update(torch.tensor([[0, 1]]), torch.tensor([0]))  # judged nowhere
    assert torch.isnan(ours.compute())


def test_a_collection_holds_one_state() -> None:
    ours, (ids, query_ids) = collection(), data()
    ours.update(ids[:7], query_ids[:7])
    ours.update(ids[7:], query_ids[7:])
    assert len(ours.compute_groups) == 1
    values = ours.compute()
    assert set(values) == set(NAMES)
    for name, value in values.items():
        assert float(value) == pytest.approx(expected(name), rel=1e-6)
    ours.reset()
    ours.update(ids[:1], query_ids[:1])
    assert ours["judged@10"].query_ids[0].tolist() == query_ids[:1].tolist()


def test_forward_returns_the_batch_and_keeps_the_whole() -> None:
    ours, alone, (ids, query_ids) = metric(), metric(), data()
    alone.update(ids[20:], query_ids[20:])
    ours(ids[:20], query_ids[:20])
    assert float(ours(ids[20:], query_ids[20:])) == float(alone.compute())
    assert float(ours.compute()) == pytest.approx(expected("ndcg@10"), rel=1e-6)


def test_the_state_survives_pickling_and_checkpoints() -> None:
    ours, (ids, query_ids) = metric("share_s@10"), data()
    ours.persistent(True)
    ours.update(ids[:20], query_ids[:20])
    restored = metric("share_s@10")
    restored.persistent(True)
    restored.load_state_dict(ours.state_dict())
    restored._update_count = 1  # torchmetrics does not save it
    for copy in (pickle.loads(pickle.dumps(ours)), ours.clone(), restored):
        copy.update(ids[20:], query_ids[20:])
        assert float(copy.compute()) == pytest.approx(expected("share_s@10"), rel=1e-6)
    assert len(ours.query_ids) == 1
    assert not metric().state_dict()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: moves between devices cannot be seen")
def test_moves_between_devices() -> None:
    ours, (ids, query_ids) = metric().cuda(), data()
    ours.update(ids[:20].cuda(), query_ids[:20].cuda())
    assert ours.compute().is_cuda
    ours.cpu().update(ids[20:], query_ids[20:])
    assert float(ours.compute()) == pytest.approx(expected("ndcg@10"), rel=1e-6)


def test_a_module_in_half_precision_changes_no_id() -> None:
    """Lightning casts whole modules for `bf16-true`; a product id of 17 bits would not survive that."""
    ours, far = metric(), torch.tensor([[2**17 + 1]])
    ours.update(far, torch.tensor([0]))
    assert torch.nn.ModuleList([ours]).to(torch.bfloat16)[0].product_ids[0][0, 0] == far[0, 0]
    assert ours.compute().dtype == torch.float32


def _share(rank: int, world: int) -> dict[str, float]:
    """Unequal shares; queries 9 to 11 come up on two ranks, and the last rank has none where there are three."""
    ids, query_ids = data()
    mine = [slice(0, 12), slice(9, None), slice(0, 0)][rank]
    ours = collection()
    if ids[mine].numel():
        ours.update(ids[mine], query_ids[mine])
    return {name: float(value) for name, value in ours.compute().items()}


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one_process(world: int) -> None:
    alone, (ids, query_ids) = collection(), data()
    alone.update(ids, query_ids)
    for values in run_ranks(_share, world):
        assert values == {name: float(value) for name, value in alone.compute().items()}


class Ranker(pl.LightningModule):
    """No more than a module needs to log the metric."""

    def __init__(self) -> None:
        super().__init__()
        self.ndcg = metric()

    def validation_step(self, batch: list[Tensor]) -> None:
        self.ndcg.update(*batch)
        self.log("val/ndcg@10", self.ndcg)


def test_any_lightning_module_logs_it() -> None:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(*data()), batch_size=16)
    (logged,) = trainer.validate(Ranker(), loader, verbose=False)
    assert logged["val/ndcg@10"] == pytest.approx(expected("ndcg@10"), rel=1e-6)


def test_what_rates_a_list_and_what_describes_it() -> None:
    best = {name: metric(name).higher_is_better for name in NAMES}
    assert [name for name, higher in best.items() if higher is None] == ["judged@10", "share_s@10", "share_unjudged@10"]
    assert not metric().is_differentiable


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ndgc@10", {}, "did you mean 'ndcg'"),
        ("ndcg@100", {}, "search depth of at least 100, got 20"),
        ("ndcg@10", {"column": "label"}, "no label column 'label'"),
        ("ndcg@10", {"unjudged": "drop"}, "expected one of: zero, condensed"),
        ("ndcg@10", {"no_positive": "drop"}, "expected one of: skip, zero"),
    ],
)
def test_wrong_options_are_explained(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankingMetric(name, judgments(), **{"column": "relevance", "depth": DEPTH} | options)


def test_shapes_that_do_not_fit_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of tests nothing checks the shapes in types, and arguments are easily swapped."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    ids, query_ids = data()
    for wrong in ((query_ids, ids), (ids, query_ids[:3]), (ids[0], query_ids[0])):
        with pytest.raises(ValueError, match=r"expected \(queries, k\) and \(queries,\)"):
            metric().update(*wrong)

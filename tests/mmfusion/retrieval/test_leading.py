"""Leading dimensions: by a slow loop, the same to the bit however they are read, and searched without a copy."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mmfusion.batch import QueryBatch
from mmfusion.losses import InfoNCE
from mmfusion.losses.matryoshka import Matryoshka
from mmfusion.retrieval.collected import with_dims
from mmfusion.retrieval.evaluation import Evaluation
from mmfusion.retrieval.leading import Leading, leading
from mmfusion.retrieval.ranking import Rows, rank_corpus
from mmfusion.retrieval.topk import tie_ranks
from mmfusion.retrieval.vectors import write_vectors
from mmfusion.stages import LossWeights, Stage, Until
from mmfusion.terms import Losses
from tests.ddp import run_ranks
from tests.small_run import small_data, small_module, small_shards, small_trainer


def vectors(rows: int, dim: int) -> torch.Tensor:
    found = torch.randn(rows, dim, generator=torch.Generator().manual_seed(rows))
    found[::7] = 0  # of a product without the modality
    return torch.nn.functional.normalize(found, dim=1)


@pytest.mark.parametrize("dim", [1, 3, 8, 16])
def test_they_are_of_unit_length_or_zero(dim):
    whole = vectors(50, 16)
    for got, row in zip(Leading(whole, dim)[:], whole.double(), strict=True):
        length = sum(x * x for x in row[:dim].tolist()) ** 0.5
        expected = [x / length if length else 0.0 for x in row[:dim].tolist()]
        assert got.tolist() == pytest.approx(expected, rel=3e-7, abs=1e-12)
    assert leading(whole, None) is whole


def test_a_vector_does_not_depend_on_those_it_is_read_with(tmp_path):
    whole = vectors(1000, 24)
    file = write_vectors(tmp_path / "v.npy", [whole])
    for source in (whole, file, whole.t().contiguous().t()):
        few = Leading(source, 10)
        assert (len(few), few.shape, few.device) == (1000, (1000, 10), torch.device("cpu"))
        at_once = few[:]
        assert torch.equal(at_once, torch.cat([few[i : i + 1] for i in range(1000)]))
        order = torch.randperm(1000)
        assert torch.equal(at_once[order], few[order])
        assert torch.equal(at_once, Leading(whole, 10)[:])


@pytest.mark.parametrize("chunk", [7, 100, 10_000])
def test_they_are_searched_as_their_copy_is(tmp_path, chunk):
    corpus, queries, ids = vectors(300, 16), vectors(20, 16), torch.randperm(300)
    tie = tie_ranks([f"p{i}" for i in range(300)])
    file = write_vectors(tmp_path / "v.npy", [corpus])
    copies = Rows(Leading(queries, 5)[:], torch.arange(20)), Rows(Leading(corpus, 5)[:], ids)
    expected = rank_corpus(*copies, tie, 30).top
    for source in (corpus, file):
        parts = Rows(Leading(queries, 5), torch.arange(20)), Rows(Leading(source, 5), ids)
        got = rank_corpus(*parts, tie, 30, chunk=chunk).top
        assert torch.equal(got.ids, expected.ids)
        assert torch.equal(got.scores, expected.scores)


def test_views_are_searched_whole_and_then_by_fewer():
    found = with_dims(["text", "image", "fused"], {"fused": [2, 4], "text": []})
    assert list(found.items()) == [("text", None), ("image", None), ("fused", None), ("fused@4", 4), ("fused@2", 2)]


# ---- in a run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


def evaluated(rank: int, world: int, shards: Path, folder: Path, **options) -> dict:
    """Metrics, products and scores of every view of the split test after a few steps."""
    weights = LossWeights(query_product=1.0, query_text=1.0)
    module = small_module(
        losses=Losses(query_product=Matryoshka(InfoNCE(), [2, 5, 8])),
        stages={"all": Stage(Until(fraction=1.0), weights)},
        evaluation=Evaluation(depth=100, **options.pop("evaluation", {})),
    )
    ranks = {"devices": world, "strategy": "ddp"} if world > 1 else {}
    trainer = small_trainer(folder, steps=3, limit_val_batches=1.0, **ranks)
    data = small_data(shards, **options)
    trainer.fit(module, data)
    assert list(module.results["val"]) == ["text", "image", "fused", "fused@5", "fused@2"]
    logged = {name for name in trainer.callback_metrics if name.startswith("val/fused")}
    assert logged >= {"val/fused/relevance/ndcg@10", "val/fused@2/relevance/ndcg@10"}
    primary = module.results["val"]["fused"].metrics["relevance/ndcg@10"]["value"]
    assert trainer.callback_metrics["val/primary"].item() == pytest.approx(primary)
    trainer.test(module, data, verbose=False)
    found = module.results["test"]["fused@5"]
    texts, count = data.query_texts(found.query_ids), len(found.query_ids)
    with torch.no_grad():
        fused = module.eval().views(data.products(np.arange(64)), {"fused"})["fused"]
        asked = module.features.queries(QueryBatch(texts, torch.arange(count), torch.ones(count) > 0))
    return {
        "vectors": (asked, fused),
        **{view: (found.top.ids, found.top.scores) for view, found in module.results["test"].items()},
        "metrics": {view: found.metrics for view, found in module.results["test"].items()},
    }


def test_a_run_is_evaluated_by_fewer_dimensions_the_same_however_it_is_read(shards, tmp_path):
    first = evaluated(0, 1, shards, tmp_path)
    other = evaluated(
        0, 1, shards, tmp_path, eval_batch_size=7, evaluation={"chunk": 9, "vectors": str(tmp_path / "vectors")}
    )
    assert list(first["metrics"])[:5] == ["text", "image", "fused", "fused@5", "fused@2"]
    for view in ("text", "image", "fused", "fused@5", "fused@2"):
        assert all(torch.equal(a, b) for a, b in zip(first[view], other[view], strict=True)), view
        assert first["metrics"][view] == other["metrics"][view]
    ids, scores = first["fused@5"]
    asked, products = (torch.nn.functional.normalize(rows[:, :5].double(), dim=1) for rows in first["vectors"])
    expected = (asked @ products.T).gather(1, ids[:, :64])
    assert (scores[:, :64] - expected).abs().max() < 1e-6
    assert (scores[:, :63] >= scores[:, 1:64]).all()
    assert not torch.equal(first["fused@2"][0], first["fused"][0])
    assert not list((tmp_path / "vectors").iterdir()), "no vectors are left"


def test_two_ranks_find_the_same(shards, tmp_path):
    one, two = run_ranks(evaluated, 2, shards, tmp_path)
    assert one["metrics"] == two["metrics"]
    assert all(torch.equal(a, b) for a, b in zip(one["fused@5"], two["fused@5"], strict=True))

"""Which queries galleries show, and which products come first, against slow loops."""

import numpy as np
import torch

from mmfusion.retrieval.evaluation import ViewResult
from mmfusion.retrieval.examples import (
    EACH,
    FIRST_PRODUCTS,
    choose,
    held_against,
    main_metric,
    products_as_seen,
    shown_first,
)
from mmfusion.retrieval.topk import TopK

NAN = float("nan")


def test_a_first_look_is_at_the_first_label_column():
    assert shown_first(["map", "mrr", "ndcg@10"]) == ["ndcg@10", "mrr"]
    assert shown_first(["a", "b"]) == ["a", "b"]
    assert main_metric(["b/mrr", "b/ndcg@10", "a/ndcg@10"]) == "b/ndcg@10"
    assert main_metric(["b/map", "b/mrr", "b/c/ndcg@10"]) == "b/mrr"
    assert main_metric(["a/b/map@5", "c/mrr"]) == "a/b/map@5"


def test_the_primary_view_is_held_against_text_or_else_bm25():
    assert held_against("fused", ["text", "image", "fused", "bm25"]) == "text"
    assert held_against("text", ["text", "bm25"]) == "bm25"
    assert held_against("image", ["image", "bm25", "random"]) == "bm25"
    assert held_against("text", ["text", "random"]) is None


def test_queries_are_chosen_by_their_difference():
    ours = np.array([0.9, 0.2, 0.1, 0.4, 0.6, NAN, 0.3])
    theirs = np.array([0.1, 0.2, 0.3, 0.4, 0.5, NAN, 0.9])
    chosen = choose(ours, theirs, each=2)
    assert (chosen.gained, chosen.lost) == ([0, 4], [6, 2])
    assert chosen.order == [0, 6, 2, 4, 1, 3, 5]
    assert len(set(chosen.drawn)) == 2
    assert choose(ours[::-1].copy(), theirs, each=2).drawn == chosen.drawn, "the same ones whatever they reach"
    assert list(chosen.galleries("fused", "text")) == [
        "fused gains most over text", "fused loses most to text", "Drawn at random",
    ]  # fmt: skip
    alone = choose(ours)
    assert (alone.gained, alone.lost, alone.order) == ([], [], list(range(7)))
    assert list(alone.galleries("fused", None)) == ["Drawn at random"]


def test_products_come_in_the_order_in_which_they_are_seen():
    draw = np.random.default_rng(0)
    queries, names = 40, ("text", "fused", "bm25", "random", "hybrid_rrf")
    results = {
        split: {
            view: ViewResult(
                np.arange(queries),
                TopK(torch.zeros(queries, 12), torch.from_numpy(draw.integers(-1, 5_000, (queries, 12)))),
                per_query={"relevance/ndcg@10": draw.random(queries)},
            )
            for view in names
        }
        for split in ("val", "test")
    }
    seen: list[int] = []
    for galleries in (True, False):
        for views in (("text", "fused", "bm25"), ("random", "hybrid_rrf")):
            for split in ("test", "val"):
                ours, text = (results[split][view].per_query["relevance/ndcg@10"] for view in ("fused", "text"))
                up, down = (np.argsort(sign * (ours - text))[:EACH].tolist() for sign in (-1, 1))
                drawn = np.random.default_rng(0).permutation(queries)[:EACH].tolist()
                rows = [*up, *down, *drawn] if galleries else np.argsort(-abs(ours - text)).tolist()
                seen += [
                    product
                    for row in rows
                    for view in views
                    for product in results[split][view].top.ids[row, :FIRST_PRODUCTS].tolist()
                    if product >= 0
                ]
    assert products_as_seen(results, "fused").tolist() == list(dict.fromkeys(seen))

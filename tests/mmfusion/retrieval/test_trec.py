import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
import torch

from mmfusion.batch import Judgments
from mmfusion.retrieval.metrics import parse_metric, ranked_gains
from mmfusion.retrieval.topk import TopK, search, tie_ranks
from mmfusion.retrieval.trec import read_run, write_qrels, write_run

QUERIES, PRODUCTS, DEPTH = 30, 50, 40
PRODUCT_IDS = [f"p{i}" for i in range(PRODUCTS)]  # p9 goes before p10: strings, not numbers
GRADES = {"E": 1.0, "S": 0.1, "C": 0.01, "I": 0.0}


def found(seed: int, kind: str = "ties") -> TopK:
    """A search among vectors that tie often, among scores that differ in the last bit, or in a short corpus."""
    draw = torch.randn(QUERIES + PRODUCTS, 4, generator=torch.Generator().manual_seed(seed))
    vectors = draw.mul(2).round().div(3) if kind != "near" else 1 + draw * 1e-7
    corpus = vectors[QUERIES:] if kind != "short" else vectors[QUERIES : QUERIES + 9]
    return search(vectors[:QUERIES], corpus, torch.arange(len(corpus)), tie_ranks(PRODUCT_IDS), DEPTH)


def judged(
    gains: list[float], seed: int, positive_from: float = 1.0, labels: dict[str, float] | None = None
) -> Judgments:
    draw = np.random.default_rng(seed)
    query, product = np.nonzero(draw.random((QUERIES, PRODUCTS)) < 0.3)
    gain = draw.choice(gains, size=len(query)).astype(float)
    gain[draw.random(len(query)) < 0.1] = np.nan
    return Judgments(
        query, product, {"label": gain}, {"label": positive_from}, "irrelevant", {"label": labels} if labels else {}
    )


def written(folder: Path, top: TopK, judgments: Judgments) -> tuple[dict, dict, dict]:
    """What pytrec_eval reads of the run and the qrels, and levels.json."""
    write_run(folder / "run", [f"q{i}" for i in range(QUERIES)], top, PRODUCT_IDS, "ours")
    write_qrels(folder / "qrels", judgments, [f"q{i}" for i in judgments.query], PRODUCT_IDS, "label")
    run = pytrec_eval.parse_run((folder / "run").read_text().splitlines())
    qrels = pytrec_eval.parse_qrel((folder / "qrels").read_text().splitlines())
    return run, qrels, json.loads((folder / "qrels.levels.json").read_text())


@pytest.mark.parametrize("kind", ["ties", "near", "short"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("gains", "positive_from", "labels"),
    [
        ([0, 1, 2, 3], 2.0, None),
        ([0, 1, 3], 1.0, {"E": 3.0, "S": 1.0, "I": 0.0}),
        ([-2, 0, 4], 4.0, None),
        (list(GRADES.values()), 1.0, GRADES),
        ([0.1, 0.5], 0.5, None),
    ],
)
def test_trec_eval_finds_our_numbers(
    tmp_path: Path, kind: str, seed: int, gains: list[float], positive_from: float, labels: dict[str, float] | None
) -> None:
    top, judgments = found(seed, kind), judged(gains, seed, positive_from, labels)
    run, qrels, meaning = written(tmp_path, top, judgments)
    names = {
        "recall_10": "recall@10",
        "recip_rank": "mrr",
        "map": "map",
        "map_cut_20": "map@20",
        "P_10": "precision@10",
        "success_10": "hit_rate@10",
        "ndcg_cut_10": "ndcg@10",
    }
    if any(int(level) != gain for level, gain in meaning["gains"].items()):
        del names["ndcg_cut_10"]  # it takes levels for gains
    theirs = pytrec_eval.RelevanceEvaluator(qrels, set(names), relevance_level=meaning["relevant_from"]).evaluate(run)
    ranked = ranked_gains(top.ids.numpy(), np.arange(QUERIES), judgments, "label")
    for their_name, name in names.items():
        ours = np.nan_to_num(parse_metric(name, DEPTH)(ranked))
        assert ours.max() > 0
        assert max(abs(ours[i] - theirs[f"q{i}"][their_name]) for i in range(QUERIES) if f"q{i}" in theirs) < 1e-9


def test_trec_evals_ndcg_is_of_levels_not_of_gains(tmp_path: Path) -> None:
    """Ours is the same number where each gain is replaced by its level, and another one with gains as they are."""
    top, judgments = found(0), judged(list(GRADES.values()), 0, 1.0, GRADES)
    run, qrels, meaning = written(tmp_path, top, judgments)
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg", "ndcg_cut_10"}).evaluate(run)
    level_of = {gain: float(level) for level, gain in meaning["gains"].items()}
    levels = np.array([level_of.get(gain, np.nan) for gain in judgments.gain["label"].tolist()])
    of_levels = dataclasses.replace(judgments, gain={"label": levels}, labels={})
    differ = []
    for their_name, name in (("ndcg_cut_10", "ndcg@10"), ("ndcg", f"ndcg@{DEPTH}")):
        given, replaced = (
            np.nan_to_num(parse_metric(name, DEPTH)(ranked_gains(top.ids.numpy(), np.arange(QUERIES), one, "label")))
            for one in (judgments, of_levels)
        )
        expected = np.array([theirs[f"q{i}"][their_name] for i in range(QUERIES)])
        assert np.abs(replaced - expected).max() < 1e-9
        differ.append(np.abs(given - expected).max())
    assert min(differ) > 0.05


@pytest.mark.parametrize("kind", ["ties", "near", "short"])
def test_a_run_comes_back_as_it_was(tmp_path: Path, kind: str) -> None:
    top = found(0, kind)
    write_run(tmp_path / "run", [f"q{i}" for i in range(QUERIES)], top, PRODUCT_IDS, "ours")
    read = read_run(tmp_path / "run")
    assert list(read) == [f"q{i}" for i in range(QUERIES)]
    for ids, scores, listed in zip(top.ids.tolist(), top.scores.tolist(), read.values(), strict=True):
        expected = [(PRODUCT_IDS[id], score) for id, score in zip(ids, scores, strict=True) if id >= 0]
        assert listed == expected  # the order, and the scores to the bit


def test_lines_are_in_trecs_format(tmp_path: Path) -> None:
    top = TopK(torch.tensor([[0.5, 0.1, -math.inf], [-1e-9, -3.0, -3.0]]), torch.tensor([[2, 0, -1], [1, 2, 0]]))
    write_run(tmp_path / "run", ["q1", "q2"], top, ["a", "b", "ü"], "fused")
    assert (tmp_path / "run").read_text(encoding="utf-8").splitlines() == [
        "q1 Q0 ü 1 0.5 fused",
        "q1 Q0 a 2 0.100000001 fused",
        "q2 Q0 b 1 -9.99999972e-10 fused",
        "q2 Q0 ü 2 -3 fused",
        "q2 Q0 a 3 -3 fused",
    ]


def test_ids_with_whitespace_are_errors(tmp_path: Path) -> None:
    top = TopK(torch.tensor([[0.5]]), torch.tensor([[0]]))
    for query, product in (("q 1", "p1"), ("q1", "p\t1"), ("", "p1"), ("q1", "p1\n")):
        bad = query if product == "p1" else product
        with pytest.raises(ValueError, match=r"the id .* is empty or holds whitespace") as error:
            write_run(tmp_path / "run", [query], top, [product], "ours")
        assert repr(bad) in str(error.value)
    judgments = Judgments(np.array([0]), np.array([0]), {"label": np.ones(1)}, {"label": 1.0}, "unknown")
    with pytest.raises(ValueError, match="'red hat'"):
        write_qrels(tmp_path / "qrels", judgments, ["red hat"], ["p1"], "label")
    no_break = TopK(torch.tensor([[0.5]]), torch.tensor([[0]]))
    write_run(
        tmp_path / "run", ["q\u00a01"], no_break, ["p1"], "ours"
    )  # trec_eval parts fields at ASCII whitespace only
    assert read_run(tmp_path / "run") == {"q\u00a01": [("p1", 0.5)]}


@pytest.mark.parametrize(
    ("gains", "labels", "positive_from", "levels", "relevant_from"),
    [
        ([0.1, 1.0], GRADES, 1.0, {"0": 0.0, "1": 0.01, "2": 0.1, "3": 1.0}, 3),
        ([0.1, 1.0], {}, 1.0, {"0": 0.0, "1": 0.1, "2": 1.0}, 2),
        ([1, 5], {}, 5.0, {"0": 0.0, "1": 1.0, "5": 5.0}, 5),
        ([-3, 0, 2], {}, 1.0, {"0": 0.0, "2": 2.0}, 2),
        ([0, 1], {}, 3.0, {"0": 0.0, "1": 1.0}, 2),
    ],
)
def test_levels_tell_what_they_are_worth(
    tmp_path: Path,
    gains: list[float],
    labels: dict[str, float],
    positive_from: float,
    levels: dict[str, float],
    relevant_from: int,
) -> None:
    judgments = judged(gains, 0, positive_from, labels)
    _, qrels, meaning = written(tmp_path, found(0), judgments)
    assert meaning == {"gains": levels, "relevant_from": relevant_from}
    listed = {(query, product): level for query, of_query in qrels.items() for product, level in of_query.items()}
    known = ~np.isnan(judgments.gain["label"])
    assert len(listed) == known.sum()  # pairs that this column does not judge are not written
    judged_pairs = (judgments.query[known], judgments.product[known], judgments.gain["label"][known])
    for query, product, gain in zip(*judged_pairs, strict=True):
        assert levels[str(listed[f"q{query}", f"p{product}"])] == max(gain, 0)


def test_other_systems_files_are_read_in_trec_evals_order(tmp_path: Path) -> None:
    """Neither ranks nor the order of lines count, scores are fp32, and fields are parted in many ways."""
    path = tmp_path / "run"
    path.write_bytes(
        b"q2 0 b 9 1e-3 x\r\nq1\tQ0\ta\t1\t0.30000000001\tx\n\n  q1 Q0 b 2 0.3 x\nq1 Q0 c 1 7 x\nq2 Q0 a 1 +2. x"
    )
    read = read_run(path)
    assert {query: [product for product, _ in listed] for query, listed in read.items()} == {
        "q2": ["a", "b"],
        "q1": ["c", "b", "a"],  # 0.3 and 0.30000000001 are one fp32 number
    }
    theirs = pytrec_eval.RelevanceEvaluator({"q1": {"a": 1}, "q2": {"b": 1}}, {"recip_rank"}).evaluate(
        {query: dict(listed) for query, listed in read.items()}
    )
    assert [theirs[query]["recip_rank"] for query in ("q1", "q2")] == pytest.approx([1 / 3, 1 / 2])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"q1 Q0 p2 2 0.4", r"run:2: expected 6 fields such as: q1 Q0 p1 1 0\.5 tag; received 5: q1 Q0 p2 2 0\.4"),
        (b"q1 Q0 red hat 2 0.4 x", "run:2: expected 6 fields .* received 7"),
        (b"q1 Q0 p1 2 0.4 x", "run:2: product 'p1' comes twice for query 'q1'"),
        (b"q1 Q0 p2 2 high x", "run:2: expected a finite score as the fifth field, received 'high'"),
        (b"q1 Q0 p2 2 nan x", "run:2: expected a finite score .* 'nan'"),
        (b"q1 Q0 p2 2 -inf x", "run:2: expected a finite score .* '-inf'"),
        (b"q1 Q0 p2 2 1e39 x", "run:2: expected a finite score .* '1e39'"),
        (b"q1 Q0 p\xff 2 0.4 x", r"run:2: the id b'p\\xff' is not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "run").write_bytes(b"q1 Q0 p1 1 0.5 x\n" + line + b"\n")
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / "run")


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("\n")
    with pytest.raises(ValueError, match="run is empty; expected lines such as"):
        read_run(tmp_path / "run")

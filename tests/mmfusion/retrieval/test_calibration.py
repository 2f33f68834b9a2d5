import numpy as np
import pytest

from mmfusion.batch import Judgments
from mmfusion.retrieval.calibration import calibration
from mmfusion.retrieval.ranked import ranked_gains
from tests.mmfusion.retrieval.test_metrics import DEPTH, drawn, lists


def test_calibration_by_hand() -> None:
    """Eight pairs in two lists, one of them padding, one not judged; two of the six others have the same score."""
    ids = np.array([[0, 1, 2, 3], [0, 1, 9, -1]])
    scores = np.array([[0.9, 0.5, 0.3, -0.2], [0.8, 0.3, 0.7, -np.inf]], np.float32)
    gain = np.array([1.0, 1.0, 0.0, 0.0, 1.0, 0.1])
    query, product = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 1, 2, 3, 0, 1])
    judgments = Judgments(query, product, {"relevance": gain}, {"relevance": 1.0}, "unknown")
    for unjudged in ("zero", "condensed"):
        ranked = ranked_gains(ids, np.array([0, 1]), judgments, "relevance", unjudged)
        parts = calibration(scores, ranked, bins=2)
        assert [part["pairs"] for part in parts] == [3, 3]
        assert [part["relevant"] for part in parts] == [0, 1]
        np.testing.assert_allclose([(part["low"], part["high"]) for part in parts], [(-0.2, 0.3), (0.5, 0.9)])
    thirds = calibration(np.full((2, 4), 0.5), ranked, bins=3)
    assert thirds == [{"low": 0.5, "high": 0.5, "pairs": 6, "relevant": 0.5}]
    assert [part["pairs"] for part in calibration(scores, ranked, bins=6)] == [1, 2, 1, 1, 1]
    nothing = np.zeros((0, 3))
    empty = ranked_gains(nothing.astype(int), np.zeros(0, int), judgments, "relevance")
    assert calibration(nothing, empty) == []


@pytest.mark.parametrize("unlisted", ["unknown", "irrelevant"])
@pytest.mark.parametrize("ties", [False, True])
def test_against_a_slow_loop(unlisted: str, ties: bool) -> None:
    """Pairs sorted by score, cut into tenths; a part of equal scores goes where the first of them went."""
    ids, query_ids = lists()
    scores = np.random.default_rng(0).normal(size=(len(ids), DEPTH)).astype(np.float32)
    scores = np.sort(scores.round(1) if ties else scores)[:, ::-1]
    ranked = ranked_gains(ids, query_ids, drawn([0, 0.1, 1], unlisted=unlisted), "relevance")
    pairs = sorted((s, g >= 1) for s, g in zip(scores.flat, ranked.shown.flat, strict=True) if not np.isnan(g))
    cuts = [pairs[part * len(pairs) // 10][0] for part in range(10)]
    parts = [[pair for pair in pairs if sum(pair[0] >= cut for cut in cuts) == part] for part in range(1, 11)]
    expected = [
        {
            "low": part[0][0],
            "high": part[-1][0],
            "pairs": len(part),
            "relevant": sum(hit for _, hit in part) / len(part),
        }
        for part in parts
        if part
    ]
    assert calibration(scores, ranked) == expected
    assert sum(part["pairs"] for part in expected) == len(pairs)

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mmfusion.retrieval.report import primary_view, print_table, read_results, splits, write_results


def cell(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.02, "high": value + 0.02}


def view(value: float, columns: tuple[str, ...] = ("relevance", "desirability")) -> dict[str, Any]:
    names = ("ndcg@1", "ndcg@10", "recall@100", "mrr")
    return {f"{column}/{name}": cell(value + i / 100) for column in columns for i, name in enumerate(names)}


RESULTS: dict[str, Any] = {
    "test": {"bm25": view(0.1), "fused": view(0.6), "text": view(0.3), "image": view(0.4)},
    "val": {"fused": view(0.5)},
    "run": {"seed": 1},
}


def printed(results: dict[str, Any], split: str = "test", **options: Any) -> str:
    console = Console(file=io.StringIO(), width=80, **options)
    print_table(results, split, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run" / "results.json"
    write_results(path, RESULTS)
    assert read_results(path) == RESULTS
    assert splits(RESULTS) == ["test", "val"]
    write_results(path, {"test": {}})
    assert read_results(path) == {"test": {}}
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, RESULTS)
    with pytest.raises(TypeError):
        write_results(path, {"test": object()})
    assert read_results(path) == RESULTS
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_no_number_is_null(tmp_path: Path) -> None:
    none = dict.fromkeys(("value", "low", "high"), math.nan)
    write_results(tmp_path / "results.json", {"test": {"fused": {"relevance/mrr": none}}})
    results = read_results(tmp_path / "results.json")
    assert results["test"]["fused"]["relevance/mrr"] == dict.fromkeys(none, None)
    for same in (results, {"test": {"fused": {"relevance/mrr": none}}}):
        assert printed(same).split()[-2:] == ["fused", "-"]
    json.dumps(results, allow_nan=False)


def test_a_broken_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"test": ')
    with pytest.raises(ValueError, match=r"results\.json is not JSON .*make eval RUN="):
        read_results(tmp_path / "results.json")


def test_the_table_away_from_a_terminal_is_plain_and_narrow() -> None:
    assert [line.rstrip() for line in printed(RESULTS).splitlines()] == [
        "test, with 95 % intervals",
        "              nDCG@10            Recall@100         MRR",
        "relevance",
        "  text        .310 [.290, .330]  .320 [.300, .340]  .330 [.310, .350]",
        "  image       .410 [.390, .430]  .420 [.400, .440]  .430 [.410, .450]",
        "  fused       .610 [.590, .630]  .620 [.600, .640]  .630 [.610, .650]",
        "  bm25        .110 [.090, .130]  .120 [.100, .140]  .130 [.110, .150]",
        "desirability",
        "  text        .310 [.290, .330]  .320 [.300, .340]  .330 [.310, .350]",
        "  image       .410 [.390, .430]  .420 [.400, .440]  .430 [.410, .450]",
        "  fused       .610 [.590, .630]  .620 [.600, .640]  .630 [.610, .650]",
        "  bm25        .110 [.090, .130]  .120 [.100, .140]  .130 [.110, .150]",
    ]


def test_intervals_are_dim_on_a_terminal() -> None:
    assert "\x1b[2m [.590, .630]" in printed(RESULTS, force_terminal=True, color_system="standard")


def test_a_view_without_a_metric_has_a_dash() -> None:
    bare = {"test": {"fused": view(0.5), "text": {"relevance/mrr": cell(0.2)}}}
    lines = [line.split() for line in printed(bare).splitlines()]
    assert lines[3] == ["text", "-", "-", ".200", "[.180,", ".220]"]


def test_other_metrics_are_shown_where_the_usual_are_absent() -> None:
    assert "ndcg@5" in printed({"test": {"fused": {"relevance/ndcg@5": cell(0.5)}}})


def test_an_unknown_split_is_explained() -> None:
    with pytest.raises(ValueError, match=r"no split 'train'.*test, val"):
        printed(RESULTS, "train")


def test_primary_view() -> None:
    assert primary_view(["text", "fused"]) == "fused"
    assert primary_view(["zero_shot_image", "image"]) == "image"
    assert primary_view(["bm25"]) == "bm25"

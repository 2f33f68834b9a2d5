import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from mmfusion.retrieval.compare import compare, differences
from mmfusion.retrieval.report import write_results
from tests.mmfusion.retrieval.test_report import view

CONFIG: dict[str, Any] = {
    "seed_everything": 1,
    "experiment": "gated",
    "model": {"fusion": {"class_path": "Gated", "init_args": {"experts": None}}, "dim": 128, "modalities": ["text"]},
    "trainer": {"max_epochs": 3, "default_root_dir": "a", "logger": {"save_dir": "a"}},
}


def make_run(
    folder: Path, value: float, config: dict[str, Any] = CONFIG, views: tuple[str, ...] = ("text", "fused"), **run: Any
) -> Path:
    results = {name: view(value + i / 10, ("relevance",)) for i, name in enumerate(views)}
    facts = {"seed": 1, "manifest": "m", "checkpoint": str(folder)} | run
    write_results(folder / "results.json", {"val": results, "test": results, "run": facts})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def printed(runs: list[Path], width: int = 80, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    compare(runs, console=console)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    model = {"fusion": {"class_path": "MoE", "init_args": {"experts": 4}}, "dim": 128, "modalities": ["text", "image"]}
    other = {**CONFIG, "experiment": "moe", "model": model, "trainer": {**CONFIG["trainer"], "default_root_dir": "b"}}
    return [make_run(tmp_path / "gated" / "1", 0.4), make_run(tmp_path / "moe" / "1", 0.5, other, commit="c0ffee")]


def test_the_primary_view_comes_first_and_then_what_differs(runs: list[Path]) -> None:
    assert printed(runs).splitlines() == [
        f"A  {runs[0]}",
        f"B  {runs[1]}",
        "test, with 95 % intervals",
        "                  nDCG@10            Recall@100         MRR",
        "fused, relevance",
        "  A gated         .510 [.490, .530]  .520 [.500, .540]  .530 [.510, .550]",
        "  B moe           .610 [.590, .630]  .620 [.600, .640]  .630 [.610, .650]",
        "text, relevance",
        "  A gated         .410 [.390, .430]  .420 [.400, .440]  .430 [.410, .450]",
        "  B moe           .510 [.490, .530]  .520 [.500, .540]  .530 [.510, .550]",
        "what differs                    A         B",
        "model.fusion.class_path         Gated     MoE",
        "model.fusion.init_args.experts  -         4",
        "model.modalities                ['text']  ['text', 'image']",
        "run.commit                      -         c0ffee",
    ]


def test_long_names_do_not_break_the_table(tmp_path: Path) -> None:
    versions = [make_run(tmp_path / "fusion_cross_attention" / version, 0.4) for version in ("1", "2")]
    row = "  {} fusion_cross_atten  .510 [.490, .530]  .520 [.500, .540]  .530 [.510, .550]"
    assert set(map(row.format, "AB")) < set(printed(versions).splitlines())


def test_the_best_is_bold(runs: list[Path]) -> None:
    text = printed(runs, width=120, force_terminal=True, color_system="standard")
    assert "\x1b[1m.610" in text
    assert "\x1b[1m.510\x1b" in text.split("text, relevance")[1]
    assert "\x1b[1m.410" not in text


def test_runs_with_different_primary_views_share_a_section(tmp_path: Path, runs: list[Path]) -> None:
    text_only = make_run(tmp_path / "text_only" / "1", 0.2, views=("text",))
    assert printed([runs[0], text_only], width=200).splitlines()[4:7] == [
        "fused/text, relevance",
        "  A gated              .510 [.490, .530]  .520 [.500, .540]  .530 [.510, .550]",
        "  B text_only          .210 [.190, .230]  .220 [.200, .240]  .230 [.210, .250]",
    ]


def test_the_same_configuration_is_said_so(tmp_path: Path) -> None:
    same = [make_run(tmp_path / "a", 0.4), make_run(tmp_path / "b", 0.4, {**CONFIG, "experiment": "again"})]
    assert "do not differ" in printed(same)


def test_different_data_are_said_so(tmp_path: Path) -> None:
    text = printed([make_run(tmp_path / "a", 0.4), make_run(tmp_path / "b", 0.4, manifest="other")])
    assert "evaluated on different data" in text
    assert "run.manifest" in text


def test_an_evaluation_on_other_data_takes_its_runs_configuration(runs: list[Path]) -> None:
    folder = runs[1] / "eval" / "abc-test"
    write_results(folder / "results.json", {"test": {"fused": view(0.5)}, "run": {"manifest": "m"}})
    assert "model.fusion.class_path" in printed([runs[0], folder])


def test_one_run_alone(runs: list[Path]) -> None:
    text = printed(runs[:1])
    assert "  A gated" in text
    assert "differ" not in text


def test_names_are_no_markup(tmp_path: Path) -> None:
    text = printed([make_run(tmp_path / "[red]x" / "1", 0.4), make_run(tmp_path / "b" / "1", 0.4)], width=200)
    assert text.count("[red]x") == 3  # the list of runs, two sections


def test_runs_without_results_are_explained(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"empty: expected a run folder with results\.json, it holds none; .*make eval"
    ):
        printed([*runs, tmp_path / "empty"])
    with pytest.raises(ValueError, match=r"nowhere: .*no such folder"):
        printed([*runs, tmp_path / "nowhere"])


def test_a_split_that_not_all_have_is_explained(runs: list[Path], tmp_path: Path) -> None:
    write_results(tmp_path / "c" / "results.json", {"train": {"fused": view(0.5)}})
    with pytest.raises(ValueError, match=r"no split in common .*A gated: val, test; .*: train"):
        printed([*runs, tmp_path / "c"])
    with pytest.raises(ValueError, match="no results on 'train', only on: val, test"):
        compare(runs, "train")


def test_no_run_or_one_twice_are_explained(runs: list[Path]) -> None:
    with pytest.raises(ValueError, match="make compare RUNS="):
        printed([])
    with pytest.raises(ValueError, match="named twice"):
        printed([runs[0], runs[0]])


def test_where_a_run_is_kept_is_no_difference() -> None:
    made = {
        "a": {"trainer.default_root_dir": "a", "trainer.logger.save_dir": "a", "experiment": "a", "data.path": "a"},
        "b": {"trainer.default_root_dir": "b", "trainer.logger.save_dir": "b", "experiment": "b", "data.path": "b"},
    }
    assert differences(made) == {"data.path": ["a", "b"]}

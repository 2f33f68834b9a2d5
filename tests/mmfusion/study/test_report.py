import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mmfusion.study.report import write_study
from mmfusion.study.table import brief
from tests.mmfusion.retrieval.test_html import CSP, Page
from tests.mmfusion.retrieval.test_html_browser import CHROMIUM, browse
from tests.mmfusion.study.drawn_runs import METRICS, draw_arm, draw_run, study_of

TEXT = """
reference: moe
variants: {sparse: ["--a=1"], full: []}
arms:
  bm25: {row_of: moe, view: bm25}
  text_only: {once: true}
  gated: {variants: [sparse]}
  moe: {}
claims:
  fusion: {says: "MoE beats <simpler> heads", arm: moe, beats: [gated], variants: [sparse]}
  tuning: {says: Fine-tuning pays, arm: moe, beats: [text_only], needs: pretrained_image}
"""
JOB = {
    "state": "done", "minutes": 3.0, "shared_minutes": 1.5, "jobs": 2, "samples_per_s": {"adapt": 90.0, "fuse": 4100.0},
    "parameters": {"head": 1234, "rest": 20, "all": 22_800_000},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three seeds; gated has one that failed."""
    runs = tmp_path / "runs"
    draw_arm(runs, "moe", 0.6, ("sparse", "full"))
    draw_arm(runs, "gated", 0.5, ("sparse",), seeds=2)
    for seed in (1, 2, 3):
        draw_run(runs / "text_only" / f"sparse-{seed}", {"text": 0.3})
    failed = {"state": "failed", "rc": 1, "tail": ["<b>no room</b>"], "minutes": 0.5}
    jobs = {f"moe/sparse-{seed}": JOB for seed in (1, 2, 3)} | {"gated/sparse-3": failed}
    (runs / "jobs.json").write_text(json.dumps(jobs))
    return runs


def written(folder: Path, width: int = 120) -> tuple[dict, Page, str]:
    console = Console(file=io.StringIO(), width=width)
    page = write_study(folder, study_of(folder.parent, TEXT), "data/shop", console)
    assert page == folder / "report.html"
    report = json.loads((folder / "report.json").read_text())
    return report, Page(page), console.file.getvalue()  # type: ignore[attr-defined]


def test_the_json(folder: Path) -> None:
    report, _, _ = written(folder)
    about = {
        "study": "small", "data": "data/shop", "manifest": "m", "commits": ["c0ffee"], "split": "test",
        "metric": METRICS[0], "seeds": [1, 2, 3], "runs": 11,
    }  # fmt: skip
    assert {key: report[key] for key in about} == about
    assert (report["minutes"], report["side_by_side"], report["tests"]) == (9.5, 2, {"table": 5, "claims": 1})
    moe = next(row for row in report["variants"]["sparse"] if row["arm"] == "moe")
    assert moe["mean"]["value"] == pytest.approx(np.mean(list(moe["by_seed"].values())))
    assert moe["mean"]["low"] < moe["mean"]["value"] < moe["mean"]["high"]
    assert moe["difference"] is None
    assert moe["known"] == pytest.approx({"0 (cold start)": 0.3, "5+": 0.9})
    assert moe["cost"] == {"minutes": 4.5, "samples_per_s": 4100, "head": 1234, "all": 22_800_000}
    assert moe["runs"] == {str(seed): f"moe/sparse-{seed}" for seed in (1, 2, 3)}
    assert moe["others"][METRICS[1]]["value"] == pytest.approx(0.6, abs=0.02)
    bm25 = next(row for row in report["variants"]["sparse"] if row["arm"] == "bm25")
    assert bm25["difference"]["significant"]
    assert bm25["known"] == pytest.approx({"0 (cold start)": 0.1, "5+": 0.3})
    assert bm25["difference"]["value"] == pytest.approx(-0.4, abs=0.01)
    assert set(bm25["cost"].values()) == {None}
    assert report["missing"] == [
        {"arm": "gated", "variant": "sparse", "seed": 3, "why": "failed with exit code 1: <b>no room</b>"}
    ]


def test_the_claims(folder: Path) -> None:
    report, page, text = written(folder)
    assert [claim["verdict"] for claim in report["claims"]] == ["holds", "not testable here"]
    for claim in report["claims"]:
        assert claim["sentence"] in text
        assert claim["says"] in page.written
        assert claim["why"] in page.written
    assert "from scratch" in report["claims"][1]["sentence"]


def test_an_arm_of_fewer_seeds_says_so_everywhere(folder: Path) -> None:
    report, page, text = written(folder)
    assert report["notes"] == [
        "Two seeds in common: gated and moe on sparse; there intervals may be too narrow where seeds decide "
        "(they hold the mean in .86 of cases).",
        "Over fewer seeds than the others: gated; differences use common seeds.",
    ]
    for note in report["notes"]:
        assert note in page.written
        assert note in text
    assert "gated (2 of 3 seeds)" in text
    assert "(2 of 3 seeds)" in page.written
    assert "missing: gated sparse seed 3: failed with exit code 1: <b>no room</b>" in text


def test_the_terminal(folder: Path) -> None:
    _, _, text = written(folder)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0].startswith("study small: relevance/ndcg@10 on test, mean over 3 seeds; difference to moe;")
    assert "sparse nDCG@10 difference p min samples/s head all" in lines
    moe = next(line for line in lines if line.startswith("moe "))
    assert moe.endswith("] 4.5 4,100 1,234 22.8M")
    assert next(line for line in lines if line.startswith("bm25")).endswith("] < .0001")


def test_a_narrow_terminal_keeps_each_arm_on_a_line(folder: Path) -> None:
    _, _, printed = written(folder, width=80)
    table = [line for line in printed.splitlines() if "[" in line][:4]
    assert [line.split()[0] for line in table] == ["bm25", "text_only", "gated", "moe"]
    assert "samples/s" not in printed
    assert "samples/s" in written(folder)[2]


def test_the_page_is_one_file_without_network(folder: Path) -> None:
    _, page, _ = written(folder)
    assert any(attributes.get("content") == CSP for tag, attributes in page.elements if tag == "meta")
    sources = [value for _, attributes in page.elements for key, value in attributes.items() if key in ("src", "href")]
    assert all(value and (value.startswith("#") or (folder / value).parent.is_dir()) for value in sources)
    assert not [tag for tag, _ in page.elements if tag == "b"]  # what a log said is text
    assert "<simpler>" in page.written


def test_the_page_holds_the_tables(folder: Path) -> None:
    _, page, _ = written(folder)
    table = page.tables[0]
    assert [cell.strip() for cell in table[0]] == [
        "arm", "nDCG@10", "on val", "difference", "p", "minutes", "samples/s", "head", "all parameters",
    ]  # fmt: skip
    assert [row[0].split()[0] for row in table[1:]] == ["bm25", "text_only", "gated", "moe"]
    moe = table[4]
    assert moe[3].strip() == "reference"
    assert [cell.strip() for cell in moe[5:]] == ["4.5", "4,100", "1,234", "22,800,000"]
    assert table[1][4].strip() == "< .0001"
    known = [[cell.strip() for cell in row] for row in page.tables[2]]
    assert known[0] == ["arm", "0 (cold start)", "5+"]
    assert known[4] == ["moe", ".300", ".900"]


def test_the_plots_show_what_the_json_holds(folder: Path) -> None:
    report, page, _ = written(folder)
    means, differences = page.data["figures"]
    assert means["layout"]["yaxis"]["ticktext"] == ["bm25", "text_only", "gated", "moe"]
    sparse = [row["mean"]["value"] for row in report["variants"]["sparse"]]
    assert means["data"][0]["x"] == pytest.approx(sparse)
    assert len(means["data"][1]["x"]) == sum(len(row["seeds"]) for row in report["variants"]["sparse"])
    shown = [row["difference"] for row in report["variants"]["full"] if row["difference"]]
    assert differences["data"][1]["x"] == pytest.approx([cell["value"] for cell in shown])
    assert differences["data"][1]["error_x"]["array"] == pytest.approx([cell["high"] - cell["value"] for cell in shown])
    places = [attributes["data-figure"] for _, attributes in page.elements if "data-figure" in attributes]
    assert places == ["0", "1"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium)")
def test_a_browser_draws_it(folder: Path) -> None:
    written(folder)
    seen = browse(folder / "report.html", """
        return {
          dots: seen(".scatterlayer .point").length, ticks: seen(".ytick text").map(one => one.textContent),
          wide: document.documentElement.scrollWidth > innerWidth,
        };
    """)  # fmt: skip
    assert seen["problems"] == []
    assert (seen["title"], seen["drawn"], seen["waiting"]) == ("Study small", 2, 0)
    assert seen["dots"] == (4 + 11) + (3 + 9) + 3 + 2  # means and their seeds, differences; sparse and full
    assert seen["ticks"] == ["bm25", "text_only", "gated", "moe"] * 2
    assert not seen["wide"]


@pytest.mark.parametrize(("seeds", "note"), [(1, "One seed:"), (2, "Two seeds:")])
def test_few_seeds_are_said(tmp_path: Path, seeds: int, note: str) -> None:
    draw_arm(tmp_path / "runs", "moe", 0.6, ("sparse", "full"), seeds=seeds)
    report, page, text = written(tmp_path / "runs")
    assert report["notes"][0].startswith(note)
    assert note in page.written
    assert note in text


def test_pairs_of_one_seed_are_named(folder: Path) -> None:
    for seed in (2, 3):
        shutil.rmtree(folder / "moe" / f"full-{seed}")
    (folder / "gated" / "sparse-1" / "results.json").unlink()
    report, page, _ = written(folder)
    one = (
        "One seed in common: gated and moe on sparse, all arms on full; there intervals and p are over queries alone "
        "and say nothing of other seeds."
    )
    assert report["notes"][0] == one
    assert one in page.written


def test_runs_of_several_commits_are_said(folder: Path) -> None:
    """By the run's own results, and by what the study's runner noted of a run that was continued."""
    path = folder / "gated" / "sparse-2" / "results.json"
    results = json.loads(path.read_text())
    results["run"]["commit"] = "beef" * 10
    path.write_text(json.dumps(results))
    jobs = json.loads((folder / "jobs.json").read_text())
    jobs["moe/sparse-1"] |= {"commits": ["dead" * 10, "c0ffee"]}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    report, page, text = written(folder)
    assert set(report["commits"]) == {"c0ffee", "beef" * 10, "dead" * 10}
    note = next(note for note in report["notes"] if "versions of the code" in note)
    assert note.startswith("Made by 3 versions of the code, which may compute differently: deaddea (moe/sparse-1) and ")
    assert "beefbee (gated/sparse-2)" in note
    assert "and 4 more)" in note  # ten others, of which six are named
    assert note in page.written
    assert note in text


def test_without_a_run_of_the_reference(folder: Path) -> None:
    for seed in (1, 2, 3):
        (folder / "moe" / f"full-{seed}" / "results.json").unlink()
    report, page, text = written(folder)
    note = "No differences on full: the reference moe has no finished run there."
    assert note in report["notes"]
    assert note in page.written
    assert note in text
    assert [row["difference"] for row in report["variants"]["full"]] == [None] * 3
    assert [row["mean"] is None for row in report["variants"]["full"]] == [True, False, True]


def test_a_study_that_has_just_begun(tmp_path: Path) -> None:
    """Nothing but names yet; then one run."""
    runs = tmp_path / "runs"
    runs.mkdir()
    report, _, _ = written(runs)
    assert (report["runs"], report["tests"], report["seeds"]) == (0, {"table": 0, "claims": 0}, [])
    draw_run(runs / "moe" / "sparse-1", {"fused": 0.5})
    report, page, text = written(runs)
    assert report["runs"] == 1
    assert "missing: gated sparse seed 1: was not trained yet" in text
    assert "#missing" in [attributes.get("href") for _, attributes in page.elements]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (1.44, "1.4"), (38.2, "38"), (1250.0, "1,250"), (82_400.0, "82k"), (23_400_000.0, "23.4M")],
)
def test_brief(value: float | None, text: str) -> None:
    assert brief(value) == text

"""`make runs` lists what there is, whatever else lies there."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmfusion.runs.family import MARKS, family
from mmfusion.runs.found import FoundRun, find_runs
from mmfusion.runs.listing import age, list_runs
from mmfusion.state import mark
from mmfusion.study.diary import STUDY
from mmfusion.sweep.book import JOURNAL
from tests.mmfusion.runs.drawn import COMMIT, NDCG, draw_run


def listed(root: Path, capsys, **options) -> list[dict]:
    list_runs(root, as_json=True, **options)
    return json.loads(capsys.readouterr().out)


def test_a_table_of_runs(tmp_path, capsys):
    draw_run(tmp_path / "moe/1", hours=5)
    draw_run(tmp_path / "gated/1", "failed", hours=30, test=None, step=3, message="the disk is full", best=None)
    list_runs(tmp_path)
    moe, gated = tmp_path / "moe/1", tmp_path / "gated/1"
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[1:]] == [
        f"{moe} fuse 7 of 10 done .250 .500 [.400, .600] 5 h moe 0123456+",
        f"{gated} fuse 3 of 10 failed – – 30 h gated 0123456+",
        f"test: {NDCG}",
        f"{gated} failed: the disk is full",
    ]


def test_what_is_known_of_a_run_as_json(tmp_path, capsys):
    draw_run(tmp_path / "moe/1", hours=2)
    (row,) = listed(tmp_path, capsys)
    assert row.pop("age") == pytest.approx(7200, abs=60)
    assert row.pop("updated") == pytest.approx(time.time() - 7200, abs=60)
    assert row == {
        "run": str(tmp_path / "moe/1"), "experiment": "moe", "family": None, "status": "done", "stage": "fuse",
        "step": 7, "steps": 10, "best_val": 0.25, "metric": NDCG,
        "test": {"value": 0.5, "low": 0.4, "high": 0.6}, "commit": COMMIT, "message": None,
    }  # fmt: skip


def test_the_status_is_what_one_sees(tmp_path, capsys):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    draw_run(tmp_path / "a/alive", "running", hours=0)
    draw_run(tmp_path / "a/gone", "running", hours=0, pid=gone.pid, process=mark(os.getpid()))
    draw_run(tmp_path / "a/silent", "running", hours=1, host="elsewhere")
    draw_run(tmp_path / "a/old", None)
    draw_run(tmp_path / "a/old-half", None, test=None)
    found = {Path(row["run"]).name: row["status"] for row in listed(tmp_path, capsys)}
    assert found == {"alive": "running", "gone": "lost", "silent": "lost", "old": "done", "old-half": "unfinished"}


def test_a_run_from_before_state_json_tells_what_its_results_do(tmp_path, capsys):
    draw_run(tmp_path / "a/1", None)
    (row,) = listed(tmp_path, capsys)
    assert (row["best_val"], row["test"]["value"], row["commit"], row["step"]) == (0.5, 0.5, COMMIT, None)


def test_what_is_broken_or_foreign_does_not_stop_it(tmp_path, capsys):
    draw_run(tmp_path / "a/1")
    (draw_run(tmp_path / "a/2") / "results.json").write_text('{"test": ')
    (draw_run(tmp_path / "a/3") / "state.json").write_bytes(b"\xff\x00")
    (draw_run(tmp_path / "a/4") / "results.json").write_text('{"test": {"fused": []}, "run": [1]}')
    (draw_run(tmp_path / "a/5") / "config.yaml").write_bytes(b"\xff\xfe")
    (tmp_path / "a/6").mkdir()
    (tmp_path / "a/6/config.yaml").write_text("server: nginx\nmodel: x\n")
    (tmp_path / "a/notes.txt").write_text("mine")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "a/nowhere").symlink_to(tmp_path / "none")
    found = {Path(row["run"]).name: row for row in listed(tmp_path, capsys)}
    assert set(found) == {"1", "2", "3", "4"}
    assert [found[name]["test"] is None for name in "1234"] == [False, True, False, True]
    assert found["3"]["status"] == "done"
    list_runs(tmp_path)


def test_a_run_behind_a_link_is_listed_once_and_known_as_that(tmp_path):
    other = draw_run(tmp_path / "disk/exp/2")
    draw_run(tmp_path / "runs/exp/1")
    (tmp_path / "runs/best").symlink_to(tmp_path / "runs/exp/1")
    (tmp_path / "runs/more").symlink_to(other.parent)
    found = {str(run.folder.relative_to(tmp_path)): run.linked for run in find_runs(tmp_path / "runs")}
    assert found == {"runs/exp/1": False, "runs/more/2": True}


@pytest.fixture
def families(tmp_path) -> Path:
    draw_run(tmp_path / "moe/1")
    draw_run(tmp_path / "studies/paper/moe/all-1")
    draw_run(tmp_path / "studies/paper/moe/all-2")
    draw_run(tmp_path / "studies/paper/gated/all-1", "failed", test=None)
    draw_run(tmp_path / "sweeps/fusion/trials/0")
    draw_run(tmp_path / "sweeps/fusion/seeds/best/all-2")
    (tmp_path / "studies/paper/study.json").write_text("{}")
    (tmp_path / "sweeps/fusion/journal.log").write_text("")
    (tmp_path / "sweeps/fusion/seeds/study.json").write_text("{}")
    return tmp_path


def test_runs_of_studies_and_sweeps_are_counted_or_listed(families, capsys):
    list_runs(families)
    counted = capsys.readouterr().out
    assert str(families / "moe/1") in counted
    assert "study paper: 3 runs (2 done, 1 failed); --all lists them" in counted
    assert "sweep fusion: 2 runs (2 done); --all lists them" in counted
    list_runs(families, everything=True)
    everything = capsys.readouterr().out
    for name in ("studies/paper/gated/all-1", "sweeps/fusion/trials/0", "sweeps/fusion/seeds/best/all-2"):
        assert str(families / name) not in counted
        assert str(families / name) in everything
    list_runs(families / "studies/paper")
    assert str(families / "studies/paper/gated/all-1") in capsys.readouterr().out


def test_the_marks_are_those_of_studies_and_sweeps(families):
    assert {STUDY: "study", JOURNAL: "sweep"} == MARKS
    assert family(families / "moe/1") is None


def test_one_experiment(families, capsys):
    assert [row["run"] for row in listed(families, capsys, experiment="gated")] == [
        str(families / "studies/paper/gated/all-1")
    ]
    with pytest.raises(ValueError, match="holds no run of gate; there are runs of best, gated, moe, trials"):
        list_runs(families, experiment="gate")


def test_no_run_and_no_folder(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        list_runs(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        list_runs(tmp_path / "none")


def test_the_experiment_is_the_one_that_the_run_was_told(tmp_path):
    run = draw_run(tmp_path / "renamed/1")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(": renamed", ": 'moe'"))
    assert FoundRun(run).experiment == "moe"


@pytest.mark.parametrize(("seconds", "said"), [(40, "40 s"), (720, "12 min"), (3 * 3600, "3 h"), (5 * 86400, "5 d")])
def test_ages(seconds, said):
    assert age(seconds) == said

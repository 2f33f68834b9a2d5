"""`make clean-runs` removes what the user agreed to, and nothing that anything needs."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mmfusion.runs import clean
from mmfusion.runs.clean import Order, clean_runs, readable, size
from tests.mmfusion.runs.drawn import draw_run


@pytest.fixture
def runs(tmp_path) -> Path:
    """Seven runs that are done, of which 1 was written last, in runs/moe."""
    for number in range(1, 8):
        draw_run(tmp_path / f"runs/moe/{number}", hours=number)
    return tmp_path / "runs"


def left(runs: Path, experiment: str = "moe") -> list[str]:
    return sorted(path.name for path in (runs / experiment).iterdir())


def answer(monkeypatch, said: str) -> list[str]:
    asked: list[str] = []

    def take(question: str) -> str:
        asked.append(question)
        return said

    monkeypatch.setattr("builtins.input", take)
    return asked


def test_all_but_the_newest_go_once_the_user_agrees(runs, monkeypatch, capsys):
    asked, of_two = answer(monkeypatch, "y"), size(runs / "moe/6") + size(runs / "moe/7")
    assert 2000 < of_two < 4000  # each holds a checkpoint of 1,000 bytes under two names
    clean_runs(runs, Order(5), yes=False)
    assert left(runs) == ["1", "2", "3", "4", "5"]
    assert asked == [f"remove 2 runs, {readable(of_two)}? [y/N] "]
    out = capsys.readouterr().out
    assert f"would go: {runs / 'moe/7'} (" in out
    assert "done, 7 h old, test relevance/ndcg@10 .500)" in out
    assert "stays: 5 runs: among the newest 5 of moe" in out


@pytest.mark.parametrize("said", ["", "n", "no", "yeah"])
def test_nothing_goes_without_a_yes(runs, monkeypatch, said):
    answer(monkeypatch, said)
    clean_runs(runs, Order(1), yes=False)
    assert len(left(runs)) == 7


def test_ctrl_c_is_a_no(runs, monkeypatch, capsys):
    def leaves(question: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", leaves)
    clean_runs(runs, Order(1), yes=False)
    assert len(left(runs)) == 7
    assert capsys.readouterr().out.endswith("nothing was removed\n")


def test_nobody_to_ask(runs, monkeypatch):
    def nobody(question: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", nobody)
    with pytest.raises(ValueError, match="ARGS=--yes"):
        clean_runs(runs, Order(1), yes=False)
    assert len(left(runs)) == 7


def test_yes_does_not_ask(runs, monkeypatch):
    asked = answer(monkeypatch, "n")
    clean_runs(runs, Order(6), yes=True)
    assert (left(runs), asked) == (["1", "2", "3", "4", "5", "6"], [])


def test_each_experiment_keeps_its_own_and_one_can_be_named(runs):
    for number in (1, 2, 3):
        draw_run(runs / f"gated/{number}", hours=number)
    clean_runs(runs, Order(2, experiment="gated"), yes=True)
    assert (left(runs, "gated"), len(left(runs))) == (["1", "2"], 7)
    clean_runs(runs, Order(2), yes=True)
    assert (left(runs, "gated"), left(runs)) == (["1", "2"], ["1", "2"])


def test_newer_runs_that_came_to_nothing_do_not_push_out_those_that_are_done(tmp_path):
    for number in (1, 2, 3):
        draw_run(tmp_path / f"moe/{number}", "failed", hours=number, checkpoints=False, test=None)
    for number in (4, 5, 6):
        draw_run(tmp_path / f"moe/{number}", hours=number)
    clean_runs(tmp_path, Order(2), yes=True)
    assert left(tmp_path) == ["1", "2", "4", "5"]


@pytest.mark.parametrize("status", ["stopped", "preempted", "failed"])
def test_what_can_be_resumed_stays_unless_asked_for(runs, capsys, status):
    draw_run(runs / "moe/8", status, hours=8, test=None)
    clean_runs(runs, Order(6), yes=True)
    assert left(runs) == ["1", "2", "3", "4", "5", "6", "8"]
    assert "RESUME=auto could go on with it" in capsys.readouterr().out
    clean_runs(runs, Order(6, unfinished=True), yes=True)
    assert left(runs) == ["1", "2", "3", "4", "5", "6"]


def test_a_running_run_stays_whatever_is_asked_for(runs):
    draw_run(runs / "moe/0", "running", hours=0)
    draw_run(runs / "moe/fresh", None, hours=0, test=None, checkpoints=False)
    for number in range(2):  # newer than both, on paper
        draw_run(runs / f"moe/later-{number}", hours=-1)
    clean_runs(runs, Order(2, unfinished=True), yes=True)
    assert left(runs) == ["0", "fresh", "later-0", "later-1"]


def named_by(runs: Path, how: str) -> None:
    """Something that needs runs/moe/7, made in this way."""
    seven = runs / "moe/7"
    other = draw_run(runs / "gated/1", branched_from=f"{seven}/checkpoints/last.ckpt" if how == "branch" else None)
    if how == "branch of a run that is not done":
        shutil.rmtree(other)
        other = draw_run(runs / "gated/1", "stopped", test=None)
        (other / "checkpoints/last.ckpt").unlink()
        torch.save({"branched_from": "runs/moe/7/checkpoints/stage-adapt.ckpt"}, other / "checkpoints/last.ckpt")
    elif how == "study":
        (runs / "studies/paper").mkdir(parents=True)
        (runs / "studies/paper/jobs.json").write_text(json.dumps({"a": {"branched_from": str(seven)}}))
    elif how == "page":
        (other / "comparison.html").write_text(f"<td>{seven}</td>")
    elif how == "command":
        (other / "environment.json").write_text(json.dumps({"command": ["--branch=runs/moe/7/checkpoints/best.ckpt"]}))
    elif how == "evaluation elsewhere":
        (runs / "mine").mkdir()
        (runs / "mine/results.json").write_text(json.dumps({"run": {"folder": str(seven.resolve())}}))
    elif how == "mined negatives":
        data = runs.parent / "shards"
        data.mkdir()
        (data / "manifest.json").write_text(json.dumps({"pairs": {"mined-1": {"made_by": {"mined_from": str(seven)}}}}))
        draw_run(runs / "gated/2", data=str(data))
    elif how == "link":
        (runs / "favourite").symlink_to(seven)


NEEDS = ["branch", "branch of a run that is not done", "study", "page", "command", "evaluation elsewhere",
         "mined negatives", "link"]  # fmt: skip


@pytest.mark.parametrize("how", NEEDS)
def test_what_something_needs_stays(runs, capsys, how):
    named_by(runs, how)
    clean_runs(runs, Order(2), yes=True)
    assert left(runs) == ["1", "2", "7"]
    assert f"stays: {runs / 'moe/7'}: " in capsys.readouterr().out


def test_a_longer_name_is_another_run(runs):
    (draw_run(runs / "gated/1") / "environment.json").write_text('["runs/moe/70", "runs/moe/7-2", "runs/a-moe/7"]')
    clean_runs(runs, Order(2), yes=True)
    assert left(runs) == ["1", "2"]


def test_runs_of_studies_and_sweeps_stay(runs):
    for number in range(3):
        draw_run(runs / f"sweeps/fusion/trials/{number}", hours=number)
    (runs / "sweeps/fusion/journal.log").write_text("")
    clean_runs(runs, Order(1), yes=True)
    assert left(runs) == ["1"]
    assert left(runs, "sweeps/fusion/trials") == ["0", "1", "2"]


def test_what_is_no_run_stays(runs, capsys):
    (runs / "moe/7/notes.md").write_text("mine")
    (runs / "moe/6/config.yaml").write_text("server: nginx")
    (runs / "moe/5/checkpoints/best-of-all.ckpt").write_text("mine")
    (runs / "moe/submitted").mkdir()
    for order in (Order(2, checkpoints_only=True), Order(2)):
        clean_runs(runs, order, yes=True)
        assert (runs / "moe/5/checkpoints/best-of-all.ckpt").is_file()
    assert left(runs) == ["1", "2", "5", "6", "7", "submitted"]
    out = capsys.readouterr().out
    assert "it holds what no run writes: notes.md" in out
    assert "it holds what no run writes: checkpoints/best-of-all.ckpt" in out


def test_nothing_behind_a_link_goes(runs, tmp_path):
    far = [draw_run(tmp_path / f"disk/far/{number}", hours=number) for number in (1, 2, 3)]
    (runs / "far").symlink_to(far[0].parent)
    checkpoints = tmp_path / "disk/checkpoints"
    (runs / "moe/7/checkpoints").rename(checkpoints)
    (runs / "moe/7/checkpoints").symlink_to(checkpoints)
    clean_runs(runs, Order(2, checkpoints_only=True), yes=True)
    assert len(list(checkpoints.iterdir())) == 2
    assert not (runs / "moe/6/checkpoints").exists()
    clean_runs(runs, Order(2), yes=True)
    assert all((run / "checkpoints/last.ckpt").is_file() for run in far)
    assert left(runs) == ["1", "2"]
    assert len(list(checkpoints.iterdir())) == 2


def test_checkpoints_alone(runs, capsys):
    (runs / "moe/7/notes.md").write_text("mine")
    clean_runs(runs, Order(5, checkpoints_only=True), yes=True)
    assert left(runs) == ["1", "2", "3", "4", "5", "6", "7"]
    assert [(runs / f"moe/{number}/checkpoints").exists() for number in (5, 6, 7)] == [True, False, False]
    assert (runs / "moe/7/results.json").is_file()
    assert f"would go: {runs / 'moe/7/checkpoints'} (1.0 kB" in capsys.readouterr().out
    clean_runs(runs, Order(5, checkpoints_only=True), yes=True)
    assert "nothing is to go" in capsys.readouterr().out


def test_a_run_that_begins_while_the_user_thinks_stays(runs, monkeypatch, capsys):
    def thinks(question: str) -> str:
        shutil.rmtree(runs / "moe/7")
        draw_run(runs / "moe/7", "running", hours=0)
        return "y"

    monkeypatch.setattr("builtins.input", thinks)
    clean_runs(runs, Order(5), yes=False)
    assert left(runs) == ["1", "2", "3", "4", "5", "7"]
    assert "it has changed meanwhile" in capsys.readouterr().err


def test_a_removal_that_was_cut_short_is_ended_by_the_next(runs, monkeypatch):
    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rmdir", killed)
        patch.setattr(clean.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            clean_runs(runs, Order(5), yes=True)
    assert (runs / "moe/7/config.yaml").is_file()
    clean_runs(runs, Order(5), yes=True)
    assert left(runs) == ["1", "2", "3", "4", "5"]


def test_the_folder_of_one_experiment_is_refused(runs):
    with pytest.raises(ValueError, match="ARGS=--experiment=moe"):
        clean_runs(runs / "moe", Order(1), yes=True)
    assert len(left(runs)) == 7


def test_sizes():
    assert [readable(count) for count in (12, 3_400, 250_000_000, 1.5e12)] == ["12 B", "3.4 kB", "250.0 MB", "1.5 TB"]

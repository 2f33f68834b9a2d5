"""Which trials run, when, and what becomes of failures, pruning and interruptions; by runs without training (actor)."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.trial import TrialState

from mmfusion.state import read_state
from mmfusion.study.jobs import Plan
from mmfusion.sweep.book import JOURNAL, Book
from mmfusion.sweep.definition import Sweep, read_sweep
from mmfusion.sweep.report import told
from mmfusion.sweep.runner import report_alone, run_sweep
from mmfusion.sweep.trials import Trial, definition, plan_of, reported
from tests.mmfusion import acting
from tests.mmfusion.acting import acted, until, write
from tests.mmfusion.runs.drawn import draw_run
from tests.mmfusion.sweep import actor

ACTOR = Path(actor.__file__)
SWEEP = Path("runs/sweeps/small")
SMALL: dict[str, Any] = {
    "experiment": "fusion_moe", "trials": 6, "pruner": "none",
    "parameters": {"x": {"uniform": [0.0, 1.0]}, "kind": {"choice": ["a", "b"]}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """An empty folder with what a project needs: data, experiments."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mmfusion.sweep.queue.PAUSE", 0.02)
    monkeypatch.setattr("mmfusion.sweep.prefix.PAUSE", 0.02)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    stages = {name: {"until": 1} for name in ("adapt", "align", "fuse")}
    base = {"model": {"dim": 8, "stages": stages}}
    with acting.project(SWEEP, {"base": base, "fusion_moe": {"model": {"fusion": "MoE"}}}):
        yield


def planned(definition: dict[str, Any] = SMALL, *more: str) -> tuple[Sweep, Plan]:
    Path("small.yaml").write_text(yaml.safe_dump(definition, sort_keys=False))
    sweep = read_sweep(Path("small.yaml"))
    return sweep, plan_of(sweep, SWEEP, "data", more, program=(sys.executable, str(ACTOR)), parse=actor.parse)


def run(definition: dict[str, Any] = SMALL, *more: str, jobs: int = 1) -> int:
    return run_sweep(*planned(definition, *more), jobs, seeds=0)


def begun(key: str = "name") -> list[Any]:
    return [line[key] for line in acted(SWEEP) if line["event"] == "begins"]


def report() -> dict[str, Any]:
    return json.loads((SWEEP / "report.json").read_text())


def states() -> dict[int, str]:
    return {row["trial"]: row["state"] for row in report()["trials"]}


def command(definition: dict[str, Any], *more: str) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(run(definition, *more)))
    process.start()
    return process


def held() -> multiprocessing.Process:
    """A command whose first trial waits before its end, for as long as the file `wait` is there."""
    Path("wait").touch()
    process = command(SMALL, "--act.hold=wait")
    until((SWEEP / "trials/0/checkpoints/last.ckpt").is_file)
    return process


def test_trials_are_told_ranked_and_reported(capfd):
    assert run(jobs=2) == 0
    found = report()
    assert states() == dict.fromkeys(range(6), "COMPLETE")
    values = [row["value"] for row in found["trials"]]
    assert values == sorted(values, reverse=True)
    first = found["trials"][0]
    assert first["value"] == pytest.approx(0.9 - (first["setting"]["x"] - 0.3) ** 2)
    assert (first["low"], first["high"]) == pytest.approx((first["value"] - 0.02, first["value"] + 0.02))
    assert set(begun("gpus")) == {"3", "4"}
    assert set(found["importance"]) == {"x", "kind"}
    assert sum(found["importance"].values()) == pytest.approx(1)
    page = (SWEEP / "report.html").read_text()
    assert all(f">{title}<" in page for title in ("History", "Parallel coordinates", "Slices"))
    assert '"parcoords"' in page
    assert "plotly.js" in page
    assert "src=" not in page.split("<script")[0]
    said = capfd.readouterr().out
    assert "6 of 6 trials over, best" in said
    assert "0 of 6 trials over; 2 at a time" in said
    best = yaml.safe_load(Path(found["best"]).read_text())
    assert best == {"model": {"fusion": first["setting"]["kind"]}}


def test_one_that_fails_is_recorded_and_the_others_go_on(capfd):
    assert run(SMALL, "--act.crash_above=0.5") == 0
    failed = [row for row in report()["trials"] if row["state"] == "FAIL"]
    assert failed
    assert len(failed) < 6
    assert all(row["setting"]["x"] > 0.5 and row["why"][-1] == "error: it fell over" for row in failed)
    assert "FAILED (runs/sweeps/small/logs/" in capfd.readouterr().out
    assert run(SMALL, "--act.crash_above=0.5") == 0
    assert len(begun()) == 6, "what is over is not tried again"


def test_all_fail():
    assert run(SMALL, "--act.crash_above=-1") == 1
    assert set(states().values()) == {"FAIL"}
    assert report()["best"] is None


def test_stopped_and_gone_on_with_it_asks_for_the_same():
    assert run({**SMALL, "trials": 12}) == 0
    straight = {row["trial"]: row["setting"] for row in report()["trials"]}
    SWEEP.rename("straight")
    assert run({**SMALL, "trials": 5}) == 0
    assert run({**SMALL, "trials": 12}) == 0
    assert {row["trial"]: row["setting"] for row in report()["trials"]} == straight
    assert len({row["x"] for row in straight.values()}) == 12


def test_a_trial_behind_the_others_is_pruned():
    definition = {**SMALL, "pruner": "median", "trials": 12}
    assert run(definition, "--act.seconds=0.2") == 0
    found = report()["trials"]
    pruned = [row for row in found if row["state"] == "PRUNED"]
    assert pruned
    ended = {line["name"] for line in acted(SWEEP) if line["event"] == "ends"}
    assert not {f"trials/{row['trial']}" for row in pruned} & ended, "they were stopped"
    best = min(row["value"] for row in found[:3])
    assert all(row["value"] < best and row["trial"] >= 5 for row in pruned)


def test_validations_before_the_last_stage_prune_nothing():
    sweep, plan = planned()
    trial = Trial.of(plan, sweep, 0, {})
    draw_run(trial.run, "running", best=None)
    (trial.run / "metrics.csv").write_text("step,train/loss,val/primary\n3,1.0,\n4,,0.25\n8,,0.5\n")
    assert trial.validations() == {}
    state = read_state(trial.run)
    assert state is not None
    dataclasses.replace(state, best=0.5).write(trial.run)
    assert trial.validations() == {4: 0.25, 8: 0.5}


def test_a_command_that_is_one_of_a_jobs_tasks_starts_runs_of_one_task(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert run({**SMALL, "trials": 1}) == 0
    assert begun("rank") == ["0"]


def test_a_trial_whose_command_was_killed_while_it_drew_values_gets_them_all():
    assert run({**SMALL, "trials": 2}) == 0
    straight = {row["trial"]: row["setting"] for row in report()["trials"]}
    shutil.rmtree(SWEEP)
    sweep, plan = planned()
    book = Book(sweep, SWEEP, definition(sweep, plan))
    book.study.ask().suggest_float("x", 0.0, 1.0)
    drawn = book.trials()[0].params["x"]
    assert run({**SMALL, "trials": 2}) == 0
    settings = {row["trial"]: row["setting"] for row in report()["trials"]}
    assert settings[0].keys() == straight[0].keys()
    assert settings[0]["x"] == drawn, "what it was given stays"


def test_ctrl_c_stops_and_the_same_trial_goes_on():
    process = held()
    os.kill(process.pid or 0, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130
    Path("wait").unlink()
    assert run(SMALL, "--act.hold=wait") == 0
    assert begun().count("trials/0") == 2
    assert begun("resume")[1] == str(SWEEP / "trials/0/checkpoints/last.ckpt")
    assert states() == dict.fromkeys(range(6), "COMPLETE")


def test_a_killed_command_leaves_a_trial_that_ends_and_is_counted():
    process = held()
    process.kill()
    process.join()
    Path("wait").unlink()
    until(lambda: any(line["event"] == "ends" for line in acted(SWEEP)))
    assert run(SMALL, "--act.hold=wait") == 0
    assert begun().count("trials/0") == 1, "its results are there"
    assert states() == dict.fromkeys(range(6), "COMPLETE")


def test_a_killed_trial_and_command_are_tried_again():
    process = held()
    process.kill()
    process.join()
    os.kill(begun("pid")[0], signal.SIGKILL)
    Path("wait").unlink()
    with (SWEEP / JOURNAL).open("a") as file:
        file.write('{"op_code": 4, "wor')  # a write that was cut
    assert run(SMALL, "--act.hold=wait") == 0
    assert begun().count("trials/0") == 2
    assert states() == dict.fromkeys(range(6), "COMPLETE")


def test_a_trial_that_is_ended_alone_goes_on(capfd):
    process = held()
    os.kill(begun("pid")[0], signal.SIGTERM)
    Path("wait").unlink()
    process.join(60)
    assert process.exitcode == 0
    assert begun()[:3] == ["trials/0", "trials/0", "trials/1"]
    assert begun("resume")[1] == str(SWEEP / "trials/0/checkpoints/last.ckpt")
    assert states() == dict.fromkeys(range(6), "COMPLETE")
    assert "trial 0 had to leave (exit code -15): it goes on" in capfd.readouterr().out


@pytest.mark.parametrize("prefix", [None, "align"])
def test_a_run_that_is_preempted_alone_begins_again(prefix):
    Path("leave").touch()
    assert run({**SMALL, "trials": 2, "prefix": prefix}, "--act.leave=leave") == 0
    first = "prefix/all-1" if prefix else "trials/0"
    assert begun() == [first, *dict.fromkeys([first, "trials/0", "trials/1"])]
    assert states() == dict.fromkeys(range(2), "COMPLETE")


def test_two_commands_share_a_sweep_and_its_prefix():
    definition = {**SMALL, "prefix": "align", "trials": 8, "args": ["--act.seconds=0.1"]}
    planned(definition)
    both = [command(definition) for _ in range(2)]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    report_alone(*planned(definition))
    assert states() == dict.fromkeys(range(8), "COMPLETE")
    assert sorted(begun()) == sorted(["prefix/all-1", *(f"trials/{number}" for number in range(8))])
    checkpoint = str(SWEEP / "prefix/all-1/checkpoints/stage-align.ckpt")
    assert begun("branch") == [None] + [checkpoint] * 8
    assert not [line for line in acted(SWEEP) if line["event"] == "ends" and line["name"].startswith("prefix")]
    alive, most = set(), 0
    for line in acted(SWEEP)[1:]:
        (alive.add if line["event"] == "begins" else alive.discard)(line["name"])
        most = max(most, len(alive))
    assert most == 2


def test_a_prefix_that_fails_is_told():
    definition = {**SMALL, "prefix": "align", "args": ["--act.seconds=x"]}
    sweep, plan = planned(definition)
    Path("fails.py").write_text("print('error: no room'); raise SystemExit(2)")
    broken = dataclasses.replace(plan, program=(sys.executable, "fails.py"), parse=lambda arguments: actor.OPTIONS)
    with pytest.raises(
        ValueError, match=r"cannot be trained \(runs/sweeps/small/logs/prefix/all-1.log\):\n.*\n?.*no room"
    ):
        run_sweep(sweep, broken, 1, 0)


def test_another_definition_is_refused():
    assert run({**SMALL, "trials": 2}) == 0
    wider = {**SMALL, "parameters": {**SMALL["parameters"], "x": {"uniform": [0.0, 2.0]}}}
    with pytest.raises(ValueError, match=r"another definition(.|\n)*parameters.x.high was 1.0, is 2.0"):
        run(wider)
    with pytest.raises(ValueError, match=r"args was \[\], is \['--y=2'\]"):
        run(SMALL, "--y=2")
    write("data/manifest.json", {"hash": "h2"})
    with pytest.raises(ValueError, match="data was h1, is h2"):
        run()
    write("data/manifest.json", {"hash": "h1"})
    assert run({**SMALL, "trials": 3}) == 0


def test_a_mistake_is_told_before_any_trial():
    with pytest.raises(ValueError, match=r"a trial with --x=0.0 --kind=a: unrecognized arguments: --z=1"):
        run(SMALL, "--z=1")
    assert not SWEEP.exists()
    with pytest.raises(ValueError, match="there is no sweep in runs/sweeps/small yet"):
        report_alone(*planned())


def test_a_report_once_trials_were_taken_away():
    assert run({**SMALL, "trials": 2}) == 0
    before = report()
    shutil.rmtree(SWEEP / "trials")
    report_alone(*planned())
    after = report()
    assert [row["value"] for row in after["trials"]] == [row["value"] for row in before["trials"]]
    assert [row["low"] for row in after["trials"]] == [None, None]
    assert after["best"] == before["best"]


def test_a_verdict_on_a_former_best_is_not_told():
    assert run({**SMALL, "trials": 2}) == 0
    best = report()["trials"][0]["trial"]
    held = {"claims": [{"says": "it beats", "verdict": "holds", "why": "so", "sentence": "it beats: holds: so."}]}
    for number, claims in ((best, held["claims"]), (1 - best, [])):
        rows = [{"arm": "default"}, {"arm": f"trial-{number}"}]
        write(str(SWEEP / "seeds/report.json"), {**held, "seeds": [2, 3], "split": "test", "variants": {"all": rows}})
        report_alone(*planned())
        assert report()["again"]["claims"] == claims


def test_a_report_of_other_parameters_is_refused():
    assert run({**SMALL, "trials": 2}) == 0
    other = {**SMALL["parameters"], "kind": {"choice": ["a", "c"]}}
    with pytest.raises(
        ValueError, match=r"(.|\n)*parameters.kind.choices.b was b, is None\n.*choices.c was None, is c"
    ):
        report_alone(*planned({**SMALL, "parameters": other}))
    with pytest.raises(ValueError, match="metric was val/primary, is val/fused/relevance/mrr"):
        report_alone(*planned({**SMALL, "metric": "val/fused/relevance/mrr"}))
    shutil.rmtree("data")  # a report needs them not
    report_alone(*planned({**SMALL, "encoders": "tiny", "trials": 3}, "--y=2"))


def test_a_report_of_what_is_there():
    assert run({**SMALL, "trials": 1}) == 0
    sweep, plan = planned()
    book = Book(sweep, SWEEP, reported(sweep), reads=True)
    assert told(book, plan)["importance"] == {}
    assert len(book.trials(TrialState.COMPLETE)) == 1
    assert "plots once two trials are done" in (SWEEP / "report.html").read_text()

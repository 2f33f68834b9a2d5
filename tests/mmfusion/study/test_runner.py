"""Who runs when, what is shared, what becomes of crashes and interruptions; by runs that train nothing (actor.py)."""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import mmfusion.cli
from mmfusion.study.definition import read_study
from mmfusion.study.diary import JOBS
from mmfusion.study.estimate import time_left
from mmfusion.study.jobs import Plan
from mmfusion.study.progress import progress
from mmfusion.study.queue import Queue
from mmfusion.study.runner import run_and_report, run_study
from mmfusion.study.signals import Interrupted
from tests.mmfusion import acting
from tests.mmfusion.acting import acted, until, write
from tests.mmfusion.study import actor

ACTOR = Path(actor.__file__)
STUDY = Path("runs/studies/small")
FOUR = {
    "reference": "moe", "prefix": "align", "arms": {
        "alone": {"experiment": "alone", "prefix": None}, "moe": {}, "gated": {}, "early": {"prefix": "adapt"},
        "bm25": {"row_of": "moe", "view": "bm25"},
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """An empty folder with what a project needs: data, experiments."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.setattr("mmfusion.study.queue.PAUSE", 0.02)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    stages = {"adapt": {"until": 1}, "align": {"until": 2}, "fuse": {"until": 3}}
    experiments = {
        "base": {"model": {"dim": 8, "stages": stages}}, "fusion_moe": {"model": {"fusion": "MoE"}},
        "alone": {"model": {"stages": {"joint": {"until": 3}}}},
    }  # fmt: skip
    with acting.project(STUDY, experiments):
        yield


def plan(definition: dict[str, Any], seeds: tuple[int, ...] = (1,), **options: Any) -> Plan:
    Path("small.yaml").write_text(yaml.safe_dump(definition, sort_keys=False))
    return Plan(
        read_study(Path("small.yaml")),
        STUDY,
        "data",
        seeds,
        program=(sys.executable, str(ACTOR)),
        parse=actor.given,
        **options,
    )


def with_args(arm: str, *args: str, of: dict[str, Any] = FOUR) -> dict[str, Any]:
    return of | {"arms": of["arms"] | {arm: {**of["arms"][arm], "args": list(args)}}}


def begun(key: str | None = None) -> list[Any]:
    """Names of the jobs in the order in which they began; or what each was given for `key`."""
    return [line[key or "name"] for line in acted(STUDY) if line["event"] == "begins"]


def states() -> dict[str, str]:
    return {name: about["state"] for name, about in json.loads((STUDY / JOBS).read_text()).items()}


def checkpoint(job: str, stage: str) -> str:
    return str(STUDY / job / "checkpoints" / f"stage-{stage}.ckpt")


def test_a_shared_stage_is_trained_once(capfd):
    assert run_study(plan(FOUR, seeds=(1, 2))) == []
    assert begun() == [f"{arm}/all-{seed}" for seed in (1, 2) for arm in ("alone", "moe", "gated", "early")]
    for seed, place in ((1, 0), (2, 4)):
        moe = f"moe/all-{seed}"
        assert begun("branch")[place : place + 4] == [None, None, checkpoint(moe, "align"), checkpoint(moe, "adapt")]
    assert begun("checkpoint_stages") == [None, "[adapt,align]", None, None] * 2
    assert set(states().values()) == {"done"}
    jobs = json.loads((STUDY / JOBS).read_text())
    assert jobs["moe/all-1"]["shared_minutes"] == jobs["alone/all-1"]["shared_minutes"] == 0
    assert 0 < jobs["early/all-2"]["shared_minutes"] <= jobs["gated/all-2"]["shared_minutes"]
    assert jobs["gated/all-2"]["shared_minutes"] < jobs["moe/all-2"]["minutes"]
    assert "gated/all-2 branches from moe/all-2 after align; 6 of 8 done, about" in capfd.readouterr().out


def test_done_is_done(capfd):
    run_study(plan(FOUR))
    assert run_study(plan(FOUR, seeds=(1, 2))) == []
    assert begun()[4:] == ["alone/all-2", "moe/all-2", "gated/all-2", "early/all-2"]
    (STUDY / "gated" / "all-1" / "results.json").write_text('{"run": ')
    run_study(plan(FOUR))
    assert begun()[8:] == ["gated/all-1"]
    assert begun("resume")[8:] == [str(STUDY / "gated" / "all-1" / "checkpoints" / "last.ckpt")]


def test_variants_and_arms_that_count_for_all():
    arms = {"photo": {"once": True, "prefix": None}, "moe": {}, "gated": {}, "joint": {"variants": ["b"]}}
    study = {"reference": "moe", "prefix": "adapt", "arms": arms, "variants": {"a": ["--x=1"], "b": ["--x=2"]}}
    run_study(plan(study, more=("--y=3",)))
    assert begun() == ["photo/a-1", "moe/a-1", "gated/a-1", "moe/b-1", "gated/b-1", "joint/b-1"]
    assert begun("branch")[4] == begun("branch")[5] == checkpoint("moe/b-1", "adapt")
    log = (STUDY / "logs" / "moe/b-1.log").read_text()
    assert log.startswith("$ MMFUSION_VERSION=b-1 OMP_NUM_THREADS=")
    assert "--experiment=moe --runs=runs/studies/small --x=2 --y=3 --seed_everything=1" in log


def test_two_at_a_time_wait_for_what_they_share_and_no_longer(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,5")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    quick = FOUR | {"args": ["--act.seconds=0.7"]}
    run_study(plan(quick), side_by_side=2)
    lines, alive, most = acted(STUDY), set(), 0
    for line in lines:
        (alive.add if line["event"] == "begins" else alive.remove)(line["name"])
        most = max(most, len(alive))
    assert most == 2
    assert set(begun()[:2]) == {"alone/all-1", "moe/all-1"}
    times = {(line["event"], line["name"]): line["time"] for line in lines}
    ready = Path(checkpoint("moe/all-1", "align")).stat().st_mtime
    early = Path(checkpoint("moe/all-1", "adapt")).stat().st_mtime
    assert times["begins", "early/all-1"] >= early
    assert early < ready <= times["begins", "gated/all-1"]
    assert begun("checkpoint_stages").count(None) == 3, "adapt and align are trained once"
    assert set(begun("threads")) == {"3"}
    assert set(begun("gpus")) == {"3,5", "4"}


def test_a_crash_sinks_nothing_else(capfd):
    failed = run_study(plan(with_args("alone", "--act.crash=start")))
    assert [job.name for job in failed] == ["alone/all-1"]
    assert states() == {"alone/all-1": "failed", "moe/all-1": "done", "gated/all-1": "done", "early/all-1": "done"}
    about = json.loads((STUDY / JOBS).read_text())["alone/all-1"]
    assert (about["rc"], about["tail"][-2:]) == (3, ["a first line", "error: it fell over"])
    assert "alone/all-1 FAILED with exit code 3" in capfd.readouterr().out
    run_study(plan(with_args("alone", "--act.crash=start")))
    assert begun()[4:] == ["alone/all-1"], "tried again, and nothing else"


def test_if_the_first_fails_before_the_end_of_the_stage_the_next_becomes_first():
    run_study(plan(with_args("moe", "--act.crash=start")))
    assert begun() == ["alone/all-1", "moe/all-1", "gated/all-1", "early/all-1"]
    assert begun("branch") == [None, None, None, checkpoint("gated/all-1", "adapt")]
    assert begun("checkpoint_stages") == [None, "[adapt,align]", "[adapt,align]", None]


def test_the_stage_of_a_run_that_fails_later_is_good():
    run_study(plan(with_args("moe", "--act.crash=end")))
    assert states()["moe/all-1"] == "failed"
    assert json.loads((STUDY / JOBS).read_text())["moe/all-1"]["rc"] == -signal.SIGABRT
    assert begun("branch")[2] == checkpoint("moe/all-1", "align")


def test_a_run_that_shares_less_leads_until_there_and_another_goes_on():
    arms = {"early": {"prefix": "adapt"}, "moe": {}, "gated": {}}
    run_study(plan({"reference": "moe", "prefix": "align", "arms": arms}))
    at = [None, checkpoint("early/all-1", "adapt"), checkpoint("moe/all-1", "align")]
    assert (begun("branch"), begun("checkpoint_stages")) == (at, ["[adapt]", "[align]", None])


def in_the_background(study: dict[str, Any], side_by_side: int) -> multiprocessing.Process:
    """A runner as a process of its own, which ends with 130 when it was interrupted."""

    def run() -> None:
        try:
            run_study(plan(study), side_by_side)
        except Interrupted:
            os._exit(130)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_stops_all_and_the_same_command_goes_on(number, capfd):
    slow = FOUR | {"args": ["--act.seconds=0.4"]}
    runner = in_the_background(slow, 2)
    until(lambda: Path(checkpoint("moe/all-1", "adapt")).is_file())
    os.kill(runner.pid, number)
    runner.join(10)
    assert runner.exitcode == 130
    assert states()["moe/all-1"] == "stopped"
    assert not [line for line in acted(STUDY) if line["event"] == "ends" and line["name"] == "moe/all-1"]
    for line in acted(STUDY):
        with pytest.raises(ProcessLookupError):
            os.kill(line["pid"], 0)
    assert "the same command goes on from here" in capfd.readouterr().out
    at = len(begun())
    Path("small.yaml").unlink()
    assert run_study(plan(slow), side_by_side=2) == []
    assert set(states().values()) == {"done"}
    resumed = dict(zip(begun()[at:], begun("resume")[at:], strict=True))
    assert resumed["moe/all-1"] == str(STUDY / "moe" / "all-1" / "checkpoints" / "last.ckpt")
    assert resumed["gated/all-1"] is None
    assert begun("checkpoint_stages")[at:].count("[adapt,align]") == 1


def test_what_a_killed_command_started_is_waited_for(capfd):
    slow = with_args("alone", "--act.seconds=1")
    runner = in_the_background(slow, 1)
    until(begun)
    with pytest.raises(ValueError, match="another command runs the study in runs/studies/small"):
        run_study(plan(slow))
    runner.kill()
    runner.join()
    assert run_study(plan(slow)) == []
    assert begun() == ["alone/all-1", "moe/all-1", "gated/all-1", "early/all-1"], "once each"
    out = capfd.readouterr().out
    assert "alone/all-1 still runs, started by an earlier command: waiting for it" in out
    assert states()["alone/all-1"] == "done"


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew():
    held = with_args("alone", "--act.hold=hold")
    Path("hold").touch()
    runner = in_the_background(held, 1)
    until((STUDY / "alone" / "all-1" / "config.yaml").is_file)
    os.kill(begun("pid")[0], signal.SIGKILL)
    runner.join(20)
    assert states()["alone/all-1"] == "failed"
    assert (STUDY / "alone" / "all-1" / "config.yaml").is_file()
    Path("hold").unlink()
    held = with_args("alone", "--act.seconds=0.1")  # nothing of the old one will be used
    assert run_study(plan(held)) == []
    assert begun()[4:] == ["alone/all-1"]
    assert begun("resume")[4:] == [None]


def test_runs_of_other_seeds_are_held_against_the_definition_too():
    """Results are means over every seed on disk."""
    run_study(plan(FOUR, seeds=(1, 2)))
    (STUDY / "gated" / "all-1").rename("elsewhere")
    gated = with_args("gated", "--model.dim=9")
    with pytest.raises(
        ValueError, match=r"another definition .*\n  gated \(.*all-2\): options was \[\], is \['--model"
    ):
        run_study(plan(gated))
    assert len(begun()) == 8


def test_a_report_alone_draws_no_data_and_lists_runs_of_another_definition_as_missing(capfd):
    """DATA is that of the runs, which may lie elsewhere by now."""
    run_study(plan(FOUR))
    plan(with_args("gated", "--model.dim=9"))
    Path("data/manifest.json").unlink()
    with pytest.raises(SystemExit, match=r"^0$"):
        mmfusion.cli.study(["--study", "small.yaml", "--report-only"])
    report = json.loads((STUDY / "report.json").read_text())
    assert report["data"] == "data"
    assert not Path("data/demo").exists()
    changed = {one["arm"]: one["why"] for one in report["missing"] if "definition" in one["why"]}
    assert changed == {"gated": "was made by another definition or on other data: options was [], is ['--model.dim=9']"}
    assert "missing: gated all seed 1: was made by another definition" in capfd.readouterr().out
    assert len(begun()) == 4


@pytest.mark.parametrize(
    "option", ["--seed_everything=7", "--experiment=x", "--config=x.yaml", "--branch=x", "--runs=x"]
)
def test_args_cannot_decide_what_the_study_does(option):
    with pytest.raises(ValueError, match=f"ARGS holds '{option}': the command gives that to each run, leave it out"):
        plan(FOUR, more=(option,))


def test_a_mistake_in_the_options_fails_once_before_anything_starts():
    with pytest.raises(ValueError, match=r"study small, arm gated on all: unrecognized arguments: --model\.dmi=9"):
        run_study(plan(with_args("gated", "--model.dmi=9")))
    assert begun() == []
    assert not (STUDY / "study.json").exists()


def test_the_commits_of_a_run_and_of_what_it_branched_from(monkeypatch):
    monkeypatch.setattr("mmfusion.environment.commit", lambda: "one")
    run_study(plan(with_args("gated", "--act.crash=start")))
    (STUDY / "moe" / "all-1" / "results.json").unlink()
    monkeypatch.setattr("mmfusion.environment.commit", lambda: "two")
    run_study(plan(with_args("gated", "--act.crash=start")))
    jobs = json.loads((STUDY / JOBS).read_text())
    found = {name: about["commits"] for name, about in jobs.items()}
    assert found == {
        "alone/all-1": ["one"], "moe/all-1": ["one", "two"], "gated/all-1": ["one", "two"], "early/all-1": ["one"],
    }  # fmt: skip


def test_a_second_interruption_kills_what_does_not_listen(capfd):
    runner = in_the_background(with_args("alone", "--act.seconds=30", "--act.deaf=true"), 1)
    until(begun)
    os.kill(runner.pid, signal.SIGINT)
    time.sleep(0.3)
    assert runner.is_alive(), "it waits for the run"
    os.kill(runner.pid, signal.SIGINT)
    runner.join(5)
    assert runner.exitcode == 130
    with pytest.raises(ProcessLookupError):
        os.kill(begun("pid")[0], 0)
    assert "stopped with 0 of 4 runs done; the same command goes on from here" in capfd.readouterr().out
    assert states()["alone/all-1"] == "stopped"


def test_an_interruption_while_it_sets_up_is_one_message(capfd):
    def interrupted(arguments: Sequence[str]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    assert run_and_report(replace(plan(FOUR), parse=interrupted), 1, report_only=False) == 130
    assert capfd.readouterr().err == "stopped; the same command goes on from here\n"
    assert begun() == []


def test_an_error_of_its_own_stops_what_runs(monkeypatch, capfd):
    """As when the disk is full: jobs.json cannot be written once a run has begun."""
    study = plan(with_args("alone", "--act.seconds=30"))

    def full(queue: Queue) -> None:
        until(begun)
        raise OSError(28, "No space left on device", str(STUDY / JOBS))

    monkeypatch.setattr(Queue, "collect", full)
    with pytest.raises(ValueError, match=r"No space left on device: '.*'\. The runs are stopped; once that is mended"):
        run_study(study)
    with pytest.raises(ProcessLookupError):
        os.kill(begun("pid")[0], 0)
    assert "stopped with 0 of 4 runs done" in capfd.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", '{"alone/all-1": 3}', '{"alone/all-1": {"attempts": []}}', "\xff"])
def test_damaged_costs_cost_no_run(content):
    run_study(plan(FOUR))
    (STUDY / JOBS).write_bytes(content.encode("latin-1"))
    (STUDY / "alone" / "all-1" / "parameters.json").write_bytes(content.encode("latin-1"))
    assert run_study(plan(FOUR)) == []
    assert len(begun()) == 4
    assert states().keys() == {"alone/all-1", "moe/all-1", "gated/all-1", "early/all-1"}


def test_a_damaged_definition_deletes_nothing():
    run_study(plan(FOUR))
    (STUDY / "study.json").write_text("{")
    with pytest.raises(ValueError, match=r"study\.json is not JSON .* Restore it from a copy, or move .* and keep it"):
        run_study(plan(FOUR))


def test_a_run_whose_diary_was_lost_while_it_ran_ends_as_any():
    slow = with_args("alone", "--act.seconds=1")
    runner = in_the_background(slow, 1)
    until(begun)
    runner.kill()
    runner.join()
    (STUDY / JOBS).unlink()
    assert run_study(plan(slow)) == []
    assert states()["alone/all-1"] == "done"


def test_a_refused_branch_says_what_to_do_in_the_study(capfd):
    refused = with_args("gated", "--act.crash=start", "--act.say=error: the run cannot branch off here; make "
                        "these equal, or train it from the start: dim")  # fmt: skip
    run_study(plan(refused))
    advice = (
        "arm gated differs from the others in stages that it shares with them (adapt, align): give it `prefix: null`"
    )
    assert advice in capfd.readouterr().out
    assert json.loads((STUDY / JOBS).read_text())["gated/all-1"]["tail"][-1].startswith(advice)


def test_names_with_dashes_are_apart():
    arms = {"moe": {}, "moe-b": {}}
    run_study(plan({"reference": "moe", "arms": arms, "variants": {"b-c": [], "c": []}}))
    assert begun() == ["moe/b-c-1", "moe-b/b-c-1", "moe/c-1", "moe-b/c-1"]
    assert len(list((STUDY / "logs").glob("*/*.log"))) == 4


def test_a_run_of_which_nothing_is_known_is_refused():
    run_study(plan(FOUR))
    (STUDY / "study.json").unlink()
    with pytest.raises(ValueError, match=r"alone .*: data was None, is h1; .*and \d more\n"):
        run_study(plan(FOUR))


def test_another_definition_is_refused():
    run_study(plan(FOUR))
    gated = with_args("gated", "--model.dim=9")
    with pytest.raises(ValueError, match=r"another definition .*\n  gated \(.*\): options was \[\], is \['--model"):
        run_study(plan(gated))
    assert run_study(plan(gated | {"arms": {key: gated["arms"][key] for key in ("moe", "bm25", "early")}})) == []
    write("experiments/fusion_moe.yaml", {"model": {"fusion": "Other"}})
    with pytest.raises(
        ValueError, match=r"moe \(.*\): files.fusion_moe.model.fusion was MoE, is Other[^$]*another name"
    ):
        run_study(plan(FOUR))
    write("experiments/fusion_moe.yaml", {"model": {"fusion": "MoE"}})
    write("data/manifest.json", {"hash": "h2"})
    with pytest.raises(ValueError, match=r"alone .*: data was h1, is h2"):
        run_study(plan(FOUR))
    assert len(begun()) == 4
    write("data/manifest.json", {"hash": "h1"})
    (STUDY / "gated").rename("elsewhere")
    assert run_study(plan(gated)) == []
    assert begun()[4:] == ["gated/all-1"]


@pytest.mark.parametrize("prefix", ["fuse", "adaptt"])
def test_a_prefix_is_a_stage_before_the_last(prefix):
    with pytest.raises(
        ValueError, match=rf"arm moe has the prefix '{prefix}', expected .*before the last .adapt, align"
    ):
        run_study(plan(FOUR | {"prefix": prefix}))
    assert not (STUDY / "acted.jsonl").exists()


def test_an_experiment_or_data_that_are_not_there():
    with pytest.raises(
        FileNotFoundError, match=r"small, moe: there is no experiments/mo.yaml, only alone, base, fusion_moe"
    ):
        run_study(plan({"reference": "moe", "arms": {"moe": {"experiment": "mo"}}}))
    Path("data/manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"DATA=data holds no manifest.json"):
        run_study(plan(FOUR))


def test_the_time_left_is_that_of_similar_runs():
    jobs = {job.name: job for job in plan(FOUR).jobs()}
    done = {"state": "done", "branched_from": None}
    diary = {
        "a": {**done, "arm": "alone", "minutes": 8.0}, "b": {**done, "arm": "alone", "minutes": 10.0},
        "c": {**done, "arm": "other", "minutes": 3.0, "branched_from": "x"}, "d": {"state": "failed", "arm": "moe"},
    }  # fmt: skip
    assert time_left([jobs["alone/all-1"], jobs["gated/all-1"]], {jobs["moe/all-1"]: 1.0}, diary, 2) == (9 + 3 + 2) / 2
    assert time_left(list(jobs.values()), {}, {}, 1) is None
    # before any is done: 3 minutes so far and 7 more, so 10 for each of the others
    running, diary = jobs["alone/all-1"], {"alone/all-1": {"branched_from": None}}
    assert time_left([jobs["moe/all-1"]], {running: 3.0}, diary, 1, {running: 7.0}) == 7 + 10


def test_how_far_a_run_is():
    bars = (
        "train:   0%|          | 0/3108 [00:00<?, ?step/s]\r"
        "stage adapt, epoch 3:  40%|####      | 1234/3108 [00:12<01:30, 60.1step/s, loss=1.2, val=0.5]"
    )
    far = progress("Seed set to 1\n" + bars)
    assert (str(far), far.minutes) == ("adapt, step 1,234 of 3,108", 1.5)
    within = progress(bars + "\n\rvalidation: queries and corpus:  30%|###  | 12/40 [00:01<00:02, 9.00batch/s]")
    assert (str(within), within.minutes) == ("validation: queries and corpus 12 of 40", 1.5)
    assert progress("no bar yet 3/4") is None


def test_what_runs_is_told(monkeypatch, capfd):
    monkeypatch.setattr("mmfusion.study.queue.TELL", 0.3)
    bar = "stage fuse, epoch 1:  50%|###  | 5/10 [01:00<2:01:00, 1.00step/s]"
    run_study(plan(with_args("alone", f"--act.bar={bar}", "--act.seconds=0.5")))
    assert "alone/all-1: fuse, step 5 of 10; 0 of 4 done, about 484 min left" in capfd.readouterr().out

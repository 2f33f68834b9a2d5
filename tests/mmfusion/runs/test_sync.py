"""`make sync` with W&B's own library and its own `wandb sync`, against a server that keeps what it is sent."""

import os
import re
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmfusion.cli import main
from mmfusion.loggers import Wandb, make_loggers
from mmfusion.runs import sync as of_sync
from mmfusion.runs.sync import Part, logs_of, sync
from tests.mmfusion.runs.drawn import draw_run
from tests.mmfusion.test_dashboard import logged as history_of
from tests.wandb_server import WandbServer, wandb_server

STEPS = ((0, 1, 2), (3, 4))  # of each part of the run


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> Path:
    """A run that was resumed, both times offline; its parts were written a minute ago."""
    run = draw_run(tmp_path_factory.mktemp("logged") / "runs/moe/1")
    for place, steps in enumerate(STEPS):
        time.sleep(1.1 * place)  # the name of a part's folder has whole seconds
        _, logger = make_loggers(run, Wandb(mode="offline"))
        for step in steps:
            logger.log_metrics({"train/loss": 1.0 / (1 + step)}, step)
        logger.experiment.finish()
    for part in run.glob("wandb/offline-run-*"):
        history_of(part)  # once it is whole
    return run


@pytest.fixture
def run(logged, tmp_path, monkeypatch) -> Path:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(logged.parents[1], tmp_path / "runs", symlinks=True)
    monkeypatch.chdir(tmp_path)
    age(Path("runs/moe/1"), 60)
    return Path("runs/moe/1")


def age(run: Path, seconds: float) -> None:
    for file in run.rglob("*.wandb"):
        os.utime(file, (time.time() - seconds,) * 2)


@pytest.fixture
def server(monkeypatch) -> Iterator[WandbServer]:
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        yield server


def ends_of_records(content: bytes) -> list[int]:
    """In a file of W&B's: LevelDB's log format after a header of seven bytes."""
    ends = [7]
    while ends[-1] + 7 < len(content):
        (size,) = struct.unpack("<H", content[ends[-1] + 4 : ends[-1] + 6])
        ends.append(ends[-1] + 7 + size)
    return ends


def steps_of(server: WandbServer, id: str) -> list[int]:
    return [line["trainer/global_step"] for line in server.history[id]]


def id_of(run: Path) -> str:
    (log,) = logs_of(run)
    (id,) = {part.id for part in log.parts}
    return id


def test_the_parts_of_a_resumed_run_become_one_in_order(run, server, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")  # as on a machine without a network
    sync(Path("runs"), None)
    assert steps_of(server, id_of(run)) == [0, 1, 2, 3, 4]
    assert {upsert["name"] for upsert in server.upserts} == {id_of(run)}
    out = capsys.readouterr().out
    assert f"{run}: 2 parts to send" in out
    assert out.count(f"sent to {server.url}/me/mmfusion/runs/{id_of(run)}") == 2
    assert not Path("wandb").exists()
    said = len(server.upserts)
    sync(Path("runs"), run)
    assert capsys.readouterr().out == "there is nothing to send to W&B now\n"
    assert len(server.upserts) == said


def test_a_part_that_was_sent_before_is_not_sent_again(run, server, capsys):
    parts = sorted(run.glob("wandb/offline-run-*"))
    shutil.move(parts[1], "elsewhere")
    sync(Path("runs"), None)
    shutil.move("elsewhere", parts[1])
    sync(Path("runs"), None)
    assert steps_of(server, id_of(run)) == [0, 1, 2, 3, 4]
    assert f"{run}: 1 part to send, 1 sent before" in capsys.readouterr().out


def test_a_run_that_was_moved_and_resumed_stays_one(run, server):
    _, second = sorted(run.glob("wandb/offline-run-*"))
    id = id_of(run)
    second = second.rename(second.with_name(second.name.replace(id, "another")))
    (second / f"run-{id}.wandb").rename(second / "run-another.wandb")
    sync(Path("runs"), run)
    assert list(server.history) == [id]
    assert steps_of(server, id) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("within", [0, 20])  # bytes of the record that it was writing
def test_what_a_killed_run_wrote_is_sent_once(run, server, within):
    """As far as its file is whole."""
    (part, *_) = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    content = part.read_bytes()
    ends = [place for place in ends_of_records(content) if place < content.rindex(b"train/loss")]
    part.write_bytes(content[: ends[-1] + within])
    age(run, 60)
    sync(Path("runs"), run)
    assert steps_of(server, id_of(run)) == [0, 1, 3, 4]
    said = len(server.upserts)
    sync(Path("runs"), run)
    assert len(server.upserts) == said


@pytest.mark.parametrize("why", ["running", "just written", "of before, just written"])
def test_a_run_that_is_being_written_is_left_out(run, server, capsys, why):
    shutil.rmtree(run / "checkpoints")
    for file in [*run.glob("*.json"), run / "config.yaml"]:
        file.unlink()
    drawn = draw_run(Path("drawn/moe/1"), {"running": "running", "just written": "done"}.get(why), hours=0)
    shutil.copytree(drawn, run, dirs_exist_ok=True)
    age(run, 0 if why == "just written" else 60)
    sync(Path("runs"), None)
    assert capsys.readouterr().out == f"{run}: left out, it is being written\nthere is nothing to send to W&B now\n"
    assert server.upserts == []


def test_what_the_server_refuses_stops_its_run_alone(run, server, capsys):
    other = shutil.copytree(run, run.with_name("2"), symlinks=True)
    for folder in sorted(other.glob("wandb/offline-run-*")):
        folder.rename(folder.with_name(folder.name.replace(id_of(run), "other")))
    server.refused.add(id_of(run))
    with pytest.raises(SystemExit) as end:
        sync(Path("runs"), None)
    assert end.value.code == 1
    assert list(server.history) == ["other"]
    assert steps_of(server, "other") == [0, 1, 2, 3, 4]
    out, errors = capsys.readouterr()
    assert out.count(f"{run}/wandb") == 1  # the second part would come before the first
    assert "permission denied" in errors
    assert "error: 1 of 2 could not be sent" in errors
    server.refused.clear()
    sync(Path("runs"), None)
    assert steps_of(server, id_of(run)) == [0, 1, 2, 3, 4]


def test_evaluations_are_sent_under_their_own_id(run, server):
    """Each folder below eval/ has a log of its own."""
    (part, _) = sorted(run.glob("wandb/offline-run-*"))
    folder = run / "eval/0123-test/wandb" / part.name.replace(id_of(run), "ofeval")
    shutil.copytree(part, folder)
    sync(Path("runs"), run)
    assert steps_of(server, "ofeval") == [0, 1, 2]
    assert {id for log in logs_of(run) for id in [log.parts[0].id]} == {"ofeval", *server.history}


def test_without_a_key_it_is_said_what_there_is_and_what_to_set(run, capsys):
    with pytest.raises(ValueError, match="set WANDB_API_KEY"):
        sync(Path("runs"), None)
    assert capsys.readouterr().out == f"{run}: 2 parts to send\n"


def test_a_server_that_does_not_answer_is_not_waited_for(run, server, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=re.escape("http://127.0.0.1:9 does not answer")):
        sync(Path("runs"), None)


def test_what_is_no_run(run):
    with pytest.raises(ValueError, match="RUN=runs/moe is no run"):
        sync(Path("runs"), Path("runs/moe"))


def test_ctrl_c_ends_it_with_a_line(run, server, monkeypatch, capsys):
    def stopped(part: Part) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(of_sync, "_wandb_sync", stopped)
    monkeypatch.setattr("sys.argv", ["mmfusion", "sync"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert capsys.readouterr().err == "stopped; the same command goes on from here\n"

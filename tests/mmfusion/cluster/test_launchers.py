"""Two ranks under each launcher: what a scheduler ends goes on, and ends as the run that it let be, bit for bit."""

import csv
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from wandb.proto import wandb_internal_pb2

from tests.mmfusion.cluster.fake_slurm import Slurm, descendants
from tests.mmfusion.test_kill import assert_equal
from tests.small_run import small_shards

ROOT = Path(__file__).parents[3]
STEPS, EVERY = 60, 10  # an epoch has 3
MINUTES = 10  # of patience, where other tests keep the processors busy


def command(shards: Path) -> list[str]:
    return [
        sys.executable, "-m", "mmfusion.cli", "train", "--exp", "fusion_moe", "--data", str(shards),
        "--cluster", "slurm", "--nodes", "2", "--gpus", "1", "--data.batch_size=16", "--data.streams=4",
        "--data.image_size=[32, 32]", f"--trainer.max_steps={STEPS}", f"--checkpoint_steps={EVERY}",
        "--trainer.accelerator=cpu", "--data.workers=1", "--trainer.log_every_n_steps=1", "--wandb.mode=offline",
        "--trainer.check_val_every_n_epoch=10", "--trainer.enable_progress_bar=false", "--cluster.cpus_per_task=1",
        "--model.evaluation.baselines=false", "--model.evaluation.drop_photos=[]",
    ]  # fmt: skip


def submitted(folder: Path, shards: Path, monkeypatch) -> Slurm:
    """The job's folder is `folder`, where the command is typed."""
    (folder / "experiments").symlink_to(ROOT / "experiments")
    slurm = Slurm.on_path(folder / "slurm", monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    subprocess.run(command(shards), cwd=folder, check=True, timeout=60 * MINUTES)
    return slurm


def run_of(folder: Path) -> Path:
    (run,) = (path.parent for path in (folder / "runs" / "fusion_moe").glob("*/config.yaml"))
    return run


def end(job: subprocess.Popen[str], slurm: Slurm) -> int:
    try:
        return job.wait(60 * MINUTES)
    finally:
        slurm.tell(signal.SIGKILL)


def interrupted(folder: Path, slurm: Slurm, number: int, after: int, restarts: int) -> str:
    """Starts the job, sends it a signal when a checkpoint past `after` is there; what its log then has more."""
    log = Path(slurm.asked("output"))
    said = len(log.read_text()) if log.exists() else 0
    job, deadline = slurm.start(restarts), time.monotonic() + 60 * MINUTES
    while saved(folder) <= after:
        assert job.poll() is None, log.read_text()[said:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    tasks = slurm.processes()
    slurm.tell(number)
    code = end(job, slurm)
    more = log.read_text()[said:]
    assert code == 75, more
    assert [process for process in tasks if is_running(process)] == [], "a process is left"
    return more


def saved(folder: Path) -> int:
    try:
        (last,) = (folder / "runs" / "fusion_moe").glob("*/checkpoints/last.ckpt")
        return int(torch.load(last, weights_only=True, mmap=True)["global_step"])
    except (ValueError, FileNotFoundError):
        return 0


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wandb_records(part: Path) -> list[wandb_internal_pb2.Record]:
    """A part of an offline run: LevelDB's log, blocks of 32 KiB, with W&B's 7 bytes before the first record."""
    (file,) = part.glob("*.wandb")
    content, at, whole, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        if kind == 0:  # a block's rest
            at += 32768 - at % 32768
            continue
        whole, at = whole + content[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            records.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
    return records


@pytest.mark.slow
@pytest.mark.timeout(60 * 4 * MINUTES)
def test_time_limit_and_preemption_change_nothing(tmp_path, monkeypatch):
    shards = small_shards(tmp_path)
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    for folder in (straight, cut):
        folder.mkdir()
    slurm = submitted(straight, shards, monkeypatch)
    job = slurm.start()
    assert end(job, slurm) == 0, Path(slurm.asked("output")).read_text()

    slurm = submitted(cut, shards, monkeypatch)
    said = interrupted(cut, slurm, signal.SIGUSR1, 0, 0)
    assert f"Job {slurm.number} is queued again and goes on by itself" in said
    assert said.count("SIGUSR1 came: the run stopped after step") == 1, "one rank tells"
    assert (slurm.folder / "scontrol.called").read_text() == f"requeue {slurm.number}\n"
    first = saved(cut)
    assert f"after step {first} of {STEPS}" in said
    assert json.loads((run_of(cut) / "state.json").read_text())["status"] == "preempted"
    said = interrupted(cut, slurm, signal.SIGTERM, first, 1)
    assert "SIGTERM came: the run stopped after step" in said
    assert "`make train EXP=fusion_moe RESUME=auto` goes on" in said
    assert (slurm.folder / "scontrol.called").read_text().count("requeue") == 1, "what is cancelled is to end"
    job = slurm.start(2)
    assert end(job, slurm) == 0, Path(slurm.asked("output")).read_text()

    run = run_of(cut)
    assert run.name == f"job-{slurm.number}"
    assert json.loads((run / "state.json").read_text())["status"] == "done"
    ends = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (run, run_of(straight))]
    for part in ("state_dict", "optimizer_states", "global_step"):
        assert_equal(ends[0][part], ends[1][part], part)
    results = [json.loads((folder / "results.json").read_text()) for folder in (run, run_of(straight))]
    assert results[0]["test"] == results[1]["test"]
    losses = [logged(folder) for folder in (run, run_of(straight))]
    assert losses[0] == losses[1]

    parts = sorted((run / "wandb").glob("offline-run-*"))
    assert len(parts) == 3
    assert len({part.name.rpartition("-")[2] for part in parts}) == 1, "one W&B run"
    records = wandb_records(parts[0])
    assert any(record.WhichOneof("record_type") == "preempting" for record in records)
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [75]


def logged(run: Path) -> dict[str, str]:
    """The loss of each step in metrics.csv. A step that was done again would be there twice."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [int(row["step"]) for row in rows] == list(range(STEPS))
    return {row["step"]: row["train/loss"] for row in rows}


def without_a_cluster(shards: Path) -> list[str]:
    """The options of `command` for one machine."""
    train = command(shards)[3:]
    for option in ("--cluster", "--nodes", "--gpus"):
        del train[train.index(option) : train.index(option) + 2]
    return [word for word in train if not word.startswith("--cluster.")]


@pytest.mark.slow
@pytest.mark.timeout(60 * 2 * MINUTES)
def test_ranks_that_lightning_starts_leave_when_the_first_is_told(tmp_path):
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    train = [*without_a_cluster(small_shards(tmp_path)), "--trainer.devices=2", "--resume=auto"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    mmfusion = subprocess.Popen(
        [sys.executable, "-m", "mmfusion.cli", *train], cwd=tmp_path, env=environment, text=True, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60 * MINUTES
    while not saved(tmp_path) and time.monotonic() < deadline and mmfusion.poll() is None:
        time.sleep(0.05)
    processes = list(descendants(mmfusion.pid))
    mmfusion.send_signal(signal.SIGTERM)
    said = mmfusion.communicate(timeout=60 * MINUTES)[1]
    assert mmfusion.returncode == 75, said
    assert said.count("SIGTERM came: the run stopped after step") == 1
    while any(is_running(process) for process in processes):
        assert time.monotonic() < deadline, "a rank or a worker is left"
        time.sleep(0.1)
    assert EVERY <= saved(tmp_path) < STEPS


@pytest.mark.slow
@pytest.mark.timeout(60 * 2 * MINUTES)
def test_torchrun_on_two_nodes_is_one_run(tmp_path):
    shards, each = small_shards(tmp_path), []
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    train = without_a_cluster(shards)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for node in range(2):
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=night",
            "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29617", f"--local-addr=127.0.0.{node + 1}",
        ]  # fmt: skip
        more = ["--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.max_steps=12", "--checkpoint_steps=4"]
        each.append(
            subprocess.Popen(
                [*torchrun, "-m", "mmfusion.cli", *train, *more], cwd=tmp_path, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    said = [node.communicate(timeout=60 * MINUTES)[0] for node in each]
    assert [node.returncode for node in each] == [0, 0], said
    assert run_of(tmp_path).name == "job-night"
    assert sum(text.count("run: runs/fusion_moe/job-night") for text in said) == 1


def torchrun_on_one_node(folder: Path, shards: Path) -> subprocess.Popen[str]:
    """Two ranks that are started again, twice at most, where one fails."""
    folder.mkdir()
    (folder / "experiments").symlink_to(ROOT / "experiments")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2", "-m", "mmfusion.cli"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(
        [sys.executable, *launch, *without_a_cluster(shards), "--trainer.devices=2", "--resume=auto"], text=True,
        cwd=folder, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def rank_of(process: int) -> str | None:
    try:
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((word.removeprefix(b"RANK=").decode() for word in variables if word.startswith(b"RANK=")), None)


@pytest.mark.slow
@pytest.mark.timeout(60 * 3 * MINUTES)
def test_torchrun_starts_all_ranks_again_when_one_is_killed(tmp_path):
    """From the last checkpoint, in the same folder, to the same numbers; also when the other one is killed then."""
    shards, cut, straight = small_shards(tmp_path), tmp_path / "cut", tmp_path / "straight"
    torchrun, deadline, before = torchrun_on_one_node(cut, shards), time.monotonic() + 60 * MINUTES, 0
    for rank in ("1", "0"):
        while saved(cut) <= before and time.monotonic() < deadline and torchrun.poll() is None:
            time.sleep(0.05)
        before = saved(cut)
        (killed, *_) = [process for process in descendants(torchrun.pid) if rank_of(process) == rank]
        os.kill(killed, signal.SIGKILL)
    said = torchrun.communicate(timeout=60 * MINUTES)[0]
    assert torchrun.returncode == 0, said
    assert said.count("resume=auto: goes on from") == 2
    torchrun = torchrun_on_one_node(straight, shards)
    straight_said = torchrun.communicate(timeout=60 * MINUTES)[0]
    assert torchrun.returncode == 0, straight_said
    assert json.loads((run_of(cut) / "state.json").read_text())["status"] == "done"
    results = [json.loads((run_of(folder) / "results.json").read_text()) for folder in (cut, straight)]
    assert [results[0][split] for split in ("val", "test")] == [results[1][split] for split in ("val", "test")]


@pytest.mark.slow
@pytest.mark.timeout(60 * 2 * MINUTES)
def test_when_a_rank_is_killed_the_other_ends_and_no_worker_is_left(tmp_path):
    """By themselves: no launcher looks after them."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    more = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.workers=2", "--trainer.max_steps=6000"]
    command = [sys.executable, "-m", "mmfusion.cli", *without_a_cluster(small_shards(tmp_path)), *more]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "MMFUSION_VERSION": "two", "OMP_NUM_THREADS": "1"}
    environment = os.environ | together | {"PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(command, cwd=tmp_path, env=environment | {"LOCAL_RANK": rank}, stderr=subprocess.DEVNULL)
        for rank in ("0", "1")
    ]
    try:
        deadline = time.monotonic() + 60 * MINUTES
        while not saved(tmp_path):
            assert time.monotonic() < deadline
            assert [rank.poll() for rank in ranks] == [None, None]
            time.sleep(0.05)
        workers = [process for rank in ranks for process in descendants(rank.pid)]
        assert len(workers) >= 4
        ranks[1].kill()
        assert ranks[0].wait(90) not in (0, None)
        deadline = time.monotonic() + 90
        while left := [process for process in workers if is_running(process)]:
            assert time.monotonic() < deadline, [Path(f"/proc/{process}/cmdline").read_bytes() for process in left]
            time.sleep(0.1)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()

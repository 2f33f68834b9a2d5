"""make train CLUSTER=slurm: the script it writes and submits, what it keeps out of it, and mistakes in one line."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mmfusion.cli import main
from tests.mmfusion.cluster.fake_slurm import Slurm

ROOT = Path(__file__).parents[3]
TRAIN = ["train", "--exp", "fusion_gated", "--data", "no/shards"]
JOB = [*TRAIN, "--cluster", "slurm", "--nodes", "4", "--gpus", "8"]


@pytest.fixture
def mmfusion(monkeypatch, tmp_path, capsys):
    """Runs the command beside the project's experiments; returns its exit code, what it printed and its errors."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> tuple[object, str, str]:
        monkeypatch.setattr("sys.argv", ["mmfusion", *argv])
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Slurm:
    """srun only writes down its arguments."""
    made = Slurm.on_path(tmp_path / "slurm", monkeypatch)
    (made.folder / "bin" / "srun").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {made.folder}/srun.called\n')
    return made


def started(slurm: Slurm) -> list[str]:
    assert slurm.start().wait(30) == 0
    return (slurm.folder / "srun.called").read_text().splitlines()


def test_it_submits_a_job_that_trains_on_all_gpus(mmfusion, slurm, tmp_path):
    code, out, err = mmfusion(*JOB, "--cluster.partition=gpu", "--cluster.time=1-02:00:00", "--model.dim=64")
    assert (code, err) == (0, "")
    (script,) = (tmp_path / "runs" / "fusion_gated" / "submitted").glob("*.sbatch")
    assert out.splitlines()[0] == f"Submitted batch job {slurm.number}: {script.relative_to(tmp_path)}"
    expected = {
        "job-name": "fusion_gated", "nodes": "4", "ntasks-per-node": "8", "gpus-per-node": "8", "partition": "gpu",
        "time": "1-02:00:00", "signal": "USR1@300", "output": str(script.with_suffix(".log")), "open-mode": "append",
    }  # fmt: skip
    assert {option: slurm.asked(option) for option in expected} == expected
    text = script.read_text()
    assert "{{" not in text
    assert "--account" not in text, "nothing is asked for that is null"
    assert "container-image" not in text
    asked = started(slurm)
    assert asked[0] == "--kill-on-bad-exit=1"
    assert asked[2:5] == ["-m", "mmfusion.cli", "fit"]
    assert {"--model.dim=64", "--trainer.devices=8", "--trainer.num_nodes=4", "--data.path=no/shards"} <= set(asked)
    assert not any(word.startswith(("--cluster", "--resume")) for word in asked)


def test_a_job_goes_on_with_its_own_run_and_with_no_other(mmfusion, slurm, tmp_path):
    mmfusion(*JOB)
    state = tmp_path / "runs" / "fusion_gated" / "before" / "state.json"
    state.parent.mkdir()
    state.write_text('{\n  "job": "1",\n  "status": "failed"\n}')
    assert "--resume=auto" not in started(slurm), "another's unfinished run is not the job's"
    state.write_text(f'{{\n  "job": "{slurm.number}",\n  "status": "preempted"\n}}')
    assert started(slurm)[-1] == "--resume=auto"
    state.unlink()
    own = tmp_path / "runs" / "fusion_gated" / f"job-{slurm.number}" / "config.yaml"
    own.parent.mkdir()
    own.touch()  # it died before it said anything
    assert started(slurm)[-1] == "--resume=auto"


def test_runs_may_be_elsewhere_by_a_file_of_options(mmfusion, slurm, tmp_path):
    (tmp_path / "mine.yaml").write_text("runs: elsewhere\nresume: auto\n")
    assert mmfusion(*JOB, "--config=mine.yaml")[0] == 0
    assert list((tmp_path / "elsewhere" / "fusion_gated" / "submitted").glob("*.sbatch"))
    assert started(slurm)[-1] == "--resume=auto"


def test_it_queues_a_run_again_that_cannot_ask_slurm_itself(mmfusion, slurm):
    mmfusion(*JOB)
    called = slurm.folder / "scontrol.called"
    for code in (75, 76):
        assert not called.exists()
        (slurm.folder / "bin" / "srun").write_text(f"#!/bin/sh\nexit {code}\n")
        assert slurm.start().wait(30) == code
    assert called.read_text() == f"requeue {slurm.number}\n"


def test_resume_is_what_the_user_asked_for_until_the_job_has_its_own_run(mmfusion, slurm):
    mmfusion(*JOB, "--resume=auto")
    assert started(slurm)[-1] == "--resume=auto"
    code, _, err = mmfusion(*JOB, "--resume=gone.ckpt")
    assert (code, err) == (2, "error: RESUME=gone.ckpt is no checkpoint; RESUME=auto finds the last one\n")


def test_lists_come_line_by_line_and_what_is_odd_is_quoted(mmfusion, slurm, tmp_path):
    lines = [
        "--cluster.modules=[cuda/12.6, nccl]",
        "--cluster.setup=[\"touch $SLURM_JOB_ID 'set up'\"]",
        "--cluster.mem=200G",
    ]
    mmfusion(*JOB, *lines, "--cluster.sbatch=[--exclusive]", "--model.fusion=Gated", "--wandb.tags=[it's, $HOME]")
    text = (slurm.folder / "script").read_text()
    assert "\nmodule load cuda/12.6\nmodule load nccl\n" in text
    assert "\n#SBATCH --exclusive\n" in text
    assert slurm.asked("mem") == "200G"
    (slurm.folder / "bin" / "module").write_text("#!/bin/sh\n")
    (slurm.folder / "bin" / "module").chmod(0o755)
    assert "--wandb.tags=[it's, $HOME]" in started(slurm)
    assert (tmp_path / str(slurm.number)).exists()
    assert (tmp_path / "set up").exists()


def test_a_clone_may_have_any_name(mmfusion, slurm, tmp_path, monkeypatch):
    clone = tmp_path / "a clone's #2 of 100%"
    clone.mkdir()
    (clone / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(clone)
    _, out, err = mmfusion(*JOB, "--experiment=my own")
    assert err == ""
    (script,) = (clone / "runs" / "my own" / "submitted").glob("*.sbatch")
    assert slurm.asked("output") == str(script.with_suffix(".log"))
    assert slurm.asked("job-name") == "my own"
    assert f"log: {script.with_suffix('.log')}\n" in out
    assert "--experiment=my own" in started(slurm)


def test_a_container_sees_the_project_and_what_is_named(mmfusion, slurm, tmp_path):
    mmfusion(*JOB, "--cluster.container=/images/torch.sqsh", "--cluster.mounts=[/shared/data, /opt/python]")
    seen = ",".join(f"{folder}:{folder}" for folder in (tmp_path, "/shared/data", "/opt/python"))
    expected = ["--container-image=/images/torch.sqsh", f"--container-mounts={seen}"]
    assert started(slurm)[1:4] == [*expected, f"--container-workdir={tmp_path}"]


def test_secrets_are_not_in_the_script_and_reach_the_run(mmfusion, slurm):
    address = "--data.path=s3://user:geheim@bucket/shards"
    code, out, _ = mmfusion(*TRAIN[:3], *JOB[5:], address)
    assert code == 0
    assert "geheim" not in out + (slurm.folder / "script").read_text()
    taken = dict(line.split("=", 1) for line in (slurm.folder / "environment").read_text().splitlines() if "=" in line)
    (name,) = (key for key, value in taken.items() if value == address)
    os.environ[name] = address  # as SLURM keeps it with the job
    try:
        assert address in started(slurm)
    finally:
        del os.environ[name]


def test_without_sbatch_it_prints_what_it_would_submit(mmfusion, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    code, out, err = mmfusion(*JOB)
    assert (code, err) == (0, "")
    (script,) = (tmp_path / "runs" / "fusion_gated" / "submitted").glob("*.sbatch")
    assert out.startswith(script.read_text())
    assert out.splitlines()[-1].startswith(
        "sbatch is not on this machine. On the login node: sbatch runs/fusion_gated/"
    )
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def test_what_sbatch_refuses_is_one_message(mmfusion, slurm):
    (slurm.folder / "bin" / "sbatch").write_text(
        "#!/bin/sh\necho 'error: invalid partition specified: gpux' >&2; exit 1\n"
    )
    code, _, err = mmfusion(*JOB)
    assert code == 2
    assert err.startswith("error: sbatch refuses runs/fusion_gated/submitted/")
    assert "invalid partition specified: gpux. Options are in experiments/clusters/slurm.yaml" in err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--cluster.partitoin=gpu"], "--cluster: partitoin is an unknown key: there are partition, "),
        (["--cluster.time=noon"], "--cluster: time is 'noon': expected [days-]hours:minutes:seconds"),
        (["--cluster.signal_lead=soon"], "--cluster: signal_lead is 'soon': expected a whole number from 1 on"),
        (["--cluster.modules=cuda"], "--cluster: modules is 'cuda': expected a list"),
        (["--cluster.partition", "gpu"], "--cluster.partition has no value: expected --cluster.partition=value"),
        (["--nodes", "two"], "NODES=two: expected a whole number from 1 on"),
        (["--cluster", "slum"], "CLUSTER=slum is not in experiments/clusters: there are slurm. Did you mean slurm?"),
        (["--model.dmi=3"], "--model.dim"),
    ],
)
def test_a_mistake_is_told_before_anything_is_submitted(mmfusion, slurm, tmp_path, more, said):
    code, _, err = mmfusion(*JOB, *more)
    assert code == 2
    assert err.startswith("error: ")
    assert said in err
    assert not (slurm.folder / "script").exists()
    assert not (tmp_path / "runs").exists()


def test_a_cluster_without_a_script_is_one_message(mmfusion, tmp_path):
    (tmp_path / "experiments").unlink()
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    (tmp_path / "experiments" / "clusters" / "juwels.yaml").touch()
    code, _, err = mmfusion(*TRAIN, "--cluster", "juwels")
    assert (code, err.startswith("error: experiments/clusters/juwels.sbatch is missing")) == (2, True)


@pytest.mark.parametrize("more", [["--nodes", "2"], ["--cluster.time=1:00:00"]], ids=" ".join)
def test_what_is_for_a_job_needs_a_cluster(mmfusion, more):
    code, _, err = mmfusion(*TRAIN, *more)
    assert code == 2
    assert "is for a job: CLUSTER=slurm NODES=2 GPUS=8" in err


def test_a_time_that_yaml_would_misread_is_refused(mmfusion, slurm, tmp_path):
    (tmp_path / "experiments").unlink()
    clusters = tmp_path / "experiments" / "clusters"
    clusters.mkdir(parents=True)
    for path in (ROOT / "experiments").iterdir():
        if path.name != "clusters":
            (tmp_path / "experiments" / path.name).symlink_to(path)
    (clusters / "slurm.yaml").write_text("time: 12:00:00\n")
    code, _, err = mmfusion(*JOB)
    assert (code, "time is 43200: expected [days-]hours:minutes:seconds, in quotes" in err) == (2, True)


def test_gpus_alone_are_those_of_this_machine(mmfusion, monkeypatch):
    given: list[list[str]] = []
    monkeypatch.setattr("mmfusion.cli.fit", given.append)
    assert mmfusion(*TRAIN, "--gpus", "8")[0] == 0
    assert given[0][-1] == "--trainer.devices=8"
    mmfusion(*TRAIN)
    assert not any("devices" in word for word in given[1])

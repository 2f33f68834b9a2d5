"""sbatch, srun and scontrol for tests: a job's nodes are this machine's, its tasks talk by 127.0.0.1.

What they keep of SLURM: the variables of a job, a step and a task; signals go to every process of a step; a step whose
task ends with another code than 0 is killed (srun --kill-on-bad-exit); a job that is requeued starts again from its
script, under its number. As a command it is srun.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SBATCH = '#!/bin/sh\nenv > {folder}/environment\ncp "$1" {folder}/script\necho Submitted batch job {number}\n'
SCONTROL = '#!/bin/sh\necho "$@" >> {folder}/scontrol.called\n'
SRUN = '#!/bin/sh\nFAKE_SLURM={folder} exec {python} {fake} "$@"\n'


@dataclass
class Slurm:
    """folder: for what the commands are told. number: of the one job."""

    folder: Path
    number: int

    @classmethod
    def on_path(cls, folder: Path, monkeypatch) -> "Slurm":
        """The commands come first on the path from here on."""
        with socket.socket() as free:  # of the port that Lightning derives from the number: free on this machine
            free.bind(("127.0.0.1", 0))
            monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
        slurm = cls(folder, 1000 + os.getpid() % 9000)
        for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("srun", SRUN)):
            place = folder / "bin" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text.format(folder=folder, number=slurm.number, python=sys.executable, fake=__file__))
            place.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        return slurm

    def asked(self, option: str) -> str:
        """What the script asks for by `#SBATCH --option=`."""
        found = re.search(rf"^#SBATCH (--{option}=.*)", (self.folder / "script").read_text(), re.MULTILINE)
        assert found, option
        (word,) = shlex.split(found[1], comments=True)
        return word.partition("=")[2].replace("%%", "%")

    def start(self, restarts: int = 0) -> subprocess.Popen[str]:
        """The job's script, on its first node, with its log where it asks for it."""
        variables = {
            "SLURM_JOB_ID": self.number, "SLURM_JOB_NAME": self.asked("job-name"), "SLURM_JOB_NUM_NODES": 1,
            "SLURM_NNODES": self.asked("nodes"), "SLURM_NTASKS_PER_NODE": self.asked("ntasks-per-node"),
            "SLURM_NODELIST": "127.0.0.1", "MASTER_ADDR": "127.0.0.1",
        } | ({"SLURM_RESTART_COUNT": restarts} if restarts else {})  # fmt: skip
        with Path(self.asked("output")).open("a") as log:
            return subprocess.Popen(
                ["bash", str(self.folder / "script")], env=os.environ | {k: str(v) for k, v in variables.items()},
                stdout=log, stderr=log, text=True,
            )  # fmt: skip

    def tell(self, number: int) -> None:
        """A signal to every process of the step."""
        for process in self.processes():
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue

    def processes(self) -> list[int]:
        return [process for task in self._tasks() for process in (task, *descendants(task))]

    def _tasks(self) -> list[int]:
        listed = self.folder / "tasks"
        return [int(line) for line in listed.read_text().split()] if listed.exists() else []


def descendants(process: int) -> Iterator[int]:
    for listed in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = [int(child) for child in listed.read_text().split()]
        except OSError:
            continue
        for child in children:
            yield child
            yield from descendants(child)


def srun(command: list[str]) -> int:
    """Runs the command once for each task and returns the highest exit code."""
    kills = "--kill-on-bad-exit=1" in command
    command = [word for word in command if not word.startswith("--kill-on-bad-exit")]
    nodes, each = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
    tasks = []
    for rank in range(nodes * each):
        variables = {
            "SLURM_NTASKS": nodes * each, "SLURM_PROCID": rank, "SLURM_LOCALID": rank % each,
            "SLURM_NODEID": rank // each, "SLURM_STEP_ID": 0,
        }  # fmt: skip
        tasks.append(subprocess.Popen(command, env=os.environ | {k: str(v) for k, v in variables.items()}))
    (Path(os.environ["FAKE_SLURM"]) / "tasks").write_text("\n".join(str(task.pid) for task in tasks))
    while any(task.poll() is None for task in tasks):
        if kills and any(task.returncode for task in tasks):
            for task in tasks:
                if task.poll() is None:
                    task.send_signal(signal.SIGKILL)
        time.sleep(0.02)
    return max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks)


if __name__ == "__main__":
    sys.exit(srun(sys.argv[1:]))

"""A job's script from its template, and its submission."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmfusion.cluster.options import Cluster
from mmfusion.options import shown

VALUE = re.compile(r"\{\{(\w+)\}\}")
SECRET = "MMFUSION_ARGUMENT_"  # the environment's variables for what a script must not show


@dataclass(frozen=True)
class Job:
    """command: what each rank runs, from the project's folder on. resume: its --resume, if the user gave one.

    runs: folder of the experiment's runs. cluster, nodes, gpus: what it asks for; gpus are of each node.
    """

    command: tuple[str, ...]
    resume: tuple[str, ...]
    runs: Path
    cluster: Cluster
    nodes: int
    gpus: int


def job_of(fit: Sequence[str], runs: Path, resume: str | None, cluster: Cluster, nodes: int, gpus: int) -> Job:
    """fit: options of `mmfusion fit`. Raises FileNotFoundError for a checkpoint to go on from that there is not."""
    if resume not in (None, "auto") and not Path(resume).is_file():
        raise FileNotFoundError(f"RESUME={resume} is no checkpoint; RESUME=auto finds the last one")
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--resume")
    _, rest = parser.parse_known_args(fit)
    command = (sys.executable, "-m", "mmfusion.cli", "fit", *rest)
    return Job(command, () if resume is None else (f"--resume={resume}",), runs, cluster, nodes, gpus)


def submit(job: Job, template: Path) -> None:
    """Writes the script under the experiment's runs and gives it to sbatch; prints it where there is no sbatch.

    An argument that is not for all eyes (options.shown) is a variable in the script. sbatch takes its value along from
    this environment, to the job and to each start of it. Raises ValueError with what sbatch has against the job, and
    FileNotFoundError where there is no template.
    """
    if not template.is_file():
        raise FileNotFoundError(f"{template} is missing: the job's script, beside its values in {template.stem}.yaml")
    now = datetime.now(UTC)
    place = job.runs / "submitted" / f"{now:%Y%m%d-%H%M%S-%f}.sbatch"
    command, secrets = _without_secrets(job.command)
    log = place.with_suffix(".log").resolve()
    values = asdict(job.cluster) | {
        "experiment": _for_sbatch(job.runs.name), "date": f"{now:%Y-%m-%d %H:%M} UTC", "nodes": job.nodes,
        "gpus": job.gpus, "log": _for_sbatch(str(log).replace("%", "%%")), "project": shlex.quote(str(Path.cwd())),
        "runs": shlex.quote(str(job.runs)), "resume": shlex.join(job.resume), "command": command,
    }  # fmt: skip
    text = filled(template.read_text(encoding="utf-8"), values, template)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text, encoding="utf-8")
    if shutil.which("sbatch") is None:
        wants = f", with {' and '.join(secrets)} set to what may not be written there" if secrets else ""
        print(f"{text}\nsbatch is not on this machine. On the login node: sbatch {shlex.quote(str(place))}{wants}")
        return
    done = subprocess.run(
        ["sbatch", str(place)], env=os.environ | secrets, capture_output=True, text=True, check=False
    )  # fmt: skip
    if done.returncode:
        raise ValueError(
            f"sbatch refuses {place}: {done.stderr.strip()}. Options are in {template.with_suffix('.yaml')}"
        )
    print(f"{done.stdout.strip()}: {place}\nlog: {log}\nrun: {job.runs}/job-<number>")


def filled(template: str, values: dict[str, Any], path: Path) -> str:
    """The template's lines with their values: a line whose value is None is left out, one of a list comes per item."""
    lines: list[str] = []
    for line in template.splitlines():
        names = set(VALUE.findall(line))
        if unknown := sorted(names - values.keys()):
            raise ValueError(f"{path} asks for {{{{{unknown[0]}}}}}: there are {', '.join(sorted(values))}")
        several = [name for name in names if isinstance(values[name], tuple | list)]
        items = [{name: item} for name in several for item in values[name]] if several else [{}]
        for item in items:
            of = values | item
            if all(of[name] is not None for name in names):
                lines.append(VALUE.sub(lambda match, of=of: str(of[match[1]]), line))  # type: ignore[misc]
    return "\n".join(lines) + "\n"


def _for_sbatch(word: str) -> str:
    """As sbatch takes it from its lines: there a backslash keeps any character from ending or quoting a word."""
    return re.sub(r"([\s\"'#\\])", r"\\\1", word)


def _without_secrets(arguments: Sequence[str]) -> tuple[str, dict[str, str]]:
    """As a line of shell, with variables for what is not to be shown; and their values."""
    words, secrets = [], {}
    for number, argument in enumerate(arguments):
        if shown(argument) == argument:
            words.append(shlex.quote(argument))
        else:
            secrets[f"{SECRET}{number}"] = argument
            words.append(f'"${SECRET}{number}"')
    return " ".join(words), secrets

"""What a job asks a cluster for: experiments/clusters/<name>.yaml, read strictly, under options of the command."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mmfusion.strict import StrictFile

TIME = re.compile(r"\d+|(\d+-)?\d+(:\d{1,2}){1,2}|\d+-\d+")  # sbatch's own forms; minutes alone are one
LINES = ("mounts", "modules", "setup", "sbatch")
COUNTS = ("signal_lead", "cpus_per_task")


@dataclass(frozen=True)
class Cluster:
    """Each field is a {{name}} in the job's template; None leaves its line out.

    time: [days-]hours:minutes:seconds. signal_lead: seconds before its end at which the run is told to save.
    cpus_per_task: of each GPU. mem: of each node. mounts: what the container sees beside the project.
    modules: for `module load`. setup: shell. sbatch: its options.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    signal_lead: int = 300
    cpus_per_task: int | None = None
    mem: str | None = None
    container: str | None = None
    mounts: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()


def given_on_command_line(options: Sequence[str]) -> dict[str, str]:
    """`--cluster.time=1:00:00` and the like, by field. Raises ValueError for one without a value."""
    for option in options:
        if "=" not in option:
            raise ValueError(f"{option} has no value: expected {option}=value")
    return dict(option.removeprefix("--cluster.").split("=", 1) for option in options)


def read_cluster(path: Path, given: Mapping[str, str]) -> Cluster:
    """given: values of the command line, by field. Raises ValueError for what no field or no value of it is."""
    file = StrictFile(path)
    cluster = _with(Cluster(), file.keys(file.content() or {}, Cluster, ""), file)
    said = StrictFile(Path("--cluster"))
    return _with(cluster, said.keys({name: _value(name, text) for name, text in given.items()}, Cluster, ""), said)


def _value(name: str, text: str) -> Any:
    """Of an option; the reader of YAML would take a time for a number of base 60."""
    if name not in (*LINES, *COUNTS):
        return None if text == "null" else text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _with(cluster: Cluster, values: Mapping[str, Any], file: StrictFile) -> Cluster:
    return replace(cluster, **{name: _read(name, value, file) for name, value in values.items()})


def _read(name: str, value: Any, file: StrictFile) -> Any:
    if name in LINES:
        lines = file.texts(value, name)
        if any("\n" in line for line in lines):
            raise file.error(name, f"is {value!r}", "expected one line in each item")
        return lines
    if name == "signal_lead" or (name in COUNTS and value is not None):
        return file.count(value, name)
    if name == "time" and value is not None and not TIME.fullmatch(str(value) if isinstance(value, str) else ""):
        raise file.error(name, f"is {value!r}", 'expected [days-]hours:minutes:seconds, in quotes: "24:00:00"')
    text = file.text_or_none(value, name)
    if text is not None and re.search(r"\s", text):
        raise file.error(name, f"is {text!r}", "expected a text without spaces")
    return text

"""The best trial as an experiment file, ready for `make train EXP=`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mmfusion.contract import RESUME_KEEPS_OF_TRAINER, RESUME_MAY_CHANGE
from mmfusion.options import shown
from mmfusion.retrieval.files import replaced
from mmfusion.retrieval.html.numbers import interval, number

OF_TRAINER = (*RESUME_KEEPS_OF_TRAINER, "check_val_every_n_epoch", "val_check_interval")


def write_best(path: Path, run: Path, told: Mapping[str, Any], options: Iterable[str], cell: Mapping[str, Any]) -> Path:
    """What the run of the best trial was given on top of base and encoders, with the values that it resolved them to.

    told: of `trials.definition`. options: what the trial was given, as on the command line. cell: what it reached.
    """
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    experiment = f"files.{told['experiment']}."
    names = [key.removeprefix(experiment) for key in told if key.startswith(experiment)]
    names += [option.removeprefix("--").partition("=")[0] for option in options]
    content: dict[str, Any] = {}
    for place in filter(None, dict.fromkeys(map(_place, names))):
        value, into = config, content
        for key in place[:-1]:
            value, into = value[key], into.setdefault(key, {})
        into[place[-1]] = value[place[-1]]
    header = (
        f"# Question: does it hold what trial {run.name} of a sweep found, {told['metric']} {number(cell['value'])} "
        f"{interval(cell)} under seed {told['seed']}?\n"
        f"#   make train EXP={path} ENCODERS={told['encoders']} DATA={shown(config['data']['init_args']['path'])}\n"
    )
    with replaced(path) as beside:
        beside.write_text(header + yaml.safe_dump(content, sort_keys=False, width=110), encoding="utf-8")
    return path


def _place(option: str) -> tuple[str, ...] | None:
    """Where the configuration has what an option belongs to, whole; None for what does not decide the weights."""
    section, _, rest = option.replace(".init_args.", ".", 1 if option.startswith("data.") else 0).partition(".")
    name = rest.partition(".")[0]
    if f"{section}.{name}".startswith(RESUME_MAY_CHANGE) or name in ("", "class_path"):
        return None
    if section == "model":
        return section, name
    if section == "data":
        return section, "init_args", name
    return (section, name) if section == "trainer" and name in OF_TRAINER else None

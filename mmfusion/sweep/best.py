"""The best trial as an experiment file, ready for `make train EXP=`."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmfusion.contract import RESUME_KEEPS_OF_TRAINER, RESUME_MAY_CHANGE
from mmfusion.options import shown
from mmfusion.retrieval.files import replaced
from mmfusion.retrieval.html.numbers import interval, number

OF_TRAINER = (*RESUME_KEEPS_OF_TRAINER, "check_val_every_n_epoch", "val_check_interval")


def write_best(
    path: Path, run: Path, told: Mapping[str, Any], options: Collection[str], cell: Mapping[str, Any]
) -> Path:
    """What the run of the best trial was given on top of base and encoders, with the values that it resolved them to;
    of `trial_args` what the files have.

    told: of `trials.definition`. options: what the trial was given, as on the command line. cell: what it reached.
    """
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    experiment = f"files.{told['experiment']}."
    names = [key.removeprefix(experiment) for key in told if key.startswith(experiment)]
    names += [_name(option) for option in options]
    content: dict[str, Any] = {}
    for place in filter(None, dict.fromkeys(map(_place, names))):
        value, into = config, content
        for key in place[:-1]:
            value, into = value[key], into.setdefault(key, {})
        into[place[-1]] = value[place[-1]]
    given = {_name(option) for option in options}
    for option in told["trial_args"]:
        if _name(option) not in given:
            _undo(content, _path(_name(option)), told)
    header = (
        f"# Question: does it hold what trial {run.name} of a sweep found, {told['metric']} {number(cell['value'])} "
        f"{interval(cell)} under seed {told['seed']}?\n"
        f"#   make train EXP={path} ENCODERS={told['encoders']} DATA={shown(config['data']['init_args']['path'])}\n"
    )
    with replaced(path) as beside:
        beside.write_text(header + yaml.safe_dump(content, sort_keys=False, width=110), encoding="utf-8")
    return path


def _name(option: str) -> str:
    return option.removeprefix("--").partition("=")[0]


def _path(name: str) -> list[str]:
    return name.replace("data.", "data.init_args.", name.startswith("data.") and ".init_args." not in name).split(".")


def _undo(content: dict[str, Any], path: Sequence[str], told: Mapping[str, Any]) -> None:
    """Where `content` holds the option, it gets the value of the experiment's file, else leaves it to base."""
    into: Any = content
    for key in path[:-1]:
        into = into.get(key) if isinstance(into, dict) else None
    if not isinstance(into, dict) or path[-1] not in into:
        return
    place = f"files.{told['experiment']}.{'.'.join(path)}"
    del into[path[-1]]
    for key, value in told.items():  # flat: an option that holds others is many
        if key == place:
            into[path[-1]] = value
        elif key.startswith(f"{place}."):
            inner = into.setdefault(path[-1], {})
            *above, last = key.removeprefix(f"{place}.").split(".")
            for part in above:
                inner = inner.setdefault(part, {})
            inner[last] = value


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

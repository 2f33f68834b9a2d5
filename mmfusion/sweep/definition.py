"""What a sweep is: the YAML file of its experiment and of what it varies, read strictly."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from mmfusion.strict import StrictFile
from mmfusion.study.definition import options_of, unfit
from mmfusion.sweep.space import Kind, Parameter

PRIMARY = "val/primary"


@dataclass(frozen=True)
class Sweep:
    """A sweep file. args: of all trials, and of the best of them. trial_args: of trials alone, to make them short.
    trials: how many in all, on all machines.

    metric: val/primary, or val/<view>/<label column>/<name>. seed: of the sampler and of every trial's training.
    sampler: tpe (a Parzen estimator of good and bad values, Bergstra 2011) or random. pruner: median ends a trial that
    is below the median of the others at the same step of the last stage. prefix: the stage until whose end all trials
    are the same.
    """

    name: str
    parameters: tuple[Parameter, ...]
    experiment: str
    encoders: str = "tiny"
    args: tuple[str, ...] = ()
    trial_args: tuple[str, ...] = ()
    metric: str = PRIMARY
    trials: int = 20
    seed: int = 1
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["median", "none"] = "median"
    prefix: str | None = None


@dataclass(frozen=True)
class Distribution:
    """A parameter in the file: one of the four, and perhaps a condition."""

    uniform: Any = None
    loguniform: Any = None
    int: Any = None
    choice: Any = None
    when: Any = None


KINDS = tuple(f.name for f in dataclasses.fields(Distribution) if f.name != "when")


def read_sweep(path: Path) -> Sweep:
    """Raises ValueError that names the file, the key and what was expected, with the nearest name."""
    file = StrictFile(path)
    given = file.keys(file.content(), Sweep, "", needs=("experiment", "parameters"))
    read: dict[str, Any] = {"name": path.stem}
    for key in ("experiment", "encoders", "metric"):
        if key in given:
            read[key] = file.text(given[key], key)
    for key in ("trials", "seed"):
        if key in given:
            read[key] = file.count(given[key], key)
    for key, names in (("sampler", ("tpe", "random")), ("pruner", ("median", "none"))):
        if key in given:
            file.among(given[key], names, key)
            read[key] = given[key]
    read["prefix"] = file.text_or_none(given.get("prefix"), "prefix")
    for key in ("args", "trial_args"):
        read[key] = options_of(file, given.get(key, []), key)
    if not read.get("metric", PRIMARY).startswith("val/"):
        raise file.error("metric", f"is {read['metric']}", f"a sweep chooses on val: {PRIMARY}, or val/<view>/<metric>")
    fixed = {option.partition("=")[0]: key for key in ("args", "trial_args") for option in read[key]}
    read["parameters"] = _parameters(file, given["parameters"], fixed)
    return Sweep(**read)


def _parameters(file: StrictFile, given: Any, fixed: Mapping[str, str]) -> tuple[Parameter, ...]:
    if not isinstance(given, dict) or not given:
        raise file.error("parameters", f"is {given!r}", "expected dotted options, each with its distribution")
    found: dict[str, Parameter] = {}
    for option, told in given.items():
        where = f"parameters.{option}"
        if why := unfit(f"--{option}=x"):
            raise file.error(where, "is given", why)
        if f"--{option}" in fixed:
            raise file.error(where, f"is in {fixed[f'--{option}']} too", "an option is varied or fixed")
        found[str(option)] = _parameter(file, str(option), told, where, found)
    return tuple(found.values())


def _parameter(file: StrictFile, option: str, given: Any, where: str, before: dict[str, Parameter]) -> Parameter:
    given = file.keys(given, Distribution, where)
    kinds = [kind for kind in KINDS if kind in given]
    if len(kinds) != 1:
        raise file.error(where, f"has {' and '.join(kinds) or 'no distribution'}", f"one of {', '.join(KINDS)}")
    when = _when(file, given.get("when") or {}, f"{where}.when", before)
    kind, value = cast(Kind, kinds[0]), given[kinds[0]]
    if kind == "choice":
        return Parameter(option, kind, choices=_choices(file, value, f"{where}.choice"), when=when)
    low, high = _bounds(file, value, kind, f"{where}.{kind}")
    return Parameter(option, kind, low, high, when=when)


def _choices(file: StrictFile, given: Any, where: str) -> dict[str, str]:
    """{name: text}, of a mapping {name: value} or of a list of values that are their own names."""
    if not isinstance(given, list | dict) or not given:
        raise file.error(where, f"is {given!r}", "expected a list of values, or {name: value, ...}")
    named = {_text(value): value for value in given} if isinstance(given, list) else given
    return {str(name): _text(value) for name, value in named.items()}


def _text(value: Any) -> str:
    """As on the command line: null, true and [1, 2] as YAML has them."""
    return value if isinstance(value, str) else json.dumps(value, default=str)  # a date, say


def _bounds(file: StrictFile, given: Any, kind: Kind, where: str) -> tuple[float, float]:
    whole = kind == "int"
    expected = f"expected [low, high], two {'whole ' if whole else ''}numbers, the first one smaller"
    try:
        low, high = (int(str(number)) if whole else float(number) for number in given)  # YAML has 1e-3 as a text
    except (TypeError, ValueError):
        raise file.error(where, f"is {given!r}", expected) from None
    if not -math.inf < low < high < math.inf or (kind == "loguniform" and low <= 0):
        raise file.error(where, f"is {given!r}", expected + (" and above 0" if kind == "loguniform" else ""))
    return low, high


def _when(file: StrictFile, given: Any, where: str, before: dict[str, Parameter]) -> dict[str, tuple[str, ...]]:
    if not isinstance(given, dict):
        raise file.error(where, f"is {given!r}", "expected {option: [names of its choices]}")
    free = [name for name, one in before.items() if one.kind == "choice" and not one.when]
    when = {}
    for option, names in given.items():
        file.among(option, free, where, f"names {option!r}, which is no earlier choice without a condition of its own")
        when[str(option)] = file.texts(names, f"{where}.{option}")
        for name in when[str(option)]:
            file.among(name, before[str(option)].choices, f"{where}.{option}")
    return when

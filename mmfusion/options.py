"""Options around the parser: rates that join a stage's table, messages that name what is near."""

import contextlib
import dataclasses
import difflib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

import mmfusion.fusion
import mmfusion.losses
from mmfusion.losses import Loss
from mmfusion.stages import Group, LossWeights, Stage, Until
from mmfusion.terms import Losses

Tables = dict[tuple[str, str], dict[str, Any]]  # by stage and name

ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^\s?#]*)(\S*)")
PIPE = re.compile(r"(?<!\w)pipe:.*", re.DOTALL)
NO_CLASS = re.compile(r"(?:dot import path string: |has no attribute '|class, but |Import path )(?:\w+\.)*(\w+)")
OF_STAGE = {  # its groups of options, and what is expected of each
    "until": "where it ends, such as {fraction: 0.5}",
    "losses": "weights by term, such as {query_text: 1.0}",
}
OF_TABLE = re.compile(r"--model\.stages\.([^.=]+)\.(rates|losses\.more)\.([^.=]+)=(.*)")


def shown(argument: str) -> str:
    """An argument without users, passwords, query strings, fragments and shell commands: what is written has readers.

    Of the address of the data, RetrievalData.address knows more exactly what may be shown.
    """
    return ADDRESS.sub(_without_secrets, PIPE.sub("pipe:...", argument))


def _without_secrets(address: re.Match[str]) -> str:
    scheme, place, rest = address.groups()
    # With an @ in the rest, the ? or # may have been one of the password.
    return f"{scheme}***" if "@" in rest else scheme + place.rpartition("@")[2]


def all_shown(value: Any) -> Any:
    """A value of the options, its texts as `shown`."""
    if isinstance(value, dict):
        return {key: all_shown(item) for key, item in value.items()}
    if isinstance(value, list):
        return [all_shown(item) for item in value]
    return shown(value) if isinstance(value, str) else value


def with_merged_tables(argv: list[str]) -> list[str]:
    """`--model.stages.S.rates.G=R` as the whole table of stage S: the parser would drop the stage's other rates.

    The same for `--model.stages.S.losses.more.TERM=W`.
    """
    tables: Tables = {}
    joined = [
        f"--config={arg}" if before == "--config" else arg for before, arg in zip(["", *argv], argv, strict=False)
    ]
    rest = []
    for arg in (arg for arg in joined if arg != "--config"):
        if arg.startswith("--config="):
            tables = _tables_after(tables, Path(arg.removeprefix("--config=")))
        if match := OF_TABLE.fullmatch(arg):
            stage, table, name, value = match.groups()
            tables.setdefault((stage, table), {})[name] = _number(value)
            rest.append(f"--model.stages.{stage}.{table}={json.dumps(tables[stage, table])}")
        else:
            rest.append(arg)
    return rest


def check_groups(config: Namespace, parser: LightningArgumentParser) -> None:
    """Raises ValueError where one value stands for a group of options: the parser takes it, if it is in a file."""
    groups = parser.groups or {}
    found = [
        (key, config.get(key), "options by name")
        for key, group in groups.items()
        if config.get(key) is not None or getattr(group, "group_class", None)  # Lightning has groups of no options
    ]
    for name, stage in config.model.stages.items():
        found += [(f"model.stages.{name}.{part}", stage[part], expected) for part, expected in OF_STAGE.items()]
    for key, value, expected in found:
        if not isinstance(value, Namespace):
            raise ValueError(f"{key} is {value!r}; expected {expected}")


def _tables_after(tables: Tables, file: Path) -> Tables:
    """Each stage's tables once a file is laid over: its stages replace those before, keeping what they do not name.

    What is no mapping is passed over: the parser refuses it.
    """
    config = None
    with contextlib.suppress(yaml.YAMLError, OSError):
        config = yaml.safe_load(file.read_text())
    stages = _mapping(_mapping(_mapping(config).get("model")).get("stages"))
    if not stages:
        return tables
    found: Tables = {}
    for name, stage in stages.items():
        given = {
            "rates": _mapping(stage).get("rates"),
            "losses.more": _mapping(_mapping(stage).get("losses")).get("more"),
        }
        for table, values in given.items():
            found[name, table] = dict(_mapping(tables.get((name, table)) if values is None else values))
    return found


def _mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: str) -> float | str:
    with contextlib.suppress(ValueError):
        return float(value)
    return value


def explained(message: str, parser: LightningArgumentParser) -> str:
    """The parser's message, with the names that it should have shown."""
    if re.search(r"Parser key .model\.fusion", message):
        heads = [name for name in mmfusion.fusion.__all__ if name != "FusionHead"]
        message += f"\nmodel.fusion takes a class name: {', '.join(heads)}"
    if re.search(r"Parser key .model\.losses", message) and (classes := NO_CLASS.findall(message)):
        message += f"\nmodel.losses takes a class name for each term: {', '.join(_losses())}"
        message += "".join(_nearest(name, _losses()) for name in dict.fromkeys(classes) if name not in _losses())
    options = [option for action in parser._actions for option in action.option_strings]
    for unknown in re.findall(r"--[\w.]+", message) if "unrecognized" in message else []:
        message += _nearest(unknown, options)
    known = [f.name for part in (Stage, Until, LossWeights, Group, Losses) for f in dataclasses.fields(part)]
    for name in re.findall(r"Problem with given class_path '([\w.]+)'", message):
        known += _parameters_of(name)
    for unknown in re.findall(r"option '([\w.]+)'", message, re.IGNORECASE):
        message += _nearest(unknown, known)
    return message


def _losses() -> list[str]:
    classes = {name: getattr(mmfusion.losses, name) for name in mmfusion.losses.__all__}
    concrete = {name: part for name, part in classes.items() if inspect.isclass(part) and not inspect.isabstract(part)}
    return [name for name, part in concrete.items() if issubclass(part, Loss)]


def _parameters_of(class_path: str) -> list[str]:
    """Of a class that the parser has imported; none where there is no such class."""
    module, _, name = class_path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return list(inspect.signature(found).parameters) if inspect.isclass(found) else []


def _nearest(unknown: str, known: list[str]) -> str:
    near = difflib.get_close_matches(unknown, list(dict.fromkeys(known)), 3)
    return f"\n{unknown}: the nearest names are {', '.join(near)}" if near else ""

"""Options around the parser: rates that join a stage's table, messages that name what is near, what a resume keeps."""

import contextlib
import dataclasses
import difflib
import json
import re
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser

import mmfusion.fusion
from mmfusion.retrieval.side import flattened
from mmfusion.stages import Group, LossWeights, Stage, Until

# What may differ when a run is resumed: where things are, how fast they are made, what is only reported.
RESUME_MAY_CHANGE = (
    "data.path", "data.workers", "data.eval_batch_size", "data.test_splits", "data.photo_cache_mib",
    "data.max_broken", "data.verify", "data.cache", "data.allow_pipe",
    "model.memo_gib", "model.evaluation", "model.compile", "model.zero_shot",
)  # fmt: skip
# The trainer's options that decide the weights; its others may change.
RESUME_KEEPS_OF_TRAINER = (
    "max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision",
    "limit_train_batches",
)  # fmt: skip

ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^\s?#]*)(\S*)")
PIPE = re.compile(r"(?<!\w)pipe:.*", re.DOTALL)
RATE = re.compile(r"--model\.stages\.([^.=]+)\.rates\.([^.=]+)=(.*)")


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


def with_merged_rates(argv: list[str]) -> list[str]:
    """`--model.stages.S.rates.G=R` as the whole table of stage S: the parser would drop the stage's other rates."""
    tables: dict[str, dict[str, Any]] = {}
    joined = [
        f"--config={arg}" if before == "--config" else arg for before, arg in zip(["", *argv], argv, strict=False)
    ]
    rest = []
    for arg in (arg for arg in joined if arg != "--config"):
        if arg.startswith("--config="):
            tables = _rates_after(tables, Path(arg.removeprefix("--config=")))
        if match := RATE.fullmatch(arg):
            stage, group, rate = match.groups()
            tables.setdefault(stage, {})[group] = _number(rate)
            rest.append(f"--model.stages.{stage}.rates={json.dumps(tables[stage])}")
        else:
            rest.append(arg)
    return rest


def _rates_after(tables: dict[str, dict[str, Any]], file: Path) -> dict[str, dict[str, Any]]:
    """Each stage's rates once a file is laid over: its stages replace those before, keeping what they do not name."""
    config = yaml.safe_load(file.read_text()) if file.is_file() else None
    stages = ((config or {}).get("model") or {}).get("stages")
    if not stages:
        return tables
    return {name: dict(stage.get("rates", tables.get(name, {})) or {}) for name, stage in stages.items()}


def _number(rate: str) -> float | str:
    with contextlib.suppress(ValueError):
        return float(rate)
    return rate


def explained(message: str, parser: LightningArgumentParser) -> str:
    """The parser's message, with the names that it should have shown."""
    if re.search(r"Parser key .model\.fusion", message):
        heads = [name for name in mmfusion.fusion.__all__ if name != "FusionHead"]
        message += f"\nmodel.fusion takes a class name: {', '.join(heads)}"
    options = [option for action in parser._actions for option in action.option_strings]
    of_stages = [f.name for part in (Stage, Until, LossWeights, Group) for f in dataclasses.fields(part)]
    for unknown in re.findall(r"--[\w.]+", message) if "unrecognized" in message else []:
        message += _nearest(unknown, options)
    for unknown in re.findall(r"option '([\w.]+)'", message):
        message += _nearest(unknown, of_stages)
    return message


def _nearest(unknown: str, known: list[str]) -> str:
    near = difflib.get_close_matches(unknown, known, 3)
    return f"\n{unknown}: the nearest names are {', '.join(near)}" if near else ""


def contract(config: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run must share with the run it goes on from, as dotted keys."""
    bound = {key: config[key] for key in ("seed_everything", "model", "data")}
    bound["trainer"] = {key: config["trainer"].get(key) for key in RESUME_KEEPS_OF_TRAINER}
    flat = {key.replace(".init_args.", "."): value for key, value in flattened(bound).items()}
    return {key: value for key, value in flat.items() if not key.startswith(RESUME_MAY_CHANGE)}

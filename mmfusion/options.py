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

Tables = dict[tuple[str, str], dict[str, Any]]  # by stage and name

ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^\s?#]*)(\S*)")
PIPE = re.compile(r"(?<!\w)pipe:.*", re.DOTALL)
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


def _tables_after(tables: Tables, file: Path) -> Tables:
    """Each stage's tables once a file is laid over: its stages replace those before, keeping what they do not name."""
    config = yaml.safe_load(file.read_text()) if file.is_file() else None
    stages = ((config or {}).get("model") or {}).get("stages")
    if not stages:
        return tables
    found: Tables = {}
    for name, stage in stages.items():
        given = {"rates": stage.get("rates"), "losses.more": (stage.get("losses") or {}).get("more")}
        for table, values in given.items():
            found[name, table] = dict((tables.get((name, table)) if values is None else values) or {})
    return found


def _number(value: str) -> float | str:
    with contextlib.suppress(ValueError):
        return float(value)
    return value


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


def refuse_another_run(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raises ValueError where the contract of a run differs from that of the checkpoint it would go on from."""
    differs = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    if differs:
        lines = [f"  {key}: the checkpoint has {theirs.get(key)}, this run {ours.get(key)}" for key in differs[:8]]
        more = [f"  and {len(differs) - 8} more"] if len(differs) > 8 else []
        raise ValueError(
            "the checkpoint cannot be resumed as another run; make these equal or start afresh:\n"
            + "\n".join(lines + more)
        )

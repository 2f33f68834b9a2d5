"""A run from its configuration to its results: LightningCLI with the project's callbacks, loggers and folders."""

import contextlib
import dataclasses
import difflib
import json
import re
import shutil
import warnings
from argparse import ArgumentError
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

import mmfusion.encoders
import mmfusion.fusion
import mmfusion.losses
from mmfusion.checkpoints import BestCheckpoint, LastCheckpoint, best_of
from mmfusion.environment import MadeWith, commit
from mmfusion.examples import ExampleTable
from mmfusion.loggers import Wandb, make_loggers
from mmfusion.module import RetrievalModule
from mmfusion.progress import RunProgress
from mmfusion.retrieval.compare import flattened
from mmfusion.retrieval.report import print_table, read_results, write_results
from mmfusion.stages import Group, LossWeights, Stage, StageSwitch, Until

# What may differ when a run is resumed: where things are, how fast they are made, what is only reported.
RESUME_MAY_CHANGE = (
    "data.path", "data.workers", "data.eval_batch_size", "data.test_splits", "data.photo_cache_mib",
    "model.memo_gib", "model.depth", "model.compile", "model.zero_shot",
)  # fmt: skip
# The trainer's options that decide the weights; its others may change.
RESUME_KEEPS_OF_TRAINER = (
    "max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision",
    "limit_train_batches",
)  # fmt: skip
# Options of Lightning's trainer that a run of this project decides itself.
DECIDED = {
    "logger": (False, "loggers are chosen by --wandb.mode; metrics.csv is always written"),
    "enable_checkpointing": (None, "the best checkpoint is what a run is evaluated with"),
    "fast_dev_run": (False, "try --trainer.max_steps=10 instead"),
}


ZERO_SHOT = "zero_shot.json"


class FusionCLI(LightningCLI):
    """LightningCLI without a sub-command: parses, builds trainer, model and datamodule; `run` is the run's folder."""

    run_folder: Path

    @classmethod
    def parse(cls, argv: list[str], run: Path | None) -> "FusionCLI":
        """`run` None: nothing is logged or saved (evaluation). Raises ArgumentError for a mistake in the options."""
        torch.set_float32_matmul_precision("high")
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        return type("FusionCLI", (cls,), {"run_folder": run})(
            model_class=RetrievalModule,
            args=with_merged_rates(argv),
            run=False,
            save_config_callback=None,
            trainer_defaults={"logger": False, "num_sanity_val_steps": 0, "use_distributed_sampler": False},
            parser_kwargs={"exit_on_error": False},
            seed_everything_default=1,
            load_from_checkpoint_support=False,
            subclass_mode_data=True,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Raises ValueError with the parser's message and the nearest valid names."""
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise ValueError(explained(str(error).removeprefix("argument None: "), parser)) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--experiment", type=str, default="custom", help="name of the run's folder under runs/")
        parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs")
        parser.add_argument("--resume", type=str | None, default=None, help="checkpoint to go on from")
        parser.add_argument(
            "--checkpoint_steps", type=int | None, default=None, help="steps between checkpoints; one an epoch without"
        )
        parser.add_argument("--wandb", type=Wandb, default=Wandb(), help="Weights & Biases")
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
        parser.link_arguments("model.modalities", "data.init_args.modalities")

    def resolved(self) -> str:
        """The options as config.yaml holds them; it runs again as it is, from the start."""
        config = self.config.clone()
        config.resume = None
        return self.parser.dump(config, skip_unset=False)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        for name, (kept, why) in DECIDED.items():
            if self.config.trainer[name] not in (kept, None):
                raise ValueError(f"trainer.{name} is not an option of a run: {why}")
        callbacks: list[Callback] = [StageSwitch()]
        if self.config.trainer.enable_progress_bar is not False:
            callbacks.append(RunProgress())
        if self.run_folder is not None:
            folder = self.run_folder / "checkpoints"
            callbacks += [BestCheckpoint(folder), LastCheckpoint(folder, self.config.checkpoint_steps)]
            callbacks += [MadeWith(self.run_folder, self.resolved()), ExampleTable()]
            kwargs["logger"] = make_loggers(self.run_folder, self.config_init.wandb)
        self.trainer_defaults["callbacks"] = callbacks
        return super().instantiate_trainer(**kwargs)


RATE = re.compile(r"--model\.stages\.([^.=]+)\.rates\.([^.=]+)=(.*)")


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


def fit_and_evaluate(cli: FusionCLI) -> None:
    """Trains (or goes on from `--resume`), evaluates with the best checkpoint, writes and prints the results.

    A run that fails before its first step leaves no folder behind.
    """
    run, model = cli.run_folder, cli.model
    resume = cli.config.resume
    model.contract = contract(yaml.safe_load(cli.resolved()))
    made_by = commit()  # the code that trains, not what the checkout holds hours later
    with _nothing_half_written(run, cli.trainer):
        if model.zero_shot and resume is None:
            _zero_shot(cli)
        cli.trainer.fit(model, cli.datamodule, ckpt_path=resume, weights_only=True)
    checkpoint = best_of(run)
    cli.trainer.test(model, cli.datamodule, ckpt_path=str(checkpoint), weights_only=True, verbose=False)
    before = read_results(run / ZERO_SHOT) if model.zero_shot and (run / ZERO_SHOT).is_file() else {}
    results = {split: before.get(split, {}) | views for split, views in _metrics(model).items()}
    _finish(run, cli, results | {"run": _about(cli, checkpoint, made_by)})


@rank_zero_only
def _finish(run: Path, cli: FusionCLI, results: dict[str, Any]) -> None:
    write_results(run / "results.json", results)
    for split in (name for name in results if name != "run"):
        print_table(results, split)
    final = {
        f"final/{split}/{view}/{name}": cell["value"]
        for split, views in results.items()
        if split != "run"
        for view, metrics in views.items()
        for name, cell in metrics.items()
    }
    for logger in cli.trainer.loggers:
        logger.log_metrics(final, cli.trainer.global_step)
        logger.finalize("success")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
    print(f"run: {run}")


def _metrics(model: RetrievalModule) -> dict[str, dict[str, Any]]:
    return {split: {view: result.metrics for view, result in views.items()} for split, views in model.results.items()}


def _about(cli: FusionCLI, checkpoint: Path, made_by: str | None) -> dict[str, Any]:
    return {
        "seed": cli.config.seed_everything,
        "commit": made_by,
        "manifest": cli.datamodule.manifest_hash,
        "data": str(cli.datamodule.path),
        "checkpoint": str(checkpoint),
        "gains": cli.datamodule.gains,
        "primary": cli.model.primary,
        "left_out": {
            f"{split}/{name}": count
            for split, views in cli.model.results.items()
            for name, count in views[cli.model.primary].left_out().items()
            if count
        },
    }


def _zero_shot(cli: FusionCLI) -> None:
    """Every view before any training: what the encoders reach as they come. Kept for the report of a resumed run."""
    cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    if cli.trainer.is_global_zero:
        named = {
            split: {f"zero_shot_{view}": metrics for view, metrics in views.items()}
            for split, views in _metrics(cli.model).items()
        }
        write_results(cli.run_folder / ZERO_SHOT, named)


@contextlib.contextmanager
def _nothing_half_written(run: Path, trainer: Trainer) -> Iterator[None]:
    existed = run.exists()
    try:
        yield
    except BaseException:
        if not existed and trainer.global_step == 0 and trainer.is_global_zero:
            shutil.rmtree(run, ignore_errors=True)
            with contextlib.suppress(OSError):  # its empty parents; others' runs keep them
                run.parent.rmdir()
                run.parents[1].rmdir()
        raise


def evaluate_run(run: Path, data: str | None, split: str, out: Path | None, rest: list[str]) -> None:
    """Evaluates the best checkpoint of `run` on `split` of its own shards or of `data`."""
    config = run / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(f"RUN={run} is no run: it holds no config.yaml. Runs are folders runs/<exp>/<version>")
    checkpoint = best_of(run)
    overrides = [f"--data.init_args.test_splits=[{split}]"] + ([f"--data.init_args.path={data}"] if data else [])
    cli = FusionCLI.parse([f"--config={config}", *overrides, *rest], None)
    cli.trainer.test(cli.model, cli.datamodule, ckpt_path=str(checkpoint), weights_only=True, verbose=False)
    folder = out or run / "eval" / f"{cli.datamodule.manifest_hash[:12]}-{split}"
    if cli.trainer.is_global_zero:
        results = {**_metrics(cli.model), "run": _about(cli, checkpoint, commit())}
        write_results(folder / "results.json", results)
        print_table(results, split)
        print(f"results: {folder / 'results.json'}")

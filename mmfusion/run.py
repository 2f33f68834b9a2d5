"""A run from its configuration to its results: LightningCLI with the project's callbacks, loggers and folders."""

import contextlib
import dataclasses
import difflib
import shutil
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger

from mmfusion.batch import RetrievalData
from mmfusion.branch import Branch
from mmfusion.checkpoints import BestCheckpoint, LastCheckpoint, StageCheckpoints, best_of
from mmfusion.contract import contract
from mmfusion.dashboard import final_values, log_evaluation
from mmfusion.environment import MadeWith, commit
from mmfusion.guards.disk import RoomyFiles
from mmfusion.guards.options import Guards
from mmfusion.loggers import Wandb, log_of_evaluation, make_loggers
from mmfusion.module import RetrievalModule
from mmfusion.options import all_shown, check_groups, explained, shown, with_merged_tables
from mmfusion.outcome import leave, metrics_of, write_trec
from mmfusion.progress import RunProgress
from mmfusion.retrieval.report import read_results, write_results
from mmfusion.retrieval.side import home
from mmfusion.save_and_leave import SaveAndLeave
from mmfusion.speed.callback import Speed
from mmfusion.stages import StageSwitch
from mmfusion.state import KeepState
from mmfusion.strategy import check_restarts, check_strategy

# Options of Lightning's trainer that a run of this project decides itself.
DECIDED = {
    "logger": (False, "loggers are chosen by --wandb.mode; metrics.csv is always written"),
    "enable_checkpointing": (None, "the best checkpoint is what a run is evaluated with"),
    "fast_dev_run": (False, "try --trainer.max_steps=10 instead"),
    "profiler": (None, "metrics.csv and speed.json tell where time goes, and make profile EXP=... writes a trace"),
    "limit_test_batches": (None, "a test searches the whole corpus; a part of it has other numbers"),
    "limit_val_batches": (None, "name a smaller corpus by --data.val_corpus=judged+10000 instead"),
}

ZERO_SHOT = "zero_shot.json"
Kind = TypeVar("Kind", bound=Callback)


class FusionCLI(LightningCLI):
    """LightningCLI without a sub-command: parses, builds trainer, model and datamodule; `run` is the run's folder."""

    run_folder: Path

    @classmethod
    def parse(
        cls, argv: list[str], run: Path | None, model_class: type[RetrievalModule] = RetrievalModule
    ) -> "FusionCLI":
        """`run` None: nothing is logged or saved (evaluation). Raises ArgumentError for a mistake in the options."""
        torch.set_float32_matmul_precision("high")
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        return type("FusionCLI", (cls,), {"run_folder": run})(
            model_class=model_class,
            args=with_merged_tables(argv),
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
        parser.add_argument("--resume", type=str | None, default=None, help="checkpoint to go on from, or auto")
        parser.add_argument(
            "--checkpoint_steps", type=int | None, default=None, help="steps between checkpoints; one an epoch without"
        )
        parser.add_argument(
            "--checkpoint_stages", type=list[str], default=[], help="stages to keep a checkpoint of the end of"
        )
        parser.add_argument(
            "--branch", type=str | None, default=None, help="checkpoint at the end of a stage for a new run to begin at"
        )
        parser.add_argument("--wandb", type=Wandb, default=Wandb(), help="Weights & Biases")
        parser.add_argument("--guards", type=Guards, default=Guards(), help="what stops a run that goes wrong")
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
        parser.link_arguments("model.modalities", "data.init_args.modalities")

    def resolved(self) -> str:
        """The options as config.yaml and loggers hold them: it runs again as it is, from the start, where the
        environment has what opens an address; of a command (pipe:) it keeps the first word alone."""
        config = self.config.clone()
        config.resume = config.branch = None
        for key, value in list(config.items()):
            config[key] = all_shown(value)
        config.data.init_args.path = self.datamodule.address
        return self.parser.dump(config, skip_unset=False)

    def before_instantiate_classes(self) -> None:
        """Raises ValueError or FileNotFoundError where no such stage, or no such checkpoint, is there, or where one
        value stands for a group of options (see check_groups)."""
        check_groups(self.config, self.parser)
        if self.run_folder is None:
            return
        stages, branch = list(self.config.model.stages), self.config.branch
        for name in self.config.checkpoint_stages:
            if name not in stages:
                near = difflib.get_close_matches(name, stages, 1)
                raise ValueError(
                    f"--checkpoint_stages names {name!r}; model.stages has {', '.join(stages)}"
                    + (f". Did you mean {near[0]}?" if near else "")
                )
        if self.begins_from and not Path(branch).is_file():
            raise FileNotFoundError(
                f"--branch={branch} is no checkpoint: those are runs/<exp>/<version>/checkpoints/stage-<name>.ckpt of "
                "a run with --checkpoint_stages"
            )

    @property
    def tags(self) -> list[str]:
        """By what a run is found in W&B: its experiment, its encoders' overlay and its primary view.

        Runs of studies and sweeps are named by their arm, or as trials: the experiment is the file's.
        """
        files = [Path(str(file)) for file in self.config.get("config") or []]
        ours = [file.stem for file in files if file.parent.name in ("experiments", "encoders") and file.stem != "base"]
        return list(dict.fromkeys([self.config.experiment, *ours, self.config_init.model.primary]))

    @property
    def begins_from(self) -> str | None:
        """The checkpoint that a new run branches off from; a run that is resumed is past that."""
        return self.config.branch if self.config.resume is None else None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        for name, (kept, why) in DECIDED.items():
            if self.config.trainer[name] not in (kept, None):
                raise ValueError(f"trainer.{name} is not an option of a run: {why}")
        if str(self.config.trainer.precision).endswith("16-true"):
            raise ValueError(
                f"trainer.precision={self.config.trainer.precision} would hold the weights in 16 bits, in which small "
                "steps are lost (a temperature's first of all): bf16-mixed computes in 16 bits and holds them in 32"
            )
        check_strategy(self.config.trainer.strategy)
        check_restarts()
        callbacks: list[Callback] = [StageSwitch()]
        if self.run_folder is not None:
            callbacks.append(Speed(self.run_folder))
        if self.config.trainer.enable_progress_bar is not False:
            callbacks.append(RunProgress())
        if self.run_folder is not None:
            folder = self.run_folder / "checkpoints"
            callbacks += [Branch(self.begins_from)] if self.begins_from else []
            callbacks += [BestCheckpoint(folder), StageCheckpoints(folder, self.config.checkpoint_stages)]
            last = LastCheckpoint(folder, self.config.checkpoint_steps)
            callbacks = [SaveAndLeave(last), *callbacks, last, KeepState(self.run_folder)]
            callbacks += [MadeWith(self.run_folder, self.resolved())]
            callbacks += self.config_init.guards.callbacks(self.run_folder)
            kwargs["logger"] = make_loggers(self.run_folder, self.config_init.wandb, self.tags)
        self.trainer_defaults["callbacks"] = callbacks
        trainer = super().instantiate_trainer(**kwargs)
        trainer.strategy.checkpoint_io = RoomyFiles()
        self.config_init.guards.set_up(trainer.strategy)
        return trainer


def fit_and_evaluate(cli: FusionCLI) -> None:
    """Trains (on from `--resume` or `--branch`, where given), evaluates the best checkpoint, writes and prints results.

    A run that fails before its first step leaves no folder behind.
    """
    run, model = cli.run_folder, cli.model
    resume = cli.config.resume
    model.contract = contract(yaml.safe_load(cli.resolved()))
    made_by = commit()  # the code that trains, not what the checkout holds hours later
    with _nothing_half_written(run, cli.trainer):
        if model.zero_shot and resume is None:
            _zero_shot(cli)
        cli.trainer.fit(model, cli.datamodule, ckpt_path=resume or cli.begins_from, weights_only=True)
    checkpoint = best_of(run)
    with _callback(cli, KeepState).told():
        cli.trainer.test(model, cli.datamodule, ckpt_path=str(checkpoint), weights_only=True, verbose=False)
        if cli.trainer.is_global_zero:
            before = read_results(run / ZERO_SHOT) if model.zero_shot and (run / ZERO_SHOT).is_file() else {}
            results = leave(run, model, cli.datamodule, _about(cli, run, checkpoint, made_by), before)
            _finish(run, cli, results)


def _finish(run: Path, cli: FusionCLI, results: dict[str, Any]) -> None:
    best = _callback(cli, BestCheckpoint).best_model_score
    for logger in cli.trainer.loggers:
        if isinstance(logger, WandbLogger):
            log_evaluation(logger.experiment, run, None if best is None else float(best))
            logger.finalize("success")
            logger.experiment.finish()
        else:
            logger.log_metrics(final_values(results), cli.trainer.global_step)
            logger.finalize("success")
    _callback(cli, KeepState).end("done")
    print(f"run: {run}")


def _callback(cli: FusionCLI, kind: type[Kind]) -> Kind:
    return next(part for part in cli.trainer.callbacks if isinstance(part, kind))  # type: ignore[attr-defined]


def _about(
    cli: FusionCLI, run: Path, checkpoint: Path, made_by: str | None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """The key `run` of results.json. overrides: options that an evaluation was given besides the run's own."""
    address = cli.datamodule.address
    return {
        "folder": str(run.resolve()),
        "overrides": [shown(option) for option in overrides],
        "seed": cli.config.seed_everything,
        "commit": made_by,
        "manifest": cli.datamodule.manifest_hash,
        "data": address if ":" in address else str(Path(address).resolve()),
        "checkpoint": str(checkpoint),
        "gains": cli.datamodule.gains,
    } | ({} if cli.model.branched_from is None else {"branched_from": shown(cli.model.branched_from)})


def _zero_shot(cli: FusionCLI) -> None:
    """Every view before any training: what the encoders reach as they come. Kept for the report of a resumed run."""
    options = cli.model.evaluation  # baselines and hidden photos come once, with the trained run
    cli.model.evaluation = dataclasses.replace(options, baselines=False, drop_photos=[])
    cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    cli.model.evaluation = options
    if cli.trainer.is_global_zero:
        named = {
            split: {f"zero_shot_{view}": metrics for view, metrics in views.items()}
            for split, views in metrics_of(cli.model).items()
        }
        write_results(cli.run_folder / ZERO_SHOT, named)


@contextlib.contextmanager
def _nothing_half_written(run: Path, trainer: Trainer) -> Iterator[None]:
    existed = run.exists()
    branches = [part for part in trainer.callbacks if isinstance(part, Branch)]  # type: ignore[attr-defined]
    try:
        yield
    except BaseException:
        began = max((branch.step for branch in branches), default=0)
        if not existed and trainer.global_step <= began and trainer.is_global_zero:
            shutil.rmtree(run, ignore_errors=True)
            with contextlib.suppress(OSError):  # its empty parents; others' runs keep them
                run.parent.rmdir()
                run.parents[1].rmdir()
        raise


def evaluate_run(
    run: Path, data: str | None, split: str, out: Path | None, rest: list[str], trec: Path | None = None
) -> None:
    """Evaluates the best checkpoint of `run` on `split` of its own shards or of `data`.

    trec: folder for run and qrels files that trec_eval reads.
    """
    for name, folder in (("OUT", out), ("--trec", trec)):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ValueError(f"{name}={folder} is a file; expected a folder, new or old")
    config, checkpoint = config_of(run), best_of(run)
    overrides = [f"--data.init_args.test_splits=[{split}]"] + ([f"--data.init_args.path={data}"] if data else [])
    cli = FusionCLI.parse([f"--config={config}", *overrides, *rest], None)
    cli.model.hybrid_weight, cli.model.score_fusion_weight = _chosen_weights(run)
    cli.trainer.test(cli.model, cli.datamodule, ckpt_path=str(checkpoint), weights_only=True, verbose=False)
    if cli.trainer.is_global_zero:
        folder = out or run / "eval" / f"{cli.datamodule.manifest_hash[:12]}-{split}"
        leave(folder, cli.model, cli.datamodule, _about(cli, run, checkpoint, commit(), rest))
        options = yaml.safe_load(cli.resolved())
        if (log := log_of_evaluation(folder, run, cli.config_init.wandb, cli.tags, options)) is not None:
            log_evaluation(log, folder)
            log.finish()
        if trec is not None:
            write_trec(trec, cli.model.results, cli.datamodule)
        print(f"results: {folder / 'results.json'}")


def config_of(run: Path) -> Path:
    """The run's resolved options. Raises FileNotFoundError for a folder that is no run."""
    config = run / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(f"RUN={run} is no run: it holds no config.yaml. Runs are folders runs/<exp>/<version>")
    return config


def _chosen_weights(run: Path) -> tuple[float | None, float | None]:
    """The weights of BM25 in hybrid_sum and of the text in score_fusion that the run chose on its val queries."""
    results = run / "results.json"
    chosen = read_results(results)["run"] if results.is_file() else {}
    return chosen.get("hybrid_weight"), chosen.get("score_fusion_weight")


def data_of(run: Path) -> RetrievalData:
    """The data that a run, or an evaluation under its eval/, was evaluated on. Raises ValueError where it changed."""
    about = read_results(run / "results.json")["run"]
    own = home(run)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    config = yaml.safe_load(config_of(own).read_text(encoding="utf-8"))["data"]
    config["init_args"] |= {"path": about["data"], "test_splits": None}
    data = parser.instantiate_classes(parser.parse_object({"data": config})).data
    data.setup("test")
    if data.manifest_hash != about["manifest"]:
        raise ValueError(f"{about['data']} has changed since {run} was evaluated on it: `make eval RUN={own}` first")
    return data

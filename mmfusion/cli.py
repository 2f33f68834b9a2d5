"""The `mmfusion` command. Each verb is one thing a user does; `fit` is LightningCLI and takes every --dotted.option."""

import argparse
import dataclasses
import difflib
import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfusion.guards.error import GuardError
from mmfusion.preemption import NOTICE, Preempted

if TYPE_CHECKING:
    from mmfusion.batch import RetrievalData

EXPERIMENTS = Path("experiments")
DEMO = Path("data/demo")
ROOT = Path(__file__).parents[1]
FULL = (errno.ENOSPC, errno.EDQUOT)
DISK = (*FULL, errno.EACCES, errno.EPERM, errno.EROFS)  # what a user mends, not we


def main() -> None:
    """Runs a verb. A user's mistake is one message and exit code 2; MMFUSION_TRACEBACK=1 shows where it was found."""
    verbs: dict[str, Callable[[list[str]], None]] = {
        "train": train, "fit": fit, "data": data, "eval": evaluate, "compare": compare, "mine": mine,
        "study": study, "sweep": sweep, "profile": profile, "runs": runs, "sync": sync, "clean-runs": clean_runs,
    }  # fmt: skip
    verb, rest = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if verb not in verbs:
        print(f"error: mmfusion takes one of {', '.join(verbs)}; received {verb or 'nothing'}", file=sys.stderr)
        sys.exit(2)
    try:
        verbs[verb](rest)
    except Preempted as preempted:
        sys.exit(preempted.code)  # W&B reads the code from this call
    except KeyboardInterrupt:
        if verb not in ("study", "sweep", "sync", "clean-runs") or os.environ.get("MMFUSION_TRACEBACK"):
            raise
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except Exception as raised:
        error = _of_constructor(raised)
        if os.environ.get("MMFUSION_TRACEBACK") or not _is_for_users(error):
            raise
        said = str(error).removeprefix("argument None: ")
        if isinstance(error, OSError) and error.errno in FULL:
            said += ". Make room there; a run that was training goes on with RESUME=auto"
        rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID", "0")
        if rank == "0":
            print(f"error: {said}", file=sys.stderr)
        elif getattr(error, "one_rank", False):  # the others do not know
            print(f"error: rank {os.environ.get('RANK', rank)}: {said}", file=sys.stderr)
        sys.exit(2)


def _of_constructor(error: Exception) -> Exception:
    """What a constructor raised that the parser of options called; else the error itself.

    The parser tells such an error with all values that it was given.
    """
    while isinstance(error.__cause__, Exception) and "jsonargparse" in _raised_in(error).parts:
        error = error.__cause__
    return error


def _raised_in(error: Exception) -> Path:
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename)


def _is_for_users(error: Exception) -> bool:
    """Whether the message was written for users: by our own checks, the parser of options or Lightning's checks."""
    if isinstance(error, argparse.ArgumentError | GuardError) or type(error).__name__ == "MisconfigurationException":
        return True
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    raised_in = _raised_in(error)
    own = [ROOT / "mmfusion", ROOT / "datamodules"]
    return isinstance(error, ValueError | FileNotFoundError | FileExistsError) and any(
        folder in raised_in.parents for folder in own
    )


def _parser(verb: str, **arguments: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"mmfusion {verb}", allow_abbrev=False)
    for name, text in arguments.items():
        parser.add_argument(f"--{name}", required=text.endswith("!"), help=text.rstrip("!"))
    return parser


def train(argv: list[str]) -> None:
    """An experiment by name: base, encoders and experiment files one over the other, then `fit`, here or in a job."""
    parser = _parser("train", cluster="name in experiments/clusters", nodes="machines", gpus="of each machine")
    options, rest = parser.parse_known_args(argv)
    asked = [option for option in rest if option.startswith("--cluster.")]
    rest = [option for option in rest if option not in asked]
    if not options.cluster and (asked or options.nodes):
        raise ValueError(f"{asked[0] if asked else 'NODES='} is for a job: CLUSTER=slurm NODES=2 GPUS=8 (see README)")
    nodes, gpus = (_count(name.upper(), vars(options)[name] or "1") for name in ("nodes", "gpus"))
    if options.cluster or options.gpus:
        rest += [f"--trainer.devices={gpus}"]
    if options.cluster:
        rest += [f"--trainer.num_nodes={nodes}"]
    arguments, shards = fit_arguments(rest)
    if Path(shards) == DEMO and os.environ.get("LOCAL_RANK", "0") == "0":
        importer("demo")(DEMO)
    if not options.cluster:
        fit(arguments)
        return
    file = _named(EXPERIMENTS / "clusters", options.cluster, "CLUSTER")
    from mmfusion.cluster.options import given_on_command_line, read_cluster  # noqa: PLC0415
    from mmfusion.cluster.script import job_of, submit  # noqa: PLC0415
    from mmfusion.study.preflight import parse  # noqa: PLC0415

    cluster = read_cluster(file, given_on_command_line(asked))
    parse(rest)  # what training would refuse is known before the job waits for its turn
    submit(job_of(arguments, *_asked_run(arguments), cluster, nodes, gpus), file.with_suffix(".sbatch"))


def fit_arguments(argv: Sequence[str]) -> tuple[list[str], str]:
    """What `train` gives to `fit`, and the data's address. Raises FileNotFoundError for a name that there is not."""
    parser = _parser("train", exp="experiment file", encoders="encoders overlay", data="folder of shards")
    parser.set_defaults(exp="", encoders="tiny", data=str(DEMO))
    options, rest = parser.parse_known_args(argv)
    experiment = _named(EXPERIMENTS, options.exp, "EXP", leave_out=("base",))
    overlay = _named(EXPERIMENTS / "encoders", options.encoders, "ENCODERS")
    configs = [f"--config={path}" for path in (EXPERIMENTS / "base.yaml", overlay, experiment)]
    return [*configs, f"--experiment={experiment.stem}", f"--data.path={options.data}", *rest], options.data


def _named(folder: Path, name: str, what: str, leave_out: Sequence[str] = ()) -> Path:
    """The YAML file called `name` in `folder`, or of that path. Raises FileNotFoundError listing those there are."""
    if name.endswith(".yaml") and Path(name).is_file():
        return Path(name)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} here: run this in the project's own folder")
    names = sorted(path.stem for path in folder.glob("*.yaml") if path.stem not in leave_out)
    if name in names:
        return folder / f"{name}.yaml"
    near = difflib.get_close_matches(name, names, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise FileNotFoundError(f"{what}={name or '(nothing)'} is not in {folder}: there are {', '.join(names)}.{hint}")


def fit(argv: list[str]) -> None:
    """Trains, evaluates val and test with the best checkpoint, writes results.json, prints the table and the run."""
    run, options = _run_folder(argv)
    with NOTICE.caught(run):
        from mmfusion.run import FusionCLI, fit_and_evaluate  # noqa: PLC0415

        fit_and_evaluate(FusionCLI.parse([*argv, *options], run))


def _run_folder(argv: Sequence[str]) -> tuple[Path, list[str]]:
    """runs/<experiment>/<version>: the folder of the checkpoint that a run resumes, or a new one.

    And what --resume=auto comes to, as options. All ranks have to agree before they can talk: those that Lightning
    starts inherit the name, those of a cluster's launcher share its job. Raises ValueError for a folder that holds
    another run already.
    """
    experiment, resume = _asked_run(argv)
    if resume == "auto":
        from mmfusion.resume import start_of  # noqa: PLC0415

        start = start_of(experiment, lambda: _new_folder(experiment))
        return start.folder, [f"--resume={start.checkpoint or 'null'}"]
    if resume is not None:
        checkpoint = Path(resume)
        if not checkpoint.is_file() or checkpoint.parent.name != "checkpoints":
            raise FileNotFoundError(
                f"--resume={checkpoint} is no checkpoint of a run: those are runs/<exp>/<version>/checkpoints/*.ckpt, "
                "and auto is the last of an unfinished one"
            )
        return checkpoint.parents[1], []
    return _new_folder(experiment), []


def _asked_run(argv: Sequence[str]) -> tuple[Path, str | None]:
    """The folder of the experiment's runs, and --resume: as options, or in files of options."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[], type=Path)
    for name in ("experiment", "runs", "resume"):
        parser.add_argument(f"--{name}")
    given, _ = parser.parse_known_args(argv)
    files = [_content(path) for path in given.config if path.is_file()]
    set_in_files = {key: value for file in files for key, value in file.items() if key in vars(given)}
    root = Path(given.runs or set_in_files.get("runs") or "runs")
    resume = given.resume or set_in_files.get("resume")
    experiment = root / (given.experiment or set_in_files.get("experiment") or "custom")
    return experiment, None if resume == "null" else resume


def _new_folder(experiment: Path) -> Path:
    """Raises ValueError for a folder that holds a run."""
    folder = experiment / _version()
    if (folder / "config.yaml").exists():
        raise ValueError(f"{folder} holds a run: go on with --resume={folder}/checkpoints/last.ckpt, or move it away")
    return folder


def _content(path: Path) -> dict[str, Any]:
    """The options in a file of --config. Raises ValueError when it holds none."""
    from mmfusion.strict import StrictFile  # noqa: PLC0415

    content = StrictFile(path).content() or {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {content!r:.60}; expected options by name, such as experiment: mine")
    return content


def _version() -> str:
    """A name for a new run that all its ranks find by themselves."""
    if inherited := os.environ.get("MMFUSION_VERSION"):
        return inherited
    launcher = os.environ.get("TORCHELASTIC_RUN_ID")
    if launcher not in (None, "none"):
        return f"job-{launcher}"
    if launcher == "none":
        if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
            raise ValueError("several nodes must agree on the run's name: start torchrun with --rdzv-id=NAME")
        parent = os.getppid()  # torchrun, whose ranks need one name
        return time.strftime(f"%Y%m%d-%H%M%S-{parent}", time.gmtime(Path(f"/proc/{parent}").stat().st_ctime))
    if os.environ.get("SLURM_PROCID") and os.environ.get("SLURM_NTASKS", "1") != "1":
        return f"job-{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_STEP_ID', '0')}"
    return os.environ.setdefault("MMFUSION_VERSION", datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f"))


def profile(argv: list[str]) -> None:
    """Traces some steps of an experiment's stages, as files that open in a browser; prints the longest operators."""
    parser = _parser(
        "profile", steps="traced steps of each stage; 20 without", stages="as in align,fuse; the first without"
    )
    parser.set_defaults(steps="20", stages="")
    options, rest = parser.parse_known_args(argv)
    arguments, shards = fit_arguments(rest)
    steps, stages = _count("STEPS", options.steps), [name for name in options.stages.split(",") if name]
    if Path(shards) == DEMO and os.environ.get("LOCAL_RANK", "0") == "0":
        importer("demo")(DEMO)
    from mmfusion.speed.profile import profile_run  # noqa: PLC0415

    profile_run(arguments, steps, stages, lambda: _run_folder(arguments)[0])


def data(argv: list[str]) -> None:
    """A catalogue into shards, by the importer of its data set."""
    from jsonargparse import ArgumentParser  # noqa: PLC0415

    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # --help is about the data set's options
    chooser.add_argument("--from", default="")
    options, rest = chooser.parse_known_args(argv)
    made = importer(getattr(options, "from"))
    parser = ArgumentParser(prog="mmfusion data", exit_on_error=False, allow_abbrev=False)
    if isinstance(made, type):
        parser.add_class_arguments(made)
    else:
        parser.add_function_arguments(made)
    names = [action.dest.upper() for action in parser._actions if action.required]
    given = [arg for arg in rest if arg not in ("--src=", "--out=")]
    missing = [name for name in names if not any(arg.partition("=")[0] == f"--{name.lower()}" for arg in given)]
    if missing and not {"-h", "--help"} & set(given):
        name, usage = getattr(options, "from"), getattr(made, "usage", "SRC=folder OUT=folder")
        raise ValueError(f"make data FROM={name} needs {' and '.join(missing)}: make data FROM={name} {usage}")
    switches = {f"--{action.dest}" for action in parser._actions if getattr(action, "_typehint", None) is bool}
    on = [arg in switches and after.startswith("--") for arg, after in zip(given, [*given[1:], "--"], strict=True)]
    given = [f"{arg}=true" if alone else arg for arg, alone in zip(given, on, strict=True)]
    chosen = vars(parser.instantiate(parser.parse_args(given)))
    try:
        made(**chosen).run() if isinstance(made, type) else made(**chosen)
    except KeyboardInterrupt:  # what was kept has been said
        sys.exit(130)
    except OSError as error:
        if error.errno not in DISK:
            raise
        place, problem = error.filename or chosen.get("out"), os.strerror(error.errno)
        raise ValueError(f"{place}: {problem}. Once that is mended, the same command goes on") from error


def importer(name: str) -> Callable[..., Any]:
    """A data set's importer, by the entry point that a package registers under `mmfusion.importers`.

    It is a function that imports, or a class whose parameters are the options and whose method `run` imports.
    """
    points = {point.name: point for point in metadata.entry_points(group="mmfusion.importers")}
    if name not in points:
        raise ValueError(f"FROM={name or '(nothing)'} is no importer: there are {', '.join(sorted(points))}")
    importer: Callable[..., Any] = points[name].load()
    return importer


def evaluate(argv: list[str]) -> None:
    """Evaluates a run again, on its own shards or others; writes results under eval/ of the run, or under --out."""
    parser = _parser(
        "eval",
        run="run folder!",
        data="folder of shards",
        split="val or test",
        out="folder for results",
        trec="folder for files that trec_eval reads",
    )
    options, rest = parser.parse_known_args(argv)
    from mmfusion.run import evaluate_run  # noqa: PLC0415

    out = Path(options.out) if options.out else None
    trec = Path(options.trec) if options.trec else None
    evaluate_run(Path(options.run), options.data, options.split or "test", out, rest, trec)


def mine(argv: list[str]) -> None:
    """Hard negatives of the train queries, from a run's own ranking, as a table beside the shards it was trained on."""
    parser = _parser(
        "mine",
        run="run folder!",
        data="folder of shards: the run's own data, elsewhere",
        name="of the table; mined-1 for the first iteration, mined-2 for a run trained with that, ... without",
        k="most negatives of a query; 20 without",
        ranks="first:last, among products that are neither positive nor ignored; 10:100 without",
        margin="how far below the query's best positive they must score, in cosine, or none; 0.05 without",
        view="that ranks; the run's primary one without",
    )
    parser.add_argument("--replace", action="store_true", help="a table of that name, if there is one")
    options, rest = parser.parse_known_args(argv)
    from mmfusion.mining import Rules  # noqa: PLC0415

    rules = Rules.of(options.k, options.ranks, options.margin)
    from mmfusion.mine import mine_run  # noqa: PLC0415

    mine_run(Path(options.run), options.data, rules, options.name, options.view, rest, options.replace)


def compare(argv: list[str]) -> None:
    """Runs side by side, tested in pairs, with what differs in their configurations; on the terminal and as a page."""
    parser = argparse.ArgumentParser(prog="mmfusion compare")
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--split", help="split to compare; test where all have it")
    parser.add_argument("--out", type=Path, help="page to write; comparison.html in the first run's folder without")
    options = parser.parse_args(argv)
    if not options.runs:
        raise ValueError('make compare needs RUNS="runs/a runs/b": folders that hold a results.json, or TREC run files')
    from mmfusion.retrieval.compare import print_comparison  # noqa: PLC0415
    from mmfusion.retrieval.comparison import compare_runs  # noqa: PLC0415
    from mmfusion.retrieval.files import file_path  # noqa: PLC0415
    from mmfusion.retrieval.html import write_comparison  # noqa: PLC0415

    if options.out:
        file_path(options.out)
    comparison = compare_runs(options.runs, options.split, _data_of)
    print_comparison(comparison)
    beside = next(run for run in options.runs if run.is_dir())
    print(f"page: {write_comparison(comparison, options.out or beside / 'comparison.html')}")


def study(argv: list[str]) -> None:
    """Trains the arms of a study that are not done yet and writes their report; exit code 1 where one failed."""
    parser = _parser(
        "study",
        study="file in experiments/studies, or the path of one; demo without",
        data="folder of shards; the demo's without, and those of the study's runs for a report",
        seeds="how many, from 1 on; or which, as in 1,4,7; the study's own number without",
        jobs="runs at a time",
        encoders="encoders overlay; the study's own without",
    )
    parser.add_argument("--report-only", action="store_true", help="of what there is, without training")
    parser.set_defaults(study="demo", jobs="1")
    options, rest = parser.parse_known_args(argv)
    from mmfusion.study.definition import read_study  # noqa: PLC0415
    from mmfusion.study.diary import recorded  # noqa: PLC0415
    from mmfusion.study.jobs import Plan  # noqa: PLC0415
    from mmfusion.study.runner import run_and_report  # noqa: PLC0415

    definition = read_study(_named(EXPERIMENTS / "studies", options.study, "STUDY"))
    definition = dataclasses.replace(definition, **_encoders(options.encoders))
    folder, side_by_side = Path("runs/studies") / definition.name, _count("JOBS", options.jobs)
    before = recorded(folder) if options.report_only else {}
    shards = options.data or before.get("data") or str(DEMO)
    seeds = _seeds(options.seeds or str(definition.seeds))
    plan = Plan(
        definition, folder, shards, seeds, tuple(rest), recorded=None if options.data else before.get("manifest")
    )
    if Path(shards) == DEMO and not options.report_only:
        importer("demo")(DEMO)
    sys.exit(run_and_report(plan, side_by_side, options.report_only))


def sweep(argv: list[str]) -> None:
    """Trains the trials of a sweep that are not over yet, reports them, and trains the best again under other seeds."""
    parser = _parser(
        "sweep",
        sweep="file in experiments/sweeps, or the path of one; fusion without",
        data="folder of shards; the demo's without",
        trials="how many in all; the sweep's own number without",
        jobs="trials at a time",
        encoders="encoders overlay; the sweep's own without",
        seeds="for the best and the experiment as it is, after the trials; 0 for none",
    )
    parser.add_argument("--report-only", action="store_true", help="of the trials that are over, without training")
    parser.add_argument("--wandb", action="store_true", help="write the sweep as a configuration of W&B's sweeps")
    parser.set_defaults(sweep="fusion", jobs="1", seeds="3", data=str(DEMO))
    options, rest = parser.parse_known_args(argv)
    from mmfusion.sweep.definition import read_sweep  # noqa: PLC0415
    from mmfusion.sweep.runner import report_alone, run_sweep, translate  # noqa: PLC0415
    from mmfusion.sweep.trials import plan_of  # noqa: PLC0415

    definition = read_sweep(_named(EXPERIMENTS / "sweeps", options.sweep, "SWEEP"))
    definition = dataclasses.replace(definition, **_encoders(options.encoders))
    if options.trials:
        definition = dataclasses.replace(definition, trials=_count("TRIALS", options.trials))
    side_by_side, seeds = _count("JOBS", options.jobs), 0 if options.seeds == "0" else _count("SEEDS", options.seeds)
    plan = plan_of(definition, Path("runs/sweeps") / definition.name, options.data, tuple(rest))
    if options.report_only:
        report_alone(definition, plan)
        return
    if Path(options.data) == DEMO:
        importer("demo")(DEMO)
    if options.wandb:
        translate(definition, plan)
        return
    sys.exit(run_sweep(definition, plan, side_by_side, seeds))


def runs(argv: list[str]) -> None:
    """Which runs there are and how far they are, as a table."""
    parser = _parser("runs", runs="folder of them; runs without", experiment="the only one to list")
    parser.add_argument("--all", action="store_true", help="those of studies and sweeps too, one by one")
    parser.add_argument("--json", action="store_true", help="all that is known of all of them, for programs")
    parser.set_defaults(runs="runs")
    options = parser.parse_args(argv)
    from mmfusion.runs.listing import list_runs  # noqa: PLC0415

    list_runs(Path(options.runs), options.experiment, options.all, options.json)


def sync(argv: list[str]) -> None:
    """Sends to W&B what runs logged offline; exit code 1 where some of it could not be."""
    parser = _parser("sync", runs="folder of all runs; runs without", run="the only one to send")
    parser.set_defaults(runs="runs")
    options = parser.parse_args(argv)
    from mmfusion.runs.sync import sync as send  # noqa: PLC0415

    send(Path(options.runs), Path(options.run) if options.run else None)


def clean_runs(argv: list[str]) -> None:
    """Removes old runs, after a question."""
    parser = _parser(
        "clean-runs",
        keep="how many runs of each experiment stay",
        runs="folder of all runs; runs without",
        experiment="the only one whose runs may go",
    )
    parser.set_defaults(runs="runs", keep="")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--checkpoints-only", action="store_true", help="numbers and pages stay")
    parser.add_argument("--unfinished", action="store_true", help="runs too that RESUME=auto could go on with")
    options = parser.parse_args(argv)
    keep = _count("KEEP", options.keep)
    from mmfusion.runs import clean  # noqa: PLC0415

    order = clean.Order(keep, options.experiment, options.checkpoints_only, options.unfinished)
    clean.clean_runs(Path(options.runs), order, options.yes)


def _encoders(given: str | None) -> dict[str, Any]:
    """What replaces a study's or sweep's own overlay. Raises FileNotFoundError where there is no such file."""
    if not given:
        return {}
    _named(EXPERIMENTS / "encoders", given, "ENCODERS")
    return {"encoders": given}


def _seeds(given: str) -> tuple[int, ...]:
    if "," not in given:
        return tuple(range(1, _count("SEEDS", given) + 1))
    seeds = tuple(_count("SEEDS", part) for part in given.split(",") if part.strip())
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"SEEDS={given} names a seed twice")
    return seeds


def _count(name: str, given: str) -> int:
    if not given.strip().isdecimal() or int(given) < 1:
        raise ValueError(f"{name}={given}: expected a whole number from 1 on")
    return int(given)


def _data_of(run: Path) -> "RetrievalData":
    from mmfusion.run import data_of  # noqa: PLC0415  (it takes seconds, and only run files of others need it)

    return data_of(run)


if __name__ == "__main__":
    main()

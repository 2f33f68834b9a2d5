"""A trace of a few training steps, to open in a browser, and the operators that take longest."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from lightning import LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from mmfusion.retrieval.files import replaced
from mmfusion.run import FusionCLI
from mmfusion.speed.phases import Phased
from mmfusion.speed.timeline import PARTS, Timeline
from mmfusion.stages import StagedModule, Until

UNTRACED = 2  # steps of a stage before those that are traced: one that makes ready, one that warms the tracer up
OPERATORS = 10


class Operator(NamedTuple):
    """calls and ms: in a step; share: of the time of all operators."""

    name: str
    calls: float
    ms: float
    share: float


class ProfileCLI(FusionCLI):
    """The options of a run, which is cut short: nothing is logged, validated or saved."""

    asked: ClassVar[list[str]]  # stages, in any order; none: the first
    steps: ClassVar[int]  # traced steps of each

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Raises ValueError where there is no such stage, or where the run would begin from a checkpoint."""
        for name in ("resume", "branch"):
            if self.config[name] is not None:
                raise ValueError(f"--{name}={self.config[name]}: a profile begins where no run has been; leave it out")
        total = len(self.stages) * (self.steps + UNTRACED)
        return super().instantiate_trainer(max_steps=total, max_epochs=-1, limit_val_batches=0, **kwargs)

    @property
    def stages(self) -> list[str]:
        """Those that were asked, in the run's order."""
        names = list(self.config.model.stages)
        for name in self.asked:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ValueError(f"STAGES names {name!r}; model.stages has {', '.join(names)}.{hint}")
        return [name for name in names if name in self.asked] or names[:1]


class Trace(Phased):
    """Traces each stage's steps into trace-<stage>.json.gz of `folder`, on rank 0."""

    def __init__(self, folder: Path, steps: int) -> None:
        super().__init__()
        self.folder, self.steps = folder, steps
        self.operators: dict[str, list[Operator]] = {}  # by stage
        self.profiler: profile | None = None

    def new_timeline(self, device: torch.device) -> Timeline:
        return Ranges(device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.before = trainer.global_step
        stage = cast(StagedModule, pl_module).stage_name
        if self.profiler is None and stage not in self.operators and trainer.is_global_zero:
            on_cuda = trainer.strategy.root_device.type == "cuda"
            self.profiler = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])],
                schedule=schedule(wait=UNTRACED - 1, warmup=1, active=self.steps, repeat=1),
                on_trace_ready=lambda done: self._keep(done, stage),
            )
            self.profiler.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.timeline.cut()
        if self.profiler is not None and trainer.global_step > self.before:  # other batches accumulate
            self.profiler.step()
            if cast(StagedModule, pl_module).stage_name in self.operators:
                self.profiler.stop()
                self.profiler = None

    def _keep(self, done: profile, stage: str) -> None:
        with replaced(self.file(stage)) as beside:
            packed = beside.with_name(f"{beside.name}.json.gz")  # by this name it is packed
            done.export_chrome_trace(str(packed))
            packed.replace(beside)
        self.operators[stage] = longest(done.key_averages(), self.steps)

    def file(self, stage: str) -> Path:
        return self.folder / f"trace-{stage}.json.gz"


class Ranges(Timeline):
    """A timeline whose parts are ranges of the trace as well."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._ranges: list[record_function] = []

    def enter(self, part: str) -> None:
        super().enter(part)
        self._ranges.append(record_function(self.part))
        self._ranges[-1].__enter__()

    def leave(self) -> None:
        self._ranges.pop().__exit__(None, None, None)
        super().leave()


def longest(averages: Iterable[Any], steps: int) -> list[Operator]:
    """The operators that take the device longest by themselves, or the processor where no device worked.

    averages: of torch.profiler over so many steps; with a device they hold its kernels too, which count as operators'.
    """
    events = [event for event in averages if event.device_type == DeviceType.CPU]
    events = [event for event in events if event.key not in PARTS and not event.key.startswith("ProfilerStep")]
    on_device = any(event.self_device_time_total for event in events)
    times = [event.self_device_time_total if on_device else event.self_cpu_time_total for event in events]
    whole = sum(times) or 1.0
    found = [
        Operator(event.key, event.count / steps, time / steps / 1000, time / whole)
        for event, time in zip(events, times, strict=True)
    ]
    return sorted(found, key=lambda operator: -operator.ms)[:OPERATORS]


def profile_run(argv: list[str], steps: int, stages: list[str], folder: Callable[[], Path]) -> None:
    """Traces `steps` steps of each of `stages` (none: the first) from untrained weights, and prints what took longest.

    folder: gives the run's folder, once the options are known to be right; traces go to its profile/.
    """
    asked: Any = type("ProfileCLI", (ProfileCLI,), {"steps": steps, "asked": stages})
    cli = asked.parse(argv, None)
    each = steps + UNTRACED
    cli.model.stages = {
        name: dataclasses.replace(cli.model.stages[name], until=Until(steps=each * (place + 1)))
        for place, name in enumerate(cli.stages)
    }
    trace = Trace(folder() / "profile", steps)
    cli.trainer.callbacks.insert(1, trace)
    cli.trainer.fit(cli.model, cli.datamodule)
    if cli.trainer.is_global_zero:
        for stage, operators in trace.operators.items():
            Console().print(operator_table(stage, operators))
            print(f"trace: {trace.file(stage)}, for https://ui.perfetto.dev or chrome://tracing")


def operator_table(stage: str, operators: Sequence[Operator]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(f"stage {stage}: longest operators", overflow="fold")
    for title in ("calls per step", "ms per step", "share"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in operators:
        table.add_row(Text(one.name), f"{one.calls:.1f}", f"{one.ms:.2f}", f"{100 * one.share:.0f} %")
    return table

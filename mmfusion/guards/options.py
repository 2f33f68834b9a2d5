"""Which guards watch a run, and how closely."""

from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy

from mmfusion.guards.disk import RoomFirst
from mmfusion.guards.divergence import RanksAgree
from mmfusion.guards.hang import HangWatch, wait_longer_than
from mmfusion.guards.slowdown import SlowdownWarning


@dataclass
class Guards:
    """What stops or warns of a run while it trains; null leaves a guard out. The loss and the disk are always watched.

    Args:
        ranks_every: optimizer steps between proofs that all ranks hold the same weights
        slower: how many times longer than before batches take, at the median, when a slowdown is told
        hang_minutes: minutes without a finished batch, or part of other work, after which the run ends with the stacks
            of all ranks
    """

    ranks_every: int | None = 200
    slower: float | None = 3.0
    hang_minutes: float | None = 30.0

    def __post_init__(self) -> None:
        for name, least, expected in (
            ("ranks_every", 1, "optimizer steps from 1 on"),
            ("slower", 1.1, "a factor from 1.1 on"),
            ("hang_minutes", 0.01, "minutes from 0.01 on"),
        ):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"guards.{name} is {value}; expected {expected}, or null to leave the guard out")

    def callbacks(self, run: Path) -> list[Callback]:
        """run: the run's folder."""
        return [
            RoomFirst(run / "checkpoints"),
            *([] if self.ranks_every is None else [RanksAgree(self.ranks_every)]),
            *([] if self.slower is None else [SlowdownWarning(self.slower)]),
            *([] if self.hang_minutes is None else [HangWatch(run / "stacks", self.hang_minutes)]),
        ]

    def set_up(self, strategy: Strategy) -> None:
        """Called before the ranks' process group is made."""
        if self.hang_minutes is not None:
            wait_longer_than(self.hang_minutes, strategy)

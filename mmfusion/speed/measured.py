"""What steps of one stage took on all ranks: sums to add up, and what they come to."""

import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import distributed as dist

from mmfusion.ranks import has_ranks
from mmfusion.speed.timeline import PARTS, Mark, split

GIB = 2**30


@dataclass
class Measured:
    """Sums over steps.

    Args:
        steps: how many optimizer steps
        samples: of all ranks
        seconds: of each part of a step, the mean over ranks
        flops: floating point operations of a rank, the mean; 0 where they were not counted
        gpu_gib: GiB of the device that tensors took at most, on the rank where they took most; 0 without CUDA
        host_gib: GiB of the training process, without its loader's workers, on the rank where it took most
    """

    steps: int = 0
    samples: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    flops: float = 0.0
    gpu_gib: float = 0.0
    host_gib: float = 0.0

    def add(self, other: "Measured") -> None:
        self.steps += other.steps
        self.samples += other.samples
        self.seconds = {part: self.seconds[part] + other.seconds[part] for part in PARTS}
        self.flops += other.flops
        self.gpu_gib, self.host_gib = max(self.gpu_gib, other.gpu_gib), max(self.host_gib, other.host_gib)

    def values(self, peak: float | None) -> dict[str, float]:
        """What is told: samples a second, milliseconds of a step and its parts, GiB; mfu where the `peak` is known."""
        total = sum(self.seconds.values())
        told = {"samples_per_s": self.samples / total, "step_ms": 1000 * total / self.steps}
        told |= {f"{part}_ms": 1000 * seconds / self.steps for part, seconds in self.seconds.items()}
        told |= {"gpu_gib": self.gpu_gib} if self.gpu_gib else {}
        told |= {"host_gib": self.host_gib}
        return told | ({"mfu": self.flops / (total * peak)} if peak and self.flops else {})


def measured(steps: Sequence[tuple[list[Mark], int]], flops: float, device: torch.device) -> Measured:
    """Of this rank's steps (their marks and samples) and those of all others; called on every rank at once.

    flops: of one step.
    """
    seconds = [sum(part) for part in zip(*(split(marks).values() for marks, _ in steps), strict=True)]
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    samples = sum(count for _, count in steps)
    own = torch.tensor(
        [*seconds, samples, flops * len(steps), gpu / GIB, host_bytes() / GIB], dtype=torch.float64, device=device
    )
    ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())] if has_ranks() else [own]
    if has_ranks():
        dist.all_gather(ranks, own)
    every = torch.stack(ranks)
    mean, most = every.mean(0).tolist(), every.amax(0).tolist()
    return Measured(
        len(steps), round(every[:, len(PARTS)].sum().item()), dict(zip(PARTS, mean[: len(PARTS)], strict=True)),
        flops=mean[-3], gpu_gib=most[-2], host_gib=most[-1],
    )  # fmt: skip


def host_bytes() -> int:
    """What this process holds in memory now; the most it ever held where the system does not tell."""
    pages = Path("/proc/self/statm")
    if pages.is_file():
        return int(pages.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

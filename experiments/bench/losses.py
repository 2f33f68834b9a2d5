"""Contrastive losses, forward and backward, against open_clip's and sentence-transformers', on the same vectors.

    make bench-loss [ARGS="--rows 4096 8192 --dim 256"]

Each contestant runs in a process of its own: the median of REPEATS runs counts (of fewer where they are long), and its
memory is what it adds to the process at its peak. Ours go by the judgments of all pairs: beside its own positive a row
has on average one other positive and two ignored pairs. open_clip's know the diagonal alone; sentence-transformers'
cached loss takes both directions, as ours. A loss that would need more memory than the machine has free is left out,
and the table says so. Then a whole step of an image tower, plain and in micro-batches (GradCache). The clock is never a
test: a row over its limit says so and the exit code stays 0.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from measured import GIB, REPEATS, Runs, console, said, verdict
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from mmfusion.cached import in_micro_batches
from mmfusion.losses import GradedInfoNCE, InfoNCE, Pairs, Sigmoid

THREADS, SCALE = 2, 20.0
ENOUGH = 10  # seconds of a contestant, after which it has no further run
CHUNK = 512  # rows of the matrix, ours and sentence-transformers'
PHOTO, PHOTOS, MICRO = (80, 60), 1024, 128
# What at most: times of open_clip's plain loss of the same rows, GiB at the most rows, times of a plain step.
PLAIN, CHUNKED, CHUNKED_GIB, CACHED = 1.1, 1.35, 1.5, 1.35
MATRICES = {"open_clip": 4.1, "ours": 1.2, "ours, graded": 1.2, "open_clip sigmoid": 5.1}  # held, as measured


class Data:
    """Unit vectors of both sides that take gradients, the scale, and which pairs are worth what."""

    def __init__(self, rows: int, dim: int) -> None:
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(rows, dim, generator=generator) for _ in range(2)]
        self.query, self.product = (normalize(side, dim=1).requires_grad_() for side in drawn)
        self.scale = torch.tensor(SCALE, requires_grad=True)
        self.valid = torch.ones(rows, dtype=torch.bool)
        own = torch.arange(rows)[:, None].repeat(1, 2)
        others = torch.randint(rows, (3 * rows, 2), generator=generator)
        pairs = torch.unique(torch.cat([own, others]), dim=0)
        place = torch.rand(len(pairs), generator=generator)
        gain = torch.where((pairs[:, 0] == pairs[:, 1]) | (place < 1 / 3), 1.0, 0.1)
        self.pairs = Pairs(pairs, gain, gain >= 1)


Contestant = Callable[[Data], Callable[[], object]]


def open_clip(data: Data) -> Callable[[], object]:
    from open_clip.loss import ClipLoss  # noqa: PLC0415 (in the process that needs it)

    loss = ClipLoss()
    return lambda: loss(data.query, data.product, data.scale).backward()


def open_clip_sigmoid(data: Data) -> Callable[[], object]:
    from open_clip.loss import SigLipLoss  # noqa: PLC0415 (as above)

    loss, bias = SigLipLoss(), torch.tensor(-10.0, requires_grad=True)
    return lambda: loss(data.query, data.product, data.scale, bias).backward()


def sentence_transformers(data: Data) -> Callable[[], object]:
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss as Cached  # noqa: PLC0415 (as above)

    both = ("query_to_doc", "doc_to_query")
    loss = Cached(
        torch.nn.Sequential(torch.nn.Identity()),
        SCALE,
        mini_batch_size=CHUNK,
        directions=both,
        partition_mode="per_direction",
    )
    return lambda: loss.calculate_loss([[data.query], [data.product]], with_backward=True)


def ours(kind: type[InfoNCE | GradedInfoNCE | Sigmoid], chunk: int | None) -> Contestant:
    def contestant(data: Data) -> Callable[[], object]:
        loss = kind(temperature=1 / SCALE, chunk=chunk)
        return lambda: loss(data.query, data.product, data.pairs, data.valid, data.valid).backward()

    return contestant


CONTESTANTS: dict[str, Contestant] = {
    "open_clip": open_clip,
    "ours": ours(InfoNCE, None),
    "sentence-transformers, cached": sentence_transformers,
    "ours, chunked": ours(InfoNCE, CHUNK),
    "ours, graded": ours(GradedInfoNCE, None),
    "ours, graded, chunked": ours(GradedInfoNCE, CHUNK),
    "open_clip sigmoid": open_clip_sigmoid,
    "ours, sigmoid": ours(Sigmoid, None),
}


def measure(name: str, rows: int, dim: int) -> Runs:
    """In a process that does nothing else."""
    torch.set_num_threads(THREADS)
    data = Data(rows, dim)
    CONTESTANTS[name](Data(64, dim))()  # imports and first calls
    runs, work = Runs(), CONTESTANTS[name](data)
    while len(runs.seconds) < REPEATS and sum(runs.seconds) < ENOUGH:
        data.query.grad = data.product.grad = data.scale.grad = None
        runs.run(work)
    return runs


def measure_step(micro_batch: int | None) -> Runs:
    """One optimizer step's forward and backward of a small image tower at PHOTOS photos."""
    from mmfusion.encoders import TimmEncoder  # noqa: PLC0415 (as above)

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    tower = TimmEncoder("mobilenetv3_small_100", pretrained=False, image_size=PHOTO, augment="light").train()
    projection, loss = torch.nn.Linear(tower.dim, 256), InfoNCE()
    data = Data(PHOTOS, 256)
    photo = torch.randint(0, 256, (PHOTOS, 3, *PHOTO), dtype=torch.uint8)
    draw, query = torch.arange(PHOTOS), data.query.detach()

    def vectors(part: slice) -> Tensor:
        return normalize(projection(tower(photo[part], draw[part]).pooled), dim=1)

    def step() -> None:
        rows = in_micro_batches(vectors, PHOTOS, micro_batch, [tower, projection])
        loss(query, rows, data.pairs, data.valid, data.valid).backward()
        tower.zero_grad(set_to_none=True)

    runs = Runs()
    step()
    for _ in range(REPEATS):
        runs.run(step)
    return runs


def alone(function: Callable[..., Runs], *arguments: object) -> Runs:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def fits(name: str, rows: int) -> float | None:
    """GiB that a contestant would need, where the machine has less; None where it fits."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    needed = MATRICES.get(name, 0) * rows * rows * 4
    return needed / GIB if needed > 0.9 * free else None


def compare(sizes: list[int], dim: int) -> None:
    table = Table(title=f"forward + backward, {dim} dimensions, fp32, {THREADS} threads")
    for heading in ("rows", "loss", "seconds", "GiB", "times open_clip", "at most", ""):
        table.add_column(heading, justify="left" if heading in ("loss", "") else "right")
    for rows in sizes:
        base: Runs | None = None
        for name in CONTESTANTS:
            if needed := fits(name, rows):
                table.add_row(f"{rows:,}", name, "-", f"{needed:.0f} needed", "", "", "does not fit")
                continue
            runs = alone(measure, name, rows, dim)
            said(f"{rows:,} rows: {name} {runs.median:.3f} s, {runs.bytes / GIB:.2f} GiB")
            base = runs if name == "open_clip" else base
            measured = f"{runs.median:.3f}", f"{runs.bytes / GIB:.2f}"
            table.add_row(f"{rows:,}", name, *measured, *judged(name, runs, base))
        table.add_section()
    console.print(table)


def judged(name: str, runs: Runs, base: Runs | None) -> tuple[str, str, str]:
    """Times open_clip's, the limit, and whether it holds."""
    ratio = runs.median / base.median if base else None
    shown = f"{ratio:.2f}" if ratio else "-"
    limit = {"ours": PLAIN, "ours, chunked": CHUNKED}.get(name)
    if limit is None:
        return shown, "", ""
    if ratio is None:
        return shown, f"{CHUNKED_GIB} GiB", verdict(runs.bytes <= CHUNKED_GIB * GIB) if name == "ours, chunked" else ""
    small = name != "ours, chunked" or runs.bytes <= CHUNKED_GIB * GIB
    return shown, f"{limit}", verdict(ratio <= limit and small)


def compare_steps() -> None:
    table = Table(title=f"one step of mobilenetv3_small_100, {PHOTOS:,} photos of {PHOTO[0]} x {PHOTO[1]}")
    for heading in ("step", "seconds", "GiB", "times plain", "at most", ""):
        table.add_column(heading, justify="left" if heading in ("step", "") else "right")
    runs = {}
    for name, size in (("plain", None), (f"micro-batches of {MICRO}", MICRO)):
        runs[name] = alone(measure_step, size)
        said(f"a step: {name} {runs[name].median:.3f} s, {runs[name].bytes / GIB:.2f} GiB")
        ratio = runs[name].median / runs["plain"].median
        limit = (f"{CACHED}", verdict(ratio <= CACHED)) if size else ("", "")
        table.add_row(name, f"{runs[name].median:.3f}", f"{runs[name].bytes / GIB:.2f}", f"{ratio:.2f}", *limit)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [4096, 8192, 16384, 32768]
    parser.add_argument("--rows", type=int, nargs="+", default=sizes, help=f"batch sizes; default: {sizes}")
    parser.add_argument("--dim", type=int, default=256, help="default: 256")
    parser.add_argument("--skip-steps", action="store_true", help="losses alone, without steps of a tower")
    options = parser.parse_args()
    if min(*options.rows, options.dim, 2**30) < 1:
        parser.error("expected at least one row and one dimension")
    compare(options.rows, options.dim)
    if not options.skip_steps:
        compare_steps()


if __name__ == "__main__":
    main()

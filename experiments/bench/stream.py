"""Our stream of photos against its limit and against open_clip's pipeline, on the same photos and with as many workers.

    make bench-stream [ARGS="--photos 6000 --side 512 --workers 0 1 2 --folder /tmp/stream"]

- limit: as many processes, each with nothing to do but to walk through its tars, mapped into memory, and to decode
  every photo by the fastest way we know; no order, no checks, no batches.
- open_clip: `open_clip_train.data.get_wds_dataset` with its evaluation transform (bicubic resize, crop, normalised
  floats) and its tokenizer; ours yields bytes and strings, which the towers normalise and tokenize.
- ours: TupleDataModule's training loader without cache of photos; then the same with one, filled by a first epoch.

Contestants take turns, each in processes of its own that live on between turns, and a turn decodes each photo once
(open_clip rounds to whole batches per worker). Without --folder the tars lie in memory (/dev/shm, where it has room),
as a system may forget at any time what it keeps of a disk; with --cold it forgets those of --folder before each turn.
The median of REPEATS turns counts, after one that starts the workers. Samples per second are by the clock; seconds of
processor per sample, over all of a contestant's processes, do not suffer from what else the machine does. Then what it
costs to begin in the middle. The clock is never a test: a row over its limit says so and the exit code stays 0.
"""

import argparse
import csv
import io
import mmap
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from measured import console, said
from PIL import Image
from PIL.Image import Resampling
from rich.table import Table
from torch.nn.functional import interpolate

REPEATS, MIB, BLOCK = 3, 2**20, 512
OF_THE_LIMIT, OF_OPEN_CLIP = 0.9, 1.2  # goals: times the samples per second of each
COLOURS, SHAPES = ("red", "green", "blue", "black"), ("chair", "lamp", "shirt", "shoe", "table", "watch")
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Data:
    """Folders of shards with the same photos: ours, and theirs (jpg and txt); and what is asked of each contestant."""

    folder: Path
    image_size: int
    batch: int
    workers: int
    cold: bool

    @property
    def ours(self) -> Path:
        return self.folder / "shards"

    @property
    def theirs(self) -> list[Path]:
        return sorted((self.folder / "open_clip").glob("*.tar"))


def photo(number: int, side: int) -> bytes:
    """A JPEG as shops have them: broad colours, detail of several sizes, a little grain."""
    random = np.random.default_rng(number)
    pixels = np.full((side // 4, side // 4, 3), 128.0, np.float32)
    for cells, contrast in ((4, 80), (12, 40), (40, 20), (side // 4, 14)):
        coarse = random.normal(0, contrast, (cells, cells, 3)).astype(np.float32)
        layers = [Image.fromarray(coarse[..., c]).resize((side // 4, side // 4), Resampling.BICUBIC) for c in range(3)]
        pixels += np.stack([np.asarray(layer) for layer in layers], -1)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((side, side), Resampling.BICUBIC)
    grain = random.integers(-5, 6, (side, side, 1), dtype=np.int16)
    content = io.BytesIO()
    grainy = (np.asarray(image, np.int16) + grain).clip(0, 255).astype(np.uint8)
    Image.fromarray(grainy).save(content, "JPEG", quality=85 + number % 6)
    return content.getvalue()


def title(number: int) -> str:
    return f"{COLOURS[number % 4]} {SHAPES[number // 4 % 6]} of walnut and brass, model {number}"


def write_photos(folder: Path, side: int, numbers: range) -> int:
    """Returns the bytes written."""
    sizes = []
    for number in numbers:
        content = photo(number, side)
        (folder / f"{number}.jpg").write_bytes(content)
        sizes.append(len(content))
    return sum(sizes)


def make(folder: Path, photos: int, side: int) -> None:
    """Writes a catalogue, and of it our shards (by the importer) and theirs; a folder that has them stays as it is."""
    if (folder / "open_clip").is_dir():
        return said(f"using the photos of {folder}")
    images = folder / "catalogue" / "images"
    images.mkdir(parents=True, exist_ok=True)
    said(f"drawing {photos:,} photos of {side} x {side} in {folder}")
    with ProcessPoolExecutor(2, SPAWN) as pool:
        parts = [range(start, photos, 2) for start in range(2)]
        written = sum(pool.map(partial(write_photos, images, side), parts))
    said(f"{written / photos / 1024:.1f} KiB each; importing")
    rows = ((f"p{n}", title(n), f"{n}.jpg") for n in range(photos))
    write_rows(folder / "catalogue" / "products.csv", ("product_id", "title", "image"), rows)
    queries = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]
    splits = ((f"q{n}", query, "train") for n, query in enumerate(queries))
    write_rows(folder / "catalogue" / "queries.csv", ("query_id", "query", "split"), splits)
    judged = ((f"q{n % len(queries)}", f"p{n}", "E") for n in range(photos))
    write_rows(folder / "catalogue" / "judgments.csv", ("query_id", "product_id", "label"), judged)
    importer = [Path(sys.executable).with_name("mmfusion"), "data", "--from=catalogue"]
    folders = [f"--src={folder / 'catalogue'}", f"--out={folder / 'shards'}"]
    subprocess.run([*importer, *folders, "--val_fraction=0"], check=True)
    write_theirs(folder, photos)


def write_rows(path: Path, header: Sequence[str], rows: Iterator[tuple[str, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def write_theirs(folder: Path, photos: int) -> None:
    """As many tars as ours, of a photo and its title each."""
    from webdataset import TarWriter  # noqa: PLC0415 (only for this)

    partial_folder = folder / "open_clip.partial"
    partial_folder.mkdir()
    shards = len(list((folder / "shards").glob("*.tar")))
    for shard, numbers in enumerate(np.array_split(np.arange(photos), shards)):
        with TarWriter(str(partial_folder / f"{shard:05d}.tar")) as tar:
            for n in numbers.tolist():
                content = (folder / "catalogue" / "images" / f"{n}.jpg").read_bytes()
                tar.write({"__key__": str(n), "jpg": content, "txt": title(n)})
    partial_folder.rename(folder / "open_clip")


Epochs = Callable[[], Iterator[int]]  # an epoch: the number of samples of each batch, as it comes


def limit(data: Data) -> Epochs:
    """Without workers the process itself; else that many, which wait for their tars."""
    tars, pipes = data.theirs, [multiprocessing.Pipe() for _ in range(data.workers)]
    for _, far in pipes:
        multiprocessing.Process(
            target=serve, args=(far, partial(decode_tars, size=data.image_size)), daemon=True
        ).start()

    def epoch() -> Iterator[int]:
        for number, (near, _) in enumerate(pipes):
            near.send(tars[number :: data.workers])
        yield from (near.recv() for near, _ in pipes) if pipes else [decode_tars(tars, data.image_size)]

    return epoch


def serve(pipe: Connection, work: Callable[[Any], Any]) -> None:
    """Answers what comes through the pipe until it is closed."""
    torch.set_num_threads(1)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        pipe.send(work(task))


def decode_tars(tars: list[Path], size: int) -> int:
    """Number of photos."""
    decoded = 0
    for tar in tars:
        with tar.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            place = 0
            while content[place]:  # two empty blocks end a tar
                length, start = int(content[place + 124 : place + 135], 8), place + BLOCK
                if content.find(b".jpg", place, place + 100) > 0:
                    decode(content[start : start + length], size)
                    decoded += 1
                place = start + -(-length // BLOCK) * BLOCK
    return decoded


def decode(content: bytes, size: int) -> torch.Tensor:
    """Scaled by the decoder to at least `size`, then by torch; nothing is checked."""
    pixels = torch.from_numpy(simplejpeg.decode_jpeg(content, "RGB", min_height=size, min_width=size, min_factor=2))
    return interpolate(pixels.permute(2, 0, 1)[None], (size, size), mode="bilinear", antialias=True)[0]


def open_clip(data: Data) -> Epochs:
    import open_clip  # noqa: PLC0415 (only this contestant's process holds it)
    from open_clip_train import data as theirs  # noqa: PLC0415

    # WebDataset 1.0 marks the end of a tar, which open_clip 3.3 does not expect.
    theirs.tar_file_expander = partial(theirs.tar_file_expander, eof_value=None)
    tars = data.theirs
    options = Namespace(
        train_data=f"{tars[0].parent}/{{00000..{len(tars) - 1:05d}}}.tar",
        train_num_samples=sum(1 for _ in (data.folder / "catalogue" / "images").iterdir()),
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=data.batch,
        workers=data.workers,
        world_size=1,
        seed=0,
    )
    transform = open_clip.image_transform(data.image_size, is_train=False)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    found = theirs.get_wds_dataset(options, transform, is_train=True, floor=True, tokenizer=tokenizer)
    turns = iter(range(2**31))

    def epoch() -> Iterator[int]:
        found.set_epoch(next(turns))
        yield from (len(texts) for _, texts in found.dataloader)

    return epoch


def ours(data: Data, cache_mib: int = 0) -> Epochs:
    from datamodules.tuples import TupleDataModule  # noqa: PLC0415 (as in open_clip)

    module = TupleDataModule(
        str(data.ours),
        batch_size=data.batch,
        image_size=data.image_size,
        workers=data.workers,
        photo_cache_mib=cache_mib,
    )
    module.setup("fit")
    loader = module.train_dataloader()

    def epoch() -> Iterator[int]:
        yield from (len(batch) for batch in loader)

    return epoch


CONTESTANTS: dict[str, Callable[[Data], Epochs]] = {
    "limit": limit,
    "open_clip": open_clip,
    "ours": ours,
    "ours, cached": partial(ours, cache_mib=64 * 1024),
}


class Turn(NamedTuple):
    """What an epoch took: seconds by the clock until the first batch and in all, of processor; bytes per worker."""

    samples: int
    first: float
    seconds: float
    processor: float
    pss: float
    uss: float

    @property
    def speed(self) -> float:
        return self.samples / self.seconds


def contest(pipe: Connection, name: str, data: Data) -> None:
    """A contestant's process: made by the first turn asked for, which counts towards it."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of workers
    made: list[Epochs] = []

    def turn(_: Any) -> Turn:
        processor, start, first, samples = processor_seconds(), time.perf_counter(), 0.0, 0
        if not made:
            made.append(CONTESTANTS[name](data))
            start = time.perf_counter()  # importing is not what first batches wait for in a training process
        for count in made[0]():
            first = first or time.perf_counter() - start
            samples += count
        seconds = time.perf_counter() - start
        memory = [memory_of(pid) for pid in children()] or [memory_of(os.getpid())]
        pss, uss = np.mean(memory, axis=0).tolist()
        return Turn(samples, first, seconds, processor_seconds() - processor, pss, uss)

    serve(pipe, turn)


def children() -> list[int]:
    """Worker processes of this one; not the helper that multiprocessing starts for itself."""
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
    return [int(pid) for pid in found if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def processor_seconds() -> float:
    """Of this process and its children, those that have ended included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = 0
    for pid in children():
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # in user and system mode
    return time.process_time() + ended.ru_utime + ended.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def memory_of(pid: int) -> tuple[int, int]:
    """Bytes that a process holds: with its part of what it shares (PSS), and alone (USS)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
    return sizes["Pss"], sizes["Private_Clean"] + sizes["Private_Dirty"]


def turns_of(data: Data) -> dict[str, list[Turn]]:
    """Each contestant's turns, the first of which starts its workers."""
    turns: dict[str, list[Turn]] = {name: [] for name in CONTESTANTS}
    with ExitStack() as stack:
        pipes = {}
        for name in CONTESTANTS:
            pipes[name], far = SPAWN.Pipe()
            process = SPAWN.Process(target=contest, args=(far, name, data))
            process.start()
            far.close()
            stack.callback(process.join)
            stack.callback(pipes[name].close)  # ends it
        for turn in range(REPEATS + 1):
            said(f"{data.workers} workers, {f'turn {turn} of {REPEATS}' if turn else 'starting them'}")
            for name in list(CONTESTANTS)[:: 1 if turn % 2 else -1]:
                if data.cold:
                    forget(data.folder)
                pipes[name].send(None)
                turns[name].append(pipes[name].recv())
    return turns


def forget(folder: Path) -> None:
    """Has the system read the tars from their disk next time."""
    for tar in folder.glob("*/*.tar"):
        with tar.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_memory(size: int) -> str | None:
    """A folder whose files are in memory for sure and that has room for so many bytes."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > size else None


def compare(data: Data, table: Table) -> None:
    turns = turns_of(data)
    speed = {name: statistics.median(turn.speed for turn in taken[1:]) for name, taken in turns.items()}
    cost = {name: statistics.median(t.processor / t.samples for t in taken[1:]) for name, taken in turns.items()}
    for name, taken in turns.items():
        pss, uss = (max(sizes) / MIB for sizes in zip(*((turn.pss, turn.uss) for turn in taken), strict=True))
        first = ["", ""] if name == "limit" else [f"{taken[0].first:.2f}", f"{taken[-1].first:.2f}"]
        cores = max(data.workers, 1)
        table.add_row(
            str(data.workers), name, f"{taken[-1].samples:,}", f"{speed[name]:,.0f}", f"{speed[name] / cores:,.0f}",
            f"{1e6 * cost[name]:,.0f}", *first, f"{pss:,.0f}", f"{uss:,.0f}",
        )  # fmt: skip
    table.add_section()
    for peer, least in (("limit", OF_THE_LIMIT), ("open_clip", OF_OPEN_CLIP)):
        by_clock, by_processor = speed["ours"] / speed[peer], cost[peer] / cost["ours"]
        verdict = "[green]PASS[/]" if by_clock >= least else "[red]over limit[/]"
        console.print(
            f"{data.workers} workers: ours is {by_clock:.2f} times {peer} by the clock ({by_processor:.2f} by the "
            f"processor), at least {least} wanted: {verdict}",
            highlight=False,
        )


def begin_in_the_middle(millions: Sequence[int], batch: int) -> None:
    """What it costs to know the samples of a step far into an epoch: no shard is read for it, and no photo decoded."""
    from datamodules.plan import Plan, Slots, draws  # noqa: PLC0415 (as in open_clip)

    table = Table(title="to begin in the middle of an epoch")
    for heading in ("samples", "plan, ms", "first request, ms", "ms per million", "each further request, ms"):
        table.add_column(heading, justify="right")
    for million in millions:
        samples = million * 10**6
        shard = np.arange(samples, dtype=np.int32) // 2048
        start = time.perf_counter()
        slots = Slots.of(shard, np.ones(samples, np.int32), "products")
        plan = Plan(slots.per_shard(int(shard[-1]) + 1), seed=0, batch=batch)
        made = time.perf_counter()
        requests = []
        for step in range(plan.steps // 2, plan.steps // 2 + 20):
            begun = time.perf_counter()
            draws(0, 1, slots.at(plan.batch(1, step))[0])
            requests.append(time.perf_counter() - begun)
        first = made - start + requests[0]
        milliseconds = (made - start, requests[0], first / million, statistics.median(requests[1:]))
        table.add_row(f"{samples:,}", *(f"{1000 * value:,.2f}" for value in milliseconds))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("photos", 6000), ("side", 512), ("image-size", 224), ("batch", 512)):
        parser.add_argument(f"--{name}", type=int, default=size, help=f"default: {size:,}")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="default: 0 2")
    parser.add_argument("--millions", type=int, nargs="*", default=[1, 10], help="samples of the plans; default: 1 10")
    parser.add_argument("--folder", type=Path, help="where the shards stay for the next time; default: a temporary one")
    parser.add_argument("--cold", action="store_true", help="from the disk of --folder (no tmpfs) each time")
    options = parser.parse_args()
    if options.photos < options.batch * max(*options.workers, 1) or min(options.side, options.image_size) < 16:
        parser.error("expected a whole batch per worker, and photos of 16 pixels at least")
    if options.cold and not options.folder:
        parser.error("--cold takes a --folder on the disk to be read from")
    with ExitStack() as stack:
        # Catalogue, shards and tars are .7 bytes a pixel together; open_clip's workers send floats through /dev/shm.
        batches = 12 * options.image_size**2 * options.batch * (2 * max(options.workers) + 2)
        place = in_memory(options.photos * options.side**2 + batches)
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(dir=place)))
        make(folder, options.photos, options.side)
        sizes = f"{options.photos:,} photos of {options.side} px to {options.image_size}, batches of {options.batch}"
        table = Table(title=sizes)
        columns = "samples", "per s", "per s and core", "processor µs each", "first batch: first turn s", "last s"
        for heading in ("workers", "who", *columns, "worker MiB: PSS", "USS"):
            table.add_column(heading, justify="left" if heading == "who" else "right")
        for workers in options.workers:
            compare(Data(folder, options.image_size, options.batch, workers, options.cold), table)
        console.print(table)
    begin_in_the_middle(options.millions, options.batch)


if __name__ == "__main__":
    main()

"""Memory of an import without photos: judgments, products and queries as Parquet, drawn and then made into shards.

    make bench-import [ARGS="--judgments 100000 --products 10000 --queries 5000"]

The import runs in a process of its own. What counts is the memory that it and its children hold and that no file
stands behind (RssAnon, as Linux counts it), looked at ten times a second: mapped tables are the system's to drop. The
clock is never a test: a peak over the goal says so and the exit code stays 0.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measured import console, said

ROOT = Path(__file__).parents[2]
GOAL, GIB, LOOKS = 2 << 30, 2**30, 10  # bytes; looks per second
WORDS, IN_TITLE, IN_TEXT = 20_000, 12, 140  # of seven characters: about a kilobyte of text
SPLITS = np.array(["train", "train", "train", "train", "val", "test"])
PRODUCTS, JUDGMENTS = 50_000, 500_000  # that are drawn at once
IMPORT = """
import sys
from datamodules.importers.catalogue import OwnCatalogue
if __name__ == "__main__":
    src, out, jobs = sys.argv[1:]
    OwnCatalogue(src=src, out=out, jobs=jobs if jobs == "ray" else int(jobs)).run()
"""


def write_catalogue(folder: Path, judgments: int, products: int, queries: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    write(folder / "products.parquet", drawn_products(products, random))
    ids = np.arange(queries)
    columns = {"query_id": _names("q", ids), "query": _names("query number ", ids), "split": SPLITS[ids % len(SPLITS)]}
    pq.write_table(pa.table(columns), folder / "queries.parquet")
    write(folder / "judgments.parquet", drawn_judgments(judgments, products, queries, random))


def write(path: Path, tables: Iterator[pa.Table]) -> None:
    first = next(tables)
    with pq.ParquetWriter(path, first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def drawn_products(products: int, random: np.random.Generator) -> Iterator[pa.Table]:
    words = np.array([f"w{number:05d}" for number in range(WORDS)])
    for start in range(0, products, PRODUCTS):
        ids = np.arange(start, min(start + PRODUCTS, products))
        texts = [words[row] for row in random.integers(WORDS, size=(len(ids), IN_TEXT))]
        yield pa.table(
            {
                "product_id": _names("p", ids),
                "title": [" ".join(text[:IN_TITLE]) for text in texts],
                "description": [" ".join(text) for text in texts],
                "image": [""] * len(ids),
            }
        )


def drawn_judgments(judgments: int, products: int, queries: int, random: np.random.Generator) -> Iterator[pa.Table]:
    """Query by query, each with as many products as the next; no pair twice."""
    bounds = np.arange(queries + 1) * judgments // queries
    starts = random.integers(products, size=queries)
    steps = random.integers(1, max(2, products // -(-judgments // queries)), queries)
    for first in range(0, judgments, JUDGMENTS):
        row = np.arange(first, min(first + JUDGMENTS, judgments))
        query = np.searchsorted(bounds, row, side="right") - 1
        product = (starts[query] + steps[query] * (row - bounds[query])) % products
        label = np.array(list("ESCI"))[random.integers(4, size=len(row))]
        yield pa.table({"query_id": _names("q", query), "product_id": _names("p", product), "label": label})


def _names(letter: str, numbers: np.ndarray) -> list[str]:
    return [f"{letter}{number}" for number in numbers.tolist()]


def run_import(src: Path, out: Path, jobs: str) -> tuple[float, int]:
    """Seconds, and the greatest sum of RssAnon in bytes. Raises CalledProcessError when the import fails."""
    command = [sys.executable, "-c", IMPORT, str(src), str(out), jobs]
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(command, cwd=ROOT) as process:
        while process.poll() is None:
            peak = max(peak, sum(map(anonymous, family(process.pid))))
            time.sleep(1 / LOOKS)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command[:2])
    return time.perf_counter() - start, peak


def anonymous(pid: int) -> int:
    """Bytes; 0 for a process that has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return 1024 * int(status.split("RssAnon:")[1].split()[0]) if "RssAnon:" in status else 0


def family(pid: int) -> list[int]:
    """The process and all that came of it."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:
        return [pid]
    return [pid, *(one for child in children for one in family(child))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("judgments", 10_000_000), ("products", 1_000_000), ("queries", 500_000)):
        parser.add_argument(f"--{name}", type=int, default=size, help=f"default: {size:,}")
    parser.add_argument("--jobs", default="1", help="processes that write shards, or ray; default: 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the drawn catalogue and its shards; default: a temporary one")
    options = parser.parse_args()
    if not 6 <= options.queries <= options.judgments or 2 * options.judgments > options.queries * options.products:
        parser.error("expected 6 queries, a judgment of each, and at most half of the products judged for each")
    with tempfile.TemporaryDirectory(dir=options.folder) as home:
        src, out = Path(home) / "catalogue", Path(home) / "shards"
        src.mkdir()
        said(f"drawing {options.judgments:,} judgments, {options.products:,} products, {options.queries:,} queries")
        write_catalogue(src, options.judgments, options.products, options.queries, options.seed)
        said("importing them")
        seconds, peak = run_import(src, out, options.jobs)
    holds = "[green]PASS[/]" if peak <= GOAL else "[red]over limit[/]"
    console.print(
        f"import with jobs {options.jobs}: {seconds:.0f} s, peak memory of its processes {peak / GIB:.2f} of "
        f"{GOAL / GIB:.0f} GiB {holds}",
        highlight=False,
    )


if __name__ == "__main__":
    main()

"""A user's own catalogue -> shards. The folder is described in DESIGN.md, The data contract."""

from pathlib import Path
from typing import Literal

from datamodules.catalogue import read_catalogue
from datamodules.manifest import Manifest, Unlisted
from datamodules.summary import print_summary
from datamodules.writer import write_shards


def convert(
    src: str,
    out: str,
    *,
    seed: int = 0,
    shard_size: int | None = None,
    gains: dict[str, dict[str, float]] | None = None,
    positive_from: dict[str, float] | None = None,
    primary: str | None = None,
    unlisted: dict[str, Unlisted] | None = None,
    on_broken_photo: Literal["error", "drop"] = "error",
    max_shared_queries: float = 0.01,
) -> Manifest:
    """Reads, checks and converts a catalogue, and prints what it holds. Nothing is left at `out` when it fails.

    Args:
        src: Folder of the catalogue: products, queries, judgments (.csv, .csv.gz or .parquet), images/ or images.tar.
        out: Folder for the shards.
        seed: Of the permutation that deals products to shards.
        shard_size: Most products of a shard. Default: 2048, less if that makes under 16 shards.
        gains: Per label column, what each label is worth, as {relevance: {E: 1, S: 0.1}}. Default: E 1, S 0.1, C 0.01,
            I 0; numbers are their own gains. The column `label` is called `relevance`.
        positive_from: Per label column, the least gain of a positive. Default: 1.
        primary: The label column that trainable products are counted by. Default: `relevance`, else the first.
        unlisted: Per split, whether a pair that is not judged is irrelevant or unknown. Default: unknown in train,
            irrelevant in val and test.
        on_broken_photo: What to do about a photo that cannot be decoded: error, or drop (the product goes without).
        max_shared_queries: Greatest fraction of val and test queries whose text may be in another split as well.
    """
    catalogue = read_catalogue(src, gains, positive_from, primary, max_shared_queries)
    manifest = write_shards(
        catalogue, out, seed, shard_size=shard_size, unlisted=unlisted, on_broken_photo=on_broken_photo
    )
    print_summary(catalogue, manifest, Path(out))
    return manifest

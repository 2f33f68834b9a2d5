"""Runs of a study as training leaves them, with drawn values of known means: for tests of what reads them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from mmfusion.study.definition import Study, read_study

METRICS = ("relevance/ndcg@10", "relevance/mrr")
SCRATCH = {"class_path": "mmfusion.encoders.TimmEncoder", "init_args": {"model": "resnet18", "pretrained": False}}
PRETRAINED = {"class_path": "mmfusion.encoders.TimmEncoder", "init_args": {"model": "resnet18", "pretrained": True}}
ABOUT = {
    "manifest": "m", "commit": "c0ffee", "primary": "fused",
    "evaluation": {"depth": 100, "no_positive": "skip", "unjudged": "zero", "resamples": 1000},
}  # fmt: skip


def study_of(folder: Path, text: str) -> Study:
    path = folder / "small.yaml"
    path.write_text(text, encoding="utf-8")
    return read_study(path)


def draw_run(
    run: Path,
    means: Mapping[str, float],
    queries: int = 200,
    image: Mapping[str, Any] = SCRATCH,
    noise: float = 0.01,
    trains: Mapping[str, Mapping[str, int]] | None = None,
    **about: Any,
) -> Path:
    """means: of each view. trains: parameters of encoders by stage, as parameters.json tells; no such file for None.

    A query's difficulty is the same in all runs; what is noise depends on the folder's name.
    """
    run.mkdir(parents=True)
    hard = np.random.default_rng(0).normal(0, 0.1, size=queries)
    random = np.random.default_rng([ord(letter) for letter in f"{run.parent.name}/{run.name}"])
    results: dict[str, Any] = {"val": {}, "test": {}}
    tables = []
    for split, cells in results.items():
        for view, value in means.items():
            values = {name: value + hard + noise * random.normal(size=queries) for name in METRICS}
            ids = [f"q{i}" for i in range(queries)]
            named = {"split": [split] * queries, "view": [view] * queries, "query_id": ids, "query": ids}
            tables.append(pa.table(named | {name: found.tolist() for name, found in values.items()}))
            cells[view] = {name: {"value": float(found.mean())} for name, found in values.items()}
    pq.write_table(pa.concat_tables(tables), run / "per_query.parquet")
    results["run"] = ABOUT | {"primary": "fused" if "fused" in means else next(iter(means))} | about
    known = {"0 (cold start)": 0.5, "5+": 1.5}  # of the view's mean
    slices = {
        bucket: {view: {"relevance/recall_capped@10": {"value": times * value}} for view, value in means.items()}
        for bucket, times in known.items()
    }
    results["slices"] = {split: {"train_positives": slices} for split in ("val", "test")}
    (run / "results.json").write_text(json.dumps(results))
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"image": dict(image)}}))
    if trains is not None:
        (run / "parameters.json").write_text(json.dumps({"stages": {}, "parameters": 1, "trains": trains}))
    return run


def draw_arm(
    folder: Path, arm: str, fused: float, variants: tuple[str, ...] = ("all",), seeds: int = 3, **options: Any
) -> None:
    """Runs of an arm whose results have a row of BM25 too."""
    for variant in variants:
        for seed in range(1, seeds + 1):
            draw_run(folder / arm / f"{variant}-{seed}", {"fused": fused, "bm25": 0.2}, **options)

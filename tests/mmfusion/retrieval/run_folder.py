"""Run folders as an evaluation leaves them: real files with drawn numbers, for tests of what reads them."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmfusion.retrieval.labels import names
from mmfusion.retrieval.metrics import shares

LABELS = {"E": 1.0, "S": 0.1, "C": 0.01, "I": 0.0}
METRICS = ("ndcg@10", "recall@100", "mrr", "precision@10", "judged@10", "map")
HOSTILE_TITLE = "<script>alert(1)</script>"
HOSTILE_QUERY = '"><img src=x onerror="document.title=1"> & </script><script>document.title=2</script>'


@dataclass
class Folder:
    """What a run folder is drawn from. columns: label columns, with labels, or None for a numeric one.

    photos: p1 has none, those of `unkept` are not in products.parquet; False: nothing has one.
    """

    views: Sequence[str] = ("text", "image", "fused", "bm25")
    columns: dict[str, dict[str, float] | None] = field(default_factory=lambda: {"relevance": LABELS})
    queries: Sequence[str] = ("red shirt", "blue shirt", HOSTILE_QUERY, "warm socks")
    titles: Sequence[str] = (HOSTILE_TITLE, *(f"Product {i}" for i in range(14)))
    photos: bool = True
    unkept: Sequence[int] = ()
    log: bool = True
    extras: bool = True
    seed: int = 0

    def write(self, path: Path) -> Path:
        """Writes results.json, the three tables and, where wanted, metrics.csv and config.yaml. Returns the path."""
        path.mkdir(parents=True)
        self.random = np.random.default_rng(self.seed)
        per_query, rankings = self._per_query(), self._rankings()
        pq.write_table(per_query, path / "per_query.parquet")
        pq.write_table(rankings, path / "rankings.parquet")
        pq.write_table(self._products(), path / "products.parquet")
        (path / "results.json").write_text(json.dumps(self._results(per_query)))
        if self.log:
            (path / "metrics.csv").write_text(log(self.views))
            (path / "config.yaml").write_text("model:\n  dim: 8\n  stages:\n    adapt: {}\n    fuse: {}\n")
        return path

    def _names(self) -> list[str]:
        return [
            f"{column}/{name}"
            for column, labels in self.columns.items()
            for name in [*METRICS, *(f"{family}@10" for family in (shares(labels) if labels else []))]
        ]

    def _per_query(self) -> pa.Table:
        parts = []
        for split in ("val", "test"):
            for view in self.views:
                values = {name: self.random.random(len(self.queries)).tolist() for name in self._names()}
                values[self._names()[0]][-1] = None
                ids = [f"q{i}" for i in range(len(self.queries))]
                named = {
                    "split": [split] * len(ids),
                    "view": [view] * len(ids),
                    "query_id": ids,
                    "query": list(self.queries),
                }
                parts.append(pa.table(named | values))
        return pa.concat_tables(parts)

    def _rankings(self) -> pa.Table:
        rows = [
            {"split": split, "view": view, "query_id": f"q{query}", "rank": place + 1, "product_id": f"p{product}",
             "score": 1.0 - place / 10} | self._judged()
            for split in ("val", "test") for view in self.views for query in range(len(self.queries))
            for place, product in enumerate(self.random.permutation(len(self.titles))[:10].tolist())
        ]  # fmt: skip
        return pa.Table.from_pylist(rows).cast(pa.schema([
            ("split", pa.string()), ("view", pa.string()), ("query_id", pa.string()), ("rank", pa.int32()),
            ("product_id", pa.string()), ("score", pa.float32()),
            *((f"{kind}/{column}", dtype) for column in self.columns
              for kind, dtype in (("label", pa.string()), ("gain", pa.float64()))),
        ]))  # fmt: skip

    def _judged(self) -> dict[str, Any]:
        judged: dict[str, Any] = {}
        for column, labels in self.columns.items():
            named = names(labels) if labels else {gain: f"{gain:g}" for gain in (0.0, 0.5, 2.0)}
            gain = [*named, None][self.random.integers(len(named) + 1)]
            judged |= {f"label/{column}": None if gain is None else named[gain], f"gain/{column}": gain}
        return judged

    def _products(self) -> pa.Table:
        ids = [f"p{i}" for i in range(len(self.titles))]
        has_photo = [self.photos and i != 1 for i in range(len(ids))]
        photos = [photo(i) if has_photo[i] and i not in self.unkept else None for i in range(len(ids))]
        about = {"product_id": ids, "title": list(self.titles), "has_photo": has_photo}
        return pa.table(about | {"photo": pa.array(photos, pa.binary())})

    def _results(self, per_query: pa.Table) -> dict[str, Any]:
        results: dict[str, Any] = {"val": {}, "test": {}}
        for split, view in ((split, view) for split in results for view in self.views):
            rows = [row for row in per_query.to_pylist() if row["split"] == split and row["view"] == view]
            results[split][view] = {name: cell([row[name] for row in rows]) for name in self._names()}
        metric = self._names()[0]
        if self.extras:
            bins = [{"low": i / 5, "high": (i + 1) / 5, "pairs": 1200 + i, "relevant": i / 5} for i in range(5)]
            results["calibration"] = {"test": dict.fromkeys(self.views, bins)}
            half = {view: {metric: {**results["test"][view][metric], "queries": 2}} for view in self.views}
            results["slices"] = {"test": {"query length": {"1 word": half, "<b>2 words</b>": half}}}
        gains = {column: {"gains": labels, "positive_from": 1.0} for column, labels in self.columns.items()}
        primary = "fused" if "fused" in self.views else self.views[0]
        results["run"] = {
            "seed": 1, "commit": "a5a6e9a9219e", "manifest": "d7f164addb", "data": "/data/shop", "gains": gains,
            "checkpoint": "runs/x/checkpoints/best.ckpt", "primary": primary, "hybrid_weight": 0.3,
            "left_out": {f"test/{metric}": 1},
        }  # fmt: skip
        return results


def cell(values: Sequence[float | None]) -> dict[str, float | None]:
    """The mean of what is known, which results.json calls null where nothing is."""
    known = [value for value in values if value is not None]
    if not known:
        return dict.fromkeys(("value", "low", "high"))
    value = float(np.mean(known))
    return {"value": value, "low": value - 0.05, "high": value + 0.05}


def photo(seed: int) -> bytes:
    """A JPEG of one colour, 96 x 72."""
    file = io.BytesIO()
    Image.new("RGB", (96, 72), (40 * seed % 256, 90, 160)).save(file, "JPEG")
    return file.getvalue()


def log(views: Sequence[str]) -> str:
    """A log of two stages as Lightning writes it: blank cells where a row does not log a column."""
    val = [f"val/{view}/relevance/ndcg@10" for view in views]
    names = [
        "epoch",
        "gates/image/mean",
        "gates/image/std",
        "lr/head",
        "stage",
        "step",
        "train/loss",
        "train/scale/query_text",
        *val,
    ]
    rows = [
        ["0", "", "", "0.001", str(float(step >= 50)), str(step), str(3 - step / 50), "10.0", *("" for _ in val)]
        for step in range(9, 100, 10)
    ]
    for row in rows[5:]:
        row[1:3] = ["0.6", "0.1"]
    rows += [["0", "", "", "", "", str(step), "", "", *(str(0.4 + step / 500) for _ in val)] for step in (50, 99)]
    return "\n".join(",".join(row) for row in [names, *rows]) + "\n"

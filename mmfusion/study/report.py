"""A study's report.json, report.html and table on the terminal, made from what lies in its folder."""

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from mmfusion.retrieval.html.page import write_page
from mmfusion.retrieval.report import write_results
from mmfusion.retrieval.seeds import Estimate
from mmfusion.study.claims import judge
from mmfusion.study.definition import Study
from mmfusion.study.differences import Differences, differences
from mmfusion.study.notes import notes, runs_by_commit
from mmfusion.study.page import page
from mmfusion.study.results import Results, Row, read_study
from mmfusion.study.table import print_study

KNOWN = "recall_capped@10"


def write_study(
    folder: Path,
    study: Study,
    data: str | Path = "",
    console: Console | None = None,
    changed: Mapping[str, str] | None = None,
) -> Path:
    """Writes report.json and report.html into the study's folder, prints the table and the claims; returns the page.

    Works at any time: what is not there yet is listed as missing, and so are the runs of `changed`, with the reason.
    data: its address, for the reader.
    """
    results = read_study(folder, study, changed)
    report = told(results, str(data))
    write_results(folder / "report.json", report)
    path = write_page(folder / "report.html", page(report))
    print_study(report, console or Console())
    return path


def told(results: Results, data: str) -> dict[str, Any]:
    """All of report.json, from which the page and the table are made.

    {"study", "data", "manifest", "commits", "split", "metric", "reference", "seeds", "runs",
    "tests": {"table", "claims"}, "minutes" (of all jobs), "side_by_side", "variants": {name: [arm's row]},
    "claims": [...], "missing": [...], "notes": [sentences]}.
    """
    tests = differences(results)
    runs = {run.folder: run for row in results.all_rows() for run in row.runs.values()}
    about = [run.results.get("run", {}) for run in runs.values()]
    return {
        "study": results.study.name,
        "data": data,
        "manifest": next((one.get("manifest") for one in about), None),
        "commits": list(runs_by_commit(results)),
        "split": results.split,
        "metric": results.metric,
        "reference": results.study.reference,
        "seeds": results.seeds,
        "runs": len(runs),
        "tests": {"table": len(tests.table), "claims": len(tests.claims)},
        "minutes": sum(job.get("minutes") or 0 for job in results.jobs.values()),
        "side_by_side": max((job.get("jobs") or 1 for job in results.jobs.values()), default=1),
        "variants": {
            variant: [_row(row, results, tests) for row in rows.values()] for variant, rows in results.rows.items()
        },
        "claims": [
            {"name": one.name, "says": one.says, "verdict": one.verdict, "why": one.why, "sentence": one.sentence,
             "variants": {part.variant: {"verdict": part.verdict, "why": part.why} for part in one.judged}}
            for one in judge(results, tests)
        ],
        "missing": _missing(results),
        "notes": notes(results, tests),
    }  # fmt: skip


def _row(row: Row, results: Results, tests: Differences) -> dict[str, Any]:
    """{"arm", "view", "seeds", "missing", "mean", "by_seed", "val", "others", "known", "difference", "cost", "runs"}"""
    split, metric = results.split, results.metric
    validated = row.mean("val", metric)
    difference = tests.to_reference(row, results.study.reference)
    return {
        "arm": row.arm,
        "view": row.view,
        "seeds": list(row.runs),
        "missing": {str(seed): why for seed, why in row.missing.items()},
        "mean": cell(row.mean(split, metric)),
        "by_seed": {str(seed): value for seed, value in row.by_seed(split, metric).items()},
        "val": None if validated is None else validated.mean,
        "others": {other: cell(row.mean(split, other)) for other in results.metrics if other != metric},
        "known": known(row, split, metric),
        "difference": cell(difference),
        "cost": cost(row, results),
        "runs": {str(seed): str(run.folder.relative_to(results.folder)) for seed, run in row.runs.items()},
    }


def cell(found: Estimate | None) -> dict[str, Any] | None:
    """An estimate as JSON; None where there is none."""
    if found is None:
        return None
    return {
        "value": found.mean, "low": found.low, "high": found.high, "p": found.p, "p_holm": found.p_holm,
        "significant": found.significant, "seeds": found.seeds, "queries": found.queries, "left_out": found.left_out,
        "seed_sd": found.seed_sd, "df": found.df, "over": found.over,
    }  # fmt: skip


def known(row: Row, split: str, metric: str) -> dict[str, float]:
    """recall_capped@10 of the products that training knew by so many positives: means over the seeds that tell all.

    A head that remembers products from training gains on those alone, and nothing on what is new in the shop.
    """
    column = metric.rpartition("/")[0]
    found = [run.slices(split, "train_positives", row.view or "", f"{column}/{KNOWN}") for run in row.runs.values()]
    buckets = [bucket for bucket in (found[0] if found else {}) if all(bucket in seed for seed in found)]
    return {bucket: mean(seed[bucket] for seed in found) for bucket in buckets}


def cost(row: Row, results: Results) -> dict[str, float | None]:
    """Means over the seeds that tell them: minutes as from scratch (what it shares with others counted in), samples/s
    and trained parameters of the head in the last stage, parameters of the whole model. All None for another arm's row.
    """
    own = results.study.source(row.arm) == row.arm
    jobs = [results.job(row, seed) for seed in row.runs] if own else []
    minutes = [job["minutes"] + (job.get("shared_minutes") or 0) for job in jobs if job.get("minutes")]
    rates = [list(job["samples_per_s"].values())[-1] for job in jobs if job.get("samples_per_s")]
    sizes = [job["parameters"] for job in jobs if job.get("parameters")]
    return {
        "minutes": mean(minutes) if minutes else None,
        "samples_per_s": mean(rates) if rates else None,
        "head": mean(size["head"] for size in sizes) if sizes else None,
        "all": mean(size["all"] for size in sizes) if sizes else None,
    }


def _missing(results: Results) -> list[dict[str, Any]]:
    """Each run that is not there, once: {"arm", "variant", "seed", "why"}."""
    found: dict[tuple[Path, str], dict[str, Any]] = {}
    for row in results.all_rows():
        for seed, why in row.missing.items():
            path = results.study.run_folder(results.folder, row.arm, row.variant, seed)
            found.setdefault((path, why), {"arm": row.arm, "variant": row.variant, "seed": seed, "why": why})
    return list(found.values())

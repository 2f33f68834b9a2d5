"""What a study's runs left, as arm x variant x seed x query; what is not there is listed with its reason."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mmfusion.retrieval.report import SHOWN, label_columns, splits
from mmfusion.retrieval.seeds import Estimate, estimate
from mmfusion.study.definition import Study
from mmfusion.study.diary import JOBS, STUDY, read_json
from mmfusion.study.finished import Finished, Values, load


@dataclass(frozen=True)
class Row:
    """An arm in a variant. view: the one that its numbers are of; None while there are none.

    runs: by seed, those that count, with values[seed][split][metric][query_id]. missing: by seed, why others do not.
    """

    arm: str
    variant: str
    view: str | None
    runs: dict[int, Finished] = field(default_factory=dict)
    values: dict[int, Values] = field(default_factory=dict)
    missing: dict[int, str] = field(default_factory=dict)

    def mean(self, split: str, metric: str) -> Estimate | None:
        """Over its queries and seeds; None where no query has a value under each of the seeds."""
        return _estimated(self._array(split, metric, list(self.runs), self._query_ids(split, metric)))

    def by_seed(self, split: str, metric: str) -> dict[int, float]:
        """The mean over each seed's own queries, of the seeds that have any."""
        known = {seed: found.get(split, {}).get(metric, {}) for seed, found in self.values.items()}
        return {seed: float(np.mean(list(values.values()))) for seed, values in known.items() if values}

    def less(self, other: "Row", split: str, metric: str) -> Estimate | None:
        """The mean difference to another row, paired by query and seed; None where they share no query or no seed."""
        return _estimated(self._less(other, split, metric))

    def comparable(self, other: "Row", split: str, metric: str) -> bool:
        """Whether `less` finds anything."""
        return _any_known(self._less(other, split, metric))

    def _less(self, other: "Row", split: str, metric: str) -> Float[np.ndarray, "seed query"]:
        seeds = [seed for seed in self.runs if seed in other.runs]
        query_ids = list(dict.fromkeys([*self._query_ids(split, metric), *other._query_ids(split, metric)]))
        mine, others = (row._array(split, metric, seeds, query_ids) for row in (self, other))
        return mine - others

    def _query_ids(self, split: str, metric: str) -> list[str]:
        return list(dict.fromkeys(id for found in self.values.values() for id in found.get(split, {}).get(metric, {})))

    def _array(
        self, split: str, metric: str, seeds: Sequence[int], query_ids: Sequence[str]
    ) -> Float[np.ndarray, "seed query"]:
        """NaN where a query has no value."""
        known = [self.values[seed].get(split, {}).get(metric, {}) for seed in seeds]
        values = [[of_seed.get(id, np.nan) for id in query_ids] for of_seed in known]
        return np.array(values, dtype=np.float64).reshape(len(seeds), len(query_ids))


def _estimated(values: Float[np.ndarray, "seed query"]) -> Estimate | None:
    return estimate(values) if _any_known(values) else None


def _any_known(values: Float[np.ndarray, "seed query"]) -> bool:
    """Whether a query has a value under every seed."""
    return bool(values.size and (~np.isnan(values)).all(0).any())


@dataclass(frozen=True)
class Results:
    """rows[variant][arm], in the study's order.

    seeds: that were asked for, or that runs are there of. split: that arms are compared on. metric: that the study is
    decided by; metrics: it and others to show. jobs: the study's jobs.json.
    """

    study: Study
    folder: Path
    seeds: list[int]
    split: str
    metric: str
    metrics: list[str]
    rows: dict[str, dict[str, Row]]
    jobs: Mapping[str, Any]

    def all_rows(self) -> Iterator[Row]:
        return (row for rows in self.rows.values() for row in rows.values())

    def job(self, row: Row, seed: int) -> Mapping[str, Any]:
        """What jobs.json tells of the run behind a row; {} where nothing."""
        return self.jobs.get(self.study.job_name(row.arm, row.variant, seed), {})


def read_study(folder: Path, study: Study, changed: Mapping[str, str] | None = None) -> Results:
    """Reads <folder>/<arm>/<variant>-<seed>/ of all arms, jobs.json and study.json.

    A run on other data than the reference's, or measured in another way, is missing too; and so are those of `changed`,
    by name of the job, with the reason.
    """
    jobs = read_json(folder / JOBS)
    seeds = sorted({*read_json(folder / STUDY).get("seeds", []), *_seeds_on_disk(folder, study)})
    runs = {
        (arm, variant, seed): (changed or {}).get(study.job_name(arm, variant, seed))
        or _run(folder, study, arm, variant, seed, jobs)
        for arm in dict.fromkeys([study.reference, *study.arms])
        for variant in study.variants_of(arm)
        for seed in seeds
    }
    first = next((run for run in runs.values() if isinstance(run, Finished)), None)
    split, metric, metrics = _measures(study, first)
    rows: dict[str, dict[str, Row]] = {variant: {} for variant in study.variants}
    for variant in study.variants:
        for arm in (arm for arm in study.arms if variant in study.variants_of(arm)):
            of_seed = {seed: runs[arm, variant, seed] for seed in seeds}
            rows[variant][arm] = _row(study, arm, variant, of_seed, first, (split, metrics))
    return Results(study, folder, seeds, split, metric, metrics, rows, jobs)


def _seeds_on_disk(folder: Path, study: Study) -> set[int]:
    """Of the folders of arms and variants that the study still has."""
    wanted = [(arm, variant) for arm in study.trained() for variant in study.trained_on(arm)]
    names = [(path.name, variant) for arm, variant in wanted for path in (folder / arm).glob(f"{variant}-*")]
    found = [re.fullmatch(re.escape(variant) + r"-(\d+)", name) for name, variant in names]
    return {int(match[1]) for match in found if match}


def _run(folder: Path, study: Study, arm: str, variant: str, seed: int, jobs: Mapping[str, Any]) -> Finished | str:
    """The run that holds an arm's numbers, or why there is none."""
    path = study.run_folder(folder, arm, variant, seed)
    try:
        if (run := load(path)) is not None:
            return run
    except ValueError as error:
        return str(error)
    about = jobs.get(study.job_name(arm, variant, seed), {})
    if about.get("state") == "failed":
        tail = about.get("tail") or ["it wrote nothing"]
        return f"failed with exit code {about.get('rc')}: {tail[-1]}"
    if about.get("state") == "running":
        return "still runs, or its runner was killed"
    return "was stopped before its end" if path.is_dir() else "was not trained yet"


def _measures(study: Study, run: Finished | None) -> tuple[str, str, list[str]]:
    """The split; the study's metric, by default nDCG@10 of the primary label column; the main ones of all columns."""
    there = splits(run.results) if run else ["test"]
    split = there[0] if there and "test" not in there else "test"
    columns = label_columns(run.results.get(split, {}).values()) if run else []
    metric = study.metric or f"{next(iter(columns), 'relevance')}/ndcg@10"
    return split, metric, list(dict.fromkeys([metric, *(f"{column}/{name}" for column in columns for name in SHOWN)]))


def _row(
    study: Study,
    arm: str,
    variant: str,
    runs: Mapping[int, Finished | str],
    first: Finished | None,
    measures: tuple[str, list[str]],
) -> Row:
    split, metrics = measures
    wanted = study.arms[arm].view
    counted, values, missing, view = {}, {}, {}, wanted
    for seed, run in runs.items():
        try:
            if isinstance(run, str):
                raise ValueError(run)
            _require_alike(run, first)
            view = run.view(wanted)
            found = run.values(view, metrics)
            if metrics[0] not in found.get(split, {}):
                raise ValueError(f"was evaluated without {metrics[0]} on {split}: `make eval RUN={run.folder}`")
            counted[seed], values[seed] = run, found
        except ValueError as error:
            missing[seed] = str(error)
    return Row(arm, variant, view, counted, values, missing)


def _require_alike(run: Finished, first: Finished | None) -> None:
    assert first is not None
    ours, theirs = run.measured_as, first.measured_as
    differ = [f"{key} is {ours[key]}, of {first.folder} {theirs[key]}" for key in theirs if ours[key] != theirs[key]]
    if differ:
        raise ValueError(f"was evaluated in another way or on other data: {'; '.join(differ)}")

"""Runs side by side as data: their numbers, paired tests, every query's values, and what differs in how they were made.

The first run is the baseline, which the others are tested against.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mmfusion.batch import RetrievalData
from mmfusion.retrieval.examples import choose
from mmfusion.retrieval.report import SHOWN, in_column, label_columns, splits
from mmfusion.retrieval.side import OVERRIDES, Side, differences, from_file, from_folder, home, named, results_of
from mmfusion.retrieval.significance import Paired, corrected, paired

LoadData = Callable[[Path], RetrievalData]  # of a run folder: the data that it was evaluated on


@dataclass(frozen=True)
class Compared:
    """One run. letter: A is the baseline. name: the letter and what fits into a narrow table, such as "A gated".

    path: a run folder, or a run file. view: the primary one; a run file takes that of the first folder.
    """

    letter: str
    name: str
    path: Path
    view: str


@dataclass(frozen=True)
class QueryValues:
    """One metric of the primary views, query by query, in the baseline's order.

    values: by letter, the baseline's first; NaN where a run has no value. Runs without values of their own are not in.
    """

    metric: str
    query_ids: list[str]
    queries: list[str]
    values: dict[str, Float[np.ndarray, "query"]]

    def extremes(self, letter: str, count: int = 5) -> tuple[list[int], list[int]]:
        """Positions of the queries in which the run gains and loses most on the baseline, the most extreme first."""
        chosen = choose(self.values[letter], next(iter(self.values.values())), each=count)
        return chosen.gained, chosen.lost


@dataclass(frozen=True)
class Comparison:
    """sections["fused, relevance"]["A gated"]["ndcg@10"] = {"value", "low", "high"}: the primary views come first.

    paired: the later runs against the baseline in each label column's main metrics, corrected for their number.
    per_query: None where fewer than two runs on the same data have values per query.
    differences: the dotted keys of the configurations that differ, with a value for each letter of `configured`, which
    are the run folders. notes: sentences about what the reader should know.
    """

    split: str
    runs: list[Compared]
    sections: dict[str, dict[str, dict[str, Any]]]
    paired: list[Paired]
    per_query: QueryValues | None
    differences: dict[str, list[Any]]
    configured: list[str]
    notes: list[str]


def compare_runs(runs: Sequence[Path], split: str | None = None, load_data: LoadData | None = None) -> Comparison:
    """Compares run folders, and run files in TREC's format, which are measured as the first folder was, on its data.

    split: by default `test`, or else the first that all folders have. load_data: needed for run files.
    Raises ValueError on a folder that has no results.json, and on run files alone.
    """
    paths = named(runs)
    results = {name: results_of(run) for name, run in paths.items() if not run.is_file()}
    if not results:
        raise ValueError("received run files alone, which hold no judgments: name a run folder evaluated on their data")
    split = split or _common_split(results)
    folders = {name: from_folder(name, paths[name], result, split) for name, result in results.items()}
    files, notes = _files({name: run for name, run in paths.items() if name not in folders}, folders, split, load_data)
    sides = [(folders | files)[name] for name in paths]
    alike = _comparable(sides)
    tests = [test for side in alike[1:] for test in _tests(alike[0], side)]
    return Comparison(
        split=split,
        runs=[Compared(side.letter, side.name, side.path, side.view) for side in sides],
        sections=_sections(sides),
        paired=corrected(tests),
        per_query=_query_values(alike),
        differences=differences({side.letter: side.made for side in folders.values()}),
        configured=[side.letter for side in folders.values()],
        notes=[
            *notes,
            *_about_data(sides, split),
            *_about_protocols(sides, split),
            *_about_settings(sides),
            *_about_tests(tests),
        ],
    )


def _files(
    paths: Mapping[str, Path], folders: Mapping[str, Side], split: str, load_data: LoadData | None
) -> tuple[dict[str, Side], list[str]]:
    if not paths:
        return {}, []
    assert load_data is not None, "run files need the data that they are measured on"
    first = next(iter(folders.values()))
    data = load_data(first.path)
    found = {name: from_file(name, path, first, data, split) for name, path in paths.items()}
    return {name: side for name, (side, _) in found.items()}, [note for _, notes in found.values() for note in notes]


def _common_split(results: Mapping[str, Mapping[str, Any]]) -> str:
    first, *others = [splits(result) for result in results.values()]
    common = [split for split in first if all(split in other for other in others)]
    if not common:
        have = "; ".join(f"{name}: {', '.join(splits(result)) or 'none'}" for name, result in results.items())
        raise ValueError(f"the runs have no split in common ({have}); evaluate one of them on the other's split")
    return "test" if "test" in common else common[0]


def _sections(sides: Sequence[Side]) -> dict[str, dict[str, dict[str, Any]]]:
    """sections["<view>, <label column>"][run]: the primary views of all runs in one section, then the other views."""
    sections: dict[str, dict[str, dict[str, Any]]] = {}
    title = "/".join(dict.fromkeys(side.view for side in sides))
    others = dict.fromkeys(view for side in sides for view in side.views if view != side.view)
    for column in label_columns(view for side in sides for view in side.views.values()):
        sections[f"{title}, {column}"] = {side.name: in_column(side.views[side.view], column) for side in sides}
        for view in others:
            rows = {side.name: in_column(side.views[view], column) for side in sides if view in side.views}
            sections[f"{view}, {column}"] = rows
    return sections


def _comparable(sides: Sequence[Side]) -> list[Side]:
    """The baseline and the runs whose queries can be paired with its own; nothing where it has no values per query."""
    first = sides[0]
    if first.measured is None:
        return []
    return [
        side
        for side in sides
        if side.measured is not None and (side.manifest, side.protocol) == (first.manifest, first.protocol)
    ]


def _tests(baseline: Side, side: Side) -> list[Paired]:
    """In each main metric of each label column that both runs have."""
    assert baseline.measured is not None
    assert side.measured is not None
    query_ids = list(dict.fromkeys([*baseline.measured.query_ids, *side.measured.query_ids]))
    tests = []
    for metric in _main_metrics(baseline):
        if metric in _main_metrics(side):
            before, after = baseline.aligned(metric, query_ids), side.aligned(metric, query_ids)
            tests.append(paired(baseline.letter, side.letter, metric, before, after))
    return tests


def _main_metrics(side: Side) -> list[str]:
    """By label column; without those that no query has a value in."""
    assert side.measured is not None
    values = side.measured.values
    metrics = [f"{column}/{name}" for column in label_columns([side.views[side.view]]) for name in SHOWN]
    return [metric for metric in metrics if metric in values and not np.isnan(values[metric]).all()]


def _query_values(alike: Sequence[Side]) -> QueryValues | None:
    """In the first main metric that all have."""
    metrics = [_main_metrics(side) for side in alike]
    common = [metric for metric in metrics[0] if all(metric in others for others in metrics)] if metrics else []
    if len(alike) < 2 or not common:
        return None
    baseline = alike[0].measured
    assert baseline is not None
    values = {side.letter: side.aligned(common[0], baseline.query_ids) for side in alike}
    return QueryValues(common[0], baseline.query_ids, baseline.queries, values)


def _about_data(sides: Sequence[Side], split: str) -> list[str]:
    notes = []
    if len({side.manifest for side in sides}) > 1:
        notes.append("These runs were evaluated on different data: their numbers do not compare.")
    older = [side for side in sides if side.measured is None]
    if older and len(sides) > 1:
        commands = ", ".join(_evaluation(side, split) for side in older)
        letters = ", ".join(side.letter for side in older)
        notes.append(
            f"No values per query in {letters}: for paired tests, {commands} and compare the new folders; only a run "
            "that this version trained can be evaluated again, so train an older one again."
        )
    return notes


def _about_protocols(sides: Sequence[Side], split: str) -> list[str]:
    """About each run that was not measured as the baseline was, and how to measure it so."""
    first, *others = sides
    notes = []
    for side in others:
        differ = {name: (side.protocol[name], wanted) for name, wanted in first.protocol.items()}
        differ = {name: (given, wanted) for name, (given, wanted) in differ.items() if given != wanted}
        if differ:
            said = ", ".join(f"{name} is {given}, not {wanted}" for name, (given, wanted) in differ.items())
            options = [f"--model.evaluation.{name}={wanted}" for name, (_, wanted) in differ.items()]
            notes.append(
                f"{side.letter} was measured otherwise than {first.letter} ({said}): their numbers do not compare and "
                f"are not tested; {_evaluation(side, split, options)}, then compare the new folder."
            )
    return notes


def _evaluation(side: Side, split: str, options: Sequence[str] = ()) -> str:
    """The command that evaluates a run as it was, but with these options."""
    own, data = home(side.path), side.made.get("run.data")
    command = f"make eval RUN={own}"
    if data and side.path.resolve() != own:
        command += f" DATA={data}"
    if split != "test":
        command += f" SPLIT={split}"
    arguments = " ".join([*filter(None, [side.made.get(OVERRIDES)]), *options])
    return f'`{command} ARGS="{arguments}"`' if arguments else f"`{command}`"


def _about_settings(sides: Sequence[Side]) -> list[str]:
    unknown = [f"{side.letter} ({home(side.path)})" for side in sides if side.path.is_dir() and not side.configured]
    if not unknown or len(sides) == 1:
        return []
    return [f"No config.yaml of {', '.join(unknown)}: the settings it was trained with are not among what differs."]


def _about_tests(tests: Sequence[Paired]) -> list[str]:
    return [
        f"{test.left_out} queries have {test.metric} in {test.baseline} or {test.run} alone: the test leaves them out."
        for test in tests
        if test.left_out
    ]

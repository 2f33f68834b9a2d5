"""A run file made by another system, measured as a run of ours was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from mmfusion.batch import RetrievalData
from mmfusion.retrieval.evaluation import Evaluation
from mmfusion.retrieval.metrics import parse_metric, ranked_gains, with_policy
from mmfusion.retrieval.trec import Run, read_run


@dataclass(frozen=True)
class Measured:
    """A view's values: values[metric][i] is that of the query with the id query_ids[i] and the text queries[i]."""

    query_ids: list[str]
    queries: list[str]
    values: dict[str, Float[np.ndarray, "query"]]


def measure_run_file(
    path: Path,
    data: RetrievalData,
    split: str,
    metrics: Sequence[str],
    options: Evaluation,
    others: Mapping[str, str],
) -> tuple[Measured, list[str]]:
    """Measures a run file on a split in `<label column>/<name>` metrics; also what is to be said about the file.

    Queries are those with judgments, and `others` of the split (id to text). Those that the file lacks count as having
    found nothing, as in trec_eval -c; those of other splits are ignored; how many is said. Of options, depth,
    no_positive and unjudged hold. Raises ValueError where no query is the split's, and on an unknown product.
    """
    run, judgments = read_run(path), data.judgments(split)
    judged = np.unique(judgments.query)
    names = data.query_ids(judged)
    known = set(names)
    unjudged = {id: text for id, text in others.items() if id not in known}
    query_ids = np.append(judged, 1 + judged.max(initial=-1) + np.arange(len(unjudged)))  # ids that no judgment has
    names, texts = [*names, *unjudged], [*data.query_texts(judged), *unjudged.values()]
    said = _coverage(path, run, names, split)
    ids = _dense(path, run, names, data.product_ids(), options.depth)
    columns = {metric.rpartition("/")[0] for metric in metrics}
    ranked = {column: ranked_gains(ids, query_ids, judgments, column, options.unjudged) for column in columns}
    values = {}
    for metric in metrics:
        column, _, name = metric.rpartition("/")
        measure = parse_metric(name, options.depth, judgments.labels.get(column, {}))
        values[metric] = with_policy(measure(ranked[column]), options.no_positive)
    return Measured(names, texts, values), said


def _coverage(path: Path, run: Run, names: Sequence[str], split: str) -> list[str]:
    missing, foreign = set(names) - set(run), set(run) - set(names)
    if len(missing) == len(names):
        raise ValueError(
            f"{path} has no query of the split {split!r}: its ids are such as {min(run)!r}, the split's such as "
            f"{min(names, default='')!r}; write the run with the catalogue's query ids"
        )
    said = []
    if missing:
        said.append(f"{path} lacks {len(missing)} of {len(names)} queries: they count as having found nothing.")
    if foreign:
        said.append(f"{path} holds {len(foreign)} queries that are not of the split {split!r}: they are ignored.")
    return said


def _dense(
    path: Path, run: Run, names: Sequence[str], product_ids: Sequence[str], depth: int
) -> Int[np.ndarray, "query k"]:
    """The lists as dense ids, padded by -1."""
    of_name = {name: id for id, name in enumerate(product_ids)}
    ids = np.full((len(names), depth), -1)
    for row, query in zip(ids, names, strict=True):
        found = [product for product, _ in run.get(query, [])]
        unknown = next((product for product in found if product not in of_name), None)
        if unknown is not None:
            raise ValueError(
                f"{path}: product {unknown!r} of query {query!r} is not in the catalogue, whose ids are such as "
                f"{product_ids[0]!r}; compare runs on the same products"
            )
        row[: len(found)] = [of_name[product] for product in found[:depth]]
    return ids

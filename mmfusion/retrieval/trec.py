"""TREC's files, as trec_eval reads them: runs (qid Q0 docid rank score tag) and qrels (qid 0 docid level).

trec_eval looks at neither the lines' order nor their ranks: it orders a query's products by score, as fp32, and equal
scores by id, both descending. So does `topk.search`, whose lists come out as they went in.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mmfusion.batch import Judgments
from mmfusion.retrieval.topk import TopK

FP32 = float(np.finfo(np.float32).max)

Run = dict[str, list[tuple[str, float]]]  # per query id (product id, score), best first


def write_run(path: Path, query_ids: Sequence[str], top: TopK, product_ids: Sequence[str], tag: str) -> None:
    """Writes the lists of `top`, one per query id, without their pads; product_ids are those of the whole catalogue.

    Scores have nine digits, which tell any two fp32 numbers apart. Raises ValueError on ids that a file cannot hold.
    """
    with path.open("w", encoding="utf-8") as file:
        for query, ids, scores in zip(query_ids, top.ids.tolist(), top.scores.tolist(), strict=True):
            found = [(score, _id(product_ids[id])) for score, id in zip(scores, ids, strict=True) if id >= 0]
            assert found == sorted(found, reverse=True), f"query {query}: trec_eval would order these otherwise"
            for rank, (score, product) in enumerate(found, 1):
                file.write(f"{_id(query)} Q0 {product} {rank} {score:.9g} {_id(tag)}\n")


def write_qrels(
    path: Path, judgments: Judgments, query_ids: Sequence[str], product_ids: Sequence[str], column: str
) -> None:
    """Writes a label column's judgments, and beside them `<path>.levels.json`: what the levels mean.

    query_ids: the query of each judgment. product_ids: of the whole catalogue. Levels are integers: 0 is worth nothing,
    those above are the column's gains in ascending order; gains that are integers stay as they are.
    levels.json: {"gains": {level: gain}, "relevant_from": level}. With -l relevant_from, trec_eval's recall, map,
    recip_rank, P and success are our recall, map, mrr, precision and hit_rate. It takes levels for gains: where gains
    are no integers its ndcg_cut is another number than our ndcg, and -m ndcg alone, of whole lists, can be given gains
    (-m ndcg.1=3.5,2=9.0).
    """
    gain = judgments.gain[column]
    levels = _levels(np.append(gain[~np.isnan(gain)], list(judgments.labels.get(column, {}).values())))
    level_of = {gain: level for level, gain in levels.items()}
    with path.open("w", encoding="utf-8") as file:
        for query, product, worth in zip(query_ids, judgments.product.tolist(), gain.tolist(), strict=True):
            if not math.isnan(worth):
                file.write(f"{_id(query)} 0 {_id(product_ids[product])} {level_of[max(worth, 0.0)]}\n")
    relevant = [level for level, worth in levels.items() if worth >= judgments.positive_from[column]]
    meaning = {"gains": levels, "relevant_from": min(relevant, default=max(levels) + 1)}
    path.with_name(f"{path.name}.levels.json").write_text(json.dumps(meaning, indent=2), encoding="utf-8")


def read_run(path: Path) -> Run:
    """The run's lists in trec_eval's order. Raises ValueError, with file and line, on what trec_eval could not read."""
    scores: dict[str, dict[str, float]] = {}
    for line, query, product, score in _lines(path):
        of_query = scores.setdefault(query, {})
        if product in of_query:
            raise ValueError(f"{path}:{line}: product {product!r} comes twice for query {query!r}; list it once")
        of_query[product] = score
    if not scores:
        raise ValueError(f"{path} is empty; expected lines such as: q1 Q0 p1 1 0.5 tag")
    return {query: sorted(found.items(), key=_order, reverse=True) for query, found in scores.items()}


def _order(found: tuple[str, float]) -> tuple[float, str]:
    return found[1], found[0]


def _lines(path: Path) -> Iterator[tuple[int, str, str, float]]:
    """Line number, query id, product id and fp32 score. Fields are parted by ASCII whitespace, as in C."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if not fields:
                continue
            if len(fields) != 6:
                raise ValueError(
                    f"{path}:{number}: expected 6 fields such as: q1 Q0 p1 1 0.5 tag; received {len(fields)}: "
                    f"{line[:80].decode('utf-8', 'replace').strip()}"
                )
            query, product = _decoded(fields[0], path, number), _decoded(fields[2], path, number)
            yield number, query, product, _score(fields[4], path, number)


def _decoded(field: bytes, path: Path, line: int) -> str:
    try:
        return field.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}:{line}: the id {field!r} is not UTF-8; write the file in UTF-8") from None


def _score(field: bytes, path: Path, line: int) -> float:
    try:
        score = float(field)
    except ValueError:
        score = math.nan
    if not abs(score) <= FP32:
        received = field.decode("utf-8", "replace")
        raise ValueError(f"{path}:{line}: expected a finite score as the fifth field, received {received!r}")
    return float(np.float32(score))


def _id(id: str) -> str:
    if id.encode().split() != [id.encode()]:
        raise ValueError(f"the id {id!r} is empty or holds whitespace, which TREC's files cannot; give it another name")
    return id


def _levels(gains: np.ndarray) -> dict[int, float]:
    """What each level is worth; gains below 0 are worth nothing, as they are in metrics."""
    worth = np.union1d(gains.clip(min=0), 0.0).tolist()
    whole = all(gain.is_integer() for gain in worth)
    return {int(gain) if whole else rank: gain for rank, gain in enumerate(worth)}

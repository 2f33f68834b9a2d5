"""Queries of Marqo-GS: those trained on, and those that the ground truth files of the evaluated parts name."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from datamodules.importers.json_entries import json_entries
from datamodules.importers.published import published_files, require
from datamodules.importing.tables import csv_batches

PARTS = {  # which half of the queries (0: seen), and which corpus
    "in_domain": ("0", "1"),
    "novel_query": ("1", "1"),
    "novel_corpus": ("0", "2"),
    "zero_shot": ("1", "2"),
}
END = "_{!@#~}_"  # behind a query's text where GCL's evaluation makes an id of it
FILES = "Marqo-GS (marqo-ai/GCL)"


class Judged(NamedTuple):
    """A file of triplets; `ids` of the queries that count there, by text; `least`: products that each must have."""

    path: Path
    ids: dict[str, str]
    least: dict[str, int]


@dataclass(frozen=True)
class Query:
    id: str
    split: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Queries:
    """`train`: ids by text. `evaluated`: per half of the queries, by text. `judged`: files with their scores."""

    train: dict[str, str]
    evaluated: dict[str, dict[str, Query]]
    judged: list[Judged]
    in_both: int  # texts that are in dev and in test, and so in test only

    def rows(self) -> Iterator[dict[str, str]]:
        for text, id in self.train.items():
            yield {"query_id": id, "query": text, "split": "train", "part": "train"}
        for queries in self.evaluated.values():
            for text, query in queries.items():
                yield {"query_id": query.id, "query": text, "split": query.split, "part": "+".join(query.parts)}


def triplets(folder: Path, half: str, corpus: str) -> Path:
    return published_files(folder, [f"{stem(half, corpus)}.csv"], FILES)[0]


def stem(half: str, corpus: str) -> str:
    return f"query_{half}_product_id_{int(corpus) - 1}"


def read_queries(folder: Path, evaluate: Sequence[str], corpora: Sequence[str]) -> Queries:
    """Raises FileNotFoundError or ValueError that names what is missing. Holds texts and counts, but no judgments."""
    train_file = triplets(folder, "0", "1")
    train = {text: _id("train", text) for text in _distinct(train_file)}
    split: dict[str, dict[str, str]] = {half: {} for half in sorted({PARTS[part][0] for part in evaluate})}
    parts: dict[str, dict[str, list[str]]] = {half: {} for half in split}
    least: dict[tuple[str, str], dict[str, int]] = {}
    dev: set[tuple[str, str]] = set()
    for kind in ("dev", "test"):
        for part in evaluate:
            half, corpus = PARTS[part]
            for text, products in _ground_truth(folder, part, kind):
                dev.update([(half, text)] if kind == "dev" else [])
                split[half][text] = "val" if kind == "dev" else "test"
                named = parts[half].setdefault(text, [])
                named.extend([part] if part not in named else [])
                least.setdefault((half, corpus), {})[text] = products
    evaluated = {
        half: {
            text: Query(
                _id(f"half {half}", text), split[half][text], tuple(name for name in PARTS if name in parts[half][text])
            )
            for text in split[half]
        }
        for half in split
    }
    judged = [Judged(train_file, train, {})]
    for half, queries in evaluated.items():
        ids = {text: query.id for text, query in queries.items()}
        judged += [Judged(triplets(folder, half, corpus), ids, least.get((half, corpus), {})) for corpus in corpora]
    return Queries(train, evaluated, judged, sum(split[half][text] == "test" for half, text in dev))


def _id(kind: str, text: str) -> str:
    """Of the text alone, so that it is the same whatever is evaluated beside."""
    return blake2b(f"{kind}\0{text}".encode(), digest_size=8).hexdigest()


def _distinct(path: Path) -> Iterator[str]:
    """Texts in the order of their first row."""
    require(path, ["query"])
    seen: set[str] = set()
    for batch in csv_batches(path):
        new = [text for text in pc.unique(batch["query"]).to_pylist() if text not in seen]
        seen.update(new)
        yield from new


def _ground_truth(folder: Path, part: str, kind: str) -> Iterator[tuple[str, int]]:
    """Text of each query, and how many products it lists."""
    name = stem(*PARTS[part])
    path = published_files(folder, [f"{name}_gt_{kind}.json"], FILES)[0]
    texts = _named_texts(folder / f"{name}_queries.json") | _numbered_texts(folder / f"{name}.csv")
    for key, products in json_entries(path):
        if not isinstance(products, dict):
            raise ValueError(f"{path}: query {key!r} has {products!r}; expected {{product id: score}}")
        yield texts.get(key, key).removesuffix(END), len(products)


def _named_texts(path: Path) -> dict[str, str]:
    """What the queries file calls each query, {} when it is a list of texts or is not there: then texts are the ids."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON or cut short: {error}") from error
    if isinstance(content, list):
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {str(content)[:40]!r}; expected an object of queries, or a list of texts")
    texts: dict[str, Any] = {
        key: value.get("query") if isinstance(value, dict) else value for key, value in content.items()
    }
    bad = next((key for key, text in texts.items() if not isinstance(text, str)), None)
    if bad is not None:
        raise ValueError(f"{path}: query {bad!r} is {content[bad]!r}; expected its text, or an object with 'query'")
    return texts


def _numbered_texts(path: Path) -> dict[str, str]:
    """Text by query_id, where the triplets have that column."""
    if not path.is_file() or "query_id" not in require(path, ["query"]):
        return {}
    texts: dict[str, str] = {}
    for batch in csv_batches(path):
        pairs = pa.table({"id": batch["query_id"], "query": batch["query"]}).group_by(["id", "query"]).aggregate([])
        texts |= {pair["id"]: pair["query"] for pair in pairs.to_pylist()}
    return texts

"""Marqo-GS as published, in small: its four parts, two corpora, and files that vary between releases."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules.importers import json_entries as json_entries_module
from datamodules.importers.json_entries import json_entries
from datamodules.importers.marqo_gs import MarqoGS
from tests.datamodules.streams import column, content, rows

SEEN, NOVEL = ("red dress", "blue hat"), ("green bag", "Ski, boots", "old lamp")
CORPORA = {"0": ("1", "2"), "1": ("3", "4")}  # product ids
SCORES = {"red dress": 100, "blue hat": 40, "green bag": 90, "Ski, boots": 70, "old lamp": 10}


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Every query lists both products of each corpus, the second with a score of 1."""
    folder = tmp_path / "marqo_gs_tiny"
    (folder / "images").mkdir(parents=True)
    for half, ids in CORPORA.items():
        entries = {
            id: {"title": f"product {id}", "image_local": f"/far/away/images/{id}.png", "price": 1} for id in ids
        }
        (folder / f"corpus_{int(half) + 1}.json").write_text(json.dumps(entries))
        for id in ids:
            Image.new("RGB", (4, 4), (60 * int(id), 0, 0)).save(folder / "images" / f"{id}.png")
        for group, texts in (("0", SEEN), ("1", NOVEL)):
            write_part(folder, f"query_{group}_product_id_{half}", texts, ids)
    write_truth(folder, "query_0_product_id_0", dev=["blue hat"], test=["red dress"])
    write_truth(folder, "query_1_product_id_0", dev=["old lamp", "green bag"], test=["Ski, boots"])
    write_truth(folder, "query_0_product_id_1", dev=["red dress"], test=["blue hat"])
    write_truth(folder, "query_1_product_id_1", dev=["Ski, boots"], test=["green bag"])
    return folder


def write_part(folder: Path, name: str, texts: Sequence[str], ids: Sequence[str], **more: str) -> None:
    header = ["query", "product_id", "title", "image_local", "position", "score_linear", "score_reciprocal", *more]
    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(header)
        for text in texts:
            for id, score in zip(ids, (SCORES[text], 1), strict=True):
                writer.writerow(
                    [text, id, f"product {id}", f"images/{id}.png", 101 - score, score, score / 100, *more.values()]
                )


def write_truth(folder: Path, name: str, end: str = "_{!@#~}_", **queries: Sequence[str]) -> None:
    ids = CORPORA[name[-1]]
    for kind, texts in queries.items():
        truth = {text + end: dict(zip(ids, (SCORES[text], 1), strict=True)) for text in texts}
        (folder / f"{name}_gt_{kind}.json").write_text(json.dumps(truth))
    (folder / f"{name}_queries.json").write_text(
        json.dumps([text + end for texts in queries.values() for text in texts])
    )


def marqo(src: Path, **options: Any) -> MarqoGS:
    return MarqoGS(src=str(src), out=str(src.parent / "out"), **options)


def told(source: Any) -> tuple[dict[tuple[str, str], str], dict[tuple[str, str], list[tuple[str, str]]]]:
    """Part of each (split, query), and its (product, score_linear)."""
    queries = {row["query_id"]: row for row in rows(source.queries)}
    parts = {(row["split"], row["query"]): row["part"] for row in queries.values()}
    assert len(parts) == len(queries)
    judged: dict[tuple[str, str], list[tuple[str, str]]] = {key: [] for key in parts}
    for row in rows(source.judgments):
        query = queries[row["query_id"]]
        judged[query["split"], query["query"]].append((row["product_id"], row["score_linear"]))
    return parts, judged


def test_novel_queries_on_the_trained_corpus_are_the_default(src: Path) -> None:
    source = marqo(src).source()
    parts, judged = told(source)
    assert parts == {
        ("train", "red dress"): "train", ("train", "blue hat"): "train", ("val", "old lamp"): "novel_query",
        ("val", "green bag"): "novel_query", ("test", "Ski, boots"): "novel_query",
    }  # fmt: skip
    assert judged["train", "red dress"] == [("1", "100"), ("2", "1")]
    assert judged["test", "Ski, boots"] == [("1", "70"), ("2", "1")]
    assert rows(source.products) == [
        {"product_id": id, "title": f"product {id}", "corpus": "1", "image": f"{id}.png"} for id in ("1", "2")
    ]
    assert rows(source.judgments)[0]["score_reciprocal"] == "1.0"
    assert source.name == "marqo_gs_tiny"


def test_zero_shot_brings_the_other_corpus_and_its_judgments(src: Path) -> None:
    """ "green bag" is dev on corpus 1 and test on corpus 2: it is tested, on both; "Ski, boots" the other way round."""
    source = marqo(src, evaluate=["novel_query", "zero_shot"]).source()
    parts, judged = told(source)
    assert {key: part for key, part in parts.items() if key[0] != "train"} == {
        ("val", "old lamp"): "novel_query", ("test", "green bag"): "novel_query+zero_shot",
        ("test", "Ski, boots"): "novel_query+zero_shot",
    }  # fmt: skip
    assert judged["val", "old lamp"] == [("1", "10"), ("2", "1"), ("3", "10"), ("4", "1")]
    assert judged["train", "red dress"] == [("1", "100"), ("2", "1")]
    assert column(source.products, "corpus") == ["1", "1", "2", "2"]
    assert source.options["left_out"] == {"dev queries that are test queries, too": 2}


def test_zero_shot_alone(src: Path) -> None:
    parts, judged = told(marqo(src, evaluate=["zero_shot"]).source())
    assert {key: part for key, part in parts.items() if key[0] != "train"} == {
        ("val", "Ski, boots"): "zero_shot", ("test", "green bag"): "zero_shot",
    }  # fmt: skip
    assert [product for product, _ in judged["test", "green bag"]] == ["1", "2", "3", "4"]


def test_seen_queries_are_evaluated_only_when_named(src: Path) -> None:
    importer = marqo(src, evaluate=["novel_query", "in_domain"])
    assert importer.max_shared_queries == 1.0
    assert marqo(src).max_shared_queries == 0.0
    parts, judged = told(importer.source())
    assert parts["val", "blue hat"] == parts["test", "red dress"] == "in_domain"
    assert judged["test", "red dress"] == judged["train", "red dress"]
    manifest = importer.run()
    assert {name: split.queries for name, split in manifest.splits.items()} == {"train": 2, "val": 3, "test": 2}


def test_a_query_keeps_its_id_whatever_is_evaluated(src: Path) -> None:
    one, all_ = (
        {
            row["query"]: row["query_id"]
            for row in rows(marqo(src, evaluate=parts).source().queries)
            if row["split"] == "val"
        }
        for parts in (["novel_query"], ["zero_shot", "novel_query"])
    )
    assert one["old lamp"] == all_["old lamp"]


@pytest.mark.parametrize("form", ["texts", "mapping", "objects", "column"])
def test_ground_truth_names_queries_in_several_ways(src: Path, form: str) -> None:
    ids = {"old lamp": "q7", "green bag": "q8", "Ski, boots": "q9"}
    name = "query_1_product_id_0"
    if form == "texts":
        write_truth(src, name, end="", dev=["old lamp", "green bag"], test=["Ski, boots"])
    else:
        for kind, texts in (("dev", ["old lamp", "green bag"]), ("test", ["Ski, boots"])):
            truth = {ids[text]: {"1": SCORES[text], "2": 1} for text in texts}
            (src / f"{name}_gt_{kind}.json").write_text(json.dumps(truth))
    named: dict[str, Mapping[str, Any]] = {
        "mapping": {id: text for text, id in ids.items()},
        "objects": {id: {"query": text} for text, id in ids.items()},
    }
    if form in named:
        (src / f"{name}_queries.json").write_text(json.dumps(named[form]))
    if form == "column":
        (src / f"{name}_queries.json").unlink()
        lines = [f"{text!r}".replace("'", '"') + f",{p},{SCORES[text]},{ids[text]}\n" for text in ids for p in (1, 2)]
        (src / f"{name}.csv").write_text("query,product_id,score_linear,query_id\n" + "".join(lines))
    parts, judged = told(marqo(src).source())
    assert set(parts) == {("train", q) for q in SEEN} | {
        ("val", "old lamp"),
        ("val", "green bag"),
        ("test", "Ski, boots"),
    }
    assert judged["val", "green bag"][0] == ("1", "90")


def test_a_ground_truth_of_another_release(src: Path) -> None:
    write_truth(src, "query_1_product_id_0", end="?", dev=["old lamp"], test=["Ski, boots"])
    with pytest.raises(
        ValueError, match=r"product_id_0\.csv has 0 products for the query 'old lamp\?', whose ground truth lists 2"
    ):
        list(marqo(src).source().judgments.batches())


def test_what_is_missing_is_named(src: Path) -> None:
    path = src / "query_0_product_id_0.csv"
    path.write_text(path.read_text().replace("score_linear", "score"))
    with pytest.raises(
        ValueError, match=r"query_0_product_id_0\.csv has no column 'score_linear'; its columns are: query"
    ):
        marqo(src).source()
    (src / "query_1_product_id_0_gt_dev.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no query_1_product_id_0_gt_dev\.json"):
        _ = marqo(src)._queries
    (src / "corpus_2.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no corpus_2\.json"):
        marqo(src, evaluate=["zero_shot"]).source()
    with pytest.raises(ValueError, match=r"evaluate is \[\]; expected one or more of in_domain"):
        marqo(src, evaluate=[])


def test_titles_that_are_nan_and_photos_that_are_nowhere(src: Path) -> None:
    corpus = src / "corpus_1.json"
    corpus.write_text('{"1": {"title": NaN, "image_local": null}, "2": {"title": "b", "image": "x/y/2.png"}}')
    assert [(row["title"], row["image"]) for row in rows(marqo(src).source().products)] == [("", ""), ("b", "2.png")]
    corpus.write_text('{"1": {"name": "a", "image": "x"}}')
    with pytest.raises(
        ValueError, match="product '1' has no title or no image_local or image; its keys are: name, image"
    ):
        rows(marqo(src).source().products)
    corpus.write_text('{"1": {"title": "a"}}')
    assert rows(marqo(src, images="none").source().products) == [{"product_id": "1", "title": "a", "corpus": "1"}]
    with pytest.raises(ValueError, match="images=none takes products without photos"):
        rows(marqo(src).source().products)
    with pytest.raises(FileNotFoundError, match="images is 'nowhere', which is no folder"):
        marqo(src, images="nowhere").source()


def test_through_to_shards(src: Path) -> None:
    manifest = marqo(src, evaluate=["novel_query", "zero_shot"]).run()
    assert (manifest.products, manifest.photos, manifest.missing_photos) == (4, 4, 0)
    assert list(manifest.labels) == ["score_linear", "score_reciprocal"]
    assert manifest.labels["score_linear"].gains is None
    assert manifest.fields == ["title", "corpus"]
    assert sum(shard.pairs for shard in manifest.shards) == 4
    assert {name: (split.queries, split.judgments) for name, split in manifest.splits.items()} == {
        "train": (2, 4), "val": (1, 4), "test": (2, 8),
    }  # fmt: skip
    photos = (src / "images").rename(src.parent / "images_wfash")
    again = MarqoGS(
        src=str(src), out=str(src.parent / "again"), evaluate=["novel_query", "zero_shot"], images=str(photos)
    )
    again.run()
    assert content(src.parent / "again") == content(src.parent / "out")


def test_queries_in_two_splits_are_let_through_by_design_or_as_asked_for(src: Path) -> None:
    assert marqo(src).max_shared_queries == 0
    assert marqo(src, evaluate="in_domain").max_shared_queries == 1
    assert marqo(src, evaluate="in_domain", max_shared_queries=0.2).max_shared_queries == 0.2


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_entries_of_a_large_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Whatever the length of what is read at once: json.load is the reference."""
    monkeypatch.setattr(json_entries_module, "CHUNK", chunk)
    path = tmp_path / "entries.json"
    for text in ("{}", " { } ", '{"a": 12345, "b": {"c": [1, "}, {"]}, "é\\"": "x",\n"n": null }\n', '{"a": 1.5e3}'):
        path.write_text(text, encoding="utf-8")
        assert dict(json_entries(path)) == json.loads(text)


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"a": 1', '{"a": 1,, "b": 2}', '{"a" 1}', '{"a": 1 "b": 2}', "{1: 2}", '{"a": tru']
)
def test_what_is_no_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "entries.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"entries\.json"):
        dict(json_entries(path))


def test_an_entry_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_entries_module, "CHUNK", 8)
    monkeypatch.setattr(json_entries_module, "LONGEST", 64)
    path = tmp_path / "entries.json"
    path.write_text('{"a": "' + "x" * 1000 + '"}')
    with pytest.raises(ValueError, match="cut short, after the start"):
        dict(json_entries(path))
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="no UTF-8"):
        dict(json_entries(path))

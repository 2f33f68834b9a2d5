"""What W&B shows is what the run folder holds, offline too; and the dashboard shows nothing that no run logs."""

import io
import json
import re
import runpy
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import wandb
from PIL import Image
from wandb.proto import wandb_internal_pb2

from mmfusion.dashboard import final_values, log_evaluation
from mmfusion.gallery import example_queries, first_products
from mmfusion.loggers import Wandb, make_loggers, wandb_settings
from mmfusion.outcome import leave
from mmfusion.retrieval.html.sections import Focus
from mmfusion.retrieval.html.sections import galleries as galleries_of_the_report
from mmfusion.retrieval.records import read
from tests.small_run import small_data, small_module, small_shards, small_trainer

LAYOUT = Path(__file__).parents[2] / "experiments" / "dashboard.py"
NDCG = "relevance/ndcg@10"
TEXT = (0.1, 0.2, 0.3, 0.4, 0.5, None)  # nDCG@10 of six queries
FUSED = (0.9, 0.2, 0.1, 0.4, 0.6, 0.5)
# fused less text: .8, 0, -.2, 0, .1, undefined


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    """Nor a home that is not empty; returns that home."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def cell(value: float | None, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": 0.0, "high": 1.0, **more}


def jpeg(colour: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (96, 64), colour).save(content, "JPEG")
    return content.getvalue()


def write_evaluation(folder: Path, photos: tuple[bytes | None, bytes | None] = (jpeg("red"), None)) -> Path:
    """Six queries, q0 to q5, that find p0 (E) and p1 (not judged) under text and fused; photos: those that are kept.

    Of the catalogue's products p1 alone has no photo.
    """
    folder.mkdir(parents=True)
    results = {
        "test": {"text": {NDCG: cell(0.3)}, "fused": {NDCG: cell(0.45), "relevance/mrr": cell(None)}},
        "slices": {"test": {"words": {"1": {"fused": {NDCG: cell(0.7, queries=2)}}}}},
        "calibration": {
            "test": {
                "text": [{"low": 0.1, "high": 0.5, "pairs": 4, "relevant": 0.25}],
                "fused": [{"low": 0.1, "high": 0.5, "pairs": 0, "relevant": None}],
            }
        },
        "run": {"primary": "fused"},
    }
    (folder / "results.json").write_text(json.dumps(results))
    of_query = [
        {"split": "test", "view": view, "query_id": f"q{n}", "query": f"query {n}", NDCG: value}
        for view, values in (("text", TEXT), ("fused", FUSED))
        for n, value in enumerate(values)
    ]
    found = [
        {"split": "test", "view": view, "query_id": f"q{n}", "rank": rank, "product_id": product, "score": 1.0 / rank,
         "label/relevance": label, "label/stars": "5", "gain/relevance": 1.0}
        for view in ("text", "fused") for n in range(6)
        for rank, product, label in ((2, "p1", None), (1, "p0", "E"))
    ]  # fmt: skip
    products = [
        {"product_id": f"p{n}", "title": f"<b>title</b> {n}", "has_photo": n == 0, "photo": photo}
        for n, photo in enumerate(photos)
    ]
    schema = pa.schema([
        ("product_id", pa.string()), ("title", pa.string()), ("has_photo", pa.bool_()), ("photo", pa.binary()),
    ])  # fmt: skip
    pq.write_table(pa.Table.from_pylist(of_query), folder / "per_query.parquet")
    pq.write_table(pa.Table.from_pylist(found), folder / "rankings.parquet")
    pq.write_table(pa.Table.from_pylist(products, schema), folder / "products.parquet")
    return folder


def wandb_records(offline: Path) -> Iterator[Any]:
    """The records of a run's file: LevelDB's log format after a header of seven bytes."""
    (path,) = offline.glob("*.wandb")
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def logged(offline: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last value of everything in the history and in the summary, once W&B's own process has written its file."""
    history: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    until = time.monotonic() + 30
    while not (records := list(wandb_records(offline))) or not records[-1].HasField("exit"):
        assert time.monotonic() < until, "the run's file has no end"
        time.sleep(0.05)
    for record in records:
        for into, items in ((history, record.history.item), (summary, record.summary.update)):
            into.update({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return history, summary


def table(offline: Path, key: str) -> dict[str, Any]:
    (path,) = (offline / "files/media/table" / key).parent.glob(f"{Path(key).name}_[0-9]*.table.json")
    return json.loads(path.read_text())


def test_a_run_offline_holds_what_its_folder_holds(no_key, tmp_path):
    folder = write_evaluation(tmp_path / "run")
    (folder / "report.html").write_text("<p>the report</p>")
    run = wandb.init(dir=str(folder), project="p", settings=wandb_settings("offline"))
    for step, value in enumerate((0.1, 0.6, 0.3)):
        run.log({"val/primary": value, "trainer/global_step": step})
    log_evaluation(run, folder, best=0.6)
    run.finish()
    (offline,) = (folder / "wandb").glob("offline-run-*")
    history, summary = logged(offline)
    assert history["val/primary"] == 0.3
    assert {name: summary[name] for name in summary if name.startswith(("final/", "val/"))} == {
        "val/primary": 0.6, "final/primary": 0.45, f"final/test/text/{NDCG}": 0.3, f"final/test/fused/{NDCG}": 0.45,
    }  # fmt: skip
    assert table(offline, "results/test")["data"] == [
        ["text", NDCG, 0.3, 0, 1], ["fused", NDCG, 0.45, 0, 1], ["fused", "relevance/mrr", None, 0, 1],
    ]  # fmt: skip
    assert table(offline, "slices/test")["data"] == [["words", "1", "fused", NDCG, 2, 0.7, 0, 1]]
    assert table(offline, "charts/views/test_table")["data"] == [["text", 0.3], ["fused", 0.45]]
    assert table(offline, "charts/slices/test/words_table")["data"] == [["1", 0.7]]
    assert table(offline, "charts/calibration/test_table")["data"] == [[1, "text", 0.25]], "no pairs, no point"
    assert (offline / "files/report.html").read_text() == "<p>the report</p>"
    assert not (offline / "files/report.html").is_symlink()
    examples = table(offline, "examples/test")
    assert examples["columns"] == ["query", "shown as", "view", NDCG, *map(str, range(1, 11))]
    shown = example_queries(read(folder), "test")
    queries = [("query 0", "text", 0.1), ("query 0", "fused", 0.9), ("query 4", "text", 0.5), ("query 4", "fused", 0.6)]
    assert [(row[0], *row[2:4]) for row in examples["data"]][:4] == queries
    assert [row[1] for row in examples["data"]] == [why for why in shown.values() for _ in range(2)]
    assert all(row[4:] == ["Image"] * 2 + [None] * 8 for row in examples["data"])


def test_the_photos_of_an_offline_run_wait_in_its_own_folder(no_key, tmp_path):
    folder = write_evaluation(tmp_path / "run")
    run = wandb.init(dir=str(folder), project="p", settings=wandb_settings("offline"))
    log_evaluation(run, folder)
    run.finish()
    colours = set()
    for path in folder.glob("wandb/offline-run-*/artifacts/staging/*"):
        if path.read_bytes()[:2] == b"\xff\xd8":
            colours.add(Image.open(path).convert("RGB").getpixel((40, 40)))
    assert colours == {(254, 0, 0), (211, 211, 211)}, "the red photo, and grey where there is none"
    assert not list(no_key.rglob("staging"))


def test_final_primary_is_the_test_value_of_the_first_label_column():
    views = {"fused": {NDCG: cell(0.5), "desirability/ndcg@10": cell(0.9)}, "text": {NDCG: cell(0.7)}}
    values = final_values({"val": views, "test": views, "slices": {"test": {}}, "run": {"primary": "fused"}})
    assert values["final/primary"] == 0.5
    assert len(values) == 7
    assert "final/primary" not in final_values({"val": views, "run": {"primary": "fused"}})


def test_examples_are_the_galleries_of_the_report(tmp_path):
    records = read(write_evaluation(tmp_path / "run"))
    found = example_queries(records, "test")
    gained = [query for query, why in found.items() if why.startswith("fused gains most over text")]
    lost = [query for query, why in found.items() if why.startswith("fused loses most to text")]
    assert (gained, lost) == (["q0", "q4"], ["q2"])
    assert list(found)[:3] == ["q0", "q4", "q2"]
    assert sum("Drawn at random" in why for why in found.values()) == 5
    focus = Focus.of(records.results, "test")
    galleries, _ = galleries_of_the_report(records, focus)
    for gallery in galleries:
        assert [query for query in found if gallery.title in found[query]] == sorted(
            gallery.query_ids, key=list(found).index
        )
    assert {query for gallery in galleries for query in gallery.query_ids} == {*found}


def test_without_another_view_examples_are_drawn_at_random(tmp_path):
    records = read(write_evaluation(tmp_path / "run"))
    records.results["run"]["primary"] = "text"
    assert set(example_queries(records, "test").values()) == {"Drawn at random"}


def test_captions_say_rank_labels_title_and_why_there_is_no_photo(tmp_path):
    red = jpeg("red")
    records = read(write_evaluation(tmp_path / "run", (red, None)))
    found = first_products(records, "test", ["q3"])
    assert set(found) == {("q3", "text"), ("q3", "fused")}
    without = ("2 · not judged/5 · <b>title</b> 1 · no photo", None)
    assert found["q3", "fused"] == [("1 · E/5 · <b>title</b> 0", red), without]
    records = read(write_evaluation(tmp_path / "no room", (None, None)))
    unkept = ("1 · E/5 · <b>title</b> 0 · photo not kept", None)
    assert first_products(records, "test", ["q3"])["q3", "fused"] == [unkept, without]


def test_a_folder_without_an_evaluation_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"has no .*per_query\.parquet"):
        log_evaluation(None, tmp_path)


@pytest.fixture(scope="module")
def layout() -> dict[str, Any]:
    pytest.importorskip("wandb_workspaces", reason="the extra `dashboards` is not installed")
    return runpy.run_path(str(LAYOUT))


def test_the_dashboard_names_only_what_a_run_logs(no_key, layout, tmp_path):
    run = tmp_path / "runs/exp/1"
    loggers, data, module = make_loggers(run, Wandb()), small_data(small_shards(tmp_path)), small_module()
    trainer = small_trainer(tmp_path, logger=loggers, limit_val_batches=1.0, log_every_n_steps=1)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    leave(run, module, data, {})
    log_evaluation(loggers[1].experiment, run, best=0.5)
    loggers[1].experiment.finish()
    (offline,) = (run / "wandb").glob("offline-run-*")
    history, summary = logged(offline)
    panels = [
        panel["config"]
        for section in json.loads(layout["specification"](layout["view"]("team", "project")))["section"][
            "panelBankConfig"
        ]["sections"]
        for panel in section["panels"]
    ]
    names = {name for panel in panels for name in [*panel.get("metrics", []), panel.get("xAxis", "stage")]}
    assert names <= {*history, *summary}, names - {*history, *summary}
    keys = set(re.findall(r'"(?:val|value)": "((?:results|slices|examples|charts)/[^"]*)"', json.dumps(panels)))
    assert {"results/test", "slices/test", "examples/test", "charts/views/test_table"} <= keys
    assert keys <= {*history}, keys - {*history}
    for pattern in (panel["metricRegex"] for panel in panels if "metricRegex" in panel):
        assert any(re.search(pattern, name) for name in history), pattern


def test_without_a_key_the_dashboard_is_printed_and_not_sent(no_key, layout, capsys):
    layout["main"](["--column", "desirability"])
    out, errors = capsys.readouterr()
    order = json.loads(out)["section"]["runSets"][0]["sort"]["keys"]
    assert order == [{"key": {"section": "summary", "name": "final/primary"}, "ascending": False}]
    assert "val/fused/desirability/ndcg@10" in out
    assert errors.startswith("not sent: no key")


def test_a_dashboard_without_an_entity_cannot_be_saved(no_key, layout, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with pytest.raises(SystemExit):
        layout["main"]([])
    assert "--entity is missing" in capsys.readouterr().err

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow.parquet as pq
import pytest

from mmfusion.retrieval.comparison import compare_runs
from mmfusion.retrieval.html import gallery, write_comparison, write_report
from mmfusion.retrieval.html.curves import Stage, clipped, gates, read_curves, stages
from mmfusion.retrieval.html.figures import MAX_VALUES, plain, scatter, slice_dots
from mmfusion.retrieval.html.numbers import interval, metric_title, number, signed
from mmfusion.retrieval.html.page import as_json, write_page
from mmfusion.retrieval.html.tables import overview
from mmfusion.retrieval.significance import corrected, paired
from tests.mmfusion.retrieval.run_folder import HOSTILE_QUERY, HOSTILE_TITLE, LABELS, Folder

CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Page(HTMLParser):
    """What a browser would see: elements with attributes, the text of each table's cells, scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.words: list[str] = []
        self.inside: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "img"):
            self.inside.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.inside:
            self.scripts.append(data)
        elif "style" in self.inside:
            self.styles.append(data)
        else:
            self.words.append(data)
            if {"td", "th"} & set(self.inside):
                self.tables[-1][-1][-1] += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])

    @property
    def ids(self) -> set[str | None]:
        return {attributes["id"] for _, attributes in self.elements if "id" in attributes}

    @property
    def written(self) -> str:
        return " ".join(self.words)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Folder().write(tmp_path / "runs" / "moe" / "20261122-100831")


@pytest.fixture
def page(folder: Path) -> Page:
    return Page(write_report(folder))


@pytest.fixture
def comparison(tmp_path: Path) -> Page:
    """Of two runs whose paths, and one of whose settings, hold markup."""
    runs = [Folder(seed=seed).write(tmp_path / f"<i>{seed}" / "v") for seed in (1, 2)]
    (runs[1] / "config.yaml").write_text("model:\n  <b>key</b>: <img src=x>\n")
    return Page(write_comparison(compare_runs(runs), tmp_path / "out" / "compare.html"))


def figures(page: Page) -> Iterator[go.Figure]:
    """Plotly's own check of every property; the style sheet's colours become a colour that it knows."""
    for figure in page.data["figures"]:
        yield go.Figure(json.loads(re.sub(r"var\(--[a-z0-9-]+\)", "red", json.dumps(figure))))


@pytest.mark.parametrize("made", ["page", "comparison"])
def test_a_page_needs_no_network(made: str, request: pytest.FixtureRequest) -> None:
    page: Page = request.getfixturevalue(made)
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": CSP}) in page.elements
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
        assert "url(" not in (attributes.get("style") or "")
    assert not re.search(r"url\(|@import|//", "".join(page.styles))
    assert len(page.scripts) == 3
    assert page.text.count("</script") == 3


@pytest.mark.parametrize("made", ["page", "comparison"])
def test_what_a_catalogue_says_is_never_markup(made: str, request: pytest.FixtureRequest) -> None:
    page: Page = request.getfixturevalue(made)
    assert HOSTILE_TITLE not in page.text
    assert HOSTILE_QUERY not in page.text
    assert not {"b", "i", "img"} & {tag for tag, _ in page.elements}
    gallery = page.data["gallery"]
    assert HOSTILE_TITLE in [title for _, title, *_ in gallery["products"]]
    assert HOSTILE_QUERY in [text for _, text in gallery["queries"]]
    assert not re.search("[<>&]", page.scripts[0])


def test_slices_and_settings_are_shown_as_they_are_named(page: Page, comparison: Page) -> None:
    assert "<b>2 words</b>" in page.written
    assert "&lt;b&gt;2 words&lt;/b&gt;  n = 2" in page.data["figures"][-1]["layout"]["yaxis"]["ticktext"]
    assert "model.<b>key</b>" in comparison.written
    assert "<img src=x>" in comparison.written


def test_json_cannot_leave_its_element() -> None:
    hostile = {"</script><!--": ["<script>", "&lt;", "\u2028"]}
    text = as_json(hostile)
    assert json.loads(text) == hostile
    assert not re.search("[<>&\u2028]", text)
    with pytest.raises(ValueError, match="JSON compliant"):
        as_json([np.nan])


def test_the_first_table_holds_the_numbers_of_the_first_split(folder: Path, page: Page) -> None:
    results = json.loads((folder / "results.json").read_text())["test"]
    names = ["ndcg@10", "recall@100", "mrr", "precision@10", "judged@10"]
    head, *rows = page.tables[0]
    assert head[:-1] == ["view", "nDCG@10", "Recall@100", "MRR", "Precision@10", "Judged@10"]
    assert [row[0] for row in rows] == list(results)
    for view, *cells, _ in rows:
        for name, shown in zip(names, cells, strict=True):
            cell = results[view][f"relevance/{name}"]
            parts = [f"{cell[key]:.3f}".removeprefix("0") for key in ("value", "low", "high")]
            assert "".join(shown.split()) == "{}[{},{}]".format(*parts)
    every = page.tables[1]
    assert [row[0] for row in every[1:]] == list(results["text"])


def test_headline_is_the_primary_view_against_text(folder: Path, page: Page) -> None:
    test = json.loads((folder / "results.json").read_text())["test"]
    ours, text = (test[view]["relevance/ndcg@10"]["value"] for view in ("fused", "text"))
    words = " ".join(page.written.split())
    shown = interval(test["fused"]["relevance/ndcg@10"])
    rows = [row for row in pq.read_table(folder / "per_query.parquet").to_pylist() if row["split"] == "test"]
    metrics = [f"relevance/{name}" for name in ("ndcg@10", "recall@100", "mrr", "precision@10")]
    before, after = (
        [np.array([row[metric] for row in rows if row["view"] == view], float) for metric in metrics]
        for view in ("text", "fused")
    )
    tests = corrected([paired("text", "fused", *values) for values in zip(metrics, before, after, strict=True)])
    assert f"nDCG@10 {number(ours)} {shown} text {number(text)}; {tests[0].verdict}" in words
    assert all(test.verdict in words for test in tests)
    assert "Holm-corrected over the 4 tests shown" in words
    assert "moe / 20261122-100831" in words
    assert "a5a6e9a" in words
    assert "1 query is left out of the mean of relevance/ndcg@10" in words


def test_label_bars_have_the_measured_widths(folder: Path, page: Page) -> None:
    results = json.loads((folder / "results.json").read_text())["test"]
    widths = [
        attributes["style"]
        for _, attributes in page.elements
        if (attributes.get("class") or "").startswith("part tone-")
    ]
    names = [*(f"share_{label.lower()}@10" for label in LABELS), "share_unjudged@10"]
    expected = [results[view][f"relevance/{name}"]["value"] for view in results for name in names]
    assert widths[: len(expected)] == [f"width: {round(100 * value, 2)}%" for value in expected]


def test_best_is_marked_but_not_of_what_is_judged() -> None:
    rows = {view: {"mrr": {"value": value}, "judged@10": {"value": value}} for view, value in (("a", 0.2), ("b", 0.7))}
    rows["c"] = {"mrr": {"value": None}}
    cells = {row["name"]: row["cells"] for row in overview(rows)["rows"]}
    assert [cells[name][0]["best"] for name in "abc"] == [False, True, False]
    assert [cells["a"][1]["best"], cells["b"][1]["best"], cells["c"][1]] == [False, False, None]


@pytest.mark.parametrize("made", ["page", "comparison"])
def test_plotly_knows_every_property_of_the_figures(made: str, request: pytest.FixtureRequest) -> None:
    page: Page = request.getfixturevalue(made)
    drawn = list(figures(page))
    assert (
        len(drawn)
        == len(page.data["figures"])
        == len({a["data-figure"] for _, a in page.elements if "data-figure" in a})
    )
    assert all(figure.data for figure in drawn)


def test_curves_have_no_blank_cells_and_stages_their_names(folder: Path) -> None:
    log = read_curves(folder / "metrics.csv")
    assert log["train/loss"].steps.tolist() == list(range(9, 100, 10))
    assert log["val/fused/relevance/ndcg@10"].values.tolist() == pytest.approx([0.5, 0.598])
    spans = stages(log, folder / "config.yaml")
    assert spans == [Stage("adapt", 9.0, 59.0), Stage("fuse", 59.0, 99.0)]
    gate = gates(log)
    assert gate["image"].spread is not None
    assert gate["image"].spread.tolist() == [0.1] * 5
    assert clipped(spans, gate) == [Stage("fuse", 59.0, 99.0)]
    assert [span.name for span in stages(log, folder / "absent.yaml")] == ["stage 0", "stage 1"]


def test_a_log_that_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,stage,note\n0,,1.0,\n0,5,,lost\n")
    log = read_curves(tmp_path / "metrics.csv")
    assert log == {}
    assert stages(log, tmp_path / "config.yaml") == []
    assert gates(log) == {}


@pytest.mark.parametrize(
    ("made", "absent"),
    [
        (Folder(log=False), {"training", "gates"}),
        (Folder(extras=False), {"slices", "calibration"}),
        (Folder(views=("text",), photos=False), set()),
        (Folder(columns={"price": None}), set()),
        (Folder(columns={"relevance": LABELS, "desirability": None}), set()),
        (Folder(queries=("one",)), set()),
    ],
)
def test_sections_without_anything_are_left_out(made: Folder, absent: set[str], tmp_path: Path) -> None:
    page = Page(write_report(made.write(tmp_path / "run")))
    assert (
        page.ids & {"training", "gates", "slices", "calibration"}
        == {"training", "gates", "slices", "calibration"} - absent
    )
    assert {attributes["href"] for tag, attributes in page.elements if tag == "a"} <= {f"#{id}" for id in page.ids}
    list(figures(page))


def test_a_numeric_column_shows_gains(tmp_path: Path) -> None:
    data = Page(write_report(Folder(columns={"price": None}).write(tmp_path / "run"))).data
    (column,) = data["gallery"]["columns"]
    tone = {"0": 3, "0.5": 1, "2": 0}
    assert {mark["letter"]: mark["tone"] for mark in column["marks"]} == tone


def test_an_evaluation_shows_the_log_of_its_run(folder: Path) -> None:
    evaluation = folder / "eval" / "shop-test"
    evaluation.mkdir(parents=True)
    for path in (folder / "results.json", *folder.glob("*.parquet")):
        shutil.copy(path, evaluation)
    page = Page(write_report(evaluation))
    assert "training" in page.ids
    assert "moe / 20261122-100831 / eval shop-test" in page.written


def test_a_folder_without_an_evaluation_is_an_error(folder: Path) -> None:
    (folder / "rankings.parquet").unlink()
    with pytest.raises(ValueError, match=r"rankings\.parquet"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_lists_are_those_of_the_rankings(folder: Path, page: Page) -> None:
    found = page.data["gallery"]
    rankings = [row for row in pq.read_table(folder / "rankings.parquet").to_pylist() if row["split"] == "test"]
    for row, view in enumerate(found["rows"]):
        for query, (query_id, _) in enumerate(found["queries"]):
            expected = sorted(
                (one for one in rankings if one["view"] == view and one["query_id"] == query_id),
                key=lambda one: one["rank"],
            )
            listed = np.array(found["lists"][row][query]).reshape(-1, 2)
            assert [found["products"][place][0] for place in listed[:, 0]] == [one["product_id"] for one in expected]
            marks = [found["columns"][0]["marks"][place]["label"] if place >= 0 else None for place in listed[:, 1]]
            assert marks == [one["label/relevance"] for one in expected]
    assert len({product_id for product_id, *_ in found["products"]}) == len(found["products"])
    assert [(product[0], product[3]) for product in found["products"] if product[2] is None] == [("p1", False)]


def test_a_view_without_lists_is_in_the_table_alone(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    results["test"]["zero_shot_text"] = results["test"]["text"]
    (folder / "results.json").write_text(json.dumps(results))
    page = Page(write_report(folder))
    assert [row[0] for row in page.tables[0][1:]] == ["text", "image", "fused", "bm25", "zero_shot_text"]
    assert page.data["gallery"]["rows"] == ["text", "image", "fused", "bm25"]


def test_galleries_show_the_largest_differences_from_text(tmp_path: Path) -> None:
    folder = Folder(queries=[f"query {i}" for i in range(30)]).write(tmp_path / "run")
    page = Page(write_report(folder))
    rows = [row for row in pq.read_table(folder / "per_query.parquet").to_pylist() if row["split"] == "test"]
    values = {
        view: {row["query_id"]: row["relevance/ndcg@10"] or 0.0 for row in rows if row["view"] == view}
        for view in ("fused", "text")
    }
    difference = {query_id: values["fused"][query_id] - values["text"][query_id] for query_id in values["text"]}
    data = page.data["gallery"]
    gained, lost, drawn = ([data["queries"][place][0] for place in places] for places in data["galleries"])
    assert gained == sorted((one for one in difference if difference[one] > 0), key=lambda one: -difference[one])[:5]
    assert lost == sorted((one for one in difference if difference[one] < 0), key=lambda one: difference[one])[:5]
    assert len(set(drawn)) == 5
    assert set(drawn) <= set(difference)
    assert data["shown"] == [True] * 4


def test_a_page_keeps_the_values_of_all_queries_and_lists_of_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Folder(queries=[f"query {i}" for i in range(60)], views=("text", "fused", "bm25", "random"))
    folder = made.write(tmp_path / "run")
    monkeypatch.setattr(gallery, "LISTS", 240)
    page = Page(write_report(folder))
    assert [len(row) for row in page.data["gallery"]["lists"]] == [60] * 4
    assert "rankings.parquet" not in page.written
    monkeypatch.setattr(gallery, "LISTS", 90)
    page = Page(write_report(folder))
    data = page.data["gallery"]
    shown = len({query for places in data["galleries"] for query in places})
    assert [len(row) for row in data["lists"]] == [30, 30, 30, shown]
    assert len(data["queries"]) == len(data["values"][0]) == 60
    assert "the products of 30 of 60 queries" in page.written
    assert f"The products of random are here for the {shown} queries of the galleries." in page.written


@pytest.mark.parametrize(
    ("shown", "queries", "galleries", "expected"),
    [
        ([True] * 4 + [False] * 3, 2_000, 15, [2_000] * 7),
        ([True] * 4 + [False] * 3, 2_001, 15, [2_001] * 4 + [15] * 3),
        ([True] * 4 + [False] * 3, 90_000, 15, [3_500] * 4 + [15] * 3),
        ([True, True], 90_000, 10, [7_000, 7_000]),
        ([True] * 26, 90_000, 600, [600] * 26),
        ([], 0, 0, []),
    ],
)
def test_rows_that_are_hidden_at_first_give_their_room_to_more_queries(
    shown: list[bool], queries: int, galleries: int, expected: list[int]
) -> None:
    assert gallery.held(shown, queries, galleries) == expected


@pytest.mark.parametrize(
    ("labels", "bars", "shown"),
    [
        ({"E": 1.0, "C": 0.0, "I": 0.0}, ["E", "C+I", "unjudged"], {("E", "E", 0), ("C+I", "C+I", 3)}),
        ({"Good": 1.0, "gOOD": 0.5}, ["Good", "gOOD", "unjudged"], {("Good", "G", 0), ("gOOD", "g", 3)}),
    ],
)
def test_labels_of_one_gain_or_one_spelling_have_their_bars_and_marks(
    labels: dict[str, float], bars: list[str], shown: set[tuple[str, str, int]], tmp_path: Path
) -> None:
    folder = Folder(columns={"relevance": labels}).write(tmp_path / "run")
    page = Page(write_report(folder))
    titles = [a["title"] for _, a in page.elements if (a.get("class") or "").startswith("part tone-")]
    assert [str(title).split()[0] for title in titles[:3]] == bars
    results = json.loads((folder / "results.json").read_text())["test"]["text"]
    shares = [cell["value"] for name, cell in results.items() if "share_" in name]
    assert [str(title) for title in titles[:3]] == [
        f"{name} {100 * share:.1f} %" for name, share in zip(bars, shares, strict=True)
    ]
    (column,) = page.data["gallery"]["columns"]
    assert {(mark["label"], mark["letter"], mark["tone"]) for mark in column["marks"]} == shown


def test_photos_that_found_no_room_are_told_from_those_that_do_not_exist(tmp_path: Path) -> None:
    page = Page(write_report(Folder(unkept=(2,)).write(tmp_path / "run")))
    found = {product[0]: (product[2] is not None, product[3]) for product in page.data["gallery"]["products"]}
    assert (found["p0"], found["p1"], found["p2"]) == ((True, True), (False, False), (False, True))


def test_an_older_folder_has_the_photos_that_it_kept(folder: Path) -> None:
    path = folder / "products.parquet"
    pq.write_table(pq.read_table(path).drop_columns("has_photo"), path)
    products = Page(write_report(folder)).data["gallery"]["products"]
    assert [product[0] for product in products if not product[3]] == ["p1"]
    assert all(product[3] is (product[2] is not None) for product in products)


def test_calibration_names_its_label_column(tmp_path: Path) -> None:
    made = Folder(columns={"desirability": LABELS, "relevance": LABELS})
    words = " ".join(Page(write_report(made.write(tmp_path / "run"))).written.split())
    assert "Relevant by the label column desirability ." in words


def test_the_hybrid_whose_weight_was_chosen_on_val_says_so_there(tmp_path: Path) -> None:
    made = Folder(views=("text", "fused", "bm25", "hybrid_sum"), extras=False)
    page = Page(write_report(made.write(tmp_path / "run")))
    named = [row[0] for table in page.tables for row in table[1:] if row[0].startswith("hybrid_sum")]
    assert named == ["hybrid_sum", "hybrid_sum (weight chosen here)"], "test's table, then val's"
    words = " ".join(page.written.split())
    assert words.count("is the best one on these very queries") == 1
    assert "the weight of bm25, .300, is the best" in words


def test_a_text_run_is_tested_against_bm25(tmp_path: Path) -> None:
    words = " ".join(Page(write_report(Folder(views=("text", "bm25")).write(tmp_path / "run"))).written.split())
    assert re.search(r"bm25 \.\d{3}; text (and bm25 do not differ significantly|is (better|worse) by)", words)


def test_numbers_read_as_on_the_terminal() -> None:
    assert [number(value) for value in (0.5434, 1.0, -0.02, 10.5, None, float("nan"))] == [
        ".543",
        "1.000",
        "−.020",
        "10.500",
        "–",
        "–",
    ]
    assert [signed(value) for value in (0.021, -0.5, None)] == ["+.021", "−.500", "–"]
    assert interval({"value": 0.5, "low": 0.4, "high": 0.61}) == "[.400, .610]"
    assert interval({"value": 0.5}) == ""
    assert [metric_title(name) for name in ("ndcg@10", "mrr", "share_c+i@10", "new@5")] == [
        "nDCG@10",
        "MRR",
        "Share c+i@10",
        "new@5",
    ]


def test_a_slice_of_many_values_shows_those_of_most_queries() -> None:
    values = {f"v{i}": {"fused": {"m": {"value": 0.5, "low": 0.4, "high": 0.6, "queries": i}}} for i in range(1, 31)}
    figure = slice_dots("brand", values, ["fused"], "m")
    shown = [text.split()[0] for text in figure["layout"]["yaxis"]["ticktext"]]
    assert shown == [f"v{i}" for i in range(31 - MAX_VALUES, 31)]
    assert figure["note"] == f"the {MAX_VALUES} values of most queries, of 30"


def test_a_scatter_leaves_out_what_one_run_has_not() -> None:
    nan = float("nan")
    figure = scatter("a/mrr", ("A", "B"), ["x", "<b>", "z"], (np.array([0.1, 0.2, nan]), np.array([0.3, 0.2, 0.1])))
    (dots,) = figure["data"]
    assert (dots["x"], dots["y"], dots["customdata"]) == ([0.1, 0.2], [0.3, 0.2], [0, 1])
    assert dots["hovertext"] == ["x<br>.100 → .300  (+.200)", "&lt;b&gt;<br>.200 → .200  (+.000)"]
    assert plain("a" * 9, 5) == "aaaa…"


def test_a_comparison_tells_verdicts_and_every_query(comparison: Page, tmp_path: Path) -> None:
    made = compare_runs([tmp_path / f"<i>{seed}" / "v" for seed in (1, 2)])
    words = " ".join(comparison.written.split())
    assert all(test.verdict in words for test in made.paired)
    assert made.paired
    assert f"Holm-corrected over the {len(made.paired)} tests shown" in words
    assert made.per_query is not None
    found = comparison.data["differences"]
    assert found["queries"] == [
        list(pair) for pair in zip(made.per_query.query_ids, made.per_query.queries, strict=True)
    ]
    for letter, values in zip(found["letters"], found["values"], strict=True):
        expected = made.per_query.values[letter]
        np.testing.assert_allclose([np.nan if value is None else value for value in values], expected, atol=5e-5)
    gains = [made.per_query.query_ids[row] for row in made.per_query.extremes("B")[0]]
    gallery = comparison.data["gallery"]
    assert [gallery["queries"][place][0] for place in gallery["galleries"][0]] == gains
    assert gallery["rows"] == [run.name for run in made.runs]


def test_galleries_leave_out_runs_on_other_data(tmp_path: Path) -> None:
    runs = [Folder(seed=seed).write(tmp_path / str(seed) / "v") for seed in (1, 2, 3)]
    results = json.loads((runs[1] / "results.json").read_text())
    results["run"]["manifest"] = "another"
    (runs[1] / "results.json").write_text(json.dumps(results))
    page = Page(write_comparison(compare_runs(runs), tmp_path / "compare.html"))
    assert page.data["gallery"]["rows"] == ["A 1", "C 3"]
    assert page.data["differences"]["letters"] == ["A", "C"]


def test_runs_without_records_compare_by_their_numbers(tmp_path: Path) -> None:
    runs = [Folder(seed=seed).write(tmp_path / str(seed) / "v") for seed in (1, 2)]
    for path in runs[1].glob("*.parquet"):
        path.unlink()
    page = Page(write_comparison(compare_runs(runs), tmp_path / "compare.html"))
    assert page.ids & {"results", "scatter", "galleries"} == {"results"}
    assert [row[0] for row in page.tables[1][1:]] == ["A 1", "B 2"]


def test_a_page_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    write_page(path, "one")
    assert write_page(path, "two").read_text() == "two"
    assert [one.name for one in path.parent.iterdir()] == ["page.html"]
    assert path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(UnicodeEncodeError):
        write_page(path, "\ud800")
    assert path.read_text() == "two"
    assert len(list(path.parent.iterdir())) == 1
    with pytest.raises(ValueError, match=r"new is a folder; expected the name of a file"):
        write_page(path.parent, "three")


def test_a_comparison_needs_the_name_of_a_file(tmp_path: Path) -> None:
    runs = [Folder(seed=seed).write(tmp_path / str(seed) / "v") for seed in (1, 2)]
    comparison = compare_runs(runs)
    shutil.rmtree(runs[0])  # what a gallery would be read from
    with pytest.raises(ValueError, match=r"is a folder; expected the name of a file, such as .*html"):
        write_comparison(comparison, tmp_path)

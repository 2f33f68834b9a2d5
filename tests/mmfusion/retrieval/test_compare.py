import dataclasses
import io
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console

from datamodules.tuples import TupleDataModule
from mmfusion.batch import RetrievalData
from mmfusion.retrieval import records
from mmfusion.retrieval.compare import print_comparison
from mmfusion.retrieval.comparison import Comparison, compare_runs
from mmfusion.retrieval.evaluation import Evaluation, ViewResult, measured
from mmfusion.retrieval.ranking import Ranking
from mmfusion.retrieval.report import write_results
from mmfusion.retrieval.run_file import measure_run_file
from mmfusion.retrieval.side import differences, home
from mmfusion.retrieval.significance import corrected, paired
from mmfusion.retrieval.topk import TopK
from mmfusion.retrieval.trec import write_run
from tests.mmfusion.retrieval.test_report import view
from tests.small_run import small_data, small_shards

CONFIG: dict[str, Any] = {
    "seed_everything": 1,
    "experiment": "gated",
    "model": {"fusion": {"class_path": "Gated", "init_args": {"experts": None}}, "dim": 128, "modalities": ["text"]},
    "trainer": {"max_epochs": 3, "default_root_dir": "a", "logger": {"save_dir": "a"}},
}


ONLY = (  # what follows the commands
    "and compare the new folders; only a run that this version trained can be evaluated again, "
    "so train an older one again."
)


def make_run(
    folder: Path,
    value: float,
    /,
    config: dict[str, Any] = CONFIG,
    views: tuple[str, ...] = ("text", "fused"),
    **run: Any,
) -> Path:
    results = {name: view(value + i / 10, ("relevance",)) for i, name in enumerate(views)}
    facts = {"seed": 1, "manifest": "m", "checkpoint": str(folder)} | run
    write_results(folder / "results.json", {"val": results, "test": results, "run": facts})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def printed(runs: list[Path], width: int = 80, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    print_comparison(compare_runs(runs), console)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    model = {"fusion": {"class_path": "MoE", "init_args": {"experts": 4}}, "dim": 128, "modalities": ["text", "image"]}
    other = {**CONFIG, "experiment": "moe", "model": model, "trainer": {**CONFIG["trainer"], "default_root_dir": "b"}}
    return [make_run(tmp_path / "gated" / "1", 0.4), make_run(tmp_path / "moe" / "1", 0.5, other, commit="c0ffee")]


def test_the_primary_view_comes_first_and_then_what_differs(runs: list[Path]) -> None:
    assert printed(runs).splitlines() == [
        f"A  {runs[0]}",
        f"B  {runs[1]}",
        "test, with 95 % intervals",
        "                  nDCG@10            Recall@100         MRR",
        "fused, relevance",
        "  A gated         .510 [.490, .530]  .520 [.500, .540]  .530 [.510, .550]",
        "  B moe           .610 [.590, .630]  .620 [.600, .640]  .630 [.610, .650]",
        "text, relevance",
        "  A gated         .410 [.390, .430]  .420 [.400, .440]  .430 [.410, .450]",
        "  B moe           .510 [.490, .530]  .520 [.500, .540]  .530 [.510, .550]",
        f"No values per query in A, B: for paired tests, `make eval RUN={runs[0]}`, `make eval RUN={runs[1]}` {ONLY}",
        "what differs                    A         B",
        "model.fusion.class_path         Gated     MoE",
        "model.fusion.init_args.experts  -         4",
        "model.modalities                ['text']  ['text', 'image']",
        "run.commit                      -         c0ffee",
    ]


def test_long_names_do_not_break_the_table(tmp_path: Path) -> None:
    versions = [make_run(tmp_path / "fusion_cross_attention" / version, 0.4) for version in ("1", "2")]
    row = "  {} fusion_cross_atten  .510 [.490, .530]  .520 [.500, .540]  .530 [.510, .550]"
    assert set(map(row.format, "AB")) < set(printed(versions).splitlines())


def test_the_best_is_bold(runs: list[Path]) -> None:
    text = printed(runs, width=120, force_terminal=True, color_system="standard")
    assert "\x1b[1m.610" in text
    assert "\x1b[1m.510\x1b" in text.split("text, relevance")[1]
    assert "\x1b[1m.410" not in text


def test_runs_with_different_primary_views_share_a_section(tmp_path: Path, runs: list[Path]) -> None:
    text_only = make_run(tmp_path / "text_only" / "1", 0.2, views=("text",))
    assert printed([runs[0], text_only], width=200).splitlines()[4:7] == [
        "fused/text, relevance",
        "  A gated              .510 [.490, .530]  .520 [.500, .540]  .530 [.510, .550]",
        "  B text_only          .210 [.190, .230]  .220 [.200, .240]  .230 [.210, .250]",
    ]


def test_the_same_configuration_is_said_so(tmp_path: Path) -> None:
    same = [make_run(tmp_path / "a", 0.4), make_run(tmp_path / "b", 0.4, {**CONFIG, "experiment": "again"})]
    assert "do not differ" in printed(same)


def test_different_data_are_said_so(tmp_path: Path) -> None:
    text = printed([make_run(tmp_path / "a", 0.4), make_run(tmp_path / "b", 0.4, manifest="other")])
    assert "evaluated on different data" in text
    assert "run.manifest" in text


def test_an_evaluation_on_other_data_takes_its_runs_configuration(runs: list[Path]) -> None:
    folder = runs[1] / "eval" / "abc-test"
    write_results(folder / "results.json", {"test": {"fused": view(0.5)}, "run": {"manifest": "m"}})
    assert "model.fusion.class_path" in printed([runs[0], folder])


def elsewhere(folder: Path, told: Path, **run: Any) -> Path:
    """An evaluation of the run `told`, written with OUT=folder."""
    about = {"seed": 1, "manifest": "m", "folder": str(told), **run}
    write_results(folder / "results.json", {"test": {"fused": view(0.5)}, "run": about})
    return folder


def test_an_evaluation_written_elsewhere_takes_its_runs_configuration(tmp_path: Path, runs: list[Path]) -> None:
    for folder in (tmp_path / "out", tmp_path / "eval" / "out"):
        comparison = compare_runs([runs[0], elsewhere(folder, runs[1])])
        assert home(folder) == runs[1]
        assert comparison.runs[1].name == "B moe"
        assert comparison.differences["model.fusion.class_path"] == ["Gated", "MoE"]
        assert "run.folder" not in comparison.differences


def test_a_run_that_was_moved_is_found_by_its_place(tmp_path: Path) -> None:
    run = make_run(tmp_path / "gated" / "1", 0.4, folder="/nowhere/gated/1")
    assert home(run) == run
    assert home(elsewhere(run / "eval" / "m-test", Path("/nowhere/gated/1"))) == run


def test_what_an_evaluation_was_given_is_a_difference(runs: list[Path]) -> None:
    """Nothing given is no difference to a run that does not tell what it was given."""
    given = ["--model.evaluation.chunk=512", "--data.text_fields=[title]"]
    evaluations = [
        elsewhere(runs[0] / "eval" / f"e{i}", runs[0], overrides=overrides) for i, overrides in enumerate(([], given))
    ]
    assert compare_runs(evaluations).differences == {
        "eval overrides": [None, "--model.evaluation.chunk=512 --data.text_fields=[title]"]
    }
    assert compare_runs([runs[0], evaluations[0]]).differences == {}


def test_settings_that_are_unknown_are_no_differences(tmp_path: Path, runs: list[Path]) -> None:
    lost = elsewhere(tmp_path / "out", tmp_path / "gone", seed=2)
    two = compare_runs([runs[0], lost])
    assert two.differences == {"run.seed": [1, 2]}
    assert two.notes[-1] == (
        f"No config.yaml of B ({lost}): the settings it was trained with are not among what differs."
    )
    three = compare_runs([runs[0], lost, runs[1]])
    assert three.differences["model.fusion.class_path"] == ["Gated", None, "MoE"]
    assert "model.dim" not in three.differences
    assert "as far as they are known, do not differ" in printed([runs[0], elsewhere(lost, tmp_path / "gone")])


def test_one_run_alone(runs: list[Path]) -> None:
    text = printed(runs[:1])
    assert "  A gated" in text
    assert "differ" not in text


def test_names_are_no_markup(tmp_path: Path) -> None:
    text = printed([make_run(tmp_path / "[red]x" / "1", 0.4), make_run(tmp_path / "b" / "1", 0.4)], width=200)
    assert text.count("[red]x") == 4  # the list of runs, two sections, a note


def test_runs_without_results_are_explained(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"empty: expected a run folder with results\.json, it holds none; .*make eval"
    ):
        printed([*runs, tmp_path / "empty"])
    with pytest.raises(ValueError, match=r"nowhere: .*no such folder"):
        printed([*runs, tmp_path / "nowhere"])


def test_a_split_that_not_all_have_is_explained(runs: list[Path], tmp_path: Path) -> None:
    write_results(tmp_path / "c" / "results.json", {"train": {"fused": view(0.5)}})
    with pytest.raises(ValueError, match=r"no split in common .*A gated: val, test; .*: train"):
        printed([*runs, tmp_path / "c"])
    with pytest.raises(ValueError, match="no results on 'train', only on: val, test"):
        compare_runs(runs, "train")


def test_no_run_or_one_twice_are_explained(runs: list[Path]) -> None:
    with pytest.raises(ValueError, match="make compare RUNS="):
        printed([])
    with pytest.raises(ValueError, match="named twice"):
        printed([runs[0], runs[0]])


def test_where_a_run_is_kept_is_no_difference() -> None:
    made = {
        "a": {"trainer.default_root_dir": "a", "trainer.logger.save_dir": "a", "experiment": "a", "data.path": "a"},
        "b": {"trainer.default_root_dir": "b", "trainer.logger.save_dir": "b", "experiment": "b", "data.path": "b"},
    }
    assert differences(made) == {"data.path": ["a", "b"]}


METRICS = ("relevance/ndcg@10", "relevance/recall@100", "relevance/mrr")


def recorded(folder: Path, values: dict[str, float | None], columns: tuple[str, ...] = METRICS, **run: Any) -> Path:
    """A run whose every metric has these values on test: query id to value, None where the mean leaves it out."""
    make_run(folder, 0.4, **run)
    table = {"split": ["test"], "view": ["fused"]}
    rows = {name: value * len(values) for name, value in table.items()}
    rows |= {"query_id": list(values), "query": [f"text of {id}" for id in values]}
    others = {**rows, **{metric: [0.0] * len(values) for metric in columns}, "view": ["text"] * len(values)}
    rows |= {metric: pa.array(list(values.values()), pa.float64()) for metric in columns}
    pq.write_table(pa.concat_tables([pa.table(others), pa.table(rows)]), folder / "per_query.parquet")
    for name in ("rankings", "products"):
        pq.write_table(pa.table({"product_id": pa.array([], pa.string())}), folder / f"{name}.parquet")
    return folder


def drawn(shift: float, seed: int, queries: int = 200) -> dict[str, float | None]:
    common = np.random.default_rng(0).uniform(0.2, 0.6, size=queries)
    noise = np.random.default_rng(seed).normal(shift, 0.05, size=queries)
    return {f"q{i}": float(value) for i, value in enumerate(common + noise)}


def test_later_runs_are_tested_against_the_first_query_by_query(tmp_path: Path) -> None:
    values = [drawn(0, 1), drawn(0.03, 2), drawn(0, 3)]
    shuffled = dict(reversed(values[1].items()))  # paired by id, not by position
    given = {"a": values[0], "b": shuffled, "c": values[2]}
    folders = [recorded(tmp_path / name / "1", values) for name, values in given.items()]
    comparison = compare_runs(folders)
    a, b, c = (np.array(list(of_run.values()), dtype=float) for of_run in values)
    expected = corrected(
        [paired("A", run, metric, a, after) for run, after in (("B", b), ("C", c)) for metric in METRICS]
    )
    assert [(test.run, test.metric, test.queries, test.left_out) for test in comparison.paired] == [
        (run, metric, 200, 0) for run in "BC" for metric in METRICS
    ]
    for test, by_hand in zip(comparison.paired, expected, strict=True):
        assert test.difference == pytest.approx(by_hand.difference)
        assert test.p_holm == pytest.approx(by_hand.p_holm, abs=0.02)
    text = printed(folders, width=100)
    assert (
        "against A, query by query\n"
        "p by Holm's method for 6 tests; intervals are of each test alone, not corrected\n"
        "relevance, 200 queries\n"
    ) in text
    assert "\n  nDCG@10     B is better by .0" in text
    assert ", p < .0001\n" not in text.split("C and A")[1].split("\n")[0]
    assert "  MRR         C and A do not differ significantly: " in text


def test_gains_and_losses_are_the_extremes(tmp_path: Path) -> None:
    before = {f"q{i}": 0.5 for i in range(20)}
    after = before | {"q3": 0.9, "q7": 0.8, "q11": 0.1, "q19": None}
    folders = [recorded(tmp_path / "a" / "1", before), recorded(tmp_path / "b" / "1", after)]
    values = compare_runs(folders).per_query
    assert values is not None
    assert values.metric == "relevance/ndcg@10"
    assert values.extremes("B") == ([3, 7], [11])
    assert values.extremes("B", 1) == ([3], [11])
    assert np.isnan(values.values["B"][19])
    lines = printed(folders).splitlines()
    start = lines.index("B gains most on")
    assert [line.split() for line in lines[start - 1 : start + 5]] == [
        ["relevance/ndcg@10", "A", "B"],
        ["B", "gains", "most", "on"],
        ["text", "of", "q3", ".500", ".900"],
        ["text", "of", "q7", ".500", ".800"],
        ["B", "loses", "most", "on"],
        ["text", "of", "q11", ".500", ".100"],
    ]


def test_queries_that_one_run_lacks_are_counted(tmp_path: Path) -> None:
    before = {f"q{i}": i / 100 for i in range(20)}
    after = {f"q{i}": i / 100 + 0.01 * (i % 3) for i in range(5, 23)} | {"q8": None}
    folders = [recorded(tmp_path / "a" / "1", before), recorded(tmp_path / "b" / "1", after)]
    comparison = compare_runs(folders)
    assert {(test.queries, test.left_out) for test in comparison.paired} == {(14, 9)}
    assert comparison.notes[0].startswith("9 queries have relevance/ndcg@10 in A or B alone")
    assert comparison.notes[0] in printed(folders)


def test_a_metric_without_any_value_is_not_tested(tmp_path: Path) -> None:
    nothing: dict[str, float | None] = dict.fromkeys(drawn(0, 1))
    folders = [recorded(tmp_path / "a" / "1", drawn(0, 1)), recorded(tmp_path / "b" / "1", nothing)]
    comparison = compare_runs(folders)
    assert (comparison.paired, comparison.per_query) == ([], None)


def test_runs_on_different_data_are_not_paired(tmp_path: Path) -> None:
    folders = [
        recorded(tmp_path / "a" / "1", drawn(0, 1)),
        recorded(tmp_path / "b" / "1", drawn(0, 2), manifest="other"),
    ]
    comparison = compare_runs(folders)
    assert comparison.paired == []
    assert comparison.per_query is None
    assert comparison.notes == ["These runs were evaluated on different data: their numbers do not compare."]


@pytest.mark.parametrize(
    ("option", "value", "usual"),
    [("unjudged", "condensed", "zero"), ("no_positive", "zero", "skip"), ("depth", 12, 1000)],
)
@pytest.mark.parametrize("told", [True, False])
def test_runs_measured_by_different_protocols_are_not_paired(
    tmp_path: Path, option: str, value: Any, usual: Any, told: bool
) -> None:
    """Whether the results tell the protocol, as an evaluation's do, or only the configuration."""
    common = recorded(tmp_path / "a" / "1", drawn(0, 1))
    other = recorded(tmp_path / "b" / "1", drawn(0, 2), **({"evaluation": {option: value}} if told else {}))
    if not told:
        model = CONFIG["model"] | {"evaluation": {option: value}}
        (other / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"model": model}))
    third = recorded(tmp_path / "c" / "1", drawn(0, 3))
    comparison = compare_runs([common, other, third])
    assert {test.run for test in comparison.paired} == {"C"}
    assert list(comparison.per_query.values) == ["A", "C"]  # type: ignore[union-attr]
    assert comparison.notes == [
        f"B was measured otherwise than A ({option} is {value}, not {usual}): their numbers do not compare and are not "
        f'tested; `make eval RUN={other} ARGS="--model.evaluation.{option}={usual}"`, then compare the new folder.'
    ]
    assert comparison.notes[0] in printed([common, other])
    assert compare_runs([other, common]).paired == []


def test_an_evaluation_is_made_again_on_its_data_with_its_options(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a" / "1", 0.4, evaluation={"unjudged": "condensed"})
    given = ["--data.text_fields=[title]", "--model.evaluation.depth=50"]
    about = {"overrides": given, "data": "/other", "evaluation": {"depth": 50}}
    folder = elsewhere(tmp_path / "out", run, **about)
    options = f"{' '.join(given)} --model.evaluation.depth=1000 --model.evaluation.unjudged=condensed"
    assert f'`make eval RUN={run} DATA=/other ARGS="{options}"`, then' in compare_runs([run, folder]).notes[1]
    other = make_run(tmp_path / "b" / "1", 0.4, data="/own")
    assert f'`make eval RUN={other} SPLIT=val ARGS="--model.ev' in compare_runs([run, other], "val").notes[1]


def test_what_results_tell_of_the_protocol_goes_before_the_configuration(tmp_path: Path) -> None:
    folders = [
        recorded(tmp_path / "a" / "1", drawn(0, 1), evaluation={"unjudged": "condensed", "resamples": 7}),
        recorded(tmp_path / "b" / "1", drawn(0, 2), evaluation={"unjudged": "condensed", "resamples": 1000}),
    ]
    model = CONFIG["model"] | {"evaluation": {"unjudged": "zero", "depth": 1000}}
    (folders[1] / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"model": model}))
    comparison = compare_runs(folders)
    assert len(comparison.paired) == len(METRICS)
    assert comparison.notes == []


def test_values_per_query_are_read_without_rankings_and_photos(tmp_path: Path) -> None:
    folders = [recorded(tmp_path / name / "1", drawn(0, seed)) for seed, name in enumerate("ab")]
    for folder in folders:
        for name in ("rankings", "products"):
            (folder / f"{name}.parquet").write_bytes(b"not read")
    assert len(compare_runs(folders).paired) == len(METRICS)


def test_queries_do_not_steer_the_terminal(tmp_path: Path) -> None:
    before: dict[str, float | None] = {f"q{i}": 0.5 for i in range(3)}
    folders = [recorded(tmp_path / "a" / "1", before), recorded(tmp_path / "b" / "1", before | {"q1": 0.9})]
    for folder in folders:
        table = pq.read_table(folder / "per_query.parquet")
        typed = pa.array(["\x1b[31mred\x1b[0m \x9b2J\thät\r\n\x07\x00[b]x"] * len(table))
        place = table.column_names.index("query")
        pq.write_table(table.set_column(place, "query", typed), folder / "per_query.parquet")
    text = printed(folders)
    assert "\n  [31mred[0m 2J hät [b]x" in text
    assert {char for char in text if unicodedata.category(char) == "Cc"} == {"\n"}


def test_an_older_run_is_compared_by_its_results_alone(tmp_path: Path) -> None:
    older = make_run(tmp_path / "older" / "1", 0.4)
    folders = [recorded(tmp_path / "a" / "1", drawn(0, 1)), older, recorded(tmp_path / "c" / "1", drawn(0, 2))]
    comparison = compare_runs(folders)
    assert {test.run for test in comparison.paired} == {"C"}
    assert list(comparison.per_query.values) == ["A", "C"]  # type: ignore[union-attr]
    assert comparison.notes == [f"No values per query in B: for paired tests, `make eval RUN={older}` {ONLY}"]
    assert compare_runs([older, folders[0]]).paired == []  # no baseline to test against


# ---- run files ----

METRICS_OF_FILES = ["ndcg@10", "mrr", "map", "recall@10", "precision@10", "judged@10", "share@10"]
SPLIT = "train"  # twelve queries; test has two


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TupleDataModule:
    data = small_data(small_shards(tmp_path_factory.mktemp("data")))
    data.setup("test")
    return data


def ranking(data: TupleDataModule, seed: int, depth: int = 20) -> Ranking:
    """Random lists, some tied scores: those in trec_eval's order."""
    draw = np.random.default_rng(seed)
    query_ids = np.unique(data.judgments(SPLIT).query)
    names = np.array(data.product_ids())
    ids = np.stack([draw.permutation(len(names))[:depth] for _ in query_ids])
    scores = np.sort(draw.integers(0, 8, size=ids.shape) / 7, 1)[:, ::-1].astype(np.float32)
    ids = np.stack([row[np.lexsort((names[row], of_row))[::-1]] for row, of_row in zip(ids, scores, strict=True)])
    return Ranking(query_ids, TopK(torch.from_numpy(scores.copy()), torch.from_numpy(ids)))


def evaluated(folder: Path, data: TupleDataModule, found: Ranking, **options: Any) -> Path:
    """A run folder as an evaluation writes it."""
    chosen = Evaluation(**{"metrics": METRICS_OF_FILES, "depth": 20, "resamples": 50, **options})
    result: ViewResult = measured(found, data.judgments(SPLIT), chosen)
    config = {"model": {"evaluation": dataclasses.asdict(chosen)}}
    about = {"manifest": data.manifest_hash, "data": str(data.path)}
    write_results(folder / "results.json", {SPLIT: {"fused": result.metrics}, "run": about})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    records.write(folder, {SPLIT: {"fused": result}}, "fused", data, 0.0)
    return folder


def run_file(path: Path, data: TupleDataModule, found: Ranking) -> Path:
    write_run(path, data.query_ids(found.query_ids), found.top, data.product_ids(), "other")
    return path


def with_data(data: TupleDataModule, runs: list[Path]) -> Comparison:
    asked: list[Path] = []

    def load(run: Path) -> RetrievalData:
        asked.append(run)
        return data

    comparison = compare_runs(runs, SPLIT, load)
    assert asked == [next(run for run in runs if run.is_dir())]
    return comparison


def test_a_run_file_is_measured_by_the_first_folders_protocol(tmp_path: Path, data: TupleDataModule) -> None:
    """Which differs from that of a second folder, not from the file's."""
    first = evaluated(tmp_path / "a" / "1", data, ranking(data, 1), unjudged="condensed")
    second = evaluated(tmp_path / "b" / "1", data, ranking(data, 2))
    comparison = with_data(data, [run_file(tmp_path / "other.run", data, ranking(data, 3)), first, second])
    assert {test.run for test in comparison.paired} == {"B"}
    assert [note[:51] for note in comparison.notes] == ["C was measured otherwise than A (unjudged is zero, "]


@pytest.mark.parametrize("options", [{}, {"unjudged": "condensed"}, {"no_positive": "zero"}, {"depth": 12}])
def test_a_run_file_counts_as_the_run_that_wrote_it(
    tmp_path: Path, data: TupleDataModule, options: dict[str, Any]
) -> None:
    """To the bit, whether the lists come from a folder or from a file; the file's lists are cut at the run's depth."""
    first = evaluated(tmp_path / "a" / "1", data, ranking(data, 1), **options)
    whole = ranking(data, 2)
    depth = options.get("depth", 20)
    cut = Ranking(whole.query_ids, TopK(whole.top.scores[:, :depth], whole.top.ids[:, :depth]))
    folder = evaluated(tmp_path / "b" / "1", data, cut, **options)
    of_file = with_data(data, [first, run_file(tmp_path / "other.run", data, whole)])
    of_folder = compare_runs([first, folder], SPLIT)
    assert of_file.sections["fused, relevance"]["B other"] == of_folder.sections["fused, relevance"]["B b"]
    assert of_file.paired == of_folder.paired != []
    assert of_file.per_query is not None
    assert of_folder.per_query is not None
    np.testing.assert_array_equal(of_file.per_query.values["B"], of_folder.per_query.values["B"])
    assert (of_file.configured, of_file.differences, of_file.notes) == (["A"], {}, [])


def test_a_run_file_may_be_the_baseline(tmp_path: Path, data: TupleDataModule) -> None:
    """It is still measured as the first folder was; the differences change their sign."""
    folder = evaluated(tmp_path / "a" / "1", data, ranking(data, 1))
    file = run_file(tmp_path / "other.run", data, ranking(data, 2))
    one, other = with_data(data, [folder, file]), with_data(data, [file, folder])
    assert [test.difference for test in one.paired] == [-test.difference for test in other.paired]
    assert [run.name for run in other.runs] == ["A other", "B a"]


def test_queries_that_a_file_lacks_found_nothing(tmp_path: Path, data: TupleDataModule) -> None:
    folder = evaluated(tmp_path / "a" / "1", data, ranking(data, 1))
    file = run_file(tmp_path / "other.run", data, ranking(data, 2))
    query = data.query_ids(ranking(data, 2).query_ids[:1])[0]
    lines = [line for line in file.read_text().splitlines(keepends=True) if not line.startswith(f"{query} ")]
    whole = with_data(data, [folder, file])
    file.write_text("".join([*lines, "q999 Q0 p1 1 0.5 other\n"]))
    comparison = with_data(data, [folder, file])
    assert comparison.notes == [
        f"{file} lacks 1 of 12 queries: they count as having found nothing.",
        f"{file} holds 1 queries that are not of the split 'train': they are ignored.",
    ]
    before, after = whole.per_query, comparison.per_query
    assert before is not None
    assert after is not None
    row = after.query_ids.index(query)
    assert after.values["B"][row] == 0
    expected = (before.values["B"].sum() - before.values["B"][row]) / 12
    assert comparison.sections["fused, relevance"]["B other"]["ndcg@10"]["value"] == pytest.approx(expected)


def test_a_file_that_does_not_fit_is_explained(tmp_path: Path, data: TupleDataModule) -> None:
    folder = evaluated(tmp_path / "a" / "1", data, ranking(data, 1))
    file = tmp_path / "other.run"
    file.write_text("q0 Q0 nowhere 1 0.5 other\n")
    with pytest.raises(
        ValueError, match="product 'nowhere' of query 'q0' is not in the catalogue, whose ids are such as"
    ):
        with_data(data, [folder, file])
    file.write_text("Q-1 Q0 p1 1 0.5 other\n")
    with pytest.raises(ValueError, match="has no query of the split 'train': its ids are such as 'Q-1'"):
        with_data(data, [folder, file])
    with pytest.raises(ValueError, match="run files alone, which hold no judgments"):
        compare_runs([file])


def test_queries_that_nobody_judged_count_as_they_do_in_a_folder(tmp_path: Path, data: TupleDataModule) -> None:
    """They are in the split's mean where queries without a positive count as 0, whatever the file says of them."""
    file = run_file(tmp_path / "other.run", data, ranking(data, 2))
    file.write_text(file.read_text() + "new Q0 p1 1 0.5 other\n")
    for no_positive, expected in (("zero", 0.0), ("skip", np.nan)):
        options = Evaluation(metrics=[], depth=20, no_positive=no_positive)  # type: ignore[arg-type]
        judged_metrics = ["relevance/ndcg@10", "relevance/share_unjudged@10"]
        found, said = measure_run_file(file, data, SPLIT, judged_metrics, options, {"new": "a new query", "q0": "cup"})
        assert said == []
        assert (len(found.query_ids), found.query_ids[-1], found.queries[-1]) == (13, "new", "a new query")
        np.testing.assert_equal(found.values["relevance/ndcg@10"][-1], expected)
        assert found.values["relevance/share_unjudged@10"][-1] == 0.1

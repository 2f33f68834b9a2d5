"""What is mined, against loops over all cosines; the command on a small run, on what it trained, on two ranks."""

import csv
import hashlib
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from datamodules.manifest import Manifest, read_manifest
from datamodules.tuples import TupleDataModule
from mmfusion.batch import Judgments
from mmfusion.checkpoints import WholeFiles, best_of
from mmfusion.cli import main
from mmfusion.mine import PLACES, TABLES, iteration_of, next_command, ranked
from mmfusion.mining import REMOVED, SAME, Known, Mined, Rules, Vectors, mined
from mmfusion.retrieval.ranking import Rows, VectorsOf
from mmfusion.run import FusionCLI
from tests.datamodules.small import convert, small_catalogue, write_rows
from tests.mmfusion import test_cli_ranks

ROOT = Path(__file__).parents[2]
SMALL = [
    "--data.batch_size=16", "--data.streams=4", "--data.image_size=[32, 32]", "--trainer.max_steps=10",
    "--trainer.check_val_every_n_epoch=1", "--trainer.accelerator=cpu", "--wandb.mode=disabled",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
]  # fmt: skip
Negatives = dict[int, list[tuple[int, float]]]


def slow(
    cosines: np.ndarray,
    query_ids: Sequence[int],
    product_ids: Sequence[str],
    gains: Mapping[tuple[int, int], float],
    vectors: np.ndarray,
    rules: Rules,
) -> tuple[Negatives, Counter[str]]:
    """By the module's docstring, over all products of the catalogue. gains: of train pairs; positive is 1 or more."""
    found: Negatives = {}
    removed = Counter[str]()
    for query, row in zip(query_ids, cosines.astype(np.float64), strict=True):
        positives = [p for p in range(len(row)) if gains.get((query, p), 0) >= 1]
        if not positives:
            continue
        found[query] = []
        best = max(row[p] for p in positives)
        rank = 0
        for product in sorted(range(len(row)), key=lambda p: (row[p], product_ids[p]), reverse=True):
            gain = gains.get((query, product), 0)
            if rank >= rules.last:
                break
            if gain > 0:
                removed["positive" if gain >= 1 else "ignored"] += 1
                continue
            rank += 1
            if rank < rules.first:
                continue
            if rules.margin is not None and not row[product] < best - rules.margin:
                removed["margin"] += 1
            elif any(np.linalg.norm(vectors[p] - vectors[product]) <= SAME for p in positives):
                removed["duplicate"] += 1
            elif len(found[query]) < rules.k:
                found[query].append((product, row[product]))
    return found, removed


def as_dict(result: Mined, queries: Sequence[int]) -> Negatives:
    found: Negatives = {query: [] for query in queries}
    for query, product, score in zip(result.query.tolist(), result.product.tolist(), result.score, strict=True):
        found[query].append((product, float(score)))
    return found


def same(found: Negatives, expected: Negatives) -> None:
    assert {q: sorted(p for p, _ in ps) for q, ps in found.items()} == {
        q: sorted(p for p, _ in ps) for q, ps in expected.items()
    }
    for query, products in found.items():
        scores = dict(expected[query])
        for product, score in products:
            assert score == pytest.approx(scores[product], abs=1e-6)


def judgments(gains: Mapping[tuple[int, int], float], **others: Sequence[float]) -> Judgments:
    pairs = sorted(gains)
    columns = {"relevance": np.array([gains[pair] for pair in pairs])}
    columns |= {name: np.array(values, float) for name, values in others.items()}
    return Judgments(
        np.array([q for q, _ in pairs], np.int64), np.array([p for _, p in pairs], np.int64), columns,
        dict.fromkeys(columns, 1.0), "unknown",
    )  # fmt: skip


def drawn(
    seed: int, queries: int = 9, products: int = 60
) -> tuple[np.ndarray, dict[tuple[int, int], float], np.ndarray]:
    """Cosines in which twins have nearly equal scores, gains, and vectors, nearly equal ones of every other twin."""
    rng = np.random.default_rng(seed)
    cosines = rng.uniform(-1, 1, (queries, products)).astype(np.float32)
    vectors = rng.normal(size=(products, 4)).astype(np.float32)
    twins = rng.permutation(products)[: products // 2].reshape(-1, 2)
    cosines[:, twins[:, 0]] = cosines[:, twins[:, 1]] + rng.choice([-1, 0, 1], (queries, len(twins))) * SAME / 4
    vectors[twins[::2, 0]] = vectors[twins[::2, 1]] + SAME / 4
    listed = [(q, p) for q in range(queries - 1) for p in rng.permutation(products)[: rng.integers(0, 12)].tolist()]
    return cosines, {pair: float(rng.choice([0, 0.1, 1, 2])) for pair in listed}, vectors


def looked_up(vectors: np.ndarray) -> Vectors:
    return lambda ids: vectors[ids]


def numbered(looks: str) -> Vectors:
    """Vectors of products that look like the letters."""
    return looked_up(np.array([[ord(look), 1] for look in looks], np.float32))


def lists(cosines: np.ndarray, product_ids: Sequence[str], depth: int) -> tuple[np.ndarray, np.ndarray]:
    order = [sorted(range(len(row)), key=lambda p: (row[p], product_ids[p]), reverse=True)[:depth] for row in cosines]
    ids = np.array(order, np.int64)
    return ids, np.take_along_axis(cosines, ids, 1)


@pytest.mark.parametrize("margin", [None, 0.0, 0.05, 1.2])
@pytest.mark.parametrize(("first", "last", "k"), [(1, 60, 60), (1, 10, 3), (4, 20, 100), (10, 500, 8), (60, 60, 1)])
def test_what_is_mined_equals_the_loops(margin, first, last, k):
    rules = Rules(k, first, last, margin)
    for seed in range(6):
        cosines, gains, vectors = drawn(seed)
        names = [f"p{i}" for i in range(cosines.shape[1])]
        expected, removed = slow(cosines, range(9), names, gains, vectors, rules)
        known = Known.of(judgments(gains), len(names))
        asked = known.with_positive(np.arange(9))
        ids, scores = lists(cosines[asked], names, len(names))
        result = Mined.joined([mined(asked, ids, scores, known, looked_up(vectors), rules)])
        same(as_dict(result, asked.tolist()), expected)
        assert result.removed == {name: removed[name] for name in REMOVED}
        assert result.per_query.tolist() == [len(expected[query]) for query in asked.tolist()]
        assert (np.diff(result.query * 60 + result.product) > 0).all()


def test_the_loops_meet_every_case():
    """Else the test above would show little."""
    seen = Counter[str]()
    for seed in range(6):
        cosines, gains, vectors = drawn(seed)
        seen += slow(cosines, range(9), [f"p{i}" for i in range(60)], gains, vectors, Rules(8, 1, 60, 0.0))[1]
    assert min(seen[name] for name in REMOVED) > 5


@pytest.mark.parametrize("margin", [None, 0.05])
@pytest.mark.parametrize("equal", [False, True], ids=["drawn", "equal"])
def test_lists_as_deep_as_is_promised_are_enough(margin, equal):
    """Also where scores are equal beyond their end, so that a positive that is past it may be a duplicate."""
    past = 0
    for seed, last in itertools.product(range(6), (3, 12)):
        rules = Rules(5, 1, last, margin)
        cosines, gains, vectors = drawn(seed)
        if equal:
            cosines[:] = 0.5
            vectors[::2] = vectors[0]
        names = [f"p{i}" for i in range(60)]
        known = Known.of(judgments(gains), 60)
        asked = known.with_positive(np.arange(9))
        whole = mined(asked, *lists(cosines[asked], names, 60), known, looked_up(vectors), rules)
        for query in asked:
            depth = rules.last + int(known.counts(np.array([query]))[0])
            ids, scores = lists(cosines[[query]], names, depth)
            one = mined(np.array([query]), ids, scores, known, looked_up(vectors), rules)
            assert one.product.tolist() == whole.product[whole.query == query].tolist()
            past += one.removed["duplicate"]
    assert past > 0 or (equal and margin is not None)


def test_a_duplicate_of_a_positive_past_the_list_is_none():
    """All score the same; the list ends before the positive 9, which looks as product 2 does."""
    ids, scores = np.arange(4)[None], np.full((1, 4), 0.5, np.float32)
    known = Known.of(judgments({(0, 9): 1}), 10)
    result = mined(np.array([0]), ids, scores, known, numbered("abcdefghic"), Rules(9, 1, 3, None))
    assert result.product.tolist() == [0, 1]
    assert result.removed == {"positive": 0, "ignored": 0, "margin": 0, "duplicate": 1}
    scores[0, 3] = 0.4
    result = mined(np.array([0]), ids, scores, known, numbered("abcdefghic"), Rules(9, 1, 3, None))
    assert result.product.tolist() == [0, 1, 2], "the positive scores less"


def test_vectors_are_asked_for_in_pieces(monkeypatch):
    cosines, gains, vectors = drawn(1)
    known = Known.of(judgments(gains), 60)
    asked, names = known.with_positive(np.arange(9)), [f"p{i}" for i in range(60)]
    given = asked, *lists(cosines[asked], names, 60), known
    sizes = list[int]()

    def noted(ids: np.ndarray) -> np.ndarray:
        sizes.append(len(ids))
        return vectors[ids]

    whole = mined(*given, noted, Rules(9, 1, 60, None))
    assert len(sizes) == 1
    assert sizes[0] < 60, "of those that score like a positive"
    monkeypatch.setattr("mmfusion.mining.PAIRS", 2)
    pieces = mined(*given, noted, Rules(9, 1, 60, None))
    assert max(sizes[1:]) <= 4
    assert pieces.product.tolist() == whole.product.tolist()
    assert pieces.removed == whole.removed
    assert whole.removed["duplicate"] > 0


def test_a_list_by_hand():
    """Query 7; products 0 to 7 score .9, .8, ...; 1 is positive, 2 ignored, 3 judged 0; 5 scores as 4 does."""
    ids = np.array([[0, 1, 2, 3, 4, 5, 6, 7, -1]])
    scores = np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.4, 0.3, -np.inf]], np.float32)
    known = Known.of(judgments({(7, 1): 1, (7, 2): 0.1, (7, 3): 0}), 8)
    vectors = numbered("abcdeegf")

    def products(**rules: Any) -> list[int]:
        return mined(np.array([7]), ids, scores, known, vectors, Rules(**rules)).product.tolist()

    assert products(k=9, first=1, last=9, margin=None) == [0, 3, 4, 5, 6, 7]
    assert products(k=9, first=1, last=9, margin=0.0) == [3, 4, 5, 6, 7], "0 ranks above the positive"
    assert products(k=9, first=1, last=9, margin=0.25) == [4, 5, 6, 7], "3 is within .25 of it"
    assert products(k=2, first=2, last=9, margin=None) == [3, 4]
    assert products(k=9, first=3, last=4, margin=None) == [4, 5], "ranks are counted without 1 and 2"


def test_a_duplicate_of_any_positive_is_none():
    """Product 2 has the vector and so the score of the weaker positive 1; 4 its score alone."""
    ids, scores = np.array([[0, 1, 2, 4, 3]]), np.array([[0.9, 0.5, 0.5, 0.5, 0.4]], np.float32)
    known = Known.of(judgments({(0, 0): 1, (0, 1): 1}), 5)
    result = mined(np.array([0]), ids, scores, known, numbered("abbdc"), Rules(9, 1, 9, 0.05))
    assert result.product.tolist() == [4, 3]
    assert result.removed == {"positive": 2, "ignored": 0, "margin": 0, "duplicate": 1}


def test_the_primary_column_decides_what_is_worth_something():
    """Pairs with product 0 to 3: bad but desired; not judged but desired; not judged, not desired; worth .1."""
    nan = np.nan
    train = judgments({(0, 0): 0, (0, 1): nan, (0, 2): nan, (0, 3): 0.1}, desirability=[1, 1, 0, nan])
    known = Known.of(train, 4)
    assert known.kinds(np.array([0]), np.array([[0, 1, 2, 3, -1]])).tolist() == [[0, 1, 0, 1, 0]]
    assert known.counts(np.array([0, 1])).tolist() == [2, 0]
    assert known.with_positive(np.array([0, 1])).tolist() == []


def test_the_ranking_is_the_same_however_it_is_cut(monkeypatch):
    rng = torch.Generator().manual_seed(5)
    queries, corpus = torch.randn(30, 8, generator=rng), torch.randn(70, 8, generator=rng)
    gains = {(q, p): 1.0 for q in range(0, 30, 2) for p in range(q // 2)} | {(0, 0): 1.0}
    known, rules = Known.of(judgments(gains), 70), Rules(4, 2, 9, None)
    asked = known.with_positive(np.arange(30))
    found = []
    for places in (PLACES, 64, 1):
        monkeypatch.setattr("mmfusion.mine.PLACES", places)
        rankings = list(
            ranked(Rows(queries, torch.arange(30)), Rows(corpus, torch.arange(70)), asked, torch.arange(70), known,
                   rules, 16)
        )  # fmt: skip
        depths = [ranking.top.ids.shape[1] for ranking in rankings]
        assert max(depths) == 9 + 14
        assert depths == sorted(depths), "few lists are long"
        held = [ranking.top.ids.numel() for ranking in rankings]
        assert all(size <= places or len(r.query_ids) == 1 for size, r in zip(held, rankings, strict=True))
        assert len(held) == {PLACES: 1, 64: 5, 1: len(asked)}[places]
        vectors = VectorsOf(Rows(corpus, torch.arange(70)))
        parts = [mined(r.query_ids, r.top.ids.numpy(), r.top.scores.numpy(), known, vectors, rules)
                 for r in rankings]  # fmt: skip
        found.append(Mined.joined(parts))
    assert len(found[0].query) == 4 * len(asked)
    for name in ("query", "product", "score"):
        for other in found[1:]:
            assert np.array_equal(getattr(found[0], name), getattr(other, name))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"k": "0"}, "K=0; expected at least 1"),
        ({"k": "many"}, "K=many; expected a number"),
        ({"ranks": "5"}, "RANKS=5; expected first:last"),
        ({"ranks": "9:3"}, "RANKS=9:3; expected first:last"),
        ({"ranks": "0:3"}, "RANKS=0:3"),
        ({"ranks": "1:2:3"}, "RANKS=1:2:3"),
        ({"ranks": "1:99999999999999999999"}, "RANKS=1:99999999999999999999; expected first:last"),
        ({"k": "99999999999999999999"}, "K=99999999999999999999; expected"),
        ({"margin": "-0.1"}, "MARGIN=-0.1; expected"),
        ({"margin": "2"}, "MARGIN=2; expected"),
        ({"margin": "nan"}, "MARGIN=nan; expected"),
        ({"margin": "wide"}, "MARGIN=wide; expected a number"),
    ],
)
def test_rules_out_of_sense_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Rules.of(**given)


def test_rules_as_typed():
    assert Rules.of() == Rules(20, 10, 100, 0.05)
    assert Rules.of("3", "1:7", "none") == Rules(3, 1, 7, None)


def test_the_iteration_is_found_by_content():
    tables = {
        "mined-2": {"sha256": "b", "made_by": {"iteration": 2}},
        "renamed": {"sha256": "a", "made_by": {"iteration": 1}},
        "theirs": {"sha256": "c", "made_by": {"importer": "negatives"}},
    }
    assert iteration_of({}, tables) == 0
    assert iteration_of({"mined-1": "a", "theirs": "c"}, tables) == 1
    assert iteration_of({"mined-1": "a", "mined-2": "b"}, tables) == 2
    assert iteration_of({"mined-9": "gone", "theirs": "c"}, tables) == 9, "by its name"
    assert iteration_of({"mined-2": "another", "renamed": "a"}, tables) == 2
    assert iteration_of({"special": "gone"}, tables) == 0


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """A folder with shards/ and a small run, mined as `first`; commands run in it."""
    folder = tmp_path_factory.mktemp("mining")
    (folder / "experiments").symlink_to(ROOT / "experiments")
    catalogue = small_catalogue(folder / "catalogue")
    with (catalogue / "judgments.csv").open(newline="") as file:
        header, *rows = list(csv.reader(file))
    kept = [[q, p, "I" if n % 7 == 3 and label == "S" else label] for n, (q, p, label) in enumerate(rows) if n % 5]
    write_rows(catalogue / "judgments.csv", header, kept)
    convert(str(catalogue), str(folder / "shards"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def mmfusion(place) -> Callable[..., None]:
    def run(*args: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("MMFUSION_VERSION", raising=False)
            patch.setattr(sys, "argv", ["mmfusion", *args])
            main()

    return run


@pytest.fixture(scope="module")
def run(mmfusion) -> Path:
    mmfusion("train", "--exp", "fusion_gated", "--data", "shards", *SMALL)
    (folder,) = Path("runs/fusion_gated").iterdir()
    return folder


def manifest() -> Manifest:
    return read_manifest(Path("shards"))


def table(name: str) -> Negatives:
    found: Negatives = {}
    for row in pq.read_table(f"shards/pairs/{name}.parquet").to_pylist():
        found.setdefault(row["query"], []).append((row["product"], row["score"]))
    return found


def by_brute_force(run: Path, view: str, rules: Rules) -> tuple[Negatives, Counter[str]]:
    """Vectors of all products and train queries by the run's best checkpoint, and loops over all cosines."""
    module = FusionCLI.parse([f"--config={run}/config.yaml"], None).model
    module.load_state_dict(torch.load(best_of(run), weights_only=True)["state_dict"])
    module.eval()
    data = TupleDataModule(path="shards", image_size=32)
    data.setup("test")
    with torch.no_grad():
        (products,), (queries,) = list(data.corpus_loader()), list(data.query_loader("train"))
        corpus = module.views(products, set(module.product.views))[view].double().numpy()
        vectors = module.features.queries(queries).double().numpy()
    cosines = (vectors @ corpus.T).astype(np.float32)
    train = data.judgments("train")
    gains = dict(
        zip(zip(train.query.tolist(), train.product.tolist(), strict=True), train.gain["relevance"], strict=True)
    )
    found, removed = slow(cosines, queries.id.tolist(), data.product_ids(), gains, corpus, rules)
    return {query: products for query, products in found.items() if products}, removed


@pytest.mark.parametrize(
    ("name", "options", "view", "rules"),
    [
        ("whole", ["--k=5", "--ranks=1:30", "--margin=none"], "fused", Rules(5, 1, 30, None)),
        ("range", ["--k=20", "--ranks=3:12", "--margin=0.01"], "fused", Rules(20, 3, 12, 0.01)),
        ("by-photo", ["--k=9", "--ranks=1:40", "--margin=none", "--view=image"], "image", Rules(9, 1, 40, None)),
        ("by-text", ["--k=50", "--ranks=1:64", "--margin=0.05", "--view=text"], "text", Rules(50, 1, 64, 0.05)),
    ],
)
def test_a_mined_table_equals_all_cosines(mmfusion, run, capfd, name, options, view, rules):
    mmfusion("mine", "--run", str(run), "--name", name, *options)
    said = capfd.readouterr().out
    expected, removed = by_brute_force(run, view, rules)
    same(table(name), expected)
    assert sum(map(len, expected.values())) > 20
    assert (
        "removed: {positive:,} as positives, {ignored:,} as ignored, {margin:,} by the margin, {duplicate:,} as "
        "duplicates of positives".format(**{kind: removed[kind] for kind in REMOVED})
        in said
    )
    assert said.rstrip().splitlines()[-2] == f"negatives: shards/pairs/{name}.parquet"
    made_by = manifest().pairs[name].made_by
    assert made_by.pop("commit") is None, "the test's folder is no checkout"
    assert made_by == {
        "mined_from": str(run.resolve()), "checkpoint": best_of(run).name,
        "checkpoint_sha256": hashlib.sha256(best_of(run).read_bytes()).hexdigest(), "view": view, "k": rules.k,
        "ranks": [rules.first, rules.last], "margin": rules.margin, "manifest": manifest().hash, "seed": 1,
        "overrides": [], "trained_with": {}, "iteration": 1,
    }  # fmt: skip


@pytest.mark.parametrize("view", ["fused", "text", "image"])
def test_duplicates_are_met_in_the_small_catalogue(run, view):
    assert by_brute_force(run, view, Rules(5, 1, 30, None))[1]["duplicate"] > 0


def test_two_ranks_write_what_one_does(mmfusion, run, place):
    options = ["--k=5", "--ranks=1:30", "--margin=none"]  # which meet duplicates, see above
    mmfusion("mine", "--run", str(run), "--name=one", *options)
    done = test_cli_ranks.mmfusion(
        place, "mine", "--run", str(run), "--name=two", *options, "--trainer.devices=2", "--trainer.strategy=ddp"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("negatives: ") == 1, "one rank prints"
    same(table("two"), table("one"))
    one, two = ({**manifest().pairs[name].made_by} for name in ("one", "two"))
    assert two.pop("overrides") == ["--trainer.devices=2", "--trainer.strategy=ddp"]
    assert one.pop("overrides") == []
    assert one == two


def as_made(typed: str) -> list[str]:
    """What a shell runs when a user types a make command, word by word."""
    shown = subprocess.run(
        ["sh", "-c", typed.replace("make ", f"make -C {shlex.quote(str(ROOT))} --no-print-directory -n -o setup ", 1)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    line = shown.splitlines()[-1].replace(".venv/bin/mmfusion", "printf '%s\\0'", 1)
    words = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return ["mmfusion", *words.split("\0")[:-1]]


@pytest.mark.filterwarnings("ignore:data.hard_max_gain is 0.1")  # no loss here has a hard_up_to
def test_iterations_are_a_chain(mmfusion, run, capfd):
    before = manifest().hash
    mmfusion("mine", "--run", str(run), "--k=4", "--ranks=1:30", "--margin=none")
    typed = capfd.readouterr().out.rstrip().splitlines()[-1].removeprefix("train with them: ")
    words = shlex.split(typed)
    assert words[:5] == ["make", "train", "EXP=fusion_gated", "DATA=shards", words[-1]]
    arguments = shlex.split(words[-1].removeprefix("ARGS="))
    assert arguments == [*SMALL, "--data.hard_negatives=1", "--data.hard_from=[mined-1]"]
    assert manifest().hash == before, "the catalogue is the same"
    judged = ["--data.hard_from=[judged,mined-1]", "--data.hard_max_gain=0.1"]
    mmfusion("train", "--exp", "fusion_gated", "--data", "shards", *arguments, *judged, "--runs=second")
    (second,) = Path("second/fusion_gated").iterdir()
    options = yaml.safe_load((second / "config.yaml").read_text())["data"]["init_args"]
    assert (options["hard_negatives"], options["hard_from"]) == (1, ["judged", "mined-1"])
    capfd.readouterr()
    mmfusion("mine", "--run", str(second), "--k=4", "--ranks=1:30", "--margin=none")
    typed = capfd.readouterr().out.rstrip().splitlines()[-1].removeprefix("train with them: ")
    assert "--data.hard_negatives=1 --data.hard_from=[mined-2]" in typed
    assert "mined-1" not in typed
    mmfusion(*as_made(typed)[1:], "--runs=third")
    (third,) = Path("third/fusion_gated").iterdir()
    options = yaml.safe_load((third / "config.yaml").read_text())["data"]["init_args"]
    assert (options["hard_negatives"], options["hard_from"], options["hard_max_gain"]) == (1, ["mined-2"], 0)
    made_by = manifest().pairs["mined-2"].made_by
    assert made_by["iteration"] == 2
    assert made_by["trained_with"] == {"mined-1": manifest().pairs["mined-1"].sha256}
    assert made_by["mined_from"] == str(second.resolve())


@pytest.fixture(scope="module")
def other(place, run) -> Path:
    """Shards of another catalogue."""
    convert(str(small_catalogue(place / "other", products=96)), "elsewhere")
    return Path("elsewhere")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--k=0"], "K=0"),
        (["--ranks=5"], "RANKS=5"),
        (["--margin=2"], "MARGIN=2"),
        (["--run=runs/none"], "RUN=runs/none is no run"),
        (["--run="], "is no run"),
        (["--view=sound"], "--view=sound: the run has the views text, image, fused"),
        (["--name=Mined 1"], "'Mined 1'"),
        (["--name=judged"], "choose another name"),
        (["--name=there"], "exists: choose another name (NAME=...), or replace it (ARGS=--replace)"),
        (["--data=elsewhere"], "another catalogue than the one that the run was trained on"),
        (["--data=nowhere"], "nowhere does not exist"),
        (["--data=pipe:cat shards/{name}", "--data.allow_pipe=true"], "local folder"),
        (["--ranks=65:70"], "no negative is left"),
        (["--ranks=1:99999999999999999999"], "RANKS=1:99999999999999999999"),
        (["--data.test_splits=[val]"], "data.test_splits is not an option of mining"),
        (["--data.test_splits=[train,val]"], "data.test_splits is not an option of mining"),
        (["--data.workers=-1"], "error: data.workers is -1; expected at least 0\n"),
        (["--trainer.fast_dev_run=true"], "trainer.fast_dev_run is not an option of a run"),
    ],
)
def test_a_mistake_is_one_message_and_writes_nothing(mmfusion, run, other, capfd, args, said):
    if "there" not in manifest().pairs:
        mmfusion("mine", "--run", str(run), "--name=there", "--ranks=1:30", "--margin=none")
    before = {path: path.read_bytes() for path in Path("shards").rglob("*") if path.is_file()}
    capfd.readouterr()
    given = [] if args[0].startswith("--run") else ["--run", str(run)]
    name = [] if args[0].startswith("--name") else ["--name=new"]
    with pytest.raises(SystemExit) as end:
        mmfusion("mine", *given, *name, *args)
    assert end.value.code == 2
    errors = capfd.readouterr().err
    assert said in errors
    assert "Traceback" not in errors
    assert "Namespace" not in errors
    assert {path: path.read_bytes() for path in Path("shards").rglob("*") if path.is_file()} == before
    assert not list(other.rglob("*.pairs"))
    assert not (other / "pairs").exists()


def test_the_same_catalogue_elsewhere_is_taken(mmfusion, run, place, capfd):
    Path("copy").symlink_to(place / "shards")
    mmfusion("mine", "--run", str(run), "--data=copy", "--name=of-copy", "--ranks=1:30", "--margin=none")
    assert "of-copy" in manifest().pairs
    assert " DATA=copy " in capfd.readouterr().out.rstrip().splitlines()[-1]


def test_what_there_is_is_replaced_or_restored_when_asked(mmfusion, run):
    options = ["--run", str(run), "--name=replaced", "--ranks=1:30", "--margin=none"]
    mmfusion("mine", *options, "--k=2")
    before = manifest().pairs["replaced"]
    mmfusion("mine", *options, "--k=3", "--replace")
    after = manifest().pairs["replaced"]
    assert (before.made_by["k"], after.made_by["k"]) == (2, 3)
    file = Path("shards/pairs/replaced.parquet")
    whole = file.read_bytes()
    file.unlink()
    mmfusion("mine", *options, "--k=3", "--replace", "--data.eval_batch_size=64")
    assert file.read_bytes() == whole
    assert manifest().pairs["replaced"] == after


def test_a_table_that_is_not_listed_is_warned_of(mmfusion, run, place):
    """What a run was trained with was replaced since: its number is told by its name."""
    state = torch.load(best_of(run), weights_only=True)
    state["contract"][f"{TABLES}mined-6"] = "f" * 64
    trained = Path(shutil.copytree(run, "unlisted"))
    WholeFiles().save_checkpoint(state, best_of(trained))
    with pytest.warns(UserWarning, match=r"shards does not list .* trained with: mined-6\. Going by .* iteration 7"):
        mmfusion("mine", "--run", str(trained), "--ranks=1:30", "--margin=none")
    assert manifest().pairs["mined-7"].made_by["trained_with"] == {"mined-6": "f" * 64}


def test_overrides_are_told_without_secrets(mmfusion, run):
    options = ["--wandb.project=https://me:SECRET@host/a", "--data.eval_batch_size=64"]
    mmfusion("mine", "--run", str(run), "--name=told", "--ranks=1:30", "--margin=none", *options)
    assert manifest().pairs["told"].made_by["overrides"] == ["--wandb.project=https://host/a", options[1]]


def test_the_next_command_of_a_run_by_fit(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {init_args: {path: shards, hard_negatives: 3}}")
    command = ["mmfusion", "fit", "--config", "a.yaml"]
    (tmp_path / "environment.json").write_text(json.dumps({"command": command}))
    assert next_command(tmp_path, "copy", "mined-3") == (
        f".venv/bin/mmfusion fit --config={tmp_path}/config.yaml --data.path=copy --data.hard_negatives=3 "
        "'--data.hard_from=[mined-3]'"
    )


def test_the_next_command_keeps_options_and_quotes_them(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {init_args: {path: shards, hard_negatives: 2}}")
    odd = ['--wandb.group=$HOME\'s "`!$$x`"', "--experiment=a\\b"]
    options = [
        "--model.losses.query_text={label: a b}",
        "--data.hard_from",
        "[mined-1]",
        "--data.hard_negatives=2",
        *odd,
    ]
    command = ["mmfusion", "train", "--exp", "joint", "--encoders", "minilm", "--data", "my shards", *options,
               "--resume=runs/x/checkpoints/last.ckpt"]  # fmt: skip
    (tmp_path / "environment.json").write_text(json.dumps({"command": command}))
    for data in (None, "it's $(pwd)", "$HOME"):
        typed = next_command(tmp_path, data, "mined-2")
        assert as_made(typed)[1:] == [
            "train", "--exp", "joint", "--encoders", "minilm", "--data", data or "my shards", options[0], *odd,
            "--data.hard_negatives=2", "--data.hard_from=[mined-2]",
        ]  # fmt: skip


@pytest.mark.parametrize("verb", ["train", "fit"])
def test_the_next_command_passes_the_check_of_its_options(tmp_path, verb):
    """Of a run with hard_max_gain, which says something of judged negatives alone: in a file, or typed."""
    (tmp_path / "config.yaml").write_text("data: {init_args: {path: a, hard_negatives: 2, hard_max_gain: 0.1}}")
    command = ["mmfusion", verb, "--exp=joint", "--data", "a", "--data.path=b", "--data.hard_max_gain=0.1"]
    (tmp_path / "environment.json").write_text(json.dumps({"command": command}))
    typed = next_command(tmp_path, None, "mined-1")
    words = as_made(typed) if verb == "train" else shlex.split(typed)
    assert words[-3:] == ["--data.hard_negatives=2", "--data.hard_from=[mined-1]", "--data.hard_max_gain=0.0"]
    given = {name: yaml.safe_load(value) for name, value in re.findall(r"--data\.(hard_\w+)=(\S+)", " ".join(words))}
    TupleDataModule(**given)
    assert verb == "fit" or words[words.index("--data") + 1] == "b"
    with pytest.raises(ValueError, match="hard_max_gain"):
        TupleDataModule(**{**given, "hard_max_gain": 0.1})

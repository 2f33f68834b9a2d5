"""Our search and metrics against those of faiss, sentence-transformers and torchmetrics, on the same seeded data.

    make bench-eval [ARGS="--queries 1000 --products 20000 --disk-products 300000"]

Contestants take turns, and the median of REPEATS runs counts (torchmetrics, the slowest by far, runs once). A
contestant's memory is what it adds to the process at its peak, as Linux counts it. Then one search through a file of
vectors larger than the memory it may take, dropped from the system's cache before, by a process of its own.
The clock is never a test: a row over its limit says so and the exit code stays 0.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measured import GIB, REPEATS, Runs, console, said, status, verdict
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from mmfusion.batch import Judgments
from mmfusion.retrieval.evaluation import Evaluation
from mmfusion.retrieval.metrics import parse_metric, ranked_gains
from mmfusion.retrieval.topk import TopK, search, tie_ranks
from mmfusion.retrieval.vectors import VectorFile, write_vectors

K, THREADS = 100, 2
TOPIC, NOISE = 100, 1.5  # products of a topic; how far vectors lie from its centre, whose norm is 1
GAINS = {"E": 1.0, "S": 0.1, "C": 0.01, "I": 0.0}
JUDGED = ["E"] * 10 + ["S"] * 10 + ["C"] * 5 + ["I"] * 5  # of each query, by similarity; E and S are relevant
DISK_QUERIES, DISK_MEMORY = 1000, 2 * GIB
# The default list of sentence-transformers' evaluator, in our names.
SHARED = [f"{family}@{k}" for family in ("hit_rate", "precision", "recall") for k in (1, 3, 5, 10)]
METRICS = [*SHARED, "mrr@10", "ndcg@10", "map@100"]


@dataclass
class Data:
    queries: Tensor
    products: Tensor
    judgments: Judgments
    product_ids: list[str]
    tie: Tensor


def clustered(queries: int, products: int, dim: int, seed: int) -> Data:
    """Queries and products scattered around the centres of topics; judgments only within the topic of a query."""
    random, topics = np.random.default_rng(seed), max(1, products // TOPIC)
    centres = random.standard_normal((topics, dim), np.float32) / dim**0.5

    def scattered(topic: np.ndarray) -> np.ndarray:
        vectors = centres[topic] + NOISE / dim**0.5 * random.standard_normal((len(topic), dim), np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    topic = random.integers(topics, size=queries)
    query_vectors, product_vectors = scattered(topic), scattered(np.arange(products) % topics)
    drawn = random.random((queries, products // topics)).argsort(1)[:, : len(JUDGED)]
    judged = topic[:, None] + topics * drawn
    similarity = np.einsum("qd,qjd->qj", query_vectors, product_vectors[judged])
    judged = np.take_along_axis(judged, similarity.argsort(1)[:, ::-1], 1)
    gain = np.broadcast_to([GAINS[label] for label in JUDGED[: judged.shape[1]]], judged.shape)
    order = judged.argsort(1)
    judgments = Judgments(
        query=np.arange(queries).repeat(judged.shape[1]),
        product=np.take_along_axis(judged, order, 1).ravel(),
        gain={"relevance": np.take_along_axis(gain, order, 1).ravel()},
        positive_from={"relevance": GAINS["S"]},
        unlisted="unknown",
        labels={"relevance": GAINS},
    )
    ids = [f"p{product}" for product in range(products)]
    ascending = products - 1 - tie_ranks(ids)  # equal scores by id ascending, as sentence-transformers has them
    return Data(torch.from_numpy(query_vectors), torch.from_numpy(product_vectors), judgments, ids, ascending)


def our_search(data: Data) -> TopK:
    return search(data.queries, data.products, torch.arange(len(data.products)), data.tie, K)


def our_metrics(data: Data, top: TopK, names: Sequence[str] = METRICS) -> dict[str, float]:
    ranked = ranked_gains(top.ids.numpy(), np.arange(len(data.queries)), data.judgments, "relevance")
    return {name: float(np.nanmean(parse_metric(name, K, GAINS)(ranked))) for name in names}


def faiss_search(data: Data) -> Callable[[], np.ndarray]:
    import faiss  # noqa: PLC0415 (the process that searches from disk must not hold it)

    faiss.omp_set_num_threads(THREADS)
    index = faiss.IndexFlatIP(data.products.shape[1])
    index.add(data.products.numpy())
    return lambda: index.search(data.queries.numpy(), K)[1]


class Evaluator:
    """sentence-transformers' InformationRetrievalEvaluator with its default metrics, fed with given vectors."""

    def __init__(self, data: Data) -> None:
        from sentence_transformers.sentence_transformer import evaluation  # noqa: PLC0415 (as faiss)
        from sentence_transformers.util import dot_score  # noqa: PLC0415

        self.data, self.product_ids = data, data.product_ids
        judgments = data.judgments
        relevant = np.flatnonzero(judgments.gain["relevance"] >= judgments.positive_from["relevance"])
        relevant_docs: dict[str, set[str]] = {f"q{query}": set() for query in range(len(data.queries))}
        for query, product in zip(judgments.query[relevant], judgments.product[relevant], strict=True):
            relevant_docs[f"q{query}"].add(self.product_ids[product])
        self.evaluator = evaluation.InformationRetrievalEvaluator(
            dict.fromkeys(relevant_docs, ""),
            dict.fromkeys(self.product_ids, ""),
            relevant_docs,
            score_functions={"dot": dot_score},
            write_csv=False,
        )

    def encode_query(self, texts: list[str], **options: Any) -> Tensor:
        """The evaluator takes this object for the model of the queries."""
        return self.data.queries

    def whole(self) -> dict[str, float]:
        scores = self.evaluator.compute_all_metrics(self, corpus_embeddings=self.data.products)
        return _renamed(scores["dot"])

    def rankings(self, top: TopK) -> list[list[dict[str, Any]]]:
        """Ranked lists in the evaluator's own form."""
        pairs = zip(top.ids.tolist(), top.scores.tolist(), strict=True)
        return [
            [{"corpus_id": self.product_ids[id_], "score": score} for id_, score in zip(*row, strict=True)]
            for row in pairs
        ]

    def metrics(self, rankings: list[list[dict[str, Any]]]) -> dict[str, float]:
        return _renamed(self.evaluator.compute_metrics(rankings))


def _renamed(scores: dict[str, dict[int, float]]) -> dict[str, float]:
    scores = {**scores, "hit_rate@k": scores["accuracy@k"]}
    return {name: float(scores[f"{name.partition('@')[0]}@k"][int(name.partition("@")[2])]) for name in METRICS}


def torchmetrics_metrics(data: Data, top: TopK) -> Callable[[], dict[str, float]]:
    """Fed with the score and the gain of every retrieved pair, which it cannot look up by itself."""
    from torchmetrics import retrieval  # noqa: PLC0415 (as faiss)

    families = {
        "hit_rate": retrieval.RetrievalHitRate,
        "precision": retrieval.RetrievalPrecision,
        "recall": retrieval.RetrievalRecall,
        "mrr": retrieval.RetrievalMRR,
        "ndcg": retrieval.RetrievalNormalizedDCG,
        "map": retrieval.RetrievalMAP,
    }
    ranked = ranked_gains(top.ids.numpy(), np.arange(len(data.queries)), data.judgments, "relevance")
    gains, relevant = torch.from_numpy(np.nan_to_num(ranked.gains)).flatten(), torch.from_numpy(ranked.relevant)
    query = torch.arange(len(data.queries)).repeat_interleave(K)

    def measured() -> dict[str, float]:
        found = {}
        for name in METRICS:
            family, _, k = name.partition("@")
            metric = families[family](top_k=int(k))
            metric.update(top.scores.flatten(), gains if family == "ndcg" else relevant.flatten(), indexes=query)
            found[name] = float(metric.compute())
        return found

    return measured


def compare_in_memory(data: Data, table: Table) -> None:
    """One row per peer."""
    faiss, evaluator = faiss_search(data), Evaluator(data)
    everything = Evaluation(depth=K).names(GAINS)
    names = "search", "faiss", "whole", "evaluator", "metrics", "evaluator's", "torchmetrics"
    runs = {name: Runs() for name in names}
    for repeat in range(REPEATS):
        said(f"repeat {repeat + 1} of {REPEATS}: search and metrics in memory")
        theirs = runs["faiss"].run(faiss)
        top = runs["search"].run(lambda: our_search(data))
        runs["whole"].run(lambda: our_metrics(data, our_search(data), everything))
        runs["evaluator"].run(evaluator.whole)
    same = np.mean([len(np.intersect1d(*lists)) for lists in zip(theirs, top.ids.numpy(), strict=True)]) / K
    said(f"{same:.4%} of our products are faiss's")
    rankings = evaluator.rankings(top)
    for repeat in range(REPEATS):
        said(f"repeat {repeat + 1} of {REPEATS}: metrics of given lists")
        ours = runs["metrics"].run(lambda: our_metrics(data, top), apart=True)
        theirs = runs["evaluator's"].run(lambda: evaluator.metrics(rankings), apart=True)
    # The evaluator's nDCG knows two grades: it is another metric.
    alike = [name for name in METRICS if name != "ndcg@10"]
    said(f"sentence-transformers' metrics differ from ours by {apart(ours, theirs, alike)} at most, nDCG aside")
    said("torchmetrics: metrics of given lists")
    given = runs["torchmetrics"].run(torchmetrics_metrics(data, top))
    # What was not retrieved does not exist for torchmetrics: it changes recall, MAP and nDCG.
    alike = [name for name in METRICS if name.startswith(("hit_rate", "precision", "mrr"))]
    said(f"torchmetrics' metrics differ from ours by {apart(ours, given, alike)} at most, recall, MAP and nDCG aside")
    add_row(table, "search", runs["search"], "faiss IndexFlatIP", runs["faiss"], 1 / 1.1)
    add_row(table, "search + all metrics", runs["whole"], "sentence-transformers", runs["evaluator"], 2.5)
    add_row(table, "metrics of given lists", runs["metrics"], "sentence-transformers", runs["evaluator's"], 20)
    add_row(table, "metrics of given lists", runs["metrics"], "torchmetrics", runs["torchmetrics"], 20)


def apart(ours: dict[str, float], theirs: dict[str, float], names: list[str]) -> str:
    return f"{max(abs(ours[name] - theirs[name]) for name in names):.1e}"


def add_row(table: Table, what: str, ours: Runs, peer: str, theirs: Runs, least: float) -> None:
    faster = theirs.median / ours.median
    table.add_row(
        what, f"{ours.median:.3f} s", f"{ours.bytes / GIB:.2f}", peer, f"{theirs.median:.3f} s",
        f"{theirs.bytes / GIB:.2f}", f"{faster:.2f}", f"{least:.2f}", verdict(faster >= least),
    )  # fmt: skip


def random_vectors(rows: int, dim: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, rows, 50_000):
        yield normalize(torch.randn(min(50_000, rows - start), dim, generator=generator))


def search_file(path: Path, wanted: Tensor) -> tuple[float, int, Tensor]:
    """Seconds and peak memory, this process and its libraries included, of a search for some of the file's own rows."""
    torch.set_num_threads(THREADS)
    vectors = VectorFile(path)
    queries, everything = vectors[wanted], torch.arange(len(vectors))
    start = time.perf_counter()
    found = search(queries, vectors, everything, everything, K)
    return time.perf_counter() - start, status("VmHWM"), found.ids[:, 0]


def search_from_disk(products: int, dim: int, seed: int) -> None:
    queries = min(DISK_QUERIES, products)
    wanted = torch.arange(queries) * (products // queries)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.npy"
        said(f"writing {products:,} vectors to {path}")
        write_vectors(path, random_vectors(products, dim, seed))
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        said(f"searching {path.stat().st_size / 1e9:.1f} GB from disk")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            seconds, peak, first = pool.submit(search_file, path, wanted).result()
        speed = path.stat().st_size / 1e9 / seconds
    right = int((first == wanted).sum())
    console.print(
        f"{queries:,} x {products:,} x {dim} from disk: {seconds / 60:.2f} minutes, {speed:.2f} GB/s, "
        f"peak memory of the process {peak / GIB:.2f} of {DISK_MEMORY / GIB:.0f} GiB {verdict(peak <= DISK_MEMORY)}\n"
        f"{right:,} of {queries:,} queries, which are rows of the file, found themselves first",
        highlight=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("queries", 10_000), ("products", 200_000), ("dim", 256), ("disk-products", 3_400_000)):
        parser.add_argument(f"--{name}", type=int, default=size, help=f"default: {size:,}")
    parser.add_argument("--skip-disk", action="store_true", help="no search through a file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.products < K or min(options.queries, options.dim, options.disk_products) < 1:
        parser.error(f"expected {K} products at least and one query, dimension and product on disk")
    torch.set_num_threads(THREADS)
    sizes = f"{options.queries:,} queries x {options.products:,} products x {options.dim}, top {K}, {THREADS} threads"
    said(f"drawing {sizes}")
    table = Table(title=sizes)
    for heading in ("what", "ours", "GiB", "peer", "theirs", "GiB", "times faster", "at least", ""):
        table.add_column(heading, justify="left" if heading in ("what", "peer", "") else "right")
    compare_in_memory(clustered(options.queries, options.products, options.dim, options.seed), table)
    console.print(table)
    if not options.skip_disk:
        search_from_disk(options.disk_products, options.dim, options.seed)


if __name__ == "__main__":
    main()

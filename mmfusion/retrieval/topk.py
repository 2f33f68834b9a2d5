"""Exact top-k search, the same to the bit whatever the chunk size, the shards of the corpus and the device.

A matrix product of another shape changes low bits, so fp32 products only choose candidates: k + MARGIN per query. The
score of a pair is its dot product summed in fp64 in a fixed order and rounded to fp32, which depends on nothing but the
two vectors. Where rounding could have hidden a product of the true top k behind the margin (collapsed embeddings, many
equal photos), the query is searched again, rescoring all that lies within the error bound of the product.
Results are ordered by one integer key, (score, tie): equal scores go by product id as a string, descending, as in
trec_eval.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor
from torch.nn.functional import pad

MARGIN = 32  # candidates per query beyond k
QUERIES = 1024  # queries of a block: its scores take QUERIES * chunk * 4 bytes
PAIRS = 8192  # pairs rescored at a time: PAIRS * dim * 8 bytes, three times
EMPTY = torch.iinfo(torch.int64).min  # the key of no product


@dataclass
class TopK:
    """The k best products of each query, best first. Where there are fewer than k products: id -1, score -inf."""

    scores: Float32[Tensor, "query k"]
    ids: Int64[Tensor, "query k"]


def tie_ranks(product_ids: Sequence[str]) -> Int64[Tensor, "catalogue"]:
    """The rank of each dense id in the ascending order of the id strings; of equal scores the higher goes first."""
    order = torch.tensor(sorted(range(len(product_ids)), key=product_ids.__getitem__), dtype=torch.int64)
    return _inverse(order)


@torch.no_grad()
def search(
    queries: Float[Tensor, "query dim"],
    corpus: Float[Tensor, "product dim"],
    ids: Int[Tensor, "product"],
    tie: Int[Tensor, "catalogue"],
    k: int,
    *,
    chunk: int = 16_384,
) -> TopK:
    """The k products of highest dot product for each query, on the queries' device.

    corpus: of any float type and on any device (a memory-mapped file, too); `chunk` rows at a time are widened to fp32
    on the queries' device. ids: the dense id of each row, distinct. tie: `tie_ranks` of the whole catalogue.
    Raises ValueError on vectors that are not finite and on ids that occur twice.
    """
    assert min(k, chunk) > 0
    queries, ids, tie = queries.float(), ids.to(queries.device), tie.to(queries.device)
    if len(ids) and (twice := ids.bincount(minlength=len(tie)) > 1).any():
        raise ValueError(f"the corpus holds product id {int(twice.nonzero()[0])} more than once; drop the copies")
    searched = _Corpus(corpus, tie[ids], chunk)
    with _full_precision(queries.device):
        blocks = [_search_block(block, searched, k) for block in queries.split(QUERIES)]
    return _decoded(torch.cat(blocks), tie)


def merge(parts: Sequence[TopK], tie: Int[Tensor, "catalogue"], k: int) -> TopK:
    """Joins the results of disjoint parts of a corpus into those of the whole."""
    scores = torch.cat([part.scores for part in parts], 1)
    ids = torch.cat([part.ids for part in parts], 1)
    tie = tie.to(ids.device)
    keys = _keys(scores, tie[ids.clamp(min=0)]).masked_fill(ids < 0, EMPTY)
    return _decoded(_best(keys, k), tie)


def exact_dot(left: Float32[Tensor, "pair dim"], right: Float32[Tensor, "pair dim"]) -> Float32[Tensor, "pair"]:
    """Row-wise dot products. Products of two fp32 are exact in fp64; they are summed by halving, in a fixed order."""
    terms = left.double() * right
    while (width := terms.shape[1]) > 1:
        half = width // 2
        folded = terms[:, :half] + terms[:, half : 2 * half]
        if width % 2:
            folded[:, 0] += terms[:, -1]
        terms = folded
    return terms[:, 0].float()


@dataclass
class _Corpus:
    vectors: Float[Tensor, "product dim"]
    tie: Int[Tensor, "product"]
    chunk: int

    def chunks(self, device: torch.device) -> Iterator[tuple[int, Float32[Tensor, "part dim"]]]:
        """The first row of each chunk, and the chunk in fp32."""
        for start in range(0, len(self.vectors), self.chunk):
            yield start, self.vectors[start : start + self.chunk].to(device, torch.float32)


def _search_block(queries: Float32[Tensor, "query dim"], corpus: _Corpus, k: int) -> Int64[Tensor, "query k"]:
    """Keys of the k best products.

    With fp32 scores off by at most `slack`, the k-th best true score is at least (k-th best fp32 score - slack), so a
    product of the true top k has an fp32 score of at least that minus slack again: the floor.
    """
    scores, rows, slack = _candidates(queries, corpus, k + MARGIN)
    best = _best(_rescored(queries, corpus.vectors, corpus.tie, rows), k)
    if len(corpus.vectors) > k + MARGIN:
        floor = scores[:, k - 1] - 2 * slack
        wide = (scores[:, -1] >= floor).nonzero()[:, 0]
        for part in wide.split(QUERIES // 4):
            best[part] = _search_wide(queries[part], floor[part], corpus, k)
    return best


def _candidates(
    queries: Float32[Tensor, "query dim"], corpus: _Corpus, count: int
) -> tuple[Float32[Tensor, "query count"], Int64[Tensor, "query count"], Float32[Tensor, "query"]]:
    """The `count` best fp32 scores of each query, best first, their rows (-1: none), and the error bound of a score.

    |fp32 - true| <= dim * u * |q| * |c|, u = 2^-24 (Higham, Accuracy and Stability, eq. 3.5); eight more u for the
    rounding of the true score, of the norms and of the floor.
    """
    best = queries.new_full((len(queries), count), -torch.inf)
    rows = torch.full_like(best, -1, dtype=torch.int64)
    longest = queries.new_zeros(())
    for start, block in corpus.chunks(queries.device):
        longest = torch.maximum(longest, block.norm(dim=1).max())
        near = (queries @ block.T).topk(min(count, len(block)), sorted=False)
        best, kept = torch.cat([best, near.values], 1).topk(count)
        rows = torch.cat([rows, near.indices + start], 1).gather(1, kept)
    slack = (queries.shape[1] + 8) * 2.0**-24 * queries.norm(dim=1) * longest
    if not slack.isfinite().all():
        raise ValueError("the query or product vectors hold NaN or infinite values: training diverged, or bad features")
    return best, rows, slack


def _search_wide(
    queries: Float32[Tensor, "query dim"],
    floor: Float32[Tensor, "query"],
    corpus: _Corpus,
    k: int,
) -> Int64[Tensor, "query k"]:
    """Keys of the k best products among all whose fp32 score reaches the floor, however many."""
    best = torch.full((len(queries), k), EMPTY, device=queries.device)
    for start, block in corpus.chunks(queries.device):
        row, tie = torch.arange(len(block), device=queries.device), corpus.tie[start : start + len(block)]
        rows = torch.where(queries @ block.T >= floor[:, None], row, -1)
        best = _best(torch.cat([best, _rescored(queries, block, tie, rows)], 1), k)
    return best


def _rescored(
    queries: Float32[Tensor, "query dim"],
    corpus: Float[Tensor, "product dim"],
    tie: Int[Tensor, "product"],
    rows: Int64[Tensor, "query slot"],
) -> Int64[Tensor, "query slot"]:
    """Keys of the pairs (query, rows[query, slot]), by the exact dot product; EMPTY where the row is -1."""
    keys = torch.full_like(rows, EMPTY)
    for pairs in (rows >= 0).nonzero().split(PAIRS):
        query, slot = pairs.unbind(1)
        row = rows[query, slot]
        products = corpus[row.to(corpus.device)].to(queries.device, torch.float32)
        keys[query, slot] = _keys(exact_dot(queries[query], products), tie[row])
    return keys


def _keys(scores: Float32[Tensor, "*shape"], tie: Int[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """One integer per product that sorts as (score, tie) does: the score as a monotonic int32 above 32 bits of tie."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() * 2**32 + tie


def _decoded(keys: Int64[Tensor, "query k"], tie: Int[Tensor, "catalogue"]) -> TopK:
    bits = (keys >> 32).int()
    scores = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)
    empty = keys == EMPTY
    ids = _inverse(tie)[(keys & 0xFFFFFFFF).masked_fill(empty, 0)]
    return TopK(scores.masked_fill(empty, -torch.inf), ids.masked_fill(empty, -1))


def _best(keys: Int64[Tensor, "query slot"], k: int) -> Int64[Tensor, "query k"]:
    return pad(keys, (0, max(0, k - keys.shape[1])), value=EMPTY).topk(k).values


def _inverse(permutation: Int[Tensor, "catalogue"]) -> Int64[Tensor, "catalogue"]:
    inverse = torch.empty_like(permutation, dtype=torch.int64)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """fp32 products in fp32: neither autocast nor TF32, which would break the error bound."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision

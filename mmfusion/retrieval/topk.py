"""Exact top-k search, the same to the bit whatever the chunk size, the shards of the corpus and the device.

A matrix product of another shape changes low bits, so fp32 products only choose candidates: k + MARGIN per query. The
score of a pair is its dot product summed in fp64 in a fixed order and rounded to fp32, which depends on nothing but the
two vectors. Where rounding could have hidden a product of the true top k behind the margin (collapsed embeddings, many
equal photos), the query is searched again, rescoring all that lies within the error bound of the product.
Results are ordered by one integer key, (score, tie): equal scores go by product id as a string, descending, as in
trec_eval.

Most products are passed over without being sorted: of each run of GROUP products only the best score is compared with
what the query has found so far, and only runs that beat it are looked into.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor
from torch.nn.functional import pad

from mmfusion.guards.pulse import PULSE
from mmfusion.precision import full_precision
from mmfusion.retrieval.vectors import ReadVectors

MARGIN = 32  # candidates per query beyond k
QUERIES = 1024  # queries of a block: its scores take QUERIES * chunk * 4 bytes
GROUP = 32  # neighbouring products of which the best score stands for all
PAIRS = 8192  # pairs rescored at a time: PAIRS * dim * 12 bytes
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
    corpus: Float[Tensor, "product dim"] | ReadVectors,
    ids: Int[Tensor, "product"],
    tie: Int[Tensor, "catalogue"],
    k: int,
    *,
    chunk: int = 16_384,
) -> TopK:
    """The k products of highest dot product for each query, on the queries' device.

    corpus: of any float type and on any device, or a file of vectors larger than memory; `chunk` rows at a time are
    widened to fp32 on the queries' device. ids: the dense id of each row, distinct. tie: `tie_ranks` of the whole
    catalogue. Raises ValueError on vectors that are not finite and on ids that occur twice.
    """
    assert min(k, chunk) > 0
    queries, ids, tie = queries.float(), ids.to(queries.device), tie.to(queries.device)
    if len(ids) and (twice := ids.bincount(minlength=len(tie)) > 1).any():
        raise ValueError(f"the corpus holds product id {int(twice.nonzero()[0])} more than once; drop the copies")
    with full_precision(queries.device):
        return _decoded(_search(queries, _Corpus(corpus, tie[ids], chunk), k), tie)


def merge(parts: Sequence[TopK], tie: Int[Tensor, "catalogue"], k: int) -> TopK:
    """Joins the results of disjoint parts of a corpus into those of the whole."""
    scores = torch.cat([part.scores for part in parts], 1)
    ids = torch.cat([part.ids for part in parts], 1)
    tie = tie.to(ids.device)
    keys = _keys(scores, tie[ids.clamp(min=0)]).masked_fill(ids < 0, EMPTY)
    return _decoded(_best(keys, k), tie)


def exact_dot(left: Float32[Tensor, "*#pair dim"], right: Float32[Tensor, "*#pair dim"]) -> Float32[Tensor, "*#pair"]:
    """Dot products over the last axis. Products of two fp32 are exact in fp64; they are summed by halving, in place."""
    terms = right.double().mul_(left.double())
    while (width := terms.shape[-1]) > 1:
        half = width // 2
        terms[..., :half] += terms[..., half : 2 * half]
        if width % 2:
            terms[..., 0] += terms[..., -1]
        terms = terms[..., :half]
    return terms[..., 0].float()


@dataclass
class _Corpus:
    vectors: Float[Tensor, "product dim"] | ReadVectors
    tie: Int[Tensor, "product"]
    chunk: int

    def chunks(self, device: torch.device) -> Iterator[tuple[int, Float32[Tensor, "part dim"]]]:
        """The first row of each chunk, and the chunk in fp32."""
        for start in range(0, len(self.vectors), self.chunk):
            PULSE.beat()
            yield start, self.vectors[start : start + self.chunk].to(device, torch.float32)


def _search(queries: Float32[Tensor, "query dim"], corpus: _Corpus, k: int) -> Int64[Tensor, "query k"]:
    """Keys of the k best products.

    With fp32 scores off by at most `slack`, the k-th best true score is at least (k-th best fp32 score - slack), so a
    product of the true top k has an fp32 score of at least that minus slack again: the floor. Where the last candidate
    lies below the floor, so does every product that is not a candidate.
    """
    scores, rows, slack = _candidates(queries, corpus, k + MARGIN)
    floor = scores[:, k - 1] - 2 * slack
    rows = rows.masked_fill(scores < floor[:, None], -1)
    best = _best(_rescored(queries, corpus.vectors, corpus.tie, rows), k)
    if len(corpus.vectors) > k + MARGIN:
        wide = (scores[:, -1] >= floor).nonzero()[:, 0]
        best[wide] = _search_wide(queries[wide], floor[wide], corpus, k)
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
    # Fresh memory of this size is slow on a CPU, so all blocks share it; what pads the last group scores -inf.
    width = -(-min(corpus.chunk, len(corpus.vectors)) // GROUP) * GROUP
    scores = queries.new_full((min(QUERIES, len(queries)), width), -torch.inf)
    for start, block in corpus.chunks(queries.device):
        longest = torch.maximum(longest, block.norm(dim=1).max())
        scores[:, len(block) :] = -torch.inf
        for part in _blocks(len(queries), QUERIES):
            block_scores = scores[: len(queries[part])]
            torch.mm(queries[part], block.T, out=block_scores[:, : len(block)])
            _keep_best(block_scores, start, best[part], rows[part])
    slack = (queries.shape[1] + 8) * 2.0**-24 * queries.norm(dim=1) * longest
    if not slack.isfinite().all():
        raise ValueError("the query or product vectors hold NaN or infinite values: training diverged, or bad features")
    best, order = best.sort(1, descending=True)
    return best, rows.gather(1, order), slack


def _keep_best(
    scores: Float32[Tensor, "query slot"],
    start: int,
    best: Float32[Tensor, "query count"],
    rows: Int64[Tensor, "query count"],
) -> None:
    """Lets the scores of the rows from `start` on into `best` and `rows`, in place and in no order.

    A score enters only if it beats the count-th best so far, so a group whose peak does not can be passed over. Of the
    others, `count` of the highest peaks are enough: `count` scores are then at least as high as any in the rest. What
    is left out is thus never above the worst that is kept, which is all that the floor needs; of equal scores, any may
    be left out.
    """
    count = best.shape[1]
    peaks = scores.unflatten(1, (-1, GROUP)).amax(2)
    beaten = int((peaks > best.amin(1, keepdim=True)).sum(1).amax())  # groups to look into, at the neediest query
    if beaten == 0:
        return
    groups = peaks.topk(min(beaten, count), sorted=False).indices
    first = torch.arange(len(scores), device=scores.device)[:, None] * peaks.shape[1]
    opened = scores.view(-1, GROUP).index_select(0, (first + groups).flatten()).view(len(scores), -1)
    values, kept = torch.cat([best, opened], 1).topk(count, sorted=False)
    slot = (kept - count).clamp(min=0)
    new = start + groups.gather(1, slot // GROUP) * GROUP + slot % GROUP
    rows.copy_(torch.where(kept < count, rows.gather(1, kept.clamp(max=count - 1)), new))
    rows.masked_fill_(values == -torch.inf, -1)
    best.copy_(values)


def _search_wide(
    queries: Float32[Tensor, "query dim"],
    floor: Float32[Tensor, "query"],
    corpus: _Corpus,
    k: int,
) -> Int64[Tensor, "query k"]:
    """Keys of the k best products among all whose fp32 score reaches the floor, however many."""
    best = torch.full((len(queries), k), EMPTY, device=queries.device)
    if len(queries) == 0:
        return best
    for start, block in corpus.chunks(queries.device):
        tie = corpus.tie[start : start + len(block)]
        for part in _blocks(len(queries), max(1, QUERIES // 4)):
            rows = _columns(queries[part] @ block.T >= floor[part, None])
            keys = _rescored(queries[part], block, tie, rows)
            best[part] = _best(torch.cat([best[part], keys], 1), k)
    return best


def _columns(where: Bool[Tensor, "query column"]) -> Int64[Tensor, "query slot"]:
    """The columns that hold in each row, from the left; -1 in the slots beyond."""
    query, column = where.nonzero().unbind(1)
    counts = where.sum(1)
    columns = torch.full((len(where), int(counts.amax())), -1, device=where.device)
    columns[query, torch.arange(len(query), device=where.device) - (counts.cumsum(0) - counts)[query]] = column
    return columns


def _rescored(
    queries: Float32[Tensor, "query dim"],
    corpus: Float[Tensor, "product dim"] | ReadVectors,
    tie: Int[Tensor, "product"],
    rows: Int64[Tensor, "query slot"],
) -> Int64[Tensor, "query slot"]:
    """Keys of the pairs (query, rows[query, slot]), by the exact dot product; EMPTY where the row is -1.

    The rows of a query stand to the left of its -1. Few large steps, not many small ones: each waits for all threads.
    """
    keys, used = torch.full_like(rows, EMPTY), (rows >= 0).sum(1)
    for part in _blocks(len(rows), max(1, PAIRS // max(1, rows.shape[1]))):
        row = rows[part, : int(used[part].amax())]
        first = row.clamp(min=0)
        products = corpus[first.flatten().to(corpus.device)].to(queries.device, torch.float32)
        scores = exact_dot(queries[part, None], products.unflatten(0, first.shape))
        keys[part, : row.shape[1]] = _keys(scores, tie[first]).masked_fill(row < 0, EMPTY)
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


def _blocks(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]

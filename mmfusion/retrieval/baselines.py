"""What a model has to beat, and what it is mixed with: BM25, a random order, and hybrids of two ranked lists.

Scores are fp32, as in a search: what is equal there is a tie, and ties go by product id (see topk.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmfusion.guards.pulse import PULSE
from mmfusion.retrieval.topk import TopK, merge

WORD = r"\w+"  # letters, digits and underscores of any script; a single one is a word
K1, B = 1.5, 0.75  # saturation of a word's count, and how far long titles are held against them
CELLS = 2_000_000  # scores of BM25, or entries of lists, that are worked on at a time
GRID = tuple(step / 20 for step in range(21))


class BM25:
    """Okapi BM25 in Lucene's variant (Kamphuis 2020, Which BM25 do you mean?, table 1), by the library bm25s.

    A text's score is the sum over the query's words, each as often as the query says it, of idf * tf / (tf + K1 *
    (1 - B + B * length / mean length)), with idf = log(1 + (N - df + .5) / (df + .5)). Words are lower-case and not
    stemmed, and no word is too common to count.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s  # noqa: PLC0415  (it takes a third of a second, and training has no use for it)

        self._tokenize, self._texts = bm25s.tokenize, len(texts)
        self._index = bm25s.BM25(k1=K1, b=B, method="lucene", dtype="float64", backend="numpy", csc_backend="numpy")
        tokens = self._tokenize(list(texts), token_pattern=WORD, stopwords=None, show_progress=False)
        self._words = tokens.vocab
        if self._words:  # else the library divides by a mean length of 0
            self._index.index(tokens, create_empty_token=False, show_progress=False)

    def search(self, queries: Sequence[str], tie: Int[Tensor, "catalogue"], k: int) -> TopK:
        """The k texts of highest score for each query; those without any of its words are not found.

        A text's id is its position; `tie` is `tie_ranks` of these ids.
        """
        assert len(tie) == self._texts
        words = self._tokenize(list(queries), token_pattern=WORD, stopwords=None, return_ids=False, show_progress=False)
        rows = max(1, CELLS // max(1, self._texts))
        parts = [self._search(words[start : start + rows], tie, k) for start in range(0, len(words), rows)]
        return _stacked(parts, k)

    def _search(self, queries: list[list[str]], tie: Int[Tensor, "catalogue"], k: int) -> TopK:
        PULSE.beat()
        found = [self._best(words, k) for words in queries]
        scores = pad_sequence([scores for scores, _ in found], batch_first=True, padding_value=-torch.inf)
        ids = pad_sequence([ids for _, ids in found], batch_first=True, padding_value=-1)
        return merge([TopK(scores, ids)], tie, k)

    def _best(self, words: list[str], k: int) -> tuple[Float32[Tensor, "found"], Int64[Tensor, "found"]]:
        """Scores and ids of the k best texts and of all that tie with the last of them, in no order."""
        known = [self._words[word] for word in words if word in self._words]
        if not known:
            return torch.zeros(0), torch.zeros(0, dtype=torch.int64)
        scores = self._index.get_scores_from_ids(known).astype(np.float32)
        ids = np.flatnonzero(scores)
        if len(ids) > k:
            ids = ids[scores[ids] >= np.partition(scores[ids], -k)[-k]]
        return torch.from_numpy(scores[ids]), torch.from_numpy(ids)


def random_ranking(query_ids: Int[np.ndarray, "query"], products: int, k: int, seed: int) -> TopK:
    """The first k of a random order of all products for each query: by (seed, query id) alone. A score is -rank."""
    ids = torch.full((len(query_ids), k), -1)
    scores = torch.full((len(query_ids), k), -torch.inf)
    found = min(k, products)
    for row, query in enumerate(query_ids.tolist()):
        ids[row, :found] = torch.from_numpy(_shuffled(np.random.default_rng((seed, query)), products, found))
    scores[:, :found] = -torch.arange(1.0, found + 1)
    return TopK(scores, ids)


def reciprocal_rank_fusion(lists: Sequence[TopK], tie: Int[Tensor, "catalogue"], k: int, constant: float = 60) -> TopK:
    """Ranks by the sum over lists of 1 / (constant + rank) (Cormack 2009); a list without the product adds nothing."""
    blocks = [_fused(block, [1 / (constant + _ranks(part)) for part in block], tie, k) for block in _blocks(lists)]
    return _stacked(blocks, k)


def weighted_sum(first: TopK, second: TopK, weight: float, tie: Int[Tensor, "catalogue"], k: int) -> TopK:
    """Ranks by weight * score in `first` + (1 - weight) * score in `second`.

    Scores are scaled to [0, 1] within each list of each query, the last product of a list at 0, the first at 1; 1 for
    all where they are equal. A product that a list does not have counts as its last one there: 0.
    """
    blocks = [
        _fused([one, other], [weight * _scaled(one), (1 - weight) * _scaled(other)], tie, k)
        for one, other in _blocks([first, second])
    ]
    return _stacked(blocks, k)


def choose_weight(
    first: TopK,
    second: TopK,
    tie: Int[Tensor, "catalogue"],
    measure: Callable[[TopK], float],
    grid: Sequence[float] = GRID,
) -> float:
    """The `best_weight` of `weighted_sum`, as long as the longer list."""
    k = max(first.ids.shape[1], second.ids.shape[1])
    measured = {weight: measure(weighted_sum(first, second, weight, tie, k)) for weight in grid}
    return best_weight(measured)


def best_weight(measured: Mapping[float, float]) -> float:
    """The weight that measures highest; of equally good ones the one nearest .5, then the lower. NaN is the worst."""
    reached = {weight: -np.inf if np.isnan(value) else value for weight, value in measured.items()}
    return max(reached, key=lambda weight: (reached[weight], -round(abs(weight - 0.5), 9), -weight))


def _shuffled(draw: np.random.Generator, products: int, count: int) -> Int64[np.ndarray, "count"]:
    """The start of a random permutation, made without the rest of it: random numbers, each where it came up first."""
    numbers = np.zeros(0, np.int64)
    first = numbers
    while len(first) < count:
        numbers = np.append(numbers, (draw.random(2 * count) * products).astype(np.int64))
        first = np.sort(np.unique(numbers, return_index=True)[1])
    return numbers[first[:count]]


def _ranks(part: TopK) -> Float64[Tensor, "query k"]:
    return torch.arange(1, part.ids.shape[1] + 1, dtype=torch.float64).expand(part.ids.shape)


def _scaled(part: TopK) -> Float64[Tensor, "query k"]:
    scores, absent = part.scores.double(), part.ids < 0
    if not scores.shape[1]:
        return scores
    low = scores.masked_fill(absent, torch.inf).amin(1, keepdim=True)
    width = scores.amax(1, keepdim=True) - low
    return torch.where(width > 0, (scores - low) / width, 1.0)


def _blocks(lists: Sequence[TopK]) -> Iterator[list[TopK]]:
    """The lists of a few queries at a time."""
    rows = max(1, CELLS // max(1, sum(part.ids.shape[1] for part in lists)))
    for start in range(0, len(lists[0].ids), rows):
        end = start + rows
        yield [TopK(part.scores[start:end], part.ids[start:end]) for part in lists]


def _fused(
    block: Sequence[TopK], shares: Sequence[Float64[Tensor, "query _"]], tie: Int[Tensor, "catalogue"], k: int
) -> TopK:
    """Ranks by the sum of what each list gives a product; `shares` are shaped as the lists."""
    ids, order = torch.cat([part.ids for part in block], 1).sort(dim=1, stable=True)
    share = torch.cat(list(shares), 1).gather(1, order)
    total = share.clone()
    for step in range(1, len(block)):  # equal ids stand side by side, one of each list at most
        total[:, :-step] += torch.where(ids[:, :-step] == ids[:, step:], share[:, step:], 0)
    gone = ids < 0
    gone[:, 1:] |= ids[:, 1:] == ids[:, :-1]
    scores = total.float().masked_fill(gone, -torch.inf)
    return merge([TopK(scores, ids.masked_fill(gone, -1))], tie, k)


def _stacked(parts: Sequence[TopK], k: int) -> TopK:
    """The queries of all parts, k products each."""
    none = TopK(torch.zeros(0, k), torch.zeros(0, k, dtype=torch.int64))
    whole = [none, *parts]
    return TopK(torch.cat([part.scores for part in whole]), torch.cat([part.ids for part in whole]))

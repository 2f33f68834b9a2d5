"""Drawing hard negatives from lists, as the docstrings of datamodules.negatives say it."""

from collections.abc import Collection, Sequence

from datamodules.negatives import RANDOM
from datamodules.plan import HARD, hashed

Pairs = Collection[tuple[int, int]]


def slow_draw(
    at: tuple[int, int], query: int, product: int, k: int, positives: Pairs, sources: Sequence[Pairs], products: int
) -> list[tuple[int, int]]:
    """(product, source) of each negative of a tuple, at = (seed, epoch)."""
    source = {p: n for n, listed in reversed(list(enumerate(sources, 1))) for q, p in listed if q == query}
    allowed = [p for p in range(products) if (query, p) not in positives]
    left, others, found = [p for p in allowed if p in source], [p for p in allowed if p not in source], []
    for j in range(k):
        number = int(hashed(*at, HARD, query, product, j)[0])
        from_list = bool(left)
        taken = (left if from_list else others).pop(number % len(left or others))
        found.append((taken, source[taken] if from_list else RANDOM))
    return found

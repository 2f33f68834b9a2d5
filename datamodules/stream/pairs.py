"""What a stream adds to tuples from beyond the samples: hard negatives, extra queries and a teacher's scores."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from datamodules.negatives import Candidates
from datamodules.pair_tables import find_pair_table, read_pair_table
from datamodules.shards import Shards
from datamodules.stores.store import Store
from datamodules.stream.listed import ListedByProduct

JUDGED = "judged"  # the source that is no table


@dataclass(frozen=True)
class PairOptions:
    """Options of TupleDataModule, under the same names."""

    hard_negatives: int = 0
    hard_from: tuple[str, ...] = (JUDGED,)
    hard_max_gain: float = 0.0
    scores: tuple[str, ...] = ()
    extra_queries: int = 0

    def check(self) -> None:
        """Raises ValueError for options that no data could suit, or that would do nothing."""
        for option in ("hard_negatives", "extra_queries"):
            if getattr(self, option) < 0:
                raise ValueError(f"data.{option} is {getattr(self, option)}; expected at least 0")
        if not self.hard_max_gain >= 0:
            raise ValueError(f"data.hard_max_gain is {self.hard_max_gain}; expected a gain of at least 0")
        for option in ("hard_from", "scores"):
            twice = [name for name, times in Counter(getattr(self, option)).items() if times > 1]
            if twice:
                raise ValueError(f"data.{option} names {twice[0]!r} twice")
        default = PairOptions()
        for option in ("hard_from", "hard_max_gain"):
            value = getattr(self, option)
            if not self.hard_negatives and value != getattr(default, option):
                shown = list(value) if isinstance(value, tuple) else value
                raise ValueError(
                    f"data.{option} is {shown}, but data.hard_negatives is 0, so there are none: "
                    "set both, or leave both out"
                )
        if self.hard_max_gain != default.hard_max_gain and JUDGED not in self.hard_from:
            raise ValueError(
                f"data.hard_max_gain is {self.hard_max_gain}, but data.hard_from is {list(self.hard_from)}: "
                f"it says which judgments {JUDGED!r} takes"
            )

    def tables(self, store: Store) -> dict[str, str]:
        """The sha256 of each table in use. Raises ValueError when the store has no such table."""
        negatives = [name for name in self.hard_from if name != JUDGED] if self.hard_negatives else []
        found = {name: find_pair_table(store, name, "negatives", "data.hard_from").sha256 for name in negatives}
        found |= {name: find_pair_table(store, name, "scores", "data.scores").sha256 for name in self.scores}
        return dict(sorted(found.items()))

    def candidates(self, shards: Shards) -> Candidates:
        """Raises ValueError when a table cannot be used, or a query has not enough products that are not positives."""
        positive_from = shards.manifest.positive_from
        judged = shards.judgments("train")
        gain = judged.gain[shards.manifest.primary]  # NaN is neither
        low = (gain <= self.hard_max_gain) & (gain < positive_from)
        sources, positive = [], gain >= positive_from
        for name in self.hard_from:
            if name == JUDGED:
                sources.append((judged.query[low], judged.product[low]))
            else:
                rows = read_pair_table(shards.store, name, "negatives", "data.hard_from")
                sources.append((rows.query, rows.product))
        positives = (judged.query[positive], judged.product[positive])
        least = gain[(gain > self.hard_max_gain) & ~positive].min(initial=np.inf)
        self._check_sources(sources, positives, shards, float(least))
        found = Candidates.of(len(shards.queries), len(shards), positives, sources)
        self._check_free(found, shards)
        return found

    def _check_sources(
        self,
        sources: list[tuple[np.ndarray, np.ndarray]],
        positives: tuple[np.ndarray, np.ndarray],
        shards: Shards,
        least: float,
    ) -> None:
        """Raises ValueError for a source of which nothing is ever drawn. `least`: the gain that "judged" would need."""
        positive = positives[0].astype(np.int64) * len(shards) + positives[1]
        trained = np.zeros(len(shards.queries), bool)  # training draws no other query
        trained[positives[0]] = True
        for name, (query, product) in zip(self.hard_from, sources, strict=True):
            pairs = (query.astype(np.int64) * len(shards) + product)[trained[query]]
            if len(pairs) and not np.isin(pairs, positive).all():
                continue
            if name == JUDGED:
                raise ValueError(
                    f"data.hard_from names {name!r}, but no train query with a positive has a product that is judged "
                    f"as worth at most data.hard_max_gain={self.hard_max_gain:g} in {shards.manifest.primary}: "
                    + (f"set that to {least:g}, " if np.isfinite(least) else "")
                    + "mine a table and name it (make mine), or set data.hard_from=[] to draw all at random"
                )
            raise ValueError(
                f"data.hard_from names {name!r}, but none of its {len(query):,} pairs is of a train query with a "
                "positive and no positive itself: leave it out, or mine another table (make mine)"
            )

    def _check_free(self, candidates: Candidates, shards: Shards) -> None:
        free = candidates.free(np.arange(len(shards.queries)))
        query = int(free.argmin())
        if free[query] < self.hard_negatives:
            raise ValueError(
                f"data.hard_negatives is {self.hard_negatives}, but query {str(shards.queries.query_id[query])!r} has "
                f"only {free[query]} of {len(shards)} products that are not its positives"
            )

    def scored(self, shards: Shards) -> dict[str, ListedByProduct]:
        """Raises ValueError when a table cannot be used."""
        tables = {name: read_pair_table(shards.store, name, "scores", "data.scores") for name in self.scores}
        return {
            name: ListedByProduct.of(rows.product, rows.query, rows.score, np.zeros(len(rows.query), bool), len(shards))
            for name, rows in tables.items()
        }

"""The ranking metrics as a torchmetrics `Metric`, for any LightningModule, with or without our datamodule."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from mmfusion.batch import Judgments
from mmfusion.retrieval.metrics import parse_metric, ranked_gains, with_policy


class RankingMetric(Metric):
    """Mean of a ranking metric over the queries of all updates and ranks; each query counts once.

    A DistributedSampler that repeats queries to make ranks equal changes nothing: of several lists of one query the
    first counts, in the order of ranks and updates. Several metrics go into one collection, where they share one state
    if they have the same depth:
        MetricCollection({name: RankingMetric(name, judgments, "relevance") for name in ("ndcg@10", "mrr")})

    Args:
        name: a metric of `retrieval.metrics`, such as ndcg@10, recall@100, mrr or share_e@10
        judgments: those of the evaluated split; retrieved or not, all of a query's count
        column: the label column
        depth: places kept of each list; longer lists are cut, shorter ones are padded
        unjudged: what a retrieved product counts that nobody judged: zero is gain 0, condensed takes it off the list
        no_positive: what a query counts for which the metric is not defined: skip leaves it out of the mean (NaN if
            no query is left), zero counts 0
        **kwargs: of torchmetrics' Metric, such as process_group or sync_on_compute
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    query_ids: list[Tensor]
    product_ids: list[Tensor]

    def __init__(
        self,
        name: str,
        judgments: Judgments,
        column: str,
        *,
        depth: int = 100,
        unjudged: str = "zero",
        no_positive: str = "skip",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        nobody = np.zeros(0, np.int64)
        ranked_gains(nobody.reshape(0, depth), nobody, judgments, column, unjudged)  # raises on what cannot be measured
        with_policy(np.zeros(0), no_positive)
        self.name, self.judgments, self.column, self.depth = name, judgments, column, depth
        self.unjudged, self.no_positive = unjudged, no_positive
        self.per_query = parse_metric(name, depth, judgments.labels.get(column))
        self.add_state("query_ids", [], dist_reduce_fx="cat")
        self.add_state("product_ids", [], dist_reduce_fx="cat")

    @property
    def higher_is_better(self) -> bool | None:  # type: ignore[override]
        """None for what describes a list and does not rate it."""
        return None if self.name.startswith(("share_", "judged@")) else True

    def update(self, product_ids: Int[Tensor, "query k"], query_ids: Int[Tensor, "query"]) -> None:
        """Adds ranked lists of dense product ids, best first, -1 pads, and the dense ids of their queries."""
        if product_ids.ndim != 2 or query_ids.shape != product_ids.shape[:1]:
            raise ValueError(
                f"product_ids have shape {tuple(product_ids.shape)} and query_ids {tuple(query_ids.shape)}; "
                "expected (queries, k) and (queries,)"
            )
        found = product_ids.sort(1).values
        if ((found[:, 1:] == found[:, :-1]) & (found[:, 1:] >= 0)).any():
            raise ValueError("a list holds a product twice; expected each product once, and -1 where there is none")
        missing = self.depth - product_ids.shape[1]
        self.product_ids.append(pad(product_ids.long(), (0, missing), value=-1))  # a negative pad cuts
        self.query_ids.append(query_ids.long())

    def compute(self) -> Float[Tensor, ""]:
        query_ids, first = np.unique(dim_zero_cat(self.query_ids).cpu().numpy(), return_index=True)
        ids = dim_zero_cat(self.product_ids).cpu().numpy()[first]
        ranked = ranked_gains(ids, query_ids, self.judgments, self.column, self.unjudged)
        values = with_policy(self.per_query(ranked), self.no_positive)
        counted = values[~np.isnan(values)]
        return torch.tensor(counted.mean() if len(counted) else torch.nan, dtype=torch.float32, device=self.device)

    def plot(self, *args: Any, **kwargs: Any) -> Any:
        """One value or a list of them, on a matplotlib axis (torchmetrics' `plot`)."""
        return self._plot(*args, **kwargs)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        """A rank that had no query sends an empty tensor of the type and rank that the others send."""
        if not self.query_ids:
            self.query_ids = [torch.empty(0, dtype=torch.int64, device=self.device)]
            self.product_ids = [torch.empty(0, self.depth, dtype=torch.int64, device=self.device)]
        super()._sync_dist(*args, **kwargs)

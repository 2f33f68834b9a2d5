"""A Weights & Biases table of sample queries with the photos of the first products that a run finds for them."""

from typing import Any, cast

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from mmfusion.batch import ProductBatch, RetrievalData
from mmfusion.module import RetrievalModule
from mmfusion.retrieval.evaluation import ViewResult


class ExampleTable(Callback):
    """Logs `<split>/examples` after a test: queries spread evenly over the split, under the primary view.

    Args:
        queries: rows of the table
        products: photos in each row
    """

    def __init__(self, queries: int = 24, products: int = 5) -> None:
        self.queries, self.products = queries, products

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(RetrievalModule, pl_module)
        for logger in trainer.loggers:
            if trainer.is_global_zero and trainer.global_step and isinstance(logger, WandbLogger):
                for split, views in module.results.items():
                    columns, rows = self.table(views[module.primary], module.data)
                    logger.log_table(f"{split}/examples", columns=columns, data=rows)

    def table(self, result: ViewResult, data: RetrievalData) -> tuple[list[str], list[list[Any]]]:
        """Column names and rows: the query, its nDCG@10 and its first products' photos, captioned with their texts."""
        metric = next(name for name in result.per_query if name.endswith("ndcg@10"))
        count = min(self.queries, len(result.query_ids))
        chosen = np.linspace(0, len(result.query_ids) - 1, count).round().astype(np.int64)
        top = result.top.ids[chosen, : self.products].numpy()
        texts = data.query_texts(result.query_ids[chosen])
        columns = ["query", metric, *(str(rank + 1) for rank in range(top.shape[1]))]
        rows = [
            [text, float(result.per_query[metric][row]), *_photos(data.products(ids[ids >= 0]))]
            for text, row, ids in zip(texts, chosen, top, strict=True)
        ]
        return columns, [row + [None] * (len(columns) - len(row)) for row in rows]


def _photos(products: ProductBatch) -> list[Any]:
    import wandb  # noqa: PLC0415  (it takes a second, and only runs that log to it need it)

    photos = products.photo.permute(0, 2, 3, 1).numpy()
    return [wandb.Image(photo, caption=text) for photo, text in zip(photos, products.text, strict=True)]

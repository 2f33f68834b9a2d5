"""The terms of the loss: their names and sides, which pairs each is about, and what they come to on a batch."""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmfusion.batch import TupleBatch
from mmfusion.guards.error import GuardError
from mmfusion.losses import InfoNCE, Loss, Pairs, identity_pairs, match_pairs
from mmfusion.losses.gather import gather_rows
from mmfusion.stages import Stage
from mmfusion.towers import MODALITIES

Reads = Literal["judgments", "scores"]

# The two sides of each loss term.
TERM_VIEWS: dict[str, tuple[str, str]] = {
    "query_product": ("query", "fused"),
    "query_text": ("query", "text"),
    "query_image": ("query", "image"),
    "text_image": ("text", "image"),
}


@dataclass
class Losses:
    """The loss of each term; InfoNCE with its defaults where none is given. Stages hold their weights.

    Args:
        query_product: of the query with the fused product
        query_text: of the query with the product's text
        query_image: of the query with the product's photo
        text_image: of the product's text with its own photo
        more: further terms, by the name of one of the four and a word of their own: query_product_desirability
    """

    query_product: Loss | None = None
    query_text: Loss | None = None
    query_image: Loss | None = None
    text_image: Loss | None = None
    more: dict[str, Loss] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.more:
            if base_of(name) == name or not re.fullmatch(r"[a-z0-9_]*[a-z0-9]", name):
                raise ValueError(
                    f"model.losses.more.{name}: a further term is named by one of {', '.join(TERM_VIEWS)}, an "
                    "underscore and a word of its own in a-z, 0-9 and _, such as query_product_desirability"
                )

    def modules(self) -> nn.ModuleDict:
        four = {f.name: getattr(self, f.name) or InfoNCE() for f in fields(self) if f.name in TERM_VIEWS}
        return nn.ModuleDict(four | self.more)


def base_of(term: str) -> str:
    """Which of TERM_VIEWS a term is one of; the name itself where it is none."""
    return next((name for name in TERM_VIEWS if term.startswith(f"{name}_")), term)


def views_of(term: str) -> tuple[str, str]:
    return TERM_VIEWS[base_of(term)]


def sides(terms: Iterable[str]) -> set[str]:
    """The views that loss terms need, `query` among them."""
    return set(itertools.chain.from_iterable(map(views_of, terms)))


def active_terms(stages: Mapping[str, Stage]) -> list[str]:
    """Those that any stage trains with."""
    return list(dict.fromkeys(term for stage in stages.values() for term in stage.losses.active()))


def parts_of(loss: Loss) -> list[Loss]:
    """The loss, the one that it is made around (Matryoshka), and so on."""
    return [part for part in loss.modules() if isinstance(part, Loss)]


def reads_of(loss: Loss) -> Reads:
    return parts_of(loss)[-1].reads


def trained_dims(stages: Mapping[str, Stage], losses: nn.ModuleDict, dim: int) -> dict[str, list[int]]:
    """By product view, the fewer leading dimensions that a stage trains to do alone against the query."""
    found: dict[str, set[int]] = {}
    for term in active_terms(stages):
        left, right = views_of(term)
        if left == "query":
            found.setdefault(right, set()).update(cast(Loss, losses[term]).dims)
    return {view: sorted(sizes - {dim}) for view, sizes in found.items()}


def loss_terms(
    losses: nn.ModuleDict, names: set[str], vectors: Mapping[str, Float[Tensor, "_ dim"]], batch: TupleBatch
) -> dict[str, Float[Tensor, ""]]:
    """The terms `names` on one rank's share of the batch; their mean over ranks is the whole batch's loss.

    vectors: by view, of the batch's queries and of all its product rows.
    """
    valid = {"query": batch.query.valid, "fused": batch.product.valid}
    valid |= {
        name: there & batch.product.valid for name, there in zip(MODALITIES, batch.product.present.T, strict=True)
    }
    pairs: dict[tuple[Reads, str] | None, Pairs] = {}
    terms = {}
    for name in sorted(names):
        left, right = views_of(name)
        loss = cast(Loss, losses[name])
        key = None if left != "query" else (reads_of(loss), loss.label or next(iter(batch.judged)))
        if key not in pairs:
            pairs[key] = identity_pairs(batch.product.id) if key is None else _listed(batch, *key)
        terms[name] = loss(vectors[left], vectors[right], pairs[key], valid[left], valid[right])
    return terms


def _listed(batch: TupleBatch, reads: Reads, label: str) -> Pairs:
    judged = (batch.judged if reads == "judgments" else batch.scores)[label]  # term_checks.check_data has seen to it
    return match_pairs(batch.query.id, judged, products=len(batch.product.id))


def stop_unless_finite(total: Float[Tensor, ""], terms: Mapping[str, Float[Tensor, ""]], where: str) -> None:
    """Raises GuardError on all ranks, naming the terms, where the sum or a term is not finite on any of them."""
    names = [*terms, "their sum"]
    values = gather_rows(torch.stack([*(term.detach().to(total.dtype) for term in terms.values()), total.detach()]))
    if values.isfinite().all():
        return
    by_rank = values.reshape(-1, len(names)).tolist()
    rank = next(rank for rank, row in enumerate(by_rank) if not torch.tensor(row).isfinite().all())
    told = {name: f"{name} is {value:.6g}" for name, value in zip(names, by_rank[rank], strict=True)}
    bad = [name for name, value in zip(names, by_rank[rank], strict=True) if not torch.tensor(value).isfinite()]
    bad = [name for name in bad if name != names[-1]] or bad
    others = [told[name] for name in terms if name not in bad]
    raise GuardError(
        f"the loss is not finite at {where}: {', '.join(told[name] for name in bad)}"
        + (f" on rank {rank} of {len(by_rank)}" if len(by_rank) > 1 else "")
        + (f"; {', '.join(others)}" if others else "")
        + "\nThis step has changed no weights. RESUME=auto goes on from the last checkpoint, but meets the same loss "
        "again unless a device is faulty. In a new run: lower the stage's rates (--model.stages.<stage>.rates.<group>),"
        " clip its gradients (--trainer.gradient_clip_val=1), lengthen its warmup, or compute in fp32 "
        "(--trainer.precision=32-true)"
    )

"""The terms of the loss: their names and sides, which pairs each is about, and what they come to on a batch."""

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmfusion.batch import TupleBatch
from mmfusion.losses import InfoNCE, Loss, Pairs, identity_pairs, match_pairs
from mmfusion.losses.gather import gather_rows
from mmfusion.stages import Stage
from mmfusion.towers import MODALITIES

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


def check_terms(stages: Mapping[str, Stage], losses: nn.ModuleDict, views: Sequence[str], dim: int) -> None:
    """Raises ValueError for a weight or a loss that this model has no use for; `views` are the product's."""
    known = [term for term in losses if term not in TERM_VIEWS]
    for name, stage in stages.items():
        for term in stage.losses.more:
            if term not in known:
                near = difflib.get_close_matches(term, known, 1)
                raise ValueError(
                    f"model.stages.{name}.losses.more.{term}: there is no such term; model.losses.more has "
                    f"{', '.join(known) or 'none'}" + (f". Did you mean {near[0]}?" if near else "")
                )
        for term in stage.losses.active():
            missing = sides([term]) - {"query", *views}
            if missing:
                raise ValueError(
                    f"model.stages.{name}.losses.{term} needs the view {missing.pop()!r}, which this model lacks "
                    f"(model.modalities gives the views {', '.join(views)})"
                )
        if not stage.losses.active():
            raise ValueError(f"model.stages.{name}.losses: every weight is 0; give one of {', '.join(losses)}")
    for term, loss in losses.items():
        label = cast(Loss, loss).label
        if "query" not in views_of(term) and label is not None:
            raise ValueError(
                f"model.losses.{term} has the label {label!r}, but its pairs are products with themselves: no label"
            )
        wide = [size for size in cast(Loss, loss).dims if size > dim]
        if wide:
            raise ValueError(f"model.losses.{term}: dims has {wide[0]}, but model.dim is {dim}")


def trained_dims(stages: Mapping[str, Stage], losses: nn.ModuleDict, dim: int) -> dict[str, list[int]]:
    """By product view, the fewer leading dimensions that a stage trains to do alone against the query."""
    active = dict.fromkeys(term for stage in stages.values() for term in stage.losses.active())
    found: dict[str, set[int]] = {}
    for term in active:
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
    pairs: dict[str, Pairs] = {}
    terms = {}
    for name in sorted(names):
        left, right = views_of(name)
        loss = cast(Loss, losses[name])
        key = "identity of products" if left != "query" else loss.label or next(iter(batch.judged))
        if key not in pairs:
            pairs[key] = identity_pairs(batch.product.id) if left != "query" else _listed(batch, name, key)
        terms[name] = loss(vectors[left], vectors[right], pairs[key], valid[left], valid[right])
    return terms


def _listed(batch: TupleBatch, term: str, label: str) -> Pairs:
    tables = batch.scores | batch.judged
    if label not in tables:
        near = difflib.get_close_matches(label, tables, 1)
        raise ValueError(
            f"model.losses.{'' if term in TERM_VIEWS else 'more.'}{term}.init_args.label {label!r} is neither one of "
            f"the shards' label columns ({', '.join(batch.judged)}) nor of the tables of data.scores "
            f"({', '.join(batch.scores) or 'none'})" + (f". Did you mean {near[0]}?" if near else "")
        )
    return match_pairs(batch.query.id, tables[label], products=len(batch.product.id))


def stop_unless_finite(total: Float[Tensor, ""], terms: Mapping[str, Float[Tensor, ""]], where: str) -> None:
    """Raises RuntimeError on all ranks, naming the terms, where the sum or a term is not finite on any of them."""
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
    raise RuntimeError(
        f"the loss is not finite at {where}: {', '.join(told[name] for name in bad)}"
        + (f" on rank {rank} of {len(by_rank)}" if len(by_rank) > 1 else "")
        + (f"; {', '.join(others)}" if others else "")
    )

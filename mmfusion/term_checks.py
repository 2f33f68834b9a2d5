"""What is told before training: weights, labels, hard negatives and extra queries that cannot be, or are of no use."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from mmfusion.batch import RetrievalData
from mmfusion.losses import Loss
from mmfusion.stages import Stage
from mmfusion.terms import TERM_VIEWS, active_terms, parts_of, reads_of, sides, views_of


def check_terms(stages: Mapping[str, Stage], losses: nn.ModuleDict, views: Sequence[str], dim: int) -> None:
    """Raises ValueError for a weight or a loss that this model has no use for; `views` are the product's."""
    known = [term for term in losses if term not in TERM_VIEWS]
    for name, stage in stages.items():
        for term in stage.losses.more:
            if term not in known:
                raise ValueError(
                    f"model.stages.{name}.losses.more.{term}: there is no such term; model.losses.more has "
                    f"{', '.join(known) or 'none'}{_nearest(term, known)}"
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


def check_data(stages: Mapping[str, Stage], losses: nn.ModuleDict, data: RetrievalData) -> None:
    """Raises ValueError for what the terms of any stage cannot use of the data; warns of negatives that are none.

    Those are a label that the data lack, and extra queries that nobody asks for or that unmasked losses cannot tell.
    """
    if data.extra_queries and not any("query" in views_of(term) for term in active_terms(stages)):
        raise ValueError(
            f"data.extra_queries is {data.extra_queries}, but no stage has a term of the query: leave them out"
        )
    judging = {}
    for term in active_terms(stages):
        loss = cast(Loss, losses[term])
        if "query" in views_of(term):
            check_label(term, loss, list(data.gains), data.score_tables)
            if reads_of(loss) == "judgments":
                judging[term] = loss
                _check_own_pairs(term, loss, data)
    primary, most = next(iter(data.gains)), data.hard_max_gain
    if most > 0 and judging and all(_ignores(loss, primary, most) for loss in judging.values()):
        rank_zero_warn(
            f"data.hard_max_gain is {most}, but hard_up_to is less in all of "
            f"{', '.join(f'{_option(term)}.init_args.hard_up_to' for term in judging)}: a hard negative that is worth "
            "more than hard_up_to is none of the query that it was read for, only of others. Make hard_up_to "
            f"{most}, or data.hard_max_gain less"
        )


def _check_own_pairs(term: str, loss: Loss, data: RetrievalData) -> None:
    """Without judgments a row's own pair is known by its place, where one side alone has more rows than tuples."""
    if data.extra_queries and data.hard_sources and not getattr(parts_of(loss)[-1], "mask_false_negatives", True):
        raise ValueError(
            f"{_option(term)}.init_args.mask_false_negatives is false, which cannot tell the tuples' own pairs where "
            f"there are both extra queries (data.extra_queries is {data.extra_queries}) and hard negatives "
            "(data.hard_negatives): leave out one of the three"
        )


def check_label(term: str, loss: Loss, columns: Sequence[str], tables: Sequence[str]) -> None:
    """Raises ValueError unless the loss's label is one of those that it can learn from.

    columns: the shards' label columns, for losses that read judgments. tables: those of data.scores, for the others.
    """
    option, name = f"{_option(term)}.init_args.label", type(parts_of(loss)[-1]).__name__
    judges = reads_of(loss) == "judgments"
    own, others = (columns, tables) if judges else (tables, columns)
    has = {
        True: f"the shards' label columns ({', '.join(columns)})",
        False: f"the tables of data.scores ({', '.join(tables) or 'none'})",
    }
    if loss.label in own or (loss.label is None and judges):
        return
    wants = f"{name} learns from {'judgments' if judges else 'a table of scores'}: name one of {has[judges]}"
    if loss.label is None:
        raise ValueError(f"{option} is null, but {wants}")
    if loss.label in others:
        raise ValueError(f"{option} {loss.label!r} is one of {has[not judges]}, but {wants}")
    raise ValueError(
        f"{option} {loss.label!r} is neither one of {has[True]} nor of {has[False]}{_nearest(loss.label, own)}"
    )


def _ignores(loss: Loss, primary: str, gain: float) -> bool:
    """Whether a pair of that gain in the primary label column is no negative of its query: where that is known."""
    inner = parts_of(loss)[-1]
    by_judgments = inner.label in (None, primary) and getattr(inner, "mask_false_negatives", True)
    return by_judgments and getattr(inner, "hard_up_to", gain) < gain


def _option(term: str) -> str:
    return f"model.losses.{'' if term in TERM_VIEWS else 'more.'}{term}"


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f". Did you mean {near[0]}?" if near else ""

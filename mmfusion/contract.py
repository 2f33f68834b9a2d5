"""What a run must share with the run that it goes on from or branches off from, and what it may change."""

import re
from typing import Any

from mmfusion.retrieval.side import flattened

# What may differ when a run is resumed: where things are, how fast they are made, what is only reported.
RESUME_MAY_CHANGE = (
    "data.path", "data.workers", "data.eval_batch_size", "data.test_splits", "data.photo_cache_mib",
    "data.max_broken", "data.verify", "data.cache", "data.allow_pipe",
    "model.memo_gib", "model.cache", "model.evaluation", "model.compile", "model.zero_shot",
)  # fmt: skip
# The trainer's options that decide the weights; its others may change.
RESUME_KEEPS_OF_TRAINER = (
    "max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision",
    "limit_train_batches",
)  # fmt: skip

# Of any loss: memory, and rounding alone. Of any encoder: memory alone.
MEMORY = re.compile(r"model\.losses\..*\.chunk|model\.(text|image|query)\.checkpoint_activations")
# What came later did nothing before, as these values do: checkpoints of then lack the options and go on with these.
BEFORE = {
    "data.hard_negatives": 0, "data.hard_from": ["judged"], "data.hard_max_gain": 0.0, "data.scores": [],
    "data.extra_queries": 0, "model.optim.layer_decay": 1.0, "model.image.augment.scale": 1.0,
}  # fmt: skip
BEFORE_OF_LOSSES = {"hard_up_to": 0.0}

Differences = dict[str, tuple[Any, Any]]  # by option: the checkpoint's value and ours


def contract(config: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run must share with the run it goes on from, as dotted keys."""
    bound = {key: config[key] for key in ("seed_everything", "model", "data")}
    bound["trainer"] = {key: config["trainer"].get(key) for key in RESUME_KEEPS_OF_TRAINER}
    return _kept({key.replace(".init_args.", "."): value for key, value in flattened(bound).items()})


def _kept(flat: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in flat.items() if not key.startswith(RESUME_MAY_CHANGE) and not MEMORY.fullmatch(key)
    }


def refuse_another_run(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raises ValueError where the contract of a run differs from that of the checkpoint it would go on from."""
    refuse(
        _differing(ours, theirs),
        "the checkpoint cannot be resumed as another run; make these equal or start afresh:",
    )


def refuse_another_past(
    ours: dict[str, Any], theirs: dict[str, Any], terms: set[str], fused: bool, more: Differences, said: str
) -> None:
    """Raises ValueError where a run that branches off has another past than the checkpoint.

    Stages and groups are compared by what they did, and `more` holds where that differs. What the past never used may
    be anything: the losses of other terms than `terms` and, unless the head was trained (`fused`), the head.
    """
    differs = _differing(ours, theirs).items()
    refuse({key: values for key, values in differs if not _comes_later(key, terms, fused)} | more, said)


def _comes_later(key: str, terms: set[str], fused: bool) -> bool:
    """Whether an option is of what comes after the branch, or is compared by what it did."""
    parts = key.split(".")
    if key.startswith("model.losses."):
        return parts[3 if parts[2] == "more" else 2] not in terms
    return key.startswith(("model.stages.", "model.groups.")) or (
        not fused and parts[:2] in (["model", "fusion"], ["model", "modality_dropout"])
    )


def refuse(differs: Differences, said: str) -> None:
    """Raises ValueError that lists what differs, after what is `said` of it."""
    if differs:
        lines = [f"  {key}: the checkpoint has {theirs}, this run {ours}" for key, (theirs, ours) in differs.items()]
        more = [f"  and {len(lines) - 8} more"] if len(lines) > 8 else []
        raise ValueError("\n".join([said, *lines[:8], *more]))


def _differing(ours: dict[str, Any], theirs: dict[str, Any]) -> Differences:
    """A checkpoint that lacks an option is of a version before it: what it did then counts."""
    theirs = _before(ours) | _kept(theirs)
    keys = sorted(ours.keys() | theirs.keys())
    return {key: (theirs.get(key), ours.get(key)) for key in keys if ours.get(key) != theirs.get(key)}


def _before(ours: dict[str, Any]) -> dict[str, Any]:
    """What these options were in versions that did not have them, where that is one of their values."""
    of_losses = {key: BEFORE_OF_LOSSES.get(key.rpartition(".")[2]) for key in ours if key.startswith("model.losses.")}
    return {key: value for key, value in {**of_losses, **BEFORE}.items() if key in ours and value is not None}

"""What a resumed run must share with the run it goes on from, and what it may change."""

import re
from typing import Any

from mmfusion.retrieval.side import flattened

# What may differ when a run is resumed: where things are, how fast they are made, what is only reported.
RESUME_MAY_CHANGE = (
    "data.path", "data.workers", "data.eval_batch_size", "data.test_splits", "data.photo_cache_mib",
    "data.max_broken", "data.verify", "data.cache", "data.allow_pipe",
    "model.memo_gib", "model.evaluation", "model.compile", "model.zero_shot",
)  # fmt: skip
# The trainer's options that decide the weights; its others may change.
RESUME_KEEPS_OF_TRAINER = (
    "max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision",
    "limit_train_batches",
)  # fmt: skip

CHUNK = re.compile(r"model\.losses\..*\.chunk")  # of any loss: memory, and rounding alone
# What came later did nothing before, as these values do: checkpoints of then lack the options and go on with these.
BEFORE = {
    "data.hard_negatives": 0, "data.hard_from": ["judged"], "data.hard_max_gain": 0.0, "data.scores": [],
}  # fmt: skip
BEFORE_OF_LOSSES = {"hard_up_to": 0.0}


def contract(config: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run must share with the run it goes on from, as dotted keys."""
    bound = {key: config[key] for key in ("seed_everything", "model", "data")}
    bound["trainer"] = {key: config["trainer"].get(key) for key in RESUME_KEEPS_OF_TRAINER}
    return _kept({key.replace(".init_args.", "."): value for key, value in flattened(bound).items()})


def _kept(flat: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in flat.items() if not key.startswith(RESUME_MAY_CHANGE) and not CHUNK.fullmatch(key)
    }


def refuse_another_run(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raises ValueError where the contract of a run differs from that of the checkpoint it would go on from.

    A checkpoint that lacks an option is of a version before it: what it did then counts.
    """
    theirs = _before(ours) | _kept(theirs)
    differs = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    if differs:
        lines = [f"  {key}: the checkpoint has {theirs.get(key)}, this run {ours.get(key)}" for key in differs[:8]]
        more = [f"  and {len(differs) - 8} more"] if len(differs) > 8 else []
        raise ValueError(
            "the checkpoint cannot be resumed as another run; make these equal or start afresh:\n"
            + "\n".join(lines + more)
        )


def _before(ours: dict[str, Any]) -> dict[str, Any]:
    """What these options were in versions that did not have them, where that is one of their values."""
    of_losses = {key: BEFORE_OF_LOSSES.get(key.rpartition(".")[2]) for key in ours if key.startswith("model.losses.")}
    return {key: value for key, value in {**of_losses, **BEFORE}.items() if key in ours and value is not None}

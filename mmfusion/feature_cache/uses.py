"""Which encoders' outputs each stage of a run trains on, and for how long they stay the same: known before it starts.

Sides are `query`, and `text` and `image` of the product; two of them may share an encoder.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from torch import nn

PRODUCT = ("text", "image")


@dataclass(frozen=True)
class Use:
    """What a stage does: the sides that its losses use, and the encoders that it trains."""

    stage: str
    sides: Set[str]
    trains: Set[nn.Module]


def sides_used(views: Set[str]) -> set[str]:
    """Of the views that loss terms need, `query` among them, the sides that these are made of."""
    used = {name for name in PRODUCT if views & {name, "fused"}}
    return used | ({"query"} & views)


def spans(uses: Sequence[Use], side: str, encoder: nn.Module) -> list[tuple[str, str]]:
    """First and last of the stages that can share one set of the side's outputs, for each set that the run needs."""
    found: list[tuple[str, str]] = []
    goes_on = False
    for use in uses:
        if encoder in use.trains:
            goes_on = False
        elif side in use.sides:
            found = [*found[:-1], (found[-1][0], use.stage)] if goes_on else [*found, (use.stage, use.stage)]
            goes_on = True
    return found


def without_content(
    uses: Sequence[Use], index: int, ends: Sequence[int], encoders: Mapping[str, nn.Module], stored: Set[str]
) -> int:
    """The first step of stage `index` or after it whose products must be shown; `ends` of the stages, in steps.

    stored: the sides whose outputs there are now, in stage `index`.
    """
    changed: set[nn.Module] = set()
    for later in range(index, len(uses)):
        if later > index:
            changed |= uses[later].trains
        if any(side not in stored or encoders[side] in changed for side in uses[later].sides - {"query"}):
            return ends[later - 1] if later else 0
    return ends[-1]

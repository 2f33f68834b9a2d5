"""How labels look: their order, their tone from best (0) to worst (3), and the letters in the corner of a photo."""

from collections.abc import Mapping
from typing import Any

WORST = 3


def tones(gains: Mapping[str, Any]) -> dict[str, int]:
    """The labels of a column, best first, with tones spread over 0 to 3; empty for a numeric column.

    gains: what results.json's `run` says of the column: {"gains": {label: gain} or None, "positive_from"}.
    """
    table = gains.get("gains") or {}
    order = sorted(table, key=lambda label: -table[label])
    return {label: round(place * WORST / max(1, len(order) - 1)) for place, label in enumerate(order)}


def numeric_tone(gain: float, positive_from: float) -> int:
    """Positive, in between, or worth nothing."""
    return 0 if gain >= positive_from else (1 if gain > 0 else WORST)


def letters(labels: Mapping[str, int]) -> dict[str, str]:
    """The shortest beginning of each label that no other label shares: E of Exact."""
    short = {}
    for label in labels:
        others = [other for other in labels if other != label]
        lengths = (n for n in range(1, len(label)) if not any(other.startswith(label[:n]) for other in others))
        short[label] = label[: next(lengths, len(label))]
    return short

"""What labels are called and how they look: names, shares, tones from best (0) to worst (3), letters on a photo.

labels: of one label column, what each is worth. Lists hold gains, so that labels worth the same cannot be told apart:
they share a name, as "C+I".
"""

from collections.abc import Mapping

from mmfusion.retrieval.metrics import shares

WORST = 3


def names(labels: Mapping[str, float]) -> dict[float, str]:
    """The name of each gain, in the order of the labels."""
    return {gain: "+".join(of_gain) for gain, of_gain in _by_gain(labels).items()}


def share_names(labels: Mapping[str, float]) -> dict[str, str]:
    """What the metric families of `metrics.shares` are shares of: {"share_e": "E", "share_c+i": "C+I"}."""
    named = names(labels)
    families = list(shares(labels))[: len(named)]
    return {**dict(zip(families, named.values(), strict=True)), "share_unjudged": "unjudged"}


def tones(labels: Mapping[str, float]) -> dict[str, int]:
    """The names, best first, with tones spread over 0 to 3."""
    order = sorted(names(labels).items(), reverse=True)
    return {name: round(place * WORST / max(1, len(order) - 1)) for place, (_, name) in enumerate(order)}


def numeric_tone(gain: float, positive_from: float) -> int:
    """Positive, in between, or worth nothing."""
    return 0 if gain >= positive_from else (1 if gain > 0 else WORST)


def letters(labels: Mapping[str, float]) -> dict[str, str]:
    """By name the shortest beginning of each label that no other shares: E of Exact, C+I of Complement+Irrelevant."""
    return {"+".join(some): "+".join(_beginning(one, labels) for one in some) for some in _by_gain(labels).values()}


def _beginning(label: str, labels: Mapping[str, float]) -> str:
    others = [other for other in labels if other != label]
    lengths = (n for n in range(1, len(label)) if not any(other.startswith(label[:n]) for other in others))
    return label[: next(lengths, len(label))]


def _by_gain(labels: Mapping[str, float]) -> dict[float, list[str]]:
    found: dict[float, list[str]] = {}
    for label, gain in labels.items():
        found.setdefault(gain, []).append(label)
    return found

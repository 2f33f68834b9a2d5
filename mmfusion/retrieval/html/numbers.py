"""Numbers and names as a page shows them."""

from collections.abc import Mapping
from typing import Any

from mmfusion.retrieval.report import counts

FAMILIES = {
    "ndcg": "nDCG",
    "ndcg_exp": "nDCG (exp)",
    "recall": "Recall",
    "recall_capped": "Recall (capped)",
    "precision": "Precision",
    "mrr": "MRR",
    "map": "MAP",
    "hit_rate": "Hit rate",
    "err": "ERR",
    "judged": "Judged",
}
NONE = "–"


def number(value: float | None) -> str:
    """.543, as on the terminal; an en dash for none."""
    if value is None or not counts(value):
        return NONE
    return ("−" if value < 0 else "") + f"{abs(value):.3f}".removeprefix("0")


def signed(value: float | None) -> str:
    """+.021 or −.021."""
    if value is None or not counts(value):
        return NONE
    return ("−" if value < 0 else "+") + number(abs(value))


def interval(cell: Mapping[str, Any]) -> str:
    """[.512, .574], or nothing where the cell has no interval."""
    low, high = cell.get("low"), cell.get("high")
    return f"[{number(low)}, {number(high)}]" if counts(low) and counts(high) else ""


def whole(value: int) -> str:
    """12,345."""
    return f"{value:,}"


def metric_title(name: str) -> str:
    """nDCG@10 of ndcg@10, and Share e@10 of share_e@10, a label's share."""
    family, at, k = name.partition("@")
    if family.startswith("share_"):
        return f"Share {family.removeprefix('share_')}{at}{k}"
    return f"{FAMILIES.get(family, family)}{at}{k}"

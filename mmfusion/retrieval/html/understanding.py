"""What a fused run's report says of the head's weights and of the matches that only the fused view finds."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmfusion.retrieval.gates import ALL
from mmfusion.retrieval.html.figures import MAX_VALUES, Figure, plain, series_colour, view_colour
from mmfusion.retrieval.html.numbers import number, whole
from mmfusion.retrieval.labels import WORST, tones

ALIKE = 0.02  # of the most entropy there can be: weights that differ by less between products say nothing of them
FEW = 0.15  # of the gates but one: fewer in use are a collapse
NAMES = {"train_positives": "train positives", "text_words": "words of the text", "photo": "photo"}


def gates(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """{"said": sentences, "figures": one per slice of products}; None for a head that weighs nothing."""
    found = results.get("gates")
    if not found:
        return None
    whole_corpus = found["slices"][ALL]
    figures = [_bars(name, whole_corpus | values) for name, values in found["slices"].items() if name != ALL]
    return {"said": _said(found["entropy"], whole_corpus[ALL]), "figures": figures}


def _said(entropy: Mapping[str, float], everything: Mapping[str, Any]) -> list[str]:
    """How evenly the gates are used, and what that means."""
    gates = "experts" if all(name.startswith("expert") for name in everything["mean"]) else "modalities"
    largest = max(everything["mean"], key=everything["mean"].__getitem__)
    if entropy["in_use"] - 1 < FEW * (entropy["of"] - 1):
        verdict = f"Collapsed: nearly all weight, {number(everything['mean'][largest])}, is on {largest}."
    elif entropy["of_mean"] - entropy["mean"] < ALIKE:
        verdict = "All products are weighed nearly alike: what they are hardly matters to the weights."
    else:
        verdict = "Products are weighed differently: what they are matters to the weights."
    return [
        f"{entropy['in_use']:.1f} of {entropy['of']} {gates} are in use over {whole(everything['products'])} products.",
        verdict,
        f"Entropy, as a share of the most there can be: {number(entropy['of_mean'])} of the mean weights, "
        f"{number(entropy['mean'])} of a product's own; the difference is what the weights tell of the product.",
    ]


def _bars(name: str, values: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The mean weights of each value as one bar, the values of most products where there are many; all first."""
    most = sorted(values, key=lambda value: -values[value]["products"])[: MAX_VALUES + 1]
    kept = [value for value in values if value in most]
    gates = list(values[ALL]["mean"])
    colours = [view_colour(gate) if gate in ("text", "image") else series_colour(at) for at, gate in enumerate(gates)]
    data = [
        {
            "type": "bar", "orientation": "h", "name": plain(gate), "marker": {"color": colour}, "width": 0.62,
            "y": list(range(len(kept))), "x": [values[value]["mean"][gate] for value in kept],
            "text": [_inside(values[value]["mean"][gate]) for value in kept], "textposition": "inside",
            "insidetextanchor": "middle", "textangle": 0, "textfont": {"size": 11, "color": "var(--paper)"},
            "hovertext": [_hover(value, gate, values[value]) for value in kept],
            "hovertemplate": "%{hovertext}<extra></extra>",
        }
        for gate, colour in zip(gates, colours, strict=True)
    ]  # fmt: skip
    layout = {
        "showlegend": False, "barmode": "stack",
        "xaxis": {"title": {"text": "mean weight"}, "range": [0, 1], "tickformat": ".1f"},
        "yaxis": {
            "tickvals": list(range(len(kept))), "range": [len(kept) - 0.5, -0.5], "showgrid": False, "zeroline": False,
            "ticktext": [f"{plain(value, 28)}  n = {whole(values[value]['products'])}" for value in kept],
        },
    }  # fmt: skip
    note = f"the {MAX_VALUES} values of most products, of {len(values) - 1}" if len(kept) < len(values) else ""
    title, legend = NAMES.get(name, name), list(zip(gates, colours, strict=True))
    return {
        "title": title, "note": note, "height": 60 + 30 * len(kept), "legend": legend, "data": data, "layout": layout
    }  # fmt: skip


def _inside(weight: float) -> str:
    return number(weight) if weight >= 0.06 else ""


def _hover(value: str, gate: str, cell: Mapping[str, Any]) -> str:
    mean, std = number(cell["mean"][gate]), number(cell["std"][gate])
    return f"{plain(value)}<br>{plain(gate)} {mean}, standard deviation {std}<br>{whole(cell['products'])} products"


def exclusive(results: Mapping[str, Any], split: str, column: str) -> dict[str, Any] | None:
    """{"found": of `exclusive_matches`, "rows": [{"name", "parts"}]}: bars of labels. None where not measured."""
    found = results.get("exclusive", {}).get(split)
    if not found:
        return None
    labels = results.get("run", {}).get("gains", {}).get(column, {}).get("gains") or {}
    names = {"exclusive": "exclusive matches", "first": f"all of the first {found['depths']['fused']}"}
    shares = found["labels"].get(column, {})
    order = {**tones(labels), "relevant": 0, "not relevant": WORST, "unjudged": None}
    rows = [{"name": name, "parts": _parts(shares, kind, order)} for kind, name in names.items()]
    return {"found": found, "rows": rows}


def _parts(shares: Mapping[str, Any], kind: str, order: Mapping[str, int | None]) -> Sequence[dict[str, Any]]:
    return [
        {"label": label, "tone": tone, "share": shares[label][kind]}
        for label, tone in order.items()
        if label in shares and shares[label][kind] is not None
    ]

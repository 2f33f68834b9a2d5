"""A page in one file: template, style sheet, script, plotly and data, all inlined; a browser fetches nothing for it.

What a catalogue says (queries, titles, ids, column names) reaches a page in two ways: through the templates, which
escape, and as JSON, which the script turns into text nodes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mmfusion.retrieval.files import replaced
from mmfusion.retrieval.html.numbers import interval, number, signed, whole

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, data: Mapping[str, Any], **context: Any) -> str:
    """A template filled in. data: what the page's script reads, without NaN. A name left out raises UndefinedError."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "interval": interval, "signed": signed, "whole": whole}
    return environment.get_template(template).render(
        data=as_json(data),
        style=_ours("page.css"),
        script=_ours("page.js"),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        **context,
    )


def as_json(value: Any) -> Markup:
    """JSON that a <script> element may hold: no character of it ends the element or opens another."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def write_page(path: Path, text: str) -> Path:
    """A reader sees the old page or the new one, whole. Raises ValueError where the path is a folder."""
    with replaced(path) as beside:
        beside.write_text(text, encoding="utf-8")
    return path


def _ours(name: str) -> Markup:
    """A file of this package, as it is."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))

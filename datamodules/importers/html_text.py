"""HTML to the text that it shows, by the standard library's html.parser: no rendering, no dependency."""

import re
from html import unescape
from html.parser import HTMLParser

UNSHOWN = ("script", "style")
INLINE = ("a", "b", "em", "font", "i", "small", "span", "strong", "sub", "sup", "u")  # do not part words

BLOCK = ("br", "div", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "table", "tbody", "td", "tr", "ul")
PLAIN = re.compile(
    rf"</?({'|'.join(INLINE + BLOCK)}) ?/?>", re.IGNORECASE
)  # needs no parser, which takes ten times longer
CUT_SHORT = re.compile(r"<[/!A-Za-z][^<>]*\Z")  # what versions of Python make of such an end differs


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.unshown = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.unshown += tag in UNSHOWN
        self._part(tag)

    def handle_endtag(self, tag: str) -> None:
        self.unshown = max(0, self.unshown - (tag in UNSHOWN))
        self._part(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._part(tag)

    def handle_data(self, data: str) -> None:
        if not self.unshown:
            self.parts.append(data)

    def _part(self, tag: str) -> None:
        if tag not in INLINE:
            self.parts.append(" ")


def shown_text(html: str) -> str:
    """What is shown, runs of white space as one space; tags part words unless they are inline (<b>, <span>, ...)."""
    if "<" not in html and "&" not in html:
        return " ".join(html.split())
    pieces = PLAIN.split(html)
    if "<" in "".join(pieces[::2]):  # a tag that is not plain, a comment, or a sign in the text
        return _parsed(html)
    texts, tags = (unescape(text) for text in pieces[::2]), [*pieces[1::2], ""]
    joined = "".join(text + ("" if tag.lower() in INLINE else " ") for text, tag in zip(texts, tags, strict=True))
    return " ".join(joined.split())


def _parsed(html: str) -> str:
    parser = _Text()
    parser.feed(CUT_SHORT.sub("", html))
    parser.close()
    return " ".join("".join(parser.parts).split())

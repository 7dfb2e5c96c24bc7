"""Reads a page, and refuses what is no proper HTML or would be loaded from elsewhere."""

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "hr", "input", "link", "source", "wbr", "col"}
BLOCKS = {"p", "div", "table", "figure", "pre", "ul", "h1", "h2", "header"}
LOADS = {"src", "srcset", "href", "xlink:href", "data", "poster", "action", "background"}


class Page(HTMLParser):
    """A page that stands alone: tags are balanced, ids unique and known, pictures have texts.

    Attributes:
        tags: how often each occurs.
        images: (alt, src) of each <img>.
        text: of the body, white space folded.
    """

    def __init__(self, page: str):
        super().__init__()
        self.tags: dict[str, int] = {}
        self.images: list[tuple[str, str]] = []
        self.ids: set[str] = set()
        self.named: set[str] = set()
        self.levels: list[int] = []
        self._open: list[str] = []
        self._text: list[str] = []
        assert page.startswith('<!doctype html>\n<html lang="en">')
        self.feed(page)
        self.close()
        assert not self._open
        self.text = " ".join("".join(self._text).split())
        assert self.named <= self.ids
        assert self.tags["title"] == self.tags["h1"] == self.tags["main"] == 1
        assert self.levels[0] == 1
        assert max(b - a for a, b in zip(self.levels, self.levels[1:], strict=False)) <= 1
        assert not {"script", "link", "iframe", "object"} & self.tags.keys()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        self._look(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]):
        assert "svg" in self._open, f"<{tag}/> is not closed in HTML"
        self._look(tag, attrs)

    def handle_endtag(self, tag: str):
        assert self._open.pop() == tag, (tag, self.getpos())
        if tag in ("td", "th"):
            self._text.append(" ")

    def handle_data(self, data: str):
        if "style" in self._open:
            assert not re.search(r"@import|url\(", data)
        elif "body" in self._open:
            self._text.append(data)

    def _look(self, tag: str, attrs: list[tuple[str, str | None]]):
        assert not (tag in BLOCKS and "p" in self._open), (tag, self.getpos())
        self.tags[tag] = self.tags.get(tag, 0) + 1
        given = dict(attrs)
        assert len(given) == len(attrs)
        if "id" in given:
            assert given["id"] not in self.ids, given["id"]
            self.ids.add(given["id"] or "")
        for name in LOADS & given.keys():
            value = given[name] or ""
            assert value.startswith(("data:image/png;base64,", "#")), value[:80]
            if value.startswith("#"):
                self.named.add(value[1:])
        for name, value in attrs:
            self.named |= set(re.findall(r"url\(#([^)]*)\)", value or ""))
            assert not re.search(r"url\((?!#)", value or ""), name
        if tag == "img":
            assert (given["alt"] or "").strip()
            self.images.append((given["alt"] or "", given["src"] or ""))
        if tag == "svg":
            assert given["role"] == "img"
            assert given["aria-label"]
        if tag == "th":
            assert given["scope"] in ("row", "col", "colgroup")
        if re.fullmatch(r"h\d", tag):
            self.levels.append(int(tag[1]))

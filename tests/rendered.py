"""Markdown as readers of it see it: the elements and the text that two renderers make of it."""

from html.parser import HTMLParser

import markdown
from markdown_it import MarkdownIt

RENDERERS = {
    "markdown-it": MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render,
    "Python-Markdown": lambda text: markdown.markdown(text, extensions=["extra", "sane_lists"]),
}


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.elements: list[str] = []  # start tags, comments and declarations as they stand
        self.texts: list[tuple[str, str]] = []  # (element, text right in it)
        self.open: list[list[str]] = [["", ""]]

    def handle_starttag(self, tag, attributes):
        self.elements.append(self.get_starttag_text())
        if tag not in ("br", "hr", "img"):
            self.open.append([tag, ""])

    def handle_endtag(self, tag):
        if tag in [name for name, _ in self.open]:
            while (found := self.open.pop())[0] != tag:
                pass
            self.texts.append((tag, found[1].strip()))

    def handle_data(self, data):
        self.open[-1][1] += data

    def handle_comment(self, data):
        self.elements.append(f"<!{data}>")

    handle_decl = unknown_decl = handle_pi = handle_comment


def read(text: str, renderer: str) -> tuple[list[str], list[tuple[str, str]]]:
    """(the HTML elements that come of a Markdown text, in order; (element, text right in it) of each)."""
    reader = _Reader()
    reader.feed(RENDERERS[renderer](text))
    reader.close()
    return reader.elements, reader.texts

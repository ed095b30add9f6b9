"""A report as a browser takes it in: its elements, and the text that is to be read."""

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "path"}  # path closes itself
ELEMENTS = set(
    "html head meta link title style body main section article header p h1 h2 h3 h4 ul li b span i code "
    "figure figcaption div svg path table thead tbody tr th td details summary dl dt dd pre".split()
)
ATTRIBUTES = set(
    "lang charset name content http-equiv rel href class viewbox preserveaspectratio role aria-label "
    "aria-hidden d style title dir".split()
)


class Page(HTMLParser):
    """Asserts that elements and attributes are ours alone, and closed in their order.

    `tables`: the cells of each, row by row; `chunks`: the text of each chunk; `text`: all that is read;
    `coloured`: (class, title, text) of coloured tokens; `charts`: of each, the classes of its paths.
    """

    def __init__(self, path: str | Path):
        super().__init__(convert_charrefs=True)
        self.text, self.source = "", Path(path).read_text(encoding="utf-8")
        self.tables: list[list[list[str]]] = []
        self.chunks: list[str] = []
        self.coloured: list[list[str]] = []
        self.charts: list[list[str]] = []
        self.open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        assert tag in ELEMENTS and set(named) <= ATTRIBUTES, self.get_starttag_text()
        assert named.get("href", "data:,") == "data:,"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "pre" and "dir" in named:
            self.chunks.append("")
        elif tag == "svg":
            self.charts.append([])
        elif tag == "path":
            self.charts[-1].append(named.get("class", ""))
        elif tag == "span" and "pre" in self.open:
            self.coloured.append([named["class"], named["title"], ""])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if self.open[-1:] in (["td"], ["th"]):
            self.tables[-1][-1][-1] += data.strip()
        if "pre" in self.open and "article" in self.open:
            self.chunks[-1] += data
            if self.open[-1] == "span":
                self.coloured[-1][2] += data

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data[:80]}")

    def handle_decl(self, decl):
        assert decl == "DOCTYPE html"

    unknown_decl = handle_pi = handle_comment

    def table(self, *head: str) -> list[list[str]]:
        """The rows below the head of the first table whose head begins so."""
        return next(table[1:] for table in self.tables if tuple(table[0][: len(head)]) == head)

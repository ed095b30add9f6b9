"""The documentation site: it builds strictly, says what the commands say, asks for nothing, and its pages
read the same on GitHub."""

import html
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from html.parser import HTMLParser

import markdown
import pytest
from browser import Browser
from markdown_it import MarkdownIt
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort
from source_tree import ROOT

from miniplm.cli import COMMANDS
from miniplm.config.fields import Schema

PAGES = sorted((ROOT / "docs").rglob("*.md"))
MODULE = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
hooks = importlib.util.module_from_spec(MODULE)
MODULE.loader.exec_module(hooks)

os.environ["NO_MKDOCS_2_WARNING"] = "1"  # the theme's advertisement
pytestmark = pytest.mark.slow


def build_site(folder, **settings):
    """The site by mkdocs.yml. Aborts where mkdocs warns of anything."""
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), **settings))
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build_site(tmp_path_factory.mktemp("site"))


BLOCKS = frozenset("h1 h2 h3 h4 ul ol li table tr th td pre blockquote img hr dl dt dd".split())


class Reader(HTMLParser):
    """`seen`: what is read of a page, without white space, and its BLOCKS; `fetched`: what it loads."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.seen: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)
        self.close()

    @property
    def text(self) -> str:
        return "".join(each for each in self.seen if len(each) == 1)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if tag in BLOCKS:
            self.seen.append(f"<{tag}>")
        if tag != "a":
            self.fetched += [named[name] for name in ("src", "href", "srcset") if named.get(name)]

    def handle_data(self, data):
        self.seen += list("".join(data.split()))


def test_every_page_is_there(site):
    built = {path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")}
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in PAGES}
    commands = {f"commands/{name.replace('_', '-')}" for name in COMMANDS}
    assert built == {page.replace("README", "index") for page in pages} | commands | {"404"}
    assert not list(site.rglob("*.py"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_all_its_settings(site, command):
    page = (site / f"commands/{command.replace('_', '-')}.html").read_text(encoding="utf-8")
    text, schema = Reader(page).text, Schema(COMMANDS[command][0])
    for name in schema.kinds:
        assert "".join(schema.docs[name].split()) in text, name
        assert f'<dt id="{name}"><code>--{name.replace("_", "-")}</code>' in page
    for group in schema.groups:
        assert "".join(schema.docs[group].split()) in text


def test_faults_stop_the_build(tmp_path, caplog):
    """A page, an anchor, a picture and a file outside docs/ that are not there, and a page that nothing leads
    to."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (tmp_path / "there.txt").touch()
    (docs / "other.md").write_text("# Other\n\n## Part\n", encoding="utf-8")
    good = "# Good\n\n[a](other.md) [b](other.md#part) [c](#good) [there](../there.txt) ![d](d.png)\n"
    (docs / "index.md").write_text(good, encoding="utf-8")
    (docs / "d.png").touch()
    nav = ["index.md", "other.md", {"Commands": ["commands/"]}]
    settings = {"docs_dir": str(docs), "theme": "mkdocs", "nav": nav}
    page = Reader((build_site(tmp_path / "good", **settings) / "index.html").read_text(encoding="utf-8"))
    assert "there(there.txt)" in page.text

    faults = {
        "[a](missing.md)": "'missing.md'",
        "[a](other.md#missing)": "no such anchor",
        "[a](#nowhere)": "'#nowhere'",
        "![a](missing.png)": "'missing.png'",
        "[a](../missing.txt)": "'../missing.txt'",
        "[a](other)": "'other'",
    }
    bad = "\n\n".join(["# Bad", *faults])
    (docs / "index.md").write_text(bad, encoding="utf-8")
    with pytest.raises(Abort, match=f"{len(faults)} warnings"):
        build_site(tmp_path / "bad", **settings)
    warnings = "\n".join(each.getMessage() for each in caplog.records if each.levelname == "WARNING")
    assert all(told in warnings for told in faults.values()), warnings

    (docs / "index.md").write_text(good, encoding="utf-8")
    with pytest.raises(Abort):
        build_site(tmp_path / "bad", **settings | {"nav": nav[1:]})


@dataclass(frozen=True)
class Hostile:
    """Does `it` [work](missing.md)? <script>alert(1)</script>"""

    data: str
    """<img src=x onerror=alert(1)> *no* `code` ${x} </dd></dl> # no heading"""
    a_b: str = "</code><b>"
    """Fine."""


def test_text_of_settings_is_shown_as_it_is(monkeypatch):
    monkeypatch.setitem(COMMANDS, "hostile", (Hostile, ""))
    page = Reader(markdown.markdown(hooks.command_page("hostile"), extensions=["pymdownx.superfences"]))
    assert page.fetched == [] and "<img>" not in page.seen
    for text in (Hostile.__doc__, Schema(Hostile).docs["data"], "--a-b text, default </code><b>"):
        assert "".join(text.split()) in page.text


def test_asks_for_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        outside = [each for each in Reader(path.read_text(encoding="utf-8")).fetched if "//" in each]
        assert not outside, path.name
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "examples/README.md"])
def test_links_of_pages_outside_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s#]+)", text) if "://" not in link]
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing and (links or page == "CONTRIBUTING.md")


def read_on_github(text: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_reads_the_same_on_github(page):
    """Lists, tables, headings, code and text, as the site's renderer and GitHub's make them."""
    text = page.read_text(encoding="utf-8")
    extensions = ["tables", "sane_lists", "pymdownx.superfences"]
    assert Reader(markdown.markdown(text, extensions=extensions)).seen == Reader(read_on_github(text)).seen


LOOKED_AT = ["index", "kernels", "commands", "commands/train", "facts", "decisions/index"]
# What is seen of a page in a frame: how wide it is, and what it has fetched.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><script>function look(frame) {{
  const page = frame.contentWindow, root = page.document.documentElement;
  document.documentElement.setAttribute("seen", JSON.stringify({{
    width: page.innerWidth, scroll: root.scrollWidth, height: root.scrollHeight,
    requests: page.performance.getEntriesByType("resource").map((each) => each.name),
  }}));
}}</script>
<iframe src="{page}" style="width: {width}px; height: 900px; border: 0" onload="look(this)"></iframe>"""


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("page", LOOKED_AT)
def test_fits_a_phone_and_a_desk(site, page, width, tmp_path):
    browser = Browser(tmp_path)
    frame = site / "frame.html"
    frame.write_text(FRAME.format(page=f"{page}.html", width=width), encoding="utf-8")
    try:
        shown, said, asked = browser(frame, "--window-size=1600,1000", "--dump-dom")
    finally:
        frame.unlink()
    seen = json.loads(html.unescape(re.search(' seen="([^"]*)"', shown)[1]))
    assert seen["width"] == width and seen["scroll"] <= width and seen["height"] > 900
    assert all(name.startswith("http://127.0.0.1:") for name in seen["requests"]) and len(asked) > 3
    assert "CONSOLE" not in said

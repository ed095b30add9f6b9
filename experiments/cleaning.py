"""Text from HTML and mail, and long texts cut into documents. Standard library only."""

import email
import email.policy
import re
from collections.abc import Iterator
from html.parser import HTMLParser

BLOCKS = set(
    "p div li tr h1 h2 h3 h4 h5 h6 pre dt dd br table section article blockquote ul ol dl title".split()
)
SPACED = {"h1", "h2", "h3", "p", "pre"}  # an empty line stands before them
LEFT_OUT = {"script", "style", "head", "nav", "footer", "svg", "noscript", "form", "button"}
VOID = {"br", "hr", "img", "input", "link", "meta"}  # have no end tag
MAX_LETTERS = 16_000  # of a document


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.left_out: list[str] = []  # open elements, from the first that is left out on
        self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if (tag in LEFT_OUT or self.left_out) and tag not in VOID:
            self.left_out.append(tag)
        self.preformatted += tag == "pre"
        if tag in BLOCKS:
            self.parts.append("\n\n" if tag in SPACED else "\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.left_out:  # with what was left open inside of it
            del self.left_out[len(self.left_out) - 1 - self.left_out[::-1].index(tag) :]
        self.preformatted = max(self.preformatted - (tag == "pre"), 0)
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.left_out:
            self.parts.append(data if self.preformatted else re.sub(r"\s+", " ", data))


def from_html(html: str) -> str:
    """The text of a page: without scripts, heads and navigation; white space kept inside <pre> alone."""
    parser = _Text()
    parser.feed(html)
    parser.close()
    lines = "".join(parser.parts).split("\n")
    return tidy("\n".join(line.rstrip() if line.startswith("    ") else line.strip() for line in lines))


def tidy(text: str) -> str:
    """Without white space at the ends, at most one empty line in a row, line ends as \\n."""
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\r\n", "\n").replace("\r", "\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def decoded(content: bytes) -> str | None:
    """UTF-8, else Latin-1; None for what is no text."""
    if b"\0" in content:
        return None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def from_mail(content: bytes) -> str:
    """The body of a mail: its plain part, else its HTML as text; empty where it has neither."""
    try:
        message = email.message_from_bytes(content, policy=email.policy.default)
        if (body := message.get_body(("plain", "html"))) is None:
            return ""
        text = body.get_content()
        is_html = body.get_content_type() == "text/html"
    except (LookupError, ValueError, KeyError, AttributeError, TypeError):
        return ""  # mails of 2002 name character sets and types that never were
    return from_html(text) if is_html else tidy(text)


def cut(text: str, longest: int = MAX_LETTERS) -> Iterator[str]:
    """The text in parts of at most `longest` letters, each but the last ended at the last empty line within
    it, else at the last line's end, else hard."""
    while len(text) > longest:
        end = max(text.rfind("\n\n", 1, longest), 0) or max(text.rfind("\n", 1, longest), 0) or longest
        yield text[:end].strip()
        text = text[end:].strip()
    yield text

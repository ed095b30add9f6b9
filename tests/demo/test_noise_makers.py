"""The demo's noise: of every kind as much, the same for a seed, and none of it from what is held out. Each
kind by itself: tests/experiments/test_noise.py."""

import random
import re
from collections import Counter

import pytest
from texts import make_text

from miniplm.demo import noise
from miniplm.demo.noise import CLEAN, IN_DEMO, with_noise
from miniplm.demo.text import HELD_OUT_SHARE, split_text


@pytest.fixture
def domains(monkeypatch):
    """Texts of two domains, each word of the 60 documents with the number of its document."""
    monkeypatch.setattr(noise, "PER_KIND", 12)
    monkeypatch.setattr(noise, "MIN_LETTERS", 100)
    monkeypatch.setattr(noise, "PASSAGE", 400)

    def text(number: int) -> str:
        lines = [f"document{number:02d}" + make_text(random.Random(line), 6) for line in range(20)]
        return "\n".join(re.sub(r"\s+", f" document{number:02d}", line) for line in lines)

    return {
        name: [text(number) for number in range(start, start + 30)] for name, start in (("a", 10), ("b", 60))
    }


def numbers(texts) -> set[str]:
    """Of the documents that words of these texts are of."""
    return {number for text in texts for number in re.findall(r"document(\d\d)", text)}


def test_of_every_kind_as_much_with_the_domain_of_its_document(domains):
    documents = [{"text": text, "domain": name} for name, texts in domains.items() for text in texts]
    rows = with_noise(documents, 3)
    assert Counter(row["kind"] for row in rows) == {CLEAN: 60, **dict.fromkeys(IN_DEMO, 12)}
    clean = [{"text": row["text"], "domain": row["domain"]} for row in rows if row["kind"] == CLEAN]
    assert sorted(clean, key=str) == sorted(documents, key=str) and clean != documents
    for row in rows:
        if row["kind"] not in ("base64", "random words"):
            found = numbers([row["text"]])
            assert found and all((int(number) < 60) == (row["domain"] == "a") for number in found)
    assert all(row["text"] not in {each["text"] for each in clean} for row in rows if row["kind"] != CLEAN)
    copies = [row["text"] for row in rows if row["kind"] == "boilerplate"]
    bodies = Counter(text.split("\n\n", 1)[1] for text in copies)
    assert len(bodies) <= 4 and len(set(copies)) > 2 * len(bodies)


def test_noise_is_that_of_the_seed(domains):
    documents = [{"text": text, "domain": name} for name, texts in domains.items() for text in texts]
    assert with_noise(documents, 3) == with_noise(documents, 3)
    made = [
        {row["text"] for row in with_noise(documents, seed) if row["kind"] == "typos"} for seed in range(2)
    ]
    assert not made[0] & made[1]


def test_held_out_text_is_clean_and_no_noise_is_made_of_it(domains):
    held_out, crawl = split_text(domains, 3)
    assert [row["text"] for row in held_out] == [text for texts in domains.values() for text in texts[:3]]
    assert HELD_OUT_SHARE == 0.1 and all(set(row) == {"text", "domain"} for row in held_out)
    assert not numbers(row["text"] for row in held_out) & numbers(row["text"] for row in crawl)
    assert split_text(domains, 4)[0] == held_out

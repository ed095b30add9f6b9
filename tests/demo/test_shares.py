"""Kinds counted in a corpus that does not hold them; and that the rule does not see them."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
from corpora import write_scores
from selections import run_select

from miniplm.config import PrepareConfig
from miniplm.data.corpus import Corpus
from miniplm.demo.command import PIPELINE
from miniplm.demo.noise import CLEAN
from miniplm.demo.shares import ALL_NOISE, shares_dropped
from miniplm.demo.text import CRAWL
from miniplm.pipeline import plan_stages, read_stages
from miniplm.stages.prepare import prepare

MARKS = {CLEAN: "teacher", "typos": "reads", "base64": "chunk"}  # the one word of all texts of a kind


def prepared_pool(folder: Path, rows, tokenizer: str) -> PrepareConfig:
    """The settings of the demo's stage `pool`, once it has run on such a crawl."""
    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / CRAWL).write_text(lines, encoding="utf-8")
    known = {"text": str(folder), "tokenizer": tokenizer, "seed": "1"}
    (settings,) = [
        each.settings
        for each in plan_stages(read_stages(PIPELINE), folder / "out", known)
        if each.name == "pool"
    ]
    prepare(dataclasses.replace(settings, workers=1))
    return settings


@pytest.fixture
def crawl():
    """60 documents of three kinds in two domains, some of them empty."""
    rng = random.Random(0)
    kinds = [rng.choice([*MARKS]) for _ in range(60)]
    lengths = [rng.choice([0, 1, 30, 700]) for _ in kinds]
    return [
        {"text": f"{MARKS[kind]} " * length + f"{MARKS[kind]}", "domain": rng.choice("ab"), "kind": kind}
        for kind, length in zip(kinds, lengths, strict=True)
    ]


def test_tokens_are_of_the_kind_of_their_document(crawl, tiny_tokenizer, tmp_path):
    for number, row in enumerate(crawl):
        row["text"] += f".{number}"  # else equal texts are in or out of the pool together
    settings = prepared_pool(tmp_path / "text", crawl, tiny_tokenizer)
    corpus = Corpus(settings.output)
    shares = shares_dropped(
        corpus, crawl, settings.take, {"first half": np.arange(len(corpus)) < len(corpus) // 2}
    )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    codes, names = corpus.domains
    expected = {share.label: [0, 0] for share in shares}
    begun = dict.fromkeys(names, "")  # the text of the document that the chunk before ended in
    for chunk, ids in enumerate(corpus.rows(range(len(corpus)))):
        domain = names[codes[chunk]]
        for token in ids:
            begun[domain] += tokenizer.decode([token])
            (kind,) = [kind for kind, mark in MARKS.items() if begun[domain].strip()[0] == mark[0]]
            label = f"{CLEAN}: {domain}" if kind == CLEAN else kind
            for name in [label] if kind == CLEAN else [label, ALL_NOISE]:
                expected[name][0] += 1
                expected[name][1] += chunk >= len(corpus) // 2
            if token == corpus.eos_token_id:
                begun[domain] = ""
    assert {share.label: [share.tokens, share.dropped["first half"]] for share in shares} == {
        label: [tokens, pytest.approx(dropped / tokens)] for label, (tokens, dropped) in expected.items()
    }
    assert set(expected) == {"typos", "base64", ALL_NOISE, "clean: a", "clean: b"} and len(corpus) > 20


def test_the_rule_does_not_see_the_kinds(crawl, tiny_tokenizer, tmp_path):
    """With the labels in another order the same chunks are selected, byte for byte."""
    kinds = [row["kind"] for row in crawl]
    outputs = []
    for name, labels in (("one", kinds), ("other", random.Random(1).sample(kinds, len(kinds)))):
        rows = [{**row, "kind": label} for row, label in zip(crawl, labels, strict=True)]
        pool = prepared_pool(tmp_path / name, rows, tiny_tokenizer).output
        corpus = Corpus(pool)
        assert set(corpus.domains[1]) == {"a", "b"}  # what the selection per domain goes by
        teacher, reference = np.random.default_rng(2).normal(size=(2, len(corpus)))
        scores = write_scores(tmp_path / name / "scores", pool, teacher, reference)
        for rule in ({}, {"per_domain": True}):
            output = tmp_path / name / f"refined{len(rule)}"
            run_select(pool, scores, output, ratio=0.5, **rule)
            outputs.append({path.name: path.read_bytes() for path in output.glob("*.arrow")})
    assert outputs[:2] == outputs[2:] and outputs[0] != outputs[1]

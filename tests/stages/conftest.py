"""Fixtures of the stages' tests: two models that go together, what they say of the tiny corpus, and students
of what was selected of it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from corpora import write_corpus, write_scores
from export_runs import make_students
from hostile import NAMES
from proxy_runs import EOS, random_chunks
from scoring_runs import run_score
from selections import run_select
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def teacher(tiny_model, tmp_path_factory) -> str:
    return tiny_model(tmp_path_factory.mktemp("teacher"), seed=0)


@pytest.fixture(scope="session")
def reference(tiny_model, tmp_path_factory) -> str:
    return tiny_model(tmp_path_factory.mktemp("reference"), seed=1, hidden_size=16)


@pytest.fixture(scope="session")
def scores(tiny_corpus, teacher, reference, tmp_path_factory) -> Path:
    """The score folder of an uninterrupted run with both models."""
    folder = tmp_path_factory.mktemp("scores") / "scores"
    run_score(tiny_corpus, folder, teacher=teacher, reference=reference)
    return folder


@pytest.fixture(scope="session")
def work(tiny_corpus, tiny_model, tmp_path_factory) -> Path:
    """A folder with scores, a refined and a random corpus, a student of each, and the refined one's
    evaluation."""
    root = tmp_path_factory.mktemp("work")
    make_students(root, tiny_corpus, tiny_model)
    return root


@pytest.fixture(scope="session")
def hostile_run(tiny_tokenizer, tmp_path_factory) -> Path:
    """A folder with a corpus, scores and a selection whose texts and names try to be more than text."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    names = [name.encode("utf-8", "replace").decode() for name in NAMES]
    chunks = [tokenizer(name)["input_ids"][:1_000] + [0, 0] for name in names]
    root = tmp_path_factory.mktemp("hostile") / "<img src=x onerror=alert(1)>\u202e"
    source = "<script>alert(1)<\x1b]0;x\x07"
    corpus = write_corpus(root / "pool", chunks, tiny_tokenizer, names, source=source)
    teacher, reference = np.random.default_rng(0).normal(-3, 1, (2, len(chunks)))
    write_scores(root / "scores", corpus, teacher, reference)
    run_select(corpus, root / "scores", root / "<b>\u202e&", ratio=0.5)
    return root


@pytest.fixture
def student_run(work, tmp_path) -> Path:
    """A training output of one's own."""
    return Path(shutil.copytree(work / "refined-student", tmp_path / "run"))


@pytest.fixture(scope="session")
def proxy_corpus(tiny_tokenizer, tmp_path_factory) -> str:
    chunks = random_chunks(0, 300)
    chunks[7] = [EOS]  # nothing to score
    domains = ["books" if row % 5 else "code" for row in range(len(chunks))]
    return write_corpus(tmp_path_factory.mktemp("proxy") / "corpus", chunks, tiny_tokenizer, domains)


@pytest.fixture(scope="session")
def sample(proxy_corpus, teacher, reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "scores"
    run_score(proxy_corpus, folder, teacher=teacher, reference=reference, sample=0.5, shard_chunks=20)
    return folder

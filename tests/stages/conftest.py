"""Fixtures of the stages' tests: two models that go together, what they say of the tiny corpus, and students
of what was selected of it."""

import shutil
from pathlib import Path

import pytest
from corpora import write_corpus
from export_runs import make_students
from proxy_runs import EOS, random_chunks
from scoring_runs import run_score


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

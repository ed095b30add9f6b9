"""Fixtures of the stages' tests: two models that go together, what they say of the tiny corpus, and students
of what was selected of it."""

import shutil
from pathlib import Path

import pytest
from export_runs import make_students
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

"""Fixtures of the stages' tests: two models that go together, and what they say of the tiny corpus."""

from pathlib import Path

import pytest
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

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def module(monkeypatch):
    """module("harness") imports benchmarks/harness.py."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def harness(module):
    return module("harness")


@pytest.fixture
def timing(module):
    return module("timing")

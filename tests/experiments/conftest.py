import importlib
from pathlib import Path

import pytest


@pytest.fixture
def noise(monkeypatch):
    """experiments/noise.py."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "experiments"))
    return importlib.import_module("noise")

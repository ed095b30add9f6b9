import importlib
from pathlib import Path

import pytest


@pytest.fixture
def experiment(monkeypatch):
    """experiment(name): the module experiments/NAME.py."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "experiments"))
    return importlib.import_module


@pytest.fixture
def noise(experiment):
    """experiments/noise.py."""
    return experiment("noise")

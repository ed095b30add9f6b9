"""Which configuration a kernel is launched with."""

import pytest
import torch
from miniplm.kernels import tuning

CPU, GPU = torch.device("cpu"), tuning.Target("cuda", 90, 132)
FIRST, SECOND = tuning.Config({"BLOCK": 1}), tuning.Config({"BLOCK": 2}, num_warps=8, num_stages=3)


@pytest.fixture
def candidates(monkeypatch):
    """A kernel "toy" with two candidates, on a GPU; the second one is faster for narrow rows. Yields the
    calls of do_bench."""
    timed = []

    def do_bench(function, return_mode):
        assert return_mode == "median"
        config, width = function()
        timed.append((config, width))
        return 1.0 if (config is SECOND) == (width < 100) else 2.0

    testing = pytest.importorskip("triton.testing")
    monkeypatch.setattr(testing, "do_bench", do_bench)
    monkeypatch.setattr(tuning, "CANDIDATES", {"toy": lambda where, width: [FIRST, SECOND]})
    monkeypatch.setattr(tuning, "target", lambda device: GPU)
    monkeypatch.setattr(tuning, "_FASTEST", {})
    return timed


def launch(width):
    return tuning.launch("toy", lambda config: (config, width), CPU, width=width)[0]


def test_the_stated_configuration(candidates, monkeypatch):
    monkeypatch.delenv("MINIPLM_AUTOTUNE", raising=False)
    assert launch(64) is FIRST and launch(1000) is FIRST and not candidates


def test_the_fastest_once_per_bucket(candidates, monkeypatch):
    monkeypatch.setenv("MINIPLM_AUTOTUNE", "1")
    assert [launch(64), launch(64), launch(1000), launch(64)] == [SECOND, SECOND, FIRST, SECOND]
    assert candidates == [(FIRST, 64), (SECOND, 64), (FIRST, 1000), (SECOND, 1000)]


def test_offline_all_are_compiled(candidates, monkeypatch):
    monkeypatch.setattr(tuning, "OFFLINE", GPU)
    seen = []
    assert tuning.launch("toy", lambda config: seen.append(config) or config, CPU, width=64) is FIRST
    assert seen == [FIRST, SECOND]


def test_options_of_a_launch():
    assert SECOND.options == {"BLOCK": 2, "num_warps": 8, "num_stages": 3}


@pytest.mark.parametrize(
    "backend, arch, descriptors",
    [
        ("cuda", 80, False),
        ("cuda", 90, True),
        ("cuda", 100, True),
        ("hip", "gfx942", False),
        ("cpu", 0, True),
    ],
)
def test_who_reads_through_descriptors(backend, arch, descriptors):
    assert tuning.Target(backend, arch, 1).descriptors is descriptors


def test_which_gpus_read_through_descriptors():
    """120, consumer Blackwell, has no room for the tiles that come with them."""
    assert [
        arch for arch in (80, 89, 90, 100, 103, 120, 121) if tuning.Target("cuda", arch, 100).descriptors
    ] == [90, 100, 103]
    assert not tuning.Target("hip", "gfx942", 304).descriptors

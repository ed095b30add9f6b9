"""Which configuration a kernel is launched with."""

import warnings

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
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
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


def test_no_memory_to_time_in(candidates, monkeypatch):
    """The first, with one warning for all buckets; a bucket is not timed again."""
    monkeypatch.setenv("MINIPLM_AUTOTUNE", "1")
    tried = []

    def full(function, return_mode):
        tried.append(function()[0])
        if tried[-1] is SECOND:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    monkeypatch.setattr(pytest.importorskip("triton.testing"), "do_bench", full)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        assert [launch(64), launch(64), launch(1000)] == [FIRST, FIRST, FIRST]
    assert [str(warning.message) for warning in warned] == [
        "MINIPLM_AUTOTUNE: no GPU memory left to time configurations in, the stated ones are used"
    ]
    assert tried == [FIRST, SECOND, FIRST, SECOND]


def test_other_errors_of_a_configuration_are_raised(candidates, monkeypatch):
    monkeypatch.setenv("MINIPLM_AUTOTUNE", "1")

    def broken(function, return_mode):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(pytest.importorskip("triton.testing"), "do_bench", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        launch(64)


def test_nothing_is_timed_while_a_graph_is_captured(candidates, monkeypatch):
    monkeypatch.setenv("MINIPLM_AUTOTUNE", "1")
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    assert launch(64) is FIRST and not candidates
    capturing[0] = False
    assert launch(64) is SECOND and candidates == [(FIRST, 64), (SECOND, 64)]
    capturing[0] = True
    assert launch(64) is SECOND  # what is known by now is used


@pytest.mark.gpu
def test_autotuning_under_capture_on_a_gpu(monkeypatch):
    from miniplm.kernels import swiglu

    monkeypatch.setenv("MINIPLM_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "_FASTEST", {})
    both = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    expected, graph = swiglu(both), torch.cuda.CUDAGraph()
    monkeypatch.setattr(tuning, "_FASTEST", {})
    with torch.cuda.graph(graph):
        captured = swiglu(both)
    graph.replay()
    assert torch.equal(captured, expected) and not tuning._FASTEST


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

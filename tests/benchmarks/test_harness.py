"""The harness of the op benchmarks: a wrong, missing or failing contender and a cut run are seen as such."""

import json
import math
import os
import sys
import time
from pathlib import Path

import pytest
import torch

WITHOUT_GPU = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the benchmarks run at full size"
)


def test_relative_error(harness):
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert harness.relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert harness.relative_error(torch.tensor([3.0, math.nan]), truth) == math.inf
    assert harness.relative_error(torch.tensor([3.0, 4.0, 0.0]), truth) == math.inf


def test_a_slightly_wrong_gradient_is_flagged(module, harness):
    cases = module("cross_entropy").cases({"T": 40, "V": 300, "d": 16}, "cpu", torch.float32)
    both = {case.name: case for case in cases}["both"]
    right = both.contenders["miniplm"]

    def wrong(results):
        return lambda: lambda: results(*right()())

    both = both._replace(
        contenders={
            "miniplm": right,
            "a thousandth off": wrong(lambda loss, hidden, weight: (loss, hidden, weight * 1.001)),
            "NaN": wrong(lambda loss, hidden, weight: (loss, hidden / 0, weight)),
            "another shape": wrong(lambda loss, hidden, weight: (loss, hidden, weight[1:])),
        }
    )
    figures = {
        name: harness.contend(both, name, torch.float32, {"gemm_tflops": None, "copy_gb_per_s": None})
        for name in both.contenders
    }
    assert figures["miniplm"]["accurate"] is True and 0 < figures["miniplm"]["error"]["grad_weight"] < 1e-5
    assert figures["a thousandth off"]["accurate"] is False and figures["a thousandth off"]["error"][
        "grad_weight"
    ] == pytest.approx(1e-3, rel=0.01)
    assert figures["NaN"]["accurate"] is False and figures["NaN"]["error"]["grad_hidden"] == "inf"
    assert (
        figures["another shape"]["accurate"] is False
        and figures["another shape"]["error"]["grad_weight"] == "inf"
    )


def test_the_truth_is_that_of_autograd(module):
    head, exact = module("log_prob").head, module("cross_entropy").exact
    hidden, weight = (
        x.double().requires_grad_() for x in head(1030, 50, 8, "cpu", torch.float32)
    )  # more than two chunks
    teacher, targets = head(1030, 50, 12, "cpu", torch.float64), torch.randint(50, (1030,))
    for alpha in (0.0, 0.3):
        log_p, r = (hidden @ weight.T).log_softmax(1), (teacher[0] @ teacher[1].T).softmax(1)
        divergence = (r * (r.log() - log_p)).sum(1).mean()
        loss = (1 - alpha) * torch.nn.functional.nll_loss(log_p, targets) + alpha * divergence
        expected = loss, *torch.autograd.grad(loss, (hidden, weight))
        with torch.no_grad():
            found = exact(hidden, weight, targets, teacher if alpha else None, alpha)
        for value, want in zip(found, expected, strict=True):
            torch.testing.assert_close(value, want.detach())


SHAPES = [{"T": 8, "d": 4}, {"T": 8, "d": 6}]


def start(harness, monkeypatch, cases, *options):
    monkeypatch.setattr(sys, "argv", ["op.py", *map(str, options)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    harness.run("op", "An op.", cases, shapes=[], quick=[], toy=SHAPES, baseline="copy", by="d")


def one_case(harness, **contenders):
    """cases: x + 1 against the contenders' results, with copy as the baseline."""

    def cases(shape, device, dtype):
        x = torch.randn(shape["T"], shape["d"], device=device, dtype=dtype)

        def copy():
            def call():  # returns nothing: a baseline is not compared
                x.clone()

            return call

        named = {name: lambda make=make: make(x) for name, make in contenders.items()}
        yield harness.Case(
            "forward",
            {"copy": copy, **named},
            bytes=2 * x.nbytes,
            errors=lambda out: {"out": harness.relative_error(out, x.double() + 1)},
        )

    return cases


def raising(problem):
    def make(x):
        raise problem

    return make


def test_contenders_that_cannot_run_are_recorded(harness, monkeypatch, tmp_path, capsys):
    file = tmp_path / "report.json"
    cases = one_case(
        harness,
        miniplm=lambda x: lambda: x + 1,
        skips=raising(harness.Skip("needs a GPU with 900 GB")),
        lacks=raising(ImportError("No module named 'peer'")),
        dies=lambda x: lambda: 1 / 0,
        full=raising(torch.OutOfMemoryError("CUDA out of memory")),
    )
    start(harness, monkeypatch, cases, "--json", file)
    records = json.loads(file.read_text())["records"]
    assert [record["contender"] for record in records] == [
        "copy",
        "miniplm",
        "skips",
        "lacks",
        "dies",
        "full",
    ] * len(SHAPES)
    reasons = {record["contender"]: record.get("skipped") for record in records}
    assert reasons == {
        "copy": None,
        "miniplm": None,
        "skips": "needs a GPU with 900 GB",
        "lacks": "ImportError: No module named 'peer'",
        "dies": "ZeroDivisionError: division by zero",
        "full": "OutOfMemoryError: CUDA out of memory",
    }
    assert "skipped: needs a GPU with 900 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    "make",
    [
        lambda x: lambda: x + 1.001,  # wrong
        lambda x: lambda: None,  # nothing to compare
        raising(RuntimeError("a broken kernel")),
        raising(ImportError("no kernel")),
    ],
)
def test_ours_must_run_and_be_right(harness, monkeypatch, tmp_path, make):
    with pytest.raises(SystemExit, match=r"inaccurate or not run: miniplm \(forward\)"):
        start(harness, monkeypatch, one_case(harness, miniplm=make), "--json", tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["finished"] is True


def test_a_peer_may_be_wrong_but_is_marked(harness, monkeypatch, capsys):
    start(
        harness, monkeypatch, one_case(harness, miniplm=lambda x: lambda: x + 1, peer=lambda x: lambda: x + 2)
    )
    marked = [line for line in capsys.readouterr().out.splitlines() if line.endswith("inaccurate")]
    assert len(marked) == len(SHAPES) and all("peer" in line for line in marked)


def test_only(harness, monkeypatch, tmp_path):
    cases = one_case(harness, miniplm=lambda x: lambda: x + 1, peer=lambda x: lambda: x + 1)
    start(harness, monkeypatch, cases, "--only", "copy,miniplm", "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert {record["contender"] for record in report["records"]} == {"copy", "miniplm"} and report[
        "only"
    ] == ["copy", "miniplm"]
    with pytest.raises(SystemExit, match="no contender per; there are copy, miniplm, peer"):
        start(harness, monkeypatch, cases, "--only", "miniplm,per")


def test_what_a_cut_run_leaves(harness, monkeypatch, tmp_path):
    whole = one_case(harness, miniplm=lambda x: lambda: x + 1)

    def cases(shape, device, dtype):
        if shape == SHAPES[1]:
            raise KeyboardInterrupt
        yield from whole(shape, device, dtype)

    with pytest.raises(KeyboardInterrupt):
        start(harness, monkeypatch, cases, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert [record["shape"] for record in report["records"]] == [SHAPES[0]] * 2 and report[
        "finished"
    ] is False


def test_a_report_is_replaced_in_one_step(harness, monkeypatch, tmp_path):
    file = tmp_path / "report.json"
    harness.write_json(file, {"is": "old"})

    def fail(source, target):
        assert json.loads(Path(source).read_text()) == {"is": "new"} and Path(target) == file
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", fail)
        harness.write_json(file, {"is": "new"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        harness.write_json(file, {"is": math.nan})
    assert json.loads(file.read_text()) == {"is": "old"}
    harness.write_json(file, {"is": "new"})
    assert json.loads(file.read_text()) == {"is": "new"} and os.listdir(tmp_path) == ["report.json"]


def test_plot(harness, monkeypatch, tmp_path, capsys):
    start(
        harness,
        monkeypatch,
        one_case(harness, miniplm=lambda x: lambda: x + 1),
        "--plot",
        tmp_path / "plot.png",
    )
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "no plot: matplotlib is not installed" in capsys.readouterr().out
    else:
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_times_on_the_cpu_are_milliseconds(timing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    median, low, high = timing.measure(lambda: time.sleep(0.02))
    assert 20 <= low <= median <= high < 2000


def test_memory_is_looked_up_before_it_is_used(harness, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (40 * 10**9, 80 * 10**9))
    harness.need_memory(39e9)
    with pytest.raises(harness.Skip, match=r"needs about 41\.0 GB of GPU memory, 40\.0 GB are free"):
        harness.need_memory(41e9)


@pytest.mark.gpu
def test_memory_on_a_gpu(timing):
    kept = torch.empty(1 << 20, device="cuda")
    assert timing.peak_memory(lambda: torch.empty(3 << 20, dtype=torch.int8, device="cuda")) == 3 << 20
    del kept


@pytest.mark.gpu
def test_time_on_a_gpu(timing):
    clock = 1e6  # torch.cuda._sleep counts clocks; no GPU runs at less than 0.2 or more than 5 GHz under load
    median, low, high = timing.measure(lambda: torch.cuda._sleep(int(50 * clock)))
    assert 10 < low <= median <= high < 250


@pytest.mark.parametrize(
    "host_ms, flush_ms, flushes", [(0.01, 0.08, 1), (0.4, 0.08, 10), (0.041, 0.08, 2), (50.0, 0.08, 32)]
)
def test_the_flush_outlasts_the_host(timing, host_ms, flush_ms, flushes):
    assert timing.flushes_for(host_ms, flush_ms) == flushes
    assert flushes in (1, timing.MAX_FLUSHES) or flushes * flush_ms >= 2 * host_ms


@pytest.mark.gpu
def test_the_host_is_not_timed(timing):
    """A call of many small launches: the events hold no pause of the host."""
    x = torch.zeros(8, device="cuda")
    launches = 100
    one = timing.measure(lambda: x.add_(1))[0]

    def many():
        for _ in range(launches):
            x.add_(1)

    assert timing.measure(many)[0] < 3 * launches * one


def test_the_table_shows_the_host_beside_the_gpu(module):
    record = {"shape": {"T": 1}, "pass": "forward", "contender": "miniplm", "ms": 0.125, "host_ms": 0.25}
    record |= dict.fromkeys(("tflops", "gb_per_s", "percent_of_ceiling", "extra_bytes", "accurate")) | {
        "error": {}
    }
    heads, _, line = module("report").table({"baseline": "other", "records": [record]}).splitlines()
    assert heads.split()[2:6] == ["ms", "host", "ms", "ratio"] and line.split()[2:5] == [
        "0.125",
        "0.250",
        "-",
    ]
    assert line.endswith("host-bound")
    quick = module("report").table({"baseline": "other", "records": [record | {"host_ms": 0.1}]})
    assert "host-bound" not in quick

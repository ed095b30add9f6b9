"""The op benchmarks and their harness: every file in benchmarks/ that defines `cases` runs at toy size on the
CPU; a wrong, missing or failing contender and a cut run are seen for what they are."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("*.py")
    if re.search(r"^def cases\(", path.read_text(), re.MULTILINE)
)
PEERS = {"eager", "compile", "torch", "liger", "liger-cutedsl", "cut-cross-entropy", "quack"}
CONTENDERS = {  # (benchmark, pass) → who must be there
    ("log_prob", "forward"): {"miniplm", "GEMM"} | PEERS,
    ("cross_entropy", "forward"): {"miniplm", "GEMMs", "liger-fp32"} | PEERS,
    ("cross_entropy", "both"): {"miniplm", "GEMMs", "liger-fp32"} | PEERS,
    ("distillation", "forward"): {"miniplm", "GEMMs", "eager", "compile", "liger", "liger-chunked"},
    ("distillation", "both"): {"miniplm", "GEMMs", "eager", "compile", "liger", "liger-chunked"},
}
WITHOUT_GPU = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the benchmarks run at full size"
)


@pytest.fixture
def module(monkeypatch):
    """module("harness") imports benchmarks/harness.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def harness(module):
    return module("harness")


def command_line(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_the_head_benchmarks_are_found():
    assert {"log_prob", "cross_entropy", "distillation"} <= set(BENCHMARKS)


@WITHOUT_GPU
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_at_toy_size(name, tmp_path):
    done = command_line(f"benchmarks/{name}.py", "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "toy sizes on the CPU" in done.stdout
    assert os.listdir(tmp_path) == ["report.json"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["op"], report["device"], report["toy"], report["finished"]) == (name, "cpu", True, True)
    assert report["environment"]["torch"] == torch.__version__
    assert report["ceilings"] == {"gemm_tflops": None, "copy_gb_per_s": None}
    assert any(record["contender"] == report["baseline"] and "ms" in record for record in report["records"])
    found = {}
    for record in report["records"]:
        found.setdefault((name, record["pass"], json.dumps(record["shape"])), []).append(record["contender"])
        assert record["contender"] in done.stdout
        if "skipped" in record:
            assert len(record["skipped"]) > 10 and record["skipped"] in done.stdout
            assert "miniplm" not in record["contender"] and record["contender"] not in (
                "eager",
                report["baseline"],
            )
        else:
            assert 0 < record["ms_low"] <= record["ms"] <= record["ms_high"]
            assert record["percent_of_ceiling"] is record["extra_bytes"] is None
            assert all(float(error) < 1e-5 for error in record["error"].values()), record
            assert record["accurate"] is (True if record["error"] else None)
        if "miniplm" in record["contender"]:
            assert record["accurate"] is True
    for (benchmark, name_of_pass, _), contenders in found.items():
        assert len(set(contenders)) == len(contenders)
        assert set(contenders) == CONTENDERS.get((benchmark, name_of_pass), set(contenders))


@WITHOUT_GPU
def test_a_checkout_need_not_be_installed(tmp_path):
    """-S: the packages that are installed are found, links to checkouts (editable installs) are not."""
    packages = os.pathsep.join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    program = (
        "import sys; sys.path.insert(0, 'benchmarks'); import harness, miniplm.kernels; "
        "print(miniplm.kernels.__file__)"
    )
    done = command_line("-S", "-c", program, PYTHONPATH=packages, PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr
    if not (Path(sysconfig.get_path("purelib")) / "miniplm").exists():
        assert done.stdout.strip() == str(ROOT / "kernels" / "__init__.py")


# --- errors ---


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


# --- a run ---

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


# --- time and memory ---


def test_times_on_the_cpu_are_milliseconds(harness, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    median, low, high = harness.measure(lambda: time.sleep(0.02))
    assert 20 <= low <= median <= high < 2000


def test_memory_is_looked_up_before_it_is_used(harness, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (40 * 10**9, 80 * 10**9))
    harness.need_memory(39e9)
    with pytest.raises(harness.Skip, match=r"needs about 41\.0 GB of GPU memory, 40\.0 GB are free"):
        harness.need_memory(41e9)


@pytest.mark.gpu
def test_memory_on_a_gpu(harness):
    kept = torch.empty(1 << 20, device="cuda")
    assert harness.peak_memory(lambda: torch.empty(3 << 20, dtype=torch.int8, device="cuda")) == 3 << 20
    del kept


@pytest.mark.gpu
def test_time_on_a_gpu(harness):
    clock = 1e6  # torch.cuda._sleep counts clocks; no GPU runs at less than 0.2 or more than 5 GHz under load
    median, low, high = harness.measure(lambda: torch.cuda._sleep(int(50 * clock)))
    assert 10 < low <= median <= high < 250


# --- tune ---


@WITHOUT_GPU
def test_tune_times_every_kernel(module, tmp_path):
    pytest.importorskip("triton")
    done = command_line("benchmarks/tune.py", "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["finished"] and report["toy"] and all(timing["ms"] > 0 for timing in report["timings"])
    assert {timing["kernel"] for timing in report["timings"]} == set(module("tune").tuning.CANDIDATES) - {
        "divergence"
    }  # that one hardly ever runs


@WITHOUT_GPU
def test_tune_goes_on_after_a_failure(module, monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton")
    tune = module("tune")
    monkeypatch.setenv("MINIPLM_KERNELS", "auto")
    monkeypatch.setattr(tune.tuning, "launch", tune.tuning.launch)  # main replaces it
    (good,) = tune.tuning.CANDIDATES["swiglu"](tune.tuning.INTERPRETER, itemsize=4)
    monkeypatch.setitem(
        tune.tuning.CANDIDATES,
        "swiglu",
        lambda *_, **__: [good, good._replace(blocks={"BLOCK_R": 3, "BLOCK_F": 64})],
    )  # no power of two
    monkeypatch.setattr(sys, "argv", ["tune.py", "--only", "swiglu", "--json", str(tmp_path / "report.json")])
    with pytest.raises(SystemExit, match="some configurations failed"):
        tune.main()
    one, other = json.loads((tmp_path / "report.json").read_text())["timings"]
    assert (
        one["blocks"] == good.blocks
        and one["ms"] > 0
        and "ms" not in other
        and "power of 2" in other["failed"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[1] == "swiglu: op=swiglu d=64 itemsize=4"
        and lines[2].endswith("(default)")
        and "1.000" in lines[2]
        and "failed: " in lines[3]
    )


def test_tune_tries_configurations_near_the_candidates(module):
    tune = module("tune")
    config = tune.tuning.Config({"BLOCK_R": 4, "BLOCK_D": 64, "SUM": True}, num_warps=1, num_stages=1)
    found = tune.configurations(
        "rms_norm_backward", tune.tuning.INTERPRETER, {"width": 64, "itemsize": 4}, wide=True
    )
    assert (
        len(found) == len({str(config) for config in found})
        and found[0] == tune.tuning.CANDIDATES["rms_norm_backward"](tune.tuning.INTERPRETER, 64, 4)[0]
    )
    near = list(tune.near("rms_norm_backward", config, {"width": 64}))
    assert {other.blocks["BLOCK_R"] for other in near} == {2, 4, 8} and {
        other.blocks["BLOCK_D"] for other in near
    } == {64}
    assert {other.num_warps for other in near} == {1, 2} and {other.num_stages for other in near} == {
        1,
        2,
    } == {other.per_processor for other in near}
    assert {other.per_processor for other in tune.near("swiglu", config, {})} == {1}

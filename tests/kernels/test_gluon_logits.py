"""The logits kernel in Gluon: who asks for it, in which order it takes its items, what it compiles to; on a
Hopper GPU also what it computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_inputs import on, random_head

pytest.importorskip("triton")
from miniplm.kernels import gluon_logits, linear_log_prob, logits, tuning

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HOPPER = tuning.Target("cuda", 90, 132)
has_gluon = pytest.mark.skipif(gluon_logits.MISSING is not None, reason="this Triton has no Gluon for Hopper")


def run_python(code, timeout=300, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


# --- who asks for it ---


@pytest.mark.parametrize("value", [None, "", "0"])
@pytest.mark.parametrize("where", [HOPPER, tuning.INTERPRETER])
def test_it_is_never_the_default(value, where, monkeypatch):
    monkeypatch.delenv("MINIPLM_GLUON", raising=False)
    if value is not None:
        monkeypatch.setenv("MINIPLM_GLUON", value)
    assert not gluon_logits.wanted(where)


@has_gluon
def test_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("MINIPLM_GLUON", "1")
    assert gluon_logits.wanted(HOPPER)


def test_a_value_that_says_nothing(monkeypatch):
    monkeypatch.setenv("MINIPLM_GLUON", "yes")
    with pytest.raises(ValueError, match="MINIPLM_GLUON is 'yes'; it must be 0 or 1"):
        gluon_logits.wanted(HOPPER)


@pytest.mark.parametrize(
    "where",
    [tuning.Target("cuda", 80, 108), tuning.Target("cuda", 100, 148), tuning.Target("hip", "gfx942", 304)],
)
def test_where_it_cannot_run(where, monkeypatch):
    monkeypatch.setenv("MINIPLM_GLUON", "1")
    assert not gluon_logits.possible(where)
    with pytest.raises(RuntimeError, match=rf"Hopper GPUs alone.*{where.arch}: unset MINIPLM_GLUON"):
        gluon_logits.wanted(where)


def test_a_triton_without_gluon(monkeypatch):
    monkeypatch.setenv("MINIPLM_GLUON", "1")
    monkeypatch.setattr(gluon_logits, "MISSING", "No module named 'triton.experimental.gluon'")
    assert not gluon_logits.possible(HOPPER)
    with pytest.raises(RuntimeError, match=r"no Gluon for it.*experimental.gluon.*unset MINIPLM_GLUON"):
        gluon_logits.wanted(HOPPER)


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter alone")
@pytest.mark.usefixtures("triton_ops")
def test_the_op_says_so(monkeypatch):
    monkeypatch.setenv("MINIPLM_GLUON", "1")
    head = on("cpu", *random_head(5, 50), dtype=torch.float32)
    with pytest.raises(RuntimeError, match="MINIPLM_GLUON=1, but it runs on Hopper GPUs alone"):
        linear_log_prob(*head)


@has_gluon
@pytest.mark.parametrize("value", ["0", "1"])
def test_what_goes_to_it(value, monkeypatch):
    """With MINIPLM_GLUON=1 sums of exponentials in 16 bits, from rows that TMA reads, do, with E and without;
    what is launched on condition, and all else, does not."""
    monkeypatch.setenv("MINIPLM_GLUON", value)
    monkeypatch.setattr(tuning, "target", lambda device: HOPPER)
    taken = []
    monkeypatch.setattr(gluon_logits, "launch", lambda grid, config, *_: taken.append(config.num_stages))
    monkeypatch.setattr(tuning, "launch", lambda name, *_, **__: taken.append(name) or (None, None))
    x, w, e = (torch.zeros(rows, 64, dtype=torch.bfloat16) for rows in (9, 64, 9))
    offset, flag = torch.zeros(9), torch.ones(1, dtype=torch.int32)
    logits.exponentials(x, w, offset, None)
    logits.exponentials(x, w, offset, e)
    assert taken == [["logsumexp", "exponentials"], [4, 3]][int(value)]
    taken.clear()
    logits.exponentials(x, w, offset, None, flag)
    logits.logsumexp_partials(x, w, flag)
    logits.exponentials(x.float(), w.float(), offset, None)
    logits.exponentials(x[:, :63], w[:, :63].contiguous(), offset, None)
    assert taken == ["logsumexp"] * 4


WITHOUT = """
import sys
sys.modules["triton.experimental.gluon.language.nvidia.hopper"] = None
import torch
from miniplm.kernels import gluon_logits, linear_log_prob
assert "hopper" in gluon_logits.MISSING, gluon_logits.MISSING
# Newer Tritons look into Gluon themselves, for the types of arguments.
for name in [name for name in sys.modules if name.startswith("triton.experimental.gluon")]:
    del sys.modules[name]
print(linear_log_prob(torch.zeros(3, 8), torch.zeros(20, 8), torch.zeros(3, dtype=torch.int64)).tolist())
"""


def test_without_gluon_all_else_works():
    result = run_python(WITHOUT, MINIPLM_KERNELS="triton", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == pytest.approx([-2.995732] * 3)


# --- the order ---


@has_gluon
@pytest.mark.parametrize(
    "blocks_t, tiles, tiles_per_split, group, programs",
    [(5, 9, 4, 2, 4), (1, 1, 16, 1, 132), (9, 4, 1, 8, 3), (9, 18, 5, 4, 40), (128, 593, 15, 32, 132)],
)
def test_the_order(blocks_t, tiles, tiles_per_split, group, programs):
    """Each program takes every so many of the items: group by group of blocks, split by split, block by
    block."""
    items = [
        (block, split)
        for first in range(0, blocks_t, group)
        for split in range(-(-tiles // tiles_per_split))
        for block in range(first, min(first + group, blocks_t))
    ]
    seen = []
    for program in range(programs):
        taken, position = [], program
        for first in range(0, blocks_t, group):
            width = min(group, blocks_t - first)
            count = width * -(-tiles // tiles_per_split)
            for item in range(position, count, programs):
                block, split, begin, end = gluon_logits._item.fn(item, first, width, tiles_per_split, tiles)
                assert begin == split * tiles_per_split and begin < end <= min(begin + tiles_per_split, tiles)
                taken.append((block, split))
                seen += [(block, tile) for tile in range(begin, end)]
            position = gluon_logits._next_position.fn(position, count, programs)
        assert taken == items[program::programs]
    assert sorted(seen) == [(block, tile) for block in range(blocks_t) for tile in range(tiles)]


# --- what it compiles to ---

COMPILED = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import compile_report, json, torch
from miniplm.kernels import dispatch, tuning

# Nothing but the Gluon kernel: the others' results are made up.
tuning.launch = lambda *_, **__: [compile_report.make(9, 300, dtype=torch.float32) for _ in range(2)]
resources = compile_report.resources
def with_registers(name, kernel):
    return {{**resources(name, kernel), "setmaxnreg": kernel.asm["ptx"].count("setmaxnreg")}}
compile_report.resources = with_registers
for op in ("linear_log_prob", "linear_cross_entropy"):
    x, w = compile_report.make(300, 512), compile_report.make(1001, 512)
    y, g = compile_report.make(300, dtype=torch.int64), compile_report.make(300, dtype=torch.float32)
    rest = (-100,) if op == "linear_log_prob" else (g, -100, True, True, 1 << 30)
    dispatch.EXAMPLES[op] = lambda make: [(x, w, y, *rest)]
    for row in compile_report.compile_op("sm_90", op):
        print(json.dumps(row))
"""


@pytest.mark.slow
@has_gluon
def test_what_it_compiles_to():
    """For sm_90: nothing spills, no wgmma waits for another, 227 KB hold all, loads are TMA, and registers go
    from the producer to the consumers. That the 16-bit logits of an op are compiled at all says that the
    compile report, and the stand-in driver of test_launches, meet the kernel."""
    result = run_python(COMPILED)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert not [row for row in rows if row["broken"]], rows
    rows = [row for row in rows if row["kernel"] == "gluon_logits._gluon_logits_kernel"]
    assert [(row["variant"]["STORE"], row["variant"]["STAGES"]) for row in rows] == [(False, 4), (True, 3)]
    for row in rows:
        assert row["spilled"] == 0 and row["shared"] <= 227 << 10 and row["registers"] <= 168
        assert row["matrix"] > 0 and row["tma"] > 0 and row["setmaxnreg"] > 0


# --- what it computes ---

CASES = [
    {"T": T, "V": V, "d": d, "dtype": dtype}
    for T, V, d, dtype in [
        (128, 256, 64, "bfloat16"),  # one tile of one step
        (1, 1001, 64, "bfloat16"),  # one token; a ragged tile
        (4096, 4096, 512, "bfloat16"),  # whole tiles alone
        (300, 5003, 200, "bfloat16"),  # ragged in all three
        (129, 151_936, 512, "bfloat16"),
        (16_384, 151_936, 2048, "bfloat16"),  # four groups
        (5000, 49_152, 768, "float16"),
        (700, 255, 1024, "float16"),  # less than one tile
    ]
]

# Each case in float64, on the Triton kernel and on this one, twice. A kernel that waits for ever is killed
# with the process; the cases before it are told.
COMPUTED = """
import json, os, torch
from miniplm.kernels import linear_cross_entropy, linear_log_prob

def log_probs(x, w, y):
    parts = [
        (z.double() @ w.double().T).log_softmax(1).gather(1, target[:, None])[:, 0]
        for z, target in zip(x.split(512), y.split(512))
    ]
    return torch.cat(parts)

def error(found, truth):
    return (found.double() - truth).norm().item() / truth.norm().item()

def losses(x, w, y):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    loss = linear_cross_entropy(x, w, y, max_logits_bytes=1 << 28)
    return [loss.detach(), *torch.autograd.grad(loss, (x, w))]

for case in json.loads(os.environ["CASES"]):
    torch.manual_seed(0)
    T, V, d, dtype = case["T"], case["V"], case["d"], getattr(torch, case["dtype"])
    x = torch.randn(T, d, device="cuda", dtype=dtype)
    w = (torch.randn(V, d, device="cuda") * (2 * d**-0.5)).to(dtype)
    y = torch.randint(V, (T,), device="cuda")
    truth, found = log_probs(x, w, y), {}
    for gluon in ("0", "1", "1"):
        os.environ["MINIPLM_GLUON"] = gluon
        found.setdefault(gluon, []).append([linear_log_prob(x, w, y), *losses(x, w, y)])
    (plain,), (once, again) = found["0"], found["1"]
    print(json.dumps({
        "case": case,
        "same": all(torch.equal(a, b) for a, b in zip(once, again)),
        "errors": [error(result[0], truth) for result in (once, plain)],
        "loss_errors": [abs(result[1].item() + truth.mean().item()) for result in (once, plain)],
        "gradients": [error(a, b.double()) for a, b in zip(once[2:], plain[2:])],
    }), flush=True)
"""


@pytest.fixture(scope="module")
def computed():
    """The records of the cases that ended, and what there is to say of the others."""
    environment = {
        **os.environ,
        "CASES": json.dumps(CASES),
        "MINIPLM_KERNELS": "triton",
        "TRITON_INTERPRET": "0",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", COMPUTED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        output, problem = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        process.kill()
        output, problem = process.communicate()
        problem = "it did not end: " + problem
    return {json.dumps(line["case"]): line for line in map(json.loads, output.splitlines())}, problem


@pytest.mark.gpu
@has_gluon
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_it_computes_the_same(case, computed):
    """Against float64, no farther than the Triton kernel but for roundings; the gradients near those of the
    Triton kernel; twice the same bits."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    records, problem = computed
    assert json.dumps(case) in records, problem[-3000:]
    record = records[json.dumps(case)]
    assert record["same"], "not the same bits again"
    for ours, plain in (record["errors"], record["loss_errors"]):
        assert ours <= 2 * plain + 1e-6, record
    assert max(record["gradients"]) < (1e-2 if case["dtype"] == "bfloat16" else 2e-3), record

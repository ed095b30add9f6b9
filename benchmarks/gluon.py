"""The contender "gluon" of the head's benchmarks: ours with MINIPLM_GLUON=1 (kernels/gluon_logits.py), which
is off by default until a GPU has shown it right and faster.

Before it runs here it must come to an end and to the same results in a process of its own: there it may hang,
or break the device's context, without taking the other contenders with it.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable

import torch
from harness import ROOT, Skip

TRIAL = """
import os, torch
from miniplm.kernels import linear_cross_entropy, linear_log_prob
torch.manual_seed(0)
for T, V, d in ((300, 5003, 200), (16384, 151936, 1024)):
    x, w = (torch.randn(n, d, device="cuda", dtype=torch.bfloat16) * s for n, s in ((T, 1), (V, 2 * d**-0.5)))
    y = torch.randint(V, (T,), device="cuda")
    found = []
    for gluon in "01":
        os.environ["MINIPLM_GLUON"] = gluon
        free = [z.detach().requires_grad_() for z in (x, w)]
        loss = linear_cross_entropy(*free, y)
        found.append([linear_log_prob(x, w, y), *torch.autograd.grad(loss, free)])
    for plain, ours in zip(*found):
        error = ((ours - plain).float().norm() / plain.float().norm()).item()
        assert error < 5e-3, f"T={T}, V={V}, d={d}: off the Triton kernel by {error:.1e}"
"""
SECONDS = 60


@functools.cache
def trial() -> str:
    """What speaks against running the kernel here; nothing does: ""."""
    if not torch.cuda.is_available():
        return "needs a Hopper GPU"
    path = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    try:
        result = subprocess.run(
            [sys.executable, "-c", "import harness\n" + TRIAL],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        return f"its trial did not end within {SECONDS} s"
    return result.stderr.strip().splitlines()[-1] if result.returncode else ""


def with_gluon(prepare: Callable[[], Callable]) -> Callable[[], Callable]:
    """Our contender's `prepare`, to run on the Gluon kernel."""

    def prepare_gluon():
        if problem := trial():
            raise Skip(problem)
        function = prepare()

        def call():
            before = os.environ.get("MINIPLM_GLUON")
            os.environ["MINIPLM_GLUON"] = "1"
            try:
                return function()
            finally:
                os.environ.pop("MINIPLM_GLUON")
                if before is not None:
                    os.environ["MINIPLM_GLUON"] = before

        return call

    return prepare_gluon

"""The contender that runs ours on the Gluon kernel, on trial first."""

import os
import subprocess
import sys

import pytest


@pytest.fixture
def gluon(module):
    found = module("gluon")
    forget = found.trial.cache_clear
    forget()
    yield found
    forget()


@pytest.mark.parametrize("before", [None, "0"])
def test_it_runs_ours_on_the_kernel(gluon, before, monkeypatch):
    monkeypatch.delenv("MINIPLM_GLUON", raising=False)
    if before:
        monkeypatch.setenv("MINIPLM_GLUON", before)
    monkeypatch.setattr(gluon, "trial", lambda: "")
    call = gluon.with_gluon(lambda: lambda: os.environ["MINIPLM_GLUON"])()
    assert call() == "1" and os.environ.get("MINIPLM_GLUON") == before
    fails = gluon.with_gluon(lambda: lambda: 1 / 0)()
    with pytest.raises(ZeroDivisionError):
        fails()
    assert os.environ.get("MINIPLM_GLUON") == before


def trial_of(gluon, monkeypatch, run):
    monkeypatch.setattr(gluon.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "run", run)
    return gluon.trial()


def test_a_kernel_that_hangs_is_left_out(gluon, harness, monkeypatch):
    def hangs(arguments, timeout, **options):
        raise subprocess.TimeoutExpired(arguments, timeout)

    assert trial_of(gluon, monkeypatch, hangs) == "its trial did not end within 60 s"
    with pytest.raises(harness.Skip, match="did not end"):
        gluon.with_gluon(lambda: pytest.fail("prepared"))()


@pytest.mark.parametrize(
    "returncode, stderr, problem",
    [
        (0, "a warning\n", ""),
        (1, "Traceback\n  x\nAssertionError: T=300: off\n", "AssertionError: T=300: off"),
    ],
)
def test_what_the_trial_says(gluon, returncode, stderr, problem, monkeypatch):
    done = subprocess.CompletedProcess([], returncode, "", stderr)
    assert trial_of(gluon, monkeypatch, lambda *_, **__: done) == problem


def test_the_trial_runs_as_written(gluon, monkeypatch):
    """On the CPU, where both ways are the reference's: the program itself has no fault."""
    source = gluon.TRIAL.replace('"cuda"', '"cpu"').replace("(16384, 151936, 1024)", "(40, 500, 32)")
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

"""A Chrome trace of a few steps of a long run, for `--profile`."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..runtime.errors import UserError
from ..runtime.progress import note

FIRST, STEPS = 3, 3  # steps before the trace (compiling, tuning; the profiler's own start), steps in it


def check_trace(path: str | None) -> None:
    """UserError if a trace cannot be written to `path`."""
    if path and not Path(path).resolve().parent.is_dir():
        raise UserError(
            f"profile {path}: there is no folder {Path(path).resolve().parent}: make it, or give another file"
        )


@contextlib.contextmanager
def trace(path: str | None) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step. With a path (.json, .json.gz), STEPS steps are traced and
    written there, and the steps go on."""
    if not path:
        yield lambda: None
        return
    written = False

    def write(profiler: torch.profiler.profile) -> None:
        nonlocal written
        # Its name ends as path's, which decides on the compression.
        aside = Path(path).with_name(f".{Path(path).name}")
        try:
            profiler.export_chrome_trace(str(aside))
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        written = True
        note(f"a trace is in {path}: open it in chrome://tracing or ui.perfetto.dev")

    schedule = torch.profiler.schedule(wait=FIRST - 1, warmup=1, active=STEPS, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write, acc_events=True) as profiler:
        yield profiler.step
    if not written:
        note(f"no trace: it begins after {FIRST} steps, and there were not as many")

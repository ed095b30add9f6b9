"""metrics.jsonl of a training output, written and read; the same figures go to TensorBoard.

A line is an object with "step" and the figures of that step, each a finite number, a flag, or null where it
is not finite. They come in the order of their steps.
"""

import json
import math
import os
import sys
from pathlib import Path

from ..runtime.files import atomic_write
from ..runtime.progress import note
from .checkpoints import metrics_file, tensorboard_folder
from .state import TrainState


def read_metrics(output: str | Path) -> list[dict]:
    """The lines of a training output's metrics.jsonl; none where there is no such file.

    A last line that a kill cut off is left out, and any other that is not as it was written, with a word.
    """
    lines, damaged = read_lines(output)
    if damaged:
        note(f"{metrics_file(output)}: {damaged:,} damaged lines are left out")
    return [line for _, line in lines]


def latest_figures(
    output: str | Path, names: tuple[str, ...], step: int
) -> dict[str, tuple[int, float | None]]:
    """{name: (step, figure or None where it was not finite)}: the latest of each name up to `step`."""
    return {
        name: (line["step"], line[name])
        for line in read_metrics(output)
        for name in names
        if name in line and line["step"] <= step
    }


def read_lines(output: str | Path) -> tuple[list[tuple[bytes, dict]], int]:
    """([(bytes, line)] of the lines that are as they were written, how many others there are).

    A last line that a kill cut off counts as neither.
    """
    path = metrics_file(output)
    lines: list[tuple[bytes, dict]] = []
    damaged = 0
    for text in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if not text.endswith(b"\n"):  # where a kill cut it off
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if _is_line(line):
            lines.append((text, line))
        else:
            damaged += 1
    return lines, damaged


def _is_line(line: object) -> bool:
    if not isinstance(line, dict) or type(line.get("step")) is not int or line["step"] < 1:
        return False
    return all(map(_is_figure, line.values()))


def _is_figure(value: object) -> bool:
    if isinstance(value, int):  # a flag too
        return abs(value) < 2**63
    return value is None or (isinstance(value, float) and math.isfinite(value))


class Metrics:
    """Writes the lines of a run.

    What an earlier process wrote past state.step, where this one starts, is dropped: the file reads as that
    of one run. `last` is the latest line, {"step": 0} before the first.
    """

    def __init__(self, output: str | Path, state: TrainState):
        path = metrics_file(output)
        lines, damaged = read_lines(output)
        if damaged:
            note(f"{path}: {damaged:,} damaged lines are removed")
        kept = [(text, line) for text, line in lines if line["step"] <= state.step]
        self.last: dict = kept[-1][1] if kept else {"step": 0}
        if self.last["step"] < state.last_logged_step:
            note(f"{path}: the last lines up to step {state.last_logged_step:,} are lost")
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"".join(text for text, _ in kept))
        self.file = open(path, "a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("tensorboard is not installed: the figures go to metrics.jsonl alone", file=sys.stderr)
            self.tensorboard = None
        else:
            self.tensorboard = SummaryWriter(
                str(tensorboard_folder(output)), purge_step=self.last["step"] + 1
            )

    def write(self, line: dict) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.last = line
        if self.tensorboard:
            for name, value in line.items():
                if isinstance(value, float):
                    self.tensorboard.add_scalar(name, value, line["step"])

    def sync(self) -> None:
        """Make what was written survive a power failure."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()

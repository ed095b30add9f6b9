"""metrics.jsonl of a training output, written and read; the same figures go to TensorBoard.

A line is an object with "step" and the figures of that step, each a finite number, a flag, or null where it
is not finite; then "after", the step of the line before (0: none is), and "checksum", a fingerprint of all
that. The lines of runs from before have neither.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import TypeGuard

from ..runtime.errors import UserError
from ..runtime.files import atomic_write, fingerprint
from ..runtime.progress import note
from .checkpoints import metrics_file, tensorboard_folder
from .state import TrainState
from .tracking import Tracker


def read_metrics(output: str | Path) -> list[dict]:
    """The lines of a training output's metrics.jsonl; none where there is no such file. What is not as it was
    written is left out, with a word."""
    lines, damaged = read_lines(output)
    if damaged:
        note(f"{metrics_file(output)}: {damaged:,} damaged lines are left out")
    return [line for _, line in lines]


def latest_figures(
    output: str | Path, names: tuple[str, ...], step: int, logged: int = 0
) -> dict[str, tuple[int, float | None]]:
    """{name: (step, figure or None where it was not finite)}: the latest of each name up to `step`; {} where
    the lines do not reach the step `logged`. UserError if they are damaged."""
    lines, damaged = read_lines(output, step)
    if damaged:
        raise UserError(
            f"{damaged:,} lines of {metrics_file(output)} are damaged or missing: restore it, or run the "
            f"train command again, which leaves them out"
        )
    found = [line for _, line in lines if line["step"] <= step]
    if not found or found[-1]["step"] < logged:
        return {}
    return {name: (line["step"], line[name]) for line in found for name in names if name in line}


def read_lines(output: str | Path, step: int | None = None) -> tuple[list[tuple[bytes, dict]], int]:
    """([(bytes, line)] of the lines that are as they were written, how many others there are or are missing).

    Args:
        step: read no further than to the first line of this step or a later one.
    """
    path = metrics_file(output)
    lines: list[tuple[bytes, dict]] = []
    damaged = known = last = 0  # known: how many were damaged at the last whole line, of step `last`
    sealed = False
    for text in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if _is_line(line, last, sealed) and text.endswith(b"\n"):
            sealed = "checksum" in line
            if line.get("after", last) != last and damaged == known:  # those between are gone
                damaged += 1
            known, last = damaged, line["step"]
            lines.append((text, line))
            if step is not None and line["step"] >= step:
                break
        else:
            damaged += 1
    return lines, damaged


def _is_line(line: object, last: int, sealed: bool) -> TypeGuard[dict]:
    """Whether a line is as it was written: after one of step `last`, and with a checksum if one before has
    it."""
    if not isinstance(line, dict) or type(line.get("step")) is not int or line["step"] <= last:
        return False
    figures = {key: value for key, value in line.items() if key != "checksum"}
    if sealed or len(figures) < len(line):
        return line.get("checksum") == fingerprint(figures)
    return all(map(_is_figure, figures.values()))


def _sealed(line: dict, after: int) -> dict:
    """A line with its last two keys."""
    figures = {key: value for key, value in line.items() if key not in ("after", "checksum")}
    figures["after"] = after
    return {**figures, "checksum": fingerprint(figures)}


def _text(line: dict) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _is_figure(value: object) -> bool:
    if isinstance(value, int):  # a flag too
        return abs(value) < 2**63
    return value is None or (isinstance(value, float) and math.isfinite(value))


class NoMetrics:
    """In the place of Metrics where another rank writes them."""

    def __init__(self, last_step: int):
        self.last: dict = {"step": last_step}

    def write(self, line: dict) -> None:
        self.last = line

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


class Metrics:
    """Writes the lines of a run.

    What an earlier process wrote past state.step, where this one starts, is dropped: the file reads as that
    of one run. `last` is the latest line, {"step": 0} before the first.
    """

    def __init__(self, output: str | Path, state: TrainState, tracker: Tracker | None = None):
        self.tracker = tracker
        path = metrics_file(output)
        lines, damaged = read_lines(output)
        kept = [(text, line) for text, line in lines if line["step"] <= state.step]
        if damaged:
            note(f"{path}: {damaged:,} lines are damaged or missing; the others are kept")
            steps = [0, *(line["step"] for _, line in kept)]
            kept = [
                (_text(_sealed(line, after)) if "checksum" in line else text, line)
                for (text, line), after in zip(kept, steps, strict=False)
            ]
        self.last: dict = kept[-1][1] if kept else {"step": 0}
        if self.last["step"] < state.last_logged_step:
            note(f"{path}: the last lines up to step {state.last_logged_step:,} are lost")
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"".join(text for text, _ in kept))
        self.file = open(path, "ab", buffering=0)
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
        line = _sealed(line, self.last["step"])
        self.file.write(_text(line))
        self.last = line
        if self.tensorboard:
            for name, value in line.items():
                if isinstance(value, float):
                    self.tensorboard.add_scalar(name, value, line["step"])

        if self.tracker:
            self.tracker.log(line)

    def sync(self) -> None:
        """Make what was written survive a power failure."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.tracker:
            self.tracker.close()

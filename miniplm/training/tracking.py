"""A run's figures to Weights & Biases or Trackio, beside TensorBoard. Both have init, log and finish.

Tracking determines nothing: where it fails in the middle of a run, a line says so, and training goes on
without. Trackio keeps its figures on this machine; wandb does with WANDB_MODE=offline.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runtime.errors import UserError, reason
from ..runtime.files import fingerprint
from ..runtime.progress import note

PROJECT = "miniplm"


def check_tracker(name: str | None) -> None:
    """UserError unless the package is installed."""
    if name and importlib.util.find_spec(name) is None:
        raise UserError(f"track {name} needs the package {name}: pip install {name}")


class Tracker:
    """Sends the figures of one run; an equal run in the same folder is continued.

    Args:
        name: "wandb" or "trackio".
        output: the training output.
        identity: all that determines the run.
    Raises:
        UserError: it cannot be started.
    """

    def __init__(self, name: str, output: str | Path, identity: Mapping[str, Any]):
        output = Path(output).resolve()
        run = fingerprint([str(output), identity])
        # Trackio knows a run by its name, wandb by its id.
        settings: dict[str, Any] = {"project": PROJECT, "name": f"{output.name}-{run[:6]}", "resume": "allow"}
        if name == "wandb":
            settings |= {"id": run, "dir": str(output)}
        self.name = name
        try:
            self.module: Any = importlib.import_module(name)
            self.module.init(**settings, config=dict(identity))
        except Exception as error:
            offline = ", or set WANDB_MODE=offline" if name == "wandb" else ""
            raise UserError(f"{name} cannot start ({reason(error)}): log in to it{offline}") from error

    def log(self, line: Mapping[str, Any]) -> None:
        """The figures of a line of metrics.jsonl, at its step."""
        figures = {key: value for key, value in line.items() if isinstance(value, float)}
        self._try(lambda: self.module.log(figures, step=line["step"]))

    def close(self) -> None:
        self._try(lambda: self.module.finish())

    def _try(self, work: Any) -> None:
        if self.module is None:
            return
        try:
            work()
        except Exception as error:
            note(f"{self.name} failed ({reason(error)}): training goes on without it")
            self.module = None

"""MiniPLM: distil a large language model into a small one before pre-training (arXiv 2410.17215).

Each command is a function here, with the settings of the command line; `help(miniplm.score)` lists them:

    miniplm.score(data="runs/pool", teacher="org/name", reference="runs/reference", output="runs/scores")

Settings in groups are given as a dict or as their class in `miniplm.config`. A function is made, and torch
imported, when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .models.base import LanguageModel

__version__ = "0.1.0"


def load_model(
    name: str,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a model for computing, in evaluation mode.

    Args:
        name: Hugging Face id, local folder, .gguf file, or training output (its latest checkpoint).
        dtype: of the weights, whatever the file holds; None: float32.
        trust_remote_code: run code that comes with a model. Only for models that you trust.
    Returns: a model that takes packed ids: `model(input_ids[T], cu_seqlens[B + 1])` is hidden [T, d], and
        `model.head_weight` is [V, d].
    Raises:
        UserError (a ValueError): it cannot be found, read or computed; the line says which file or tensor.
    """
    import torch

    from .models.loading import load_model as load
    from .training.checkpoints import latest_checkpoint

    return load(latest_checkpoint(name), dtype or torch.float32, device, trust_remote_code)


def _commands() -> list[str]:
    """The commands that are functions here; `miniplm.demo` is the package of that name."""
    from .config import STAGES

    return [*STAGES, "ledger", "report", "run"]


def __getattr__(name: str) -> Any:
    if name.startswith("_") or name not in _commands():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .api import command

    globals()[name] = command(name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_commands()})

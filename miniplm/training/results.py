"""What came of a run, and whether all of it is still there."""

from pathlib import Path

from ..runtime.artifacts import MANIFEST, open_output, read_manifest
from ..runtime.errors import UserError
from ..runtime.progress import note
from .checkpoints import DamagedCheckpoint, checkpoint_folders, read_checkpoint
from .metrics import read_lines
from .setup import Setup
from .state import TrainState
from .step import LOSS_COMPONENTS


def run_results(setup: Setup, state: TrainState, last_line: dict) -> dict:
    """What the manifest says of a run that has ended in `state` with `last_line` of its metrics."""
    components = LOSS_COMPONENTS if "teacher" in setup.identity else ()
    return {
        "steps": state.step,
        "skipped": state.step - state.optimizer_steps,
        "tokens": state.tokens,
        **(trained_share(state) if setup.token_scores else {}),
        **{name: last_line.get(name) for name in ("loss", *components, "eval_loss")},
    }


def trained_share(state: TrainState) -> dict:
    """What the manifest says of a run that trains on the best tokens alone."""
    return {
        "trained_tokens": state.trained_tokens,
        "trained_share": state.trained_tokens / state.tokens if state.tokens else None,
    }


def is_complete(output: Path, setup: Setup) -> bool:
    """True when an equal run has completed in `output` and all that it wrote is there, as it was written."""
    if not (output / MANIFEST).exists() or not open_output(output, "train", setup.identity):
        return False
    folders = checkpoint_folders(output)
    if not folders:
        raise UserError(
            f"training {output} was complete, but its checkpoints are gone: delete it to train again"
        )
    for folder in folders[:-1]:
        try:
            read_checkpoint(folder)
        except DamagedCheckpoint as error:
            note(f"checkpoint {folder} is damaged ({error.reason}); it is not the latest: remove it")
    lost = _what_is_lost(output, folders[-1], setup)
    if lost:
        note(f"training {output} was complete, but {lost}")
    return not lost


def _what_is_lost(output: Path, checkpoint: Path, setup: Setup) -> str | None:
    """What of a complete run is lost or changed, None where all is as it was written."""
    try:
        state = read_checkpoint(checkpoint).state
    except DamagedCheckpoint as error:
        return f"checkpoint {checkpoint.name} is damaged ({error.reason})"
    if state.step != setup.steps:
        return "its last checkpoint is gone"
    lines, damaged = read_lines(output)
    if damaged:
        return f"{damaged:,} lines of its metrics are damaged or missing"
    last_line = lines[-1][1] if lines else {"step": 0}
    if last_line["step"] != setup.steps:
        return "the last line of its metrics is gone"
    manifest = read_manifest(output, "train")
    results = run_results(setup, state, last_line)
    if any(manifest.get(name) != value for name, value in results.items()):
        return f"its {MANIFEST} does not hold its results"
    return None

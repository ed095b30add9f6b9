"""The layout of a training output: its checkpoints, and where its metrics lie.

    manifest.json                  what runtime/artifacts.py writes for every stage
    metrics.jsonl, tensorboard/    what training/metrics.py writes
    checkpoints/step-00001000/     a folder that transformers opens (config.json, model.safetensors, the
                                   tokenizer's files), with optimizer.safetensors (`exp_avg.<parameter>`,
                                   `exp_avg_sq.<parameter>`) and trainer_state.json beside

trainer_state.json (see state.py) holds a hash of every other file, and a checksum of itself; what is read is
verified. A checkpoint is written whole or not at all, and holds no time, so equal runs write equal bytes.
torch.distributed.checkpoint is not used: its .metadata file is a pickle, and nothing here is unpickled.
"""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from ..models.base import LanguageModel
from ..runtime.artifacts import MANIFEST, damaged_file, is_as_written
from ..runtime.errors import UserError, system_error
from ..runtime.files import atomic_folder, fingerprint, hash_files, read_json, write_json
from ..runtime.progress import note
from .parallel import sliced_like
from .snapshot import OPTIMIZER_STATE, Snapshot
from .state import TrainState, state_from_json, state_to_json

STATE_FILE, OPTIMIZER_FILE = "trainer_state.json", "optimizer.safetensors"
STEP_FOLDER = re.compile(r"step-(\d+)")


class Checkpoint(NamedTuple):
    """A checkpoint whose files are as they were written."""

    folder: Path
    identity: str  # fingerprint of the run's identity
    state: TrainState

    @property
    def fingerprint(self) -> str:
        """Of its content: the state holds a hash of every file."""
        return hash_files([self.folder / STATE_FILE])


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is missing or is not as it was written; `reason` says which."""

    def __init__(self, folder: Path, reason: str):
        super().__init__(
            f"checkpoint {folder} is damaged ({reason}): give an earlier one, or run its train command "
            f"again, which continues from the latest whole one"
        )
        self.reason = reason


# ---- where things lie ----


def metrics_file(output: str | Path) -> Path:
    return Path(output) / "metrics.jsonl"


def tensorboard_folder(output: str | Path) -> Path:
    return Path(output) / "tensorboard"


def checkpoint_folder(output: str | Path, step: int) -> Path:
    return Path(output) / "checkpoints" / f"step-{step:08d}"


def training_output(checkpoint: Path) -> Path:
    """The training output that a checkpoint lies in."""
    return checkpoint.resolve().parent.parent


def checkpoint_folders(output: str | Path) -> list[Path]:
    """The checkpoints of a training output, damaged ones among them, the earliest first."""
    found = []
    for folder in Path(output).glob("checkpoints/*"):
        match = STEP_FOLDER.fullmatch(folder.name)
        if match and folder.is_dir():
            found.append((int(match[1]), folder))
    return [folder for _, folder in sorted(found)]


def latest_checkpoint(name: str | Path) -> str:
    """The latest checkpoint where `name` is a training output, else `name` itself (a Hugging Face id, a
    folder, a file).

    Raises:
        UserError: it is a checkpoint or an export, and a file that a model is loaded from is not as it was
            written.
    """
    folders = checkpoint_folders(name)
    folder = folders[-1] if folders else Path(name)
    if (folder / STATE_FILE).exists() and not _is_of_another_trainer(folder):
        read_checkpoint(folder, with_optimizer=False)
    _verify_exported(folder)
    return str(folder if folders else name)


def _verify_exported(path: Path) -> None:
    """UserError if this is a folder that export wrote, or a .gguf file in one, and what a model is loaded
    from is not as it was written."""
    folder = path.parent if path.suffix == ".gguf" else path
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"]) if manifest["stage"] == "export" else {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # somebody else's, or none
        return
    is_read = path.name.__eq__ if folder != path else lambda name: not name.endswith((".md", ".gguf"))
    if damage := damaged_file(folder, {name: content for name, content in files.items() if is_read(name)}):
        raise UserError(
            f"model {folder} is damaged ({damage}): export it again, or, if it was changed on purpose, "
            f"remove {MANIFEST} from it"
        )


def _is_of_another_trainer(folder: Path) -> bool:
    """transformers' Trainer writes a file of the same name."""
    try:
        found = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "global_step" in found


def read_training_output(name: str | Path) -> tuple[Checkpoint, dict]:
    """(the latest checkpoint of a training output, or the one that `name` is; the output's manifest).

    Raises:
        UserError: there is none, it is damaged, or the output it lies in is not that of its run.
    """
    folders = checkpoint_folders(name)
    folder = folders[-1] if folders else Path(name)
    run = training_output(folder)
    if not folder.is_dir():
        raise UserError(f"checkpoint {name} does not exist")
    if folders and not (folder / STATE_FILE).exists():
        raise DamagedCheckpoint(folder, f"{STATE_FILE} is missing")
    if not (folder / STATE_FILE).exists() or not (run / MANIFEST).exists():
        raise UserError(
            f"{name} is neither a training output with a checkpoint nor a checkpoint in one: give what "
            f"`miniplm train` wrote"
        )
    checkpoint, manifest = read_checkpoint(folder, with_optimizer=False), read_json(run / MANIFEST)
    of_training = isinstance(manifest, dict) and manifest.get("stage") == "train"
    if not of_training or checkpoint.identity != fingerprint(manifest.get("identity")):
        raise UserError(
            f"checkpoint {folder} does not belong to the run whose manifest is in {run}: give it in its own "
            f"training output"
        )
    if not is_as_written(manifest):
        raise UserError(f"{run / MANIFEST} is not as written: run its train command again, which mends it")
    return checkpoint, manifest


# ---- writing and reading a checkpoint ----


def save_checkpoint(
    folder: Path, model: LanguageModel, snapshot: Snapshot, tokenizer: str, identity: str
) -> None:
    """Write a checkpoint of a snapshot.

    Args:
        model: of its kind the snapshot is; it may be training by now.
        tokenizer: the folder whose files are copied.
        identity: fingerprint of the run's identity.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_folder(folder) as temporary:
        shutil.copytree(tokenizer, temporary, dirs_exist_ok=True)
        snapshot.wait()
        try:
            model.save_pretrained(temporary, snapshot.weights)
            save_file(snapshot.moments, temporary / OPTIMIZER_FILE)
        except SafetensorError as error:  # how the library reports a full disk
            raise system_error(error, folder) or error from None
        files = {
            str(file.relative_to(temporary)): hash_files([file])
            for file in sorted(temporary.rglob("*"))
            if file.is_file()
        }
        write_json(temporary / STATE_FILE, state_to_json(identity, snapshot.state, files))


def read_checkpoint(folder: Path, with_optimizer: bool = True) -> Checkpoint:
    """A checkpoint, its files verified; without the optimizer's file if it is not needed.

    Raises:
        DamagedCheckpoint: a file is missing or is not as it was written.
    """
    if not (folder / STATE_FILE).exists():
        raise DamagedCheckpoint(folder, f"{STATE_FILE} is missing")
    try:
        content = read_json(folder / STATE_FILE)
    except UserError:
        raise DamagedCheckpoint(folder, f"{STATE_FILE} is not as it was written: it is not JSON") from None
    try:
        identity, state, files = state_from_json(content)
    except ValueError as error:
        raise DamagedCheckpoint(folder, f"{STATE_FILE} is not as it was written: {error}") from None
    if not {OPTIMIZER_FILE, "config.json"} <= files.keys():
        raise DamagedCheckpoint(folder, f"{STATE_FILE} is not as it was written: it lacks files")
    match = STEP_FOLDER.fullmatch(folder.name)
    if match and int(match[1]) != state.step:
        raise DamagedCheckpoint(folder, f"{STATE_FILE} is that of step {state.step}")
    for name, content_hash in files.items():
        if name == OPTIMIZER_FILE and not with_optimizer:
            continue
        if not (folder / name).is_file():
            raise DamagedCheckpoint(folder, f"{name} is missing")
        if hash_files([folder / name]) != content_hash:
            raise DamagedCheckpoint(folder, f"{name} is not as it was written")
    return Checkpoint(folder, identity, state)


def load_optimizer(
    optimizer: torch.optim.Optimizer, model: LanguageModel, checkpoint: Path, optimizer_steps: int
) -> None:
    """Fill the AdamW of `model` from a checkpoint made after so many steps of the optimiser."""
    from safetensors import safe_open

    states = {}
    with safe_open(checkpoint / OPTIMIZER_FILE, "pt") as file:
        for index, (name, parameter) in enumerate(model.named_parameters()):
            # Copies, because the tensors of an open file are the file.
            states[index] = {
                key: sliced_like(file.get_tensor(f"{key}.{name}").to(parameter.device, copy=True), parameter)
                for key in OPTIMIZER_STATE
            }
            states[index]["step"] = torch.tensor(float(optimizer_steps))
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


# ---- the checkpoints of a run ----


def find_checkpoint(output: str | Path, identity: str) -> Checkpoint | None:
    """The latest whole checkpoint of a run, None if there is none. Damaged later ones are removed, with a
    warning; so is what a kill left of one that was being written.

    Raises:
        UserError: all are damaged, or the latest whole one belongs to another run.
    """
    for leftover in Path(output).glob("checkpoints/.step-*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:  # the lock of a folder that was being written
            leftover.unlink(missing_ok=True)
    damaged: dict[Path, str] = {}
    for folder in reversed(checkpoint_folders(output)):
        try:
            checkpoint = read_checkpoint(folder)
        except DamagedCheckpoint as error:
            damaged[folder] = error.reason
            continue
        if checkpoint.identity != identity:
            raise UserError(
                f"checkpoint {folder} belongs to another run: remove it, or choose another --output"
            )
        for path, reason in damaged.items():
            note(f"checkpoint {path} is damaged ({reason}): removed, continuing from {folder.name}")
            shutil.rmtree(path)
        return checkpoint
    if damaged:
        path, reason = next(iter(damaged.items()))
        raise UserError(
            f"checkpoint {path} is damaged ({reason}) and there is no intact one before it: delete {output} "
            f"to start again"
        )
    return None


def prune_checkpoints(output: str | Path, keep: int) -> None:
    """Remove all but the latest `keep` checkpoints."""
    for folder in checkpoint_folders(output)[:-keep]:
        shutil.rmtree(folder)

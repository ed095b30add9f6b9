"""What a training run keeps on disk: checkpoints to continue from, and metrics.

A checkpoint is a folder that transformers opens (config.json, model.safetensors, the tokenizer's files) with
optimizer.safetensors (`exp_avg.<parameter>`, `exp_avg_sq.<parameter>`) and trainer_state.json beside. It is
written whole or not at all, and holds no time, so equal runs write equal bytes. torch.distributed.checkpoint
is not used: its .metadata file is a pickle, and nothing here is unpickled.
"""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import torch

from ..runtime.errors import UserError
from ..runtime.files import atomic_folder, atomic_write, hash_files, read_json, write_json

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names
STATE = "trainer_state.json"


@dataclasses.dataclass
class TrainState:
    """What a checkpoint holds beside weights and moments."""

    step: int = 0  # steps done, skipped ones among them
    updates: int = 0  # steps that were not skipped
    tokens: int = 0  # predictions gone through
    skipped_in_a_row: int = 0
    grad_norm: float | None = None  # of the last step; None where it was not finite
    losses: list[float] = dataclasses.field(
        default_factory=list
    )  # of the steps since the last line of metrics.jsonl
    parts: list[list[float]] = dataclasses.field(
        default_factory=list
    )  # [cross-entropy, KL divergence] of those steps, with a teacher
    line_step: int = 0  # the step of that line
    micro_batch_tokens: int | None = None  # chosen by memory: a continued run adds up in the same order


def checkpoint_folder(output, step: int) -> Path:
    return Path(output) / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(folder: Path, model, optimizer, state: TrainState, tokenizer: str, identity: str):
    """Write a checkpoint.

    Args:
        tokenizer: the folder whose files are copied.
        identity: fingerprint of the run.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_folder(folder) as temporary:
        shutil.copytree(tokenizer, temporary, dirs_exist_ok=True)
        moments = {}
        for name, parameter in model.named_parameters():
            for moment in MOMENTS:
                moments[f"{moment}.{name}"] = (
                    optimizer.state[parameter][moment] if state.updates else torch.zeros_like(parameter)
                )
        try:
            model.save_pretrained(temporary)
            save_file(moments, temporary / "optimizer.safetensors")
        except SafetensorError as error:  # how the library reports a full disk
            raise OSError(f"cannot write checkpoint {folder}: {error}") from error
        files = {
            str(file.relative_to(temporary)): hash_files([file])
            for file in sorted(temporary.rglob("*"))
            if file.is_file()
        }
        write_json(
            temporary / STATE, {"identity": identity, "state": dataclasses.asdict(state), "files": files}
        )


def load_optimizer(optimizer, model, checkpoint: Path, updates: int):
    """Fill the AdamW of `model` from a checkpoint made after `updates` updates."""
    from safetensors import safe_open

    moments = {}
    with safe_open(checkpoint / "optimizer.safetensors", "pt") as file:
        for index, (name, parameter) in enumerate(model.named_parameters()):
            # Copies, because the tensors of an open file are the file.
            moments[index] = {
                moment: file.get_tensor(f"{moment}.{name}").to(parameter.device, copy=True)
                for moment in MOMENTS
            }
            moments[index]["step"] = torch.tensor(float(updates))
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def find_checkpoint(output, identity: str) -> tuple[Path, TrainState] | None:
    """The latest whole checkpoint of a run, None if there is none. Damaged later ones are removed, with a
    warning; so is what a kill left of one that was being written.

    Raises:
        UserError: all are damaged, or the latest whole one belongs to another run.
    """
    for leftover in Path(output).glob("checkpoints/.step-*.tmp"):
        shutil.rmtree(leftover)
    damaged = {}
    for checkpoint in sorted(Path(output).glob("checkpoints/step-*"), reverse=True):
        try:
            found = read_json(checkpoint / STATE)
            for name, content in found["files"].items():
                if hash_files([checkpoint / name]) != content:
                    raise UserError(f"{name} is not as it was written")
        except (UserError, FileNotFoundError, KeyError, TypeError) as error:
            damaged[checkpoint] = str(error)
            continue
        if found["identity"] != identity:
            raise UserError(
                f"checkpoint {checkpoint} belongs to another run: remove it, or choose another --output"
            )
        for path, reason in damaged.items():
            print(
                f"checkpoint {path} is damaged ({reason}): removed, continuing from {checkpoint.name}",
                file=sys.stderr,
            )
            shutil.rmtree(path)
        return checkpoint, TrainState(**found["state"])
    if damaged:
        path, reason = next(iter(damaged.items()))
        raise UserError(
            f"checkpoint {path} is damaged ({reason}) and there is no whole one before it: delete {output} "
            f"to start again"
        )
    return None


def prune_checkpoints(output, keep: int):
    """Remove all but the latest `keep` checkpoints."""
    for checkpoint in sorted(Path(output).glob("checkpoints/step-*"))[:-keep]:
        shutil.rmtree(checkpoint)


class Metrics:
    """metrics.jsonl, and the same figures for tensorboard.

    What an earlier process wrote past `step`, where this one starts, is dropped: the file reads as that of
    one run. `last` is the latest line, {"step": 0} before the first.
    """

    def __init__(self, output, step: int):
        path, self.last = Path(output) / "metrics.jsonl", {"step": 0}
        kept = []
        for text in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # where a kill cut it off
                break
            if line["step"] > step or not text.endswith("\n"):
                break
            kept.append(text)
            self.last = line
        with atomic_write(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        self.file = open(path, "a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("tensorboard is not installed: the figures go to metrics.jsonl alone", file=sys.stderr)
            self.tensorboard = None
        else:
            self.tensorboard = SummaryWriter(
                str(Path(output) / "tensorboard"), purge_step=self.last["step"] + 1
            )

    def write(self, line: dict):
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.last = line
        if self.tensorboard:
            for name, value in line.items():
                if isinstance(value, float):
                    self.tensorboard.add_scalar(name, value, line["step"])

    def sync(self):
        """Make what was written survive a power failure."""
        os.fsync(self.file.fileno())

    def close(self):
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()


def latest_checkpoint(name: str) -> str:
    """The latest checkpoint folder where `name` is a training output, else `name` itself (a Hugging Face id,
    a folder, a file)."""
    steps = sorted(Path(name).glob("checkpoints/step-*"))
    return str(steps[-1]) if steps else str(name)

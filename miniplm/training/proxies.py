"""The folder of proxy fit: manifest.json, proxy.safetensors with what predicts, and while a fit goes on
state.safetensors, from which a killed one continues."""

import hashlib
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..config import NgramConfig
from ..models.ngram import NgramProxy
from ..runtime.artifacts import damaged_file, read_manifest
from ..runtime.errors import UserError
from ..runtime.files import atomic_write, hash_files
from ..runtime.progress import note
from ..runtime.schema import Count, Figure, Record

WEIGHTS, STATE = "proxy.safetensors", "state.safetensors"
CHECKSUM = "checksum"  # a tensor of the state beside the others
DTYPES = {"weights": np.float32, "mean": np.float64}  # of the n-gram model


class ProxyIdentity(Record):
    """What determines a proxy, as far as others read it."""

    corpus: str  # fingerprint
    scores: dict[str, Any]  # their identity
    kind: Literal["ngram"]
    ngram: dict[str, Any]


class HeldOut(Record):
    """How well it agrees with the scores, as far as others tell it."""

    spearman: Figure
    equal_selections: Figure
    ratio: Figure


class ProxyManifest(Record):
    """What a proxy says of itself, and of the scores that it was fitted to."""

    identity: ProxyIdentity
    checksum: str
    files: dict[str, str]  # name → hash
    held_out: HeldOut
    eos_token_id: Count
    tokenizer_fingerprint: str
    teacher: str | None  # name
    reference: str | None
    vocab_size: Count


def write_weights(folder: Path, tensors: dict[str, np.ndarray]) -> dict[str, str]:
    """Write what predicts, atomically; the hash of its file by name, for the manifest."""
    from safetensors.numpy import save_file

    with atomic_write(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary)
    return {WEIGHTS: hash_files([folder / WEIGHTS])}


def read_proxy(folder: str | PathLike[str]) -> tuple[dict[str, Any], NgramProxy]:
    """(the manifest, the model) of a complete fit; UserError where it is none, or damaged."""
    manifest = read_manifest(folder, "proxy fit", what="proxy", schema=ProxyManifest)
    if damage := damaged_file(Path(folder), manifest["files"]):
        raise UserError(
            f"proxy {folder} is damaged: {damage}: restore it, or run its proxy fit command again"
        )
    tensors = _read(Path(folder) / WEIGHTS)
    if tensors is None or {name: values.dtype for name, values in tensors.items()} != DTYPES:
        raise UserError(f"{Path(folder) / WEIGHTS} does not hold a proxy: run its proxy fit command again")
    orders = NgramConfig(**manifest["identity"]["ngram"]).orders
    return manifest, NgramProxy(tensors["weights"], tensors["mean"].item(), orders, manifest["eos_token_id"])


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """The tensors of a safetensors file; None where it is none."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError):
        return None


# ---- a fit on its way ----


def save_state(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Keep what a killed fit continues from."""
    from safetensors.numpy import save_file

    with atomic_write(folder / STATE) as temporary:
        save_file({**tensors, CHECKSUM: _digest(tensors)}, temporary)


def read_state(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray] | None:
    """What a killed fit had kept; None to start from the beginning: there is nothing, or it is damaged, which
    is told.

    Args:
        shapes: of the tensors that are to be there.
    """
    if not (folder / STATE).exists():
        return None
    tensors = _read(folder / STATE) or {}
    checksum = tensors.pop(CHECKSUM, None)
    whole = {name: values.shape for name, values in tensors.items()} == shapes
    if whole and checksum is not None and np.array_equal(checksum, _digest(tensors)):
        return tensors
    note(f"{folder / STATE} is not as written: the fit starts over")
    return None


def forget_state(folder: Path) -> None:
    """The fit has ended, or is to start over."""
    (folder / STATE).unlink(missing_ok=True)


def _digest(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """uint8 [32]: SHA-256 of the tensors, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(np.ascontiguousarray(tensors[name]).data)
    return np.frombuffer(total.digest(), np.uint8)

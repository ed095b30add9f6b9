"""The folder of proxy fit: manifest.json, proxy.safetensors with what predicts, of a transformer its body in
model/, and while a fit goes on state.safetensors, from which a killed one continues."""

import hashlib
import shutil
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..config import NgramConfig
from ..data.corpus import Corpus
from ..models.loading import load_model
from ..models.ngram import NgramProxy
from ..models.regression import ScoreRegressor
from ..runtime.artifacts import damaged_file, read_manifest
from ..runtime.errors import UserError
from ..runtime.files import atomic_folder, atomic_write, hash_files
from ..runtime.progress import note
from ..runtime.schema import Count, Figure, Record
from .cost import corpus_work
from .regression import TransformerProxy

WEIGHTS, STATE, BODY = "proxy.safetensors", "state.safetensors", "model"
CHECKSUM = "checksum"  # a tensor of the state beside the others
TENSORS = {"ngram": {"weights", "mean"}, "transformer": {"weight", "bias", "mean", "scale"}}

Proxy = NgramProxy | TransformerProxy


class ProxyIdentity(Record):
    """What determines a proxy, as far as others read it."""

    corpus: str  # fingerprint
    scores: dict[str, Any]  # their identity
    kind: Literal["ngram", "transformer"]
    ngram: dict[str, Any] | None = None


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


def write_proxy(folder: Path, proxy: Proxy) -> dict[str, str]:
    """Write what predicts; the hashes of its files by name, for the manifest."""
    from safetensors.numpy import save_file

    if isinstance(proxy, NgramProxy):
        tensors = {"weights": proxy.weights, "mean": np.array(proxy.mean)}
    else:
        own = {name: getattr(proxy.model, name).detach().cpu().numpy() for name in ("weight", "bias")}
        tensors = {**own, "mean": np.array(proxy.mean), "scale": np.array(proxy.scale)}
        shutil.rmtree(folder / BODY, ignore_errors=True)
        with atomic_folder(folder / BODY) as temporary:
            proxy.model.body.save_pretrained(temporary)
    with atomic_write(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary)
    paths = [folder / WEIGHTS, *sorted(path for path in (folder / BODY).rglob("*") if path.is_file())]
    return {path.relative_to(folder).as_posix(): hash_files([path]) for path in paths}


def prediction_flops(proxy: Proxy, corpus: Corpus, chunks: np.ndarray | slice = slice(None)) -> int:
    """What it costs to predict the scores of chunks of a corpus, of all if they are not given."""
    document_mask = isinstance(proxy, TransformerProxy) and proxy.document_mask
    return proxy.flops(*corpus_work(corpus, document_mask, chunks))


def read_manifest_of(folder: str | PathLike[str]) -> dict[str, Any]:
    """The manifest of a complete fit; UserError where it is none, or damaged."""
    manifest = read_manifest(folder, "proxy fit", what="proxy", schema=ProxyManifest)
    if damage := damaged_file(Path(folder), manifest["files"]):
        raise UserError(
            f"proxy {folder} is damaged: {damage}: restore it, or run its proxy fit command again"
        )
    return manifest


def read_proxy(
    folder: str | PathLike[str],
    manifest: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    batch_tokens: int,
) -> Proxy:
    """The model of a fit with this manifest.

    Args:
        device, dtype, batch_tokens: of a transformer: where and what it computes in, and how much at once.
    """
    identity, eos = manifest["identity"], manifest["eos_token_id"]
    tensors = _read(Path(folder) / WEIGHTS)
    if tensors is None or tensors.keys() != TENSORS[identity["kind"]]:
        raise UserError(f"{Path(folder) / WEIGHTS} does not hold a proxy: run its proxy fit command again")
    mean = tensors["mean"].item()
    if identity["kind"] == "ngram":
        return NgramProxy(tensors["weights"], mean, NgramConfig(**identity["ngram"]).orders, eos)
    model = ScoreRegressor(load_model(Path(folder) / BODY, torch.float32, device))
    own = {name: torch.from_numpy(tensors[name]) for name in ("weight", "bias")}
    model.load_state_dict(own, strict=False)
    document_mask = identity["scores"]["document_mask"]
    return TransformerProxy(model, mean, tensors["scale"].item(), eos, document_mask, dtype, batch_tokens)


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


def read_state(folder: Path) -> dict[str, np.ndarray] | None:
    """What a killed fit had kept; None to start from the beginning: there is nothing, or it is damaged, which
    is told."""
    if not (folder / STATE).exists():
        return None
    tensors = _read(folder / STATE) or {}
    checksum = tensors.pop(CHECKSUM, None)
    if checksum is not None and np.array_equal(checksum, _digest(tensors)):
        return tensors
    note(f"{folder / STATE} is not as written: the fit starts over")
    return None


def forget_state(folder: Path) -> None:
    """The fit has ended."""
    (folder / STATE).unlink(missing_ok=True)


def _digest(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """uint8 [32]: SHA-256 of the tensors, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        total.update(np.ascontiguousarray(tensors[name]).data)
    return np.frombuffer(total.digest(), np.uint8)

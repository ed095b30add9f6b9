"""Files that survive a kill: atomic writes, manifests, fingerprints.

Every stage writes into an output folder with a `manifest.json`. The manifest holds the stage's *identity* (all that
determines its result), `complete` (false until the last byte is on disk) and what came out. A run into a folder with
another identity is refused; one with the same identity continues; one that is complete is left alone. Manifests carry
no times and no paths of this machine's making, so that two equal runs write equal bytes.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

MANIFEST = "manifest.json"


class UserError(ValueError):
    """A user's mistake. Its text is one plain line: what is wrong, where, and what to do."""


def fingerprint(value) -> str:
    """SHA-256 (first 16 hex digits) of a JSON-able value; equal values give equal fingerprints."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def hash_files(paths) -> str:
    """SHA-256 (first 16 hex digits) of the contents of the files, in the order given. Names do not count."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest() if hasattr(hashlib, "file_digest") else _digest(file))
    return total.hexdigest()[:16]


def _digest(file) -> bytes:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.digest()


def _fsync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`; when the block ends well it is fsynced and renamed to `path`, else removed."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path):
    """Yield a new temporary folder beside `path`; when the block ends well it is fsynced and renamed to `path`, which
    must not exist, else removed. What an earlier kill left of the temporary folder is removed first."""
    path = Path(path)
    temporary = _temporary(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        for found in [*temporary.rglob("*"), temporary]:
            if found.is_file():
                found.chmod(0o666 & ~umask)  # safetensors writes files that only their owner may read
            _fsync(found)
        os.rename(temporary, path)
        _fsync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(path, value):
    """Write a JSON-able value atomically, keys in the order given."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): restore it or make it again") from None


def open_output(folder, stage: str, identity: dict) -> bool:
    """Claim `folder` for a run of `stage`. True when an equal run has completed there; False to start or to continue.

    Args:
        folder: made if missing. A non-empty folder without a manifest is refused: it is somebody's.
        stage: "prepare", "score", …
        identity: JSON-able; all that determines the result.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file: choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    identity = json.loads(json.dumps(identity))
    path = folder / MANIFEST
    if not path.exists():
        if leftovers := sorted(found.name for found in folder.iterdir() if not found.name.endswith(".tmp")):
            raise UserError(f"output folder {folder} is not empty and holds no manifest ({leftovers[0]}, …): choose another --output")
        write_json(path, {"stage": stage, "complete": False, "identity": identity})
        return False
    found = read_json(path)
    if found.get("stage") != stage:
        raise UserError(f"output folder {folder} holds a {found.get('stage')!r} run, not a {stage!r} run: choose another --output")
    if found.get("identity") != identity:
        raise UserError(f"output folder {folder} holds another {stage} run ({_difference(found.get('identity'), identity)}): "
                        "choose another --output or delete it")
    return bool(found.get("complete"))


@contextlib.contextmanager
def exclusive(folder):
    """Keep other processes out of an output folder while the block runs; UserError if one is in it. A kill ends it too."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing to {folder}: wait for it, stop it, or choose another --output") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def _difference(old, new, prefix="") -> str:
    """The first place where two identities differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if old.get(key) != new.get(key):
                return _difference(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    return f"{prefix} was {json.dumps(old)[:80]}, is now {json.dumps(new)[:80]}"


def complete_output(folder, results: dict):
    """Mark the run in `folder` complete and record its results in the manifest, beside stage and identity."""
    manifest = read_json(Path(folder) / MANIFEST)
    write_json(Path(folder) / MANIFEST, {**manifest, **results, "complete": True})


def read_manifest(folder, *stages: str, what: str = "folder") -> dict:
    """The manifest of a complete output; UserError when missing, incomplete, or of none of `stages` (any if none are given)."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{what} {folder} does not exist")
    if not (folder / MANIFEST).exists():
        raise UserError(f"{what} {folder} has no {MANIFEST}: give a folder that miniplm wrote")
    manifest = read_json(folder / MANIFEST)
    if stages and manifest.get("stage") not in stages:
        raise UserError(f"{what} {folder} holds the output of {manifest.get('stage')!r}; expected that of {' or '.join(map(repr, stages))}")
    if not manifest.get("complete"):
        raise UserError(f"{what} {folder} is not complete: run its {manifest.get('stage')!r} command again, it continues where it stopped")
    return manifest


def latest_checkpoint(name: str) -> str:
    """The latest checkpoint folder where `name` is a training output, else `name` itself (a Hugging Face id, a folder, a file)."""
    steps = sorted(Path(name).glob("checkpoints/step-*"))
    return str(steps[-1]) if steps else str(name)

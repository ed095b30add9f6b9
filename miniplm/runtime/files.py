"""Files that survive a kill: atomic writes, and hashes of contents."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

from .errors import UserError


def fingerprint(value) -> str:
    """SHA-256 (first 16 hex digits) of a JSON-able value; equal values give equal fingerprints."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def hash_files(paths) -> str:
    """SHA-256 (first 16 hex digits) of the contents of the files, in the order given. Names do not count."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            total.update(
                hashlib.file_digest(file, "sha256").digest()
                if hasattr(hashlib, "file_digest")
                else _digest(file)
            )
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
    """Yield a temporary path beside `path`; when the block ends well it is fsynced and renamed to `path`,
    else removed."""
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
    """Yield a new temporary folder beside `path`; when the block ends well it is fsynced and renamed to
    `path`, which must not exist, else removed. What an earlier kill left of the temporary folder is removed
    first."""
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

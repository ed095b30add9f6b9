"""Files that survive a kill: atomic writes, and hashes of contents."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError, reason
from .locks import lock


def fingerprint(value: Any) -> str:
    """SHA-256 (first 16 hex digits) of a JSON-able value; equal values give equal fingerprints."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def hash_files(paths: Iterable[str | os.PathLike]) -> str:
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


def _digest(file: BinaryIO) -> bytes:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.digest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
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
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a new temporary folder beside `path`; when the block ends well it is fsynced and renamed to
    `path`, which must not exist or be an empty folder, else removed. What an earlier kill left of the
    temporary folder is removed first.

    Raises:
        UserError: another process is writing the same folder, or has written it in the meantime.
    """
    path = Path(path)
    temporary = _temporary(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    refusal = f"another process is writing {path}: wait for it, or choose another --output"
    with lock(path.with_name(f".{path.name}.lock.tmp"), refusal):
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
            try:
                os.rename(temporary, path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise UserError(
                    f"{path} was written by another process in the meantime: look at it, or choose another "
                    f"--output"
                ) from None
            _fsync(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a JSON-able value atomically, keys in the order given."""
    with atomic_write(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        try:
            temporary.write_text(text, encoding="utf-8")
        except UnicodeEncodeError:  # half a surrogate pair: a byte of a file's name that is no UTF-8
            temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike) -> Any:
    """The value that a JSON file holds, of any type; UserError when there is no such file or it is no
    JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:  # JSON's, UTF-8's, or a number of thousands of digits
        raise UserError(f"{path} is not valid JSON ({reason(error)}): restore it or make it again") from error

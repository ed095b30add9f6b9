"""Packages of the ordinary registries, by their ordinary clients, and what is in them."""

import gzip
import io
import lzma
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import zstandard

from miniplm.runtime.errors import UserError

MAX_MEMBER = 2**28  # bytes of a file in a package, unpacked
AR_MAGIC, AR_HEADER = b"!<arch>\n", 60  # of ar(5), which a .deb is
TIMEOUT = 900  # seconds for one package


def download(registry: str, name: str, version: str, folder: Path) -> Path:
    """The package's file in `folder`, downloaded where it is missing.

    Args:
        registry: "pypi", "npm" or "debian".
        version: "": the one that the registry offers, which Debian's may change.
    Raises:
        UserError: the client is not there, or could not fetch it.
    """
    pattern, command = _client(registry, name, version)
    if not (found := sorted(folder.glob(pattern))):
        # Into a folder of its own first: a download that was cut is not taken for a package.
        aside = folder / f".{registry}-{name.replace('/', '-')}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _run(command, aside, f"{name} from {registry}")
        for path in aside.iterdir():
            path.replace(folder / path.name)
        aside.rmdir()
        found = sorted(folder.glob(pattern))
    if not found:
        raise UserError(f"`{' '.join(command)}` ended without a file {pattern}: look at it by hand")
    return found[-1]


def _client(registry: str, name: str, version: str) -> tuple[str, list[str]]:
    """(pattern of the file's name, the command that fetches it into the current folder)."""
    if registry == "pypi":
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
        return f"{name.replace('-', '_')}-{version or '*'}-*.whl", [*pip, f"{name}=={version}"]
    if registry == "npm":
        return f"{name.lstrip('@').replace('/', '-')}-{version}.tgz", ["npm", "pack", f"{name}@{version}"]
    return f"{name}_*.deb", ["apt-get", "download", name + (f"={version}" if version else "")]


def _run(command: list[str], folder: Path, what: str) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=TIMEOUT)
    except FileNotFoundError:
        raise UserError(
            f"{what}: there is no {command[0]} here: install it, or put the package's file into --packages"
        ) from None
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        raise UserError(
            f"{what}: `{' '.join(command)}` failed; is the registry within reach (Debian: after `apt-get "
            f"update`)? Else put the package's file into --packages"
        ) from None


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file in a .whl, .tgz or .deb, in its order; content that is compressed with
    gzip once more is unpacked, and its name loses .gz or .dz.

    Raises:
        UserError: it is not such an archive, or is damaged.
    """
    try:
        for name, content in _zipped(path) if path.suffix == ".whl" else _tarred(path):
            if content[:2] == b"\x1f\x8b":
                name, content = name.removesuffix(".gz").removesuffix(".dz"), gzip.decompress(content)
            yield name, content
    except (
        OSError,
        EOFError,
        ValueError,
        zlib.error,
        lzma.LZMAError,
        tarfile.TarError,
        zipfile.BadZipFile,
        zstandard.ZstdError,
    ):
        raise UserError(f"package {path} cannot be read: delete it, it will be fetched again") from None


def _zipped(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as files:
        for info in files.infolist():
            if not info.is_dir() and info.file_size <= MAX_MEMBER:
                yield info.filename, files.read(info)


def _tarred(path: Path) -> Iterator[tuple[str, bytes]]:
    with open(path, "rb") as file:
        inner = _deb_data(file) if path.suffix == ".deb" else file
        with tarfile.open(fileobj=inner, mode="r:*") as files:
            for info in files:
                if info.isfile() and info.size <= MAX_MEMBER and (content := files.extractfile(info)):
                    yield info.name, content.read()


def _deb_data(file: IO[bytes]) -> IO[bytes]:
    """The data.tar of a .deb (deb(5)), as a file that tarfile opens."""
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        raise ValueError("no ar archive")
    while len(header := file.read(AR_HEADER)) == AR_HEADER:
        name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            content = file.read(size)
            if len(content) != size:
                raise EOFError
            if name.endswith(".zst"):
                content = zstandard.ZstdDecompressor().stream_reader(content).read()
            return io.BytesIO(content)
        file.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError("no data.tar")

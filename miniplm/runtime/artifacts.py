"""What an output folder is: its identity, its manifest, and when it is complete.

Every stage writes into an output folder with a `manifest.json`. The manifest holds the stage's *identity*
(all that determines its result), `complete` (false until the last byte is on disk), what came out, and once
it is complete a `checksum` of all that (manifests of before have none). A run into a folder with another
identity is refused; one with the same identity continues; one that is complete is left alone. Manifests carry
no times and no paths of this machine's making, so that two equal runs write equal bytes.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import fingerprint, hash_files, read_json, write_json
from .locks import Occupied, lock
from .progress import note
from .schema import Record, read_record

MANIFEST = "manifest.json"
UNCHECKED_KEYS = ("stage", "complete", "checksum")  # of a manifest
MAX_SHOWN = 80  # characters of a value in a message


class _Manifest(Record):
    """What every manifest holds."""

    stage: str
    complete: bool
    identity: dict[str, Any]
    checksum: str | None = None


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path)
    _check(content, path, _Manifest)
    return content


def _write(path: Path, manifest: dict[str, Any]) -> None:
    if manifest["complete"]:
        manifest = {**manifest, "checksum": manifest_checksum(manifest)}
    write_json(path, manifest)


def _check(content: object, path: Path, schema: type[Record]) -> None:
    read_record(
        schema, content, f"{path} is not a manifest of miniplm", "restore it, or make its folder again"
    )


def is_as_written(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is complete and has the checksum of its content, or has none: it is incomplete, or
    from before there were any."""
    checksum = manifest.get("checksum")
    return checksum is None or bool(manifest.get("complete") and checksum == manifest_checksum(manifest))


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """Of a complete run's identity and results."""
    return fingerprint({key: value for key, value in manifest.items() if key not in UNCHECKED_KEYS})


def damaged_file(folder: Path, files: Mapping[str, str]) -> str | None:
    """In words, the first of these files ({name: hash}) in a folder that is missing or changed; None if all
    are as they were written."""
    for name, content_hash in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if hash_files([folder / name]) != content_hash:
            return f"{name} is not as it was written"
    return None


def open_output(
    folder: str | os.PathLike, stage: str, identity: Mapping[str, Any], wait: float = 0.0
) -> bool:
    """Claim `folder` for a run of `stage`. True when an equal run has completed there; False to start, to
    continue, or to find out again what came of a run whose manifest is damaged.

    Args:
        folder: made if missing. A non-empty folder without a manifest is refused: it is somebody's.
        stage: "prepare", "score", …
        identity: JSON-able; all that determines the result.
        wait: seconds to wait for a process that claims it at the same moment.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file: choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    identity = json.loads(json.dumps(identity))
    path = folder / MANIFEST
    if not path.exists():
        with exclusive(folder, wait):  # runs that begin at the same moment would get into each other's way
            if not path.exists():
                _claim(folder, {"stage": stage, "complete": False, "identity": identity})
                return False
    found = _read(path)
    if found["stage"] != stage:
        raise UserError(
            f"output folder {folder} holds a {found['stage']!r} run, not a {stage!r} run: choose another "
            f"--output"
        )
    if found["identity"] != identity:
        raise UserError(
            f"output folder {folder} holds another {stage} run "
            f"({_difference(found['identity'], identity)}): choose another --output or delete it"
        )
    return found["complete"] and is_as_written(found)


def _claim(folder: Path, manifest: dict[str, Any]) -> None:
    if leftovers := sorted(found.name for found in folder.iterdir() if not found.name.endswith(".tmp")):
        raise UserError(
            f"output folder {folder} is not empty and holds no manifest ({leftovers[0]}, …): choose "
            f"another --output"
        )
    write_json(folder / MANIFEST, manifest)


@contextlib.contextmanager
def exclusive(folder: str | os.PathLike, wait: float = 0.0) -> Iterator[None]:
    """Keep other processes out of an output folder while the block runs; Occupied, a UserError, if one is in
    it for more than `wait` seconds. A kill ends it too: what is left of the lock file counts as nothing (see
    open_output)."""
    refusal = f"another process is writing to {folder}: wait for it, stop it, or choose another --output"
    with lock(Path(folder) / ".lock.tmp", refusal, wait):
        yield


def remove_free_locks(folder: str | os.PathLike) -> None:
    """Remove lock files of parts of an output folder that killed processes have left."""
    for path in Path(folder).glob(".?*.lock*.tmp"):
        with (
            contextlib.suppress(Occupied),
            lock(path.with_name(path.name.replace(".lock.heartbeat.", ".lock.")), ""),
        ):
            pass


def _difference(old: Any, new: Any, prefix: str = "") -> str:
    """The first place where two identities differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if old.get(key) != new.get(key):
                return _difference(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    return f"{prefix} was {_shown(old)}, is now {_shown(new)}"


def _shown(value: Any) -> str:
    try:
        return json.dumps(value)[:MAX_SHOWN]
    except RecursionError:  # a manifest from outside may be as deep as JSON can be read
        return "something else"


def record_output(folder: str | os.PathLike, results: Mapping[str, Any]) -> None:
    """Record results of the run in `folder`, complete or not, in its manifest."""
    path = Path(folder) / MANIFEST
    _write(path, {**_read(path), **results})


def recorded(folder: str | os.PathLike) -> dict[str, Any]:
    """The manifest of the run in `folder`, complete or not; {} where there is none."""
    path = Path(folder) / MANIFEST
    return _read(path) if path.exists() else {}


def complete_output(folder: str | os.PathLike, results: Mapping[str, Any]) -> None:
    """Mark the run in `folder` complete and record its results in the manifest, beside stage and identity."""
    path = Path(folder) / MANIFEST
    begun = {key: value for key, value in _read(path).items() if key not in results}
    _write(path, {**begun, "complete": True, **results})


def reopen_output(folder: str | os.PathLike, results: Mapping[str, Any] | None = None) -> None:
    """Take back that the run in `folder` is complete: a part of it is to be made again. Of its results only
    `results` stay."""
    path = Path(folder) / MANIFEST
    manifest = _read(path)
    if manifest["complete"] or not is_as_written(manifest):
        if not is_as_written(manifest):
            note(f"{path} is not as written: what came of its run is found out again")
        begun = {"stage": manifest["stage"], "complete": False, "identity": manifest["identity"]}
        write_json(path, {**begun, **(results or {})})


def read_manifest(
    folder: str | os.PathLike, *stages: str, what: str = "folder", schema: type[Record] | None = None
) -> dict[str, Any]:
    """The manifest of a complete output.

    Args:
        stages: the stages that may have written it; any if none are given.
        what: the folder, in messages.
        schema: the keys and types that the caller relies on, beside stage, complete and identity.
    Raises:
        UserError: it is missing, incomplete, of none of the stages, not as the schema has it, or not as
            written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{what} {folder} does not exist")
    if not (folder / MANIFEST).exists():
        raise UserError(f"{what} {folder} has no {MANIFEST}: give a folder that miniplm wrote")
    manifest = _read(folder / MANIFEST)
    if stages and manifest["stage"] not in stages:
        raise UserError(
            f"{what} {folder} holds the output of {manifest['stage']!r}; expected that of "
            f"{' or '.join(map(repr, stages))}"
        )
    if not manifest["complete"]:
        raise UserError(
            f"{what} {folder} is not complete: run its {manifest['stage']!r} command again, it continues "
            f"where it stopped"
        )
    if schema is not None:
        _check(manifest, folder / MANIFEST, schema)
    if not is_as_written(manifest):
        raise UserError(
            f"{folder / MANIFEST} is not as written: restore it, or run its {manifest['stage']!r} command "
            f"again, which mends it"
        )
    return manifest

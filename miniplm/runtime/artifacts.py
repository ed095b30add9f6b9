"""What an output folder is: its identity, its manifest, and when it is complete.

Every stage writes into an output folder with a `manifest.json`. The manifest holds the stage's *identity*
(all that determines its result), `complete` (false until the last byte is on disk) and what came out. A run
into a folder with another identity is refused; one with the same identity continues; one that is complete is
left alone. Manifests carry no times and no paths of this machine's making, so that two equal runs write equal
bytes.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError
from .files import lock, read_json, write_json

MANIFEST = "manifest.json"


def open_output(folder, stage: str, identity: dict) -> bool:
    """Claim `folder` for a run of `stage`. True when an equal run has completed there; False to start or to
    continue.

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
            raise UserError(
                f"output folder {folder} is not empty and holds no manifest ({leftovers[0]}, …): choose "
                f"another --output"
            )
        write_json(path, {"stage": stage, "complete": False, "identity": identity})
        return False
    found = read_json(path)
    if found.get("stage") != stage:
        raise UserError(
            f"output folder {folder} holds a {found.get('stage')!r} run, not a {stage!r} run: choose "
            f"another --output"
        )
    if found.get("identity") != identity:
        raise UserError(
            f"output folder {folder} holds another {stage} run "
            f"({_difference(found.get('identity'), identity)}): "
            "choose another --output or delete it"
        )
    return bool(found.get("complete"))


@contextlib.contextmanager
def exclusive(folder: str | os.PathLike) -> Iterator[None]:
    """Keep other processes out of an output folder while the block runs; UserError if one is in it. A kill
    ends it too: what is left of the lock file counts as nothing (see open_output)."""
    refusal = f"another process is writing to {folder}: wait for it, stop it, or choose another --output"
    with lock(Path(folder) / ".lock.tmp", refusal):
        yield


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


def reopen_output(folder) -> None:
    """Take back that the run in `folder` is complete, and its results: a part of it is to be made again."""
    manifest = read_json(Path(folder) / MANIFEST)
    if manifest["complete"]:
        reopened = {"stage": manifest["stage"], "complete": False, "identity": manifest["identity"]}
        write_json(Path(folder) / MANIFEST, reopened)


def read_manifest(folder, *stages: str, what: str = "folder") -> dict:
    """The manifest of a complete output; UserError when missing, incomplete, or of none of `stages` (any if
    none are given)."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{what} {folder} does not exist")
    if not (folder / MANIFEST).exists():
        raise UserError(f"{what} {folder} has no {MANIFEST}: give a folder that miniplm wrote")
    manifest = read_json(folder / MANIFEST)
    if stages and manifest.get("stage") not in stages:
        raise UserError(
            f"{what} {folder} holds the output of {manifest.get('stage')!r}; expected that of "
            f"{' or '.join(map(repr, stages))}"
        )
    if not manifest.get("complete"):
        raise UserError(
            f"{what} {folder} is not complete: run its {manifest.get('stage')!r} command again, it "
            f"continues where it stopped"
        )
    return manifest

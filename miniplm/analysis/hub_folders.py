"""Folders as the Hugging Face Hub has them, each with a manifest that holds a hash of every other file."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from ..runtime.artifacts import MANIFEST, damaged_file, open_output
from ..runtime.errors import UserError, reason
from ..runtime.files import atomic_write, hash_files, read_json, write_json
from ..runtime.text import printable

CARD = "README.md"


def write_manifest(folder: Path, stage: str, identity: Mapping[str, Any]) -> None:
    """Write the manifest of a complete folder, the last file of it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    files = {path.relative_to(folder).as_posix(): hash_files([path]) for path in paths}
    write_json(folder / MANIFEST, {"stage": stage, "complete": True, "identity": identity, "files": files})


def is_complete(
    output: Path,
    stage: str,
    identity: Mapping[str, Any],
    always_there: Collection[str],
    visible_damage: Callable[[Path], str | None] = lambda _: None,
) -> bool:
    """True where an equal run of the stage has completed and its files are as they were written, False where
    there is nothing.

    Args:
        always_there: files that are in every such folder.
        visible_damage: what is missing or cut of a folder from before the manifest held hashes.
    Raises:
        UserError: something else is there, or a file of it is not as it was written.
    """
    if output.is_dir():
        if not any(output.iterdir()):
            return False
        if not (output / MANIFEST).exists():
            raise UserError(
                f"output folder {output} is not empty and holds no {MANIFEST}: choose another --output"
            )
    if not output.exists():
        return False
    if not open_output(output, stage, identity):
        raise UserError(
            f"output folder {output} is not a complete export: delete it or choose another --output"
        )
    manifest = read_json(output / MANIFEST)
    damage = (
        _damage(output, manifest["files"], always_there) if "files" in manifest else visible_damage(output)
    )
    if damage:
        raise UserError(
            f"export {output} was complete, but {damage}: restore that file, or delete {output} to export "
            f"again"
        )
    return True


def _damage(folder: Path, files: object, always_there: Collection[str]) -> str | None:
    """What is lost or changed of these files ({name: hash}), None where all are as they were written."""
    if not isinstance(files, dict) or not files.keys() >= set(always_there):
        return f"the list of files in its {MANIFEST} is not as it was written"
    return damaged_file(folder, files)


def upload(
    repository: str,
    private: bool,
    folder: Path,
    card: Callable[[str], str],
    kind: Literal["model", "dataset"] = "model",
) -> None:
    """Upload the folder; the card, a function of the repository's id, then says how to load it from there."""
    from huggingface_hub import HfApi

    def ask(method: Callable, *args: Any, **settings: Any) -> Any:
        try:
            return method(*args, **settings)
        except Exception as error:  # the HTTP library's too, which is another one from version to version
            raise UserError(
                f"{folder} is complete, but could not be uploaded to {repository} ({reason(error)}): look at "
                f"the name and the network, log in with `hf auth login`, and run the command again"
            ) from error

    api = HfApi()
    of_kind = {} if kind == "model" else {"repo_type": kind}
    found = ask(api.create_repo, repository, private=private, exist_ok=True, **of_kind).repo_id
    with atomic_write(folder / CARD) as temporary:
        temporary.write_text(card(found), encoding="utf-8")
    manifest = read_json(folder / MANIFEST)
    write_manifest(folder, manifest["stage"], manifest["identity"])
    ask(
        api.upload_folder,
        repo_id=found,
        folder_path=folder,
        ignore_patterns=[MANIFEST],
        commit_message=f"Upload {kind}",
        **of_kind,
    )
    place = found if kind == "model" else f"datasets/{found}"
    print(printable(f"uploaded to {api.endpoint}/{place}"))

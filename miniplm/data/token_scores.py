"""Log-probabilities per token on disk: what score --tokens writes beside its score files, and train reads.

Beside each score file stands an Arrow file of the same chunks, `tokens-00000.arrow`, … It has the columns
`index` (int64, the row of the corpus) and, of the models that have scored, `teacher_log_prob` and
`reference_log_prob`: a list of float16 with a value for each position of the chunk, in nats. It is NaN where
nothing is predicted and where the log-probability is not finite; what is below float16's range is its lowest
number, −65504. The manifest holds the hash of each file under `token_files`.
"""

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.artifacts import read_manifest
from ..runtime.errors import UserError
from ..runtime.file_facts import file_facts, signature
from ..runtime.files import atomic_write, fingerprint, hash_files
from ..runtime.schema import Record
from .corpus import ROWS_PER_RECORD_BATCH, Corpus
from .list_rows import ListRows
from .score_folders import check_no_shard_is_missing
from .scores import REMEDY, ROLES, ScoreIdentity

ROLES_OF_RULE: dict[str, tuple[str, ...]] = {
    "difference": ROLES,
    "teacher_loss": ("teacher",),
    "reference_loss": ("reference",),
}


class TokenManifest(Record):
    """What the manifest of a score folder says of log-probabilities per token."""

    identity: ScoreIdentity
    teacher: str | None  # name
    reference: str | None
    token_files: dict[str, str] | None = None  # name → hash


def token_path(folder: str | PathLike[str], number: int) -> Path:
    """The file of log-probabilities per token number 0, 1, … of a folder."""
    return Path(folder) / f"tokens-{number:05d}.arrow"


def write_tokens(
    folder: str | PathLike[str],
    number: int,
    rows: np.ndarray,
    positions: np.ndarray,
    values: dict[str, np.ndarray],
) -> str:
    """Write the log-probabilities per token of the chunks `rows` (int64) atomically and return the hash of
    the file.

    Args:
        positions: int [len(rows)], how many each chunk has.
        values: by role, float16 [the sum of positions], as they are to be stored.
    """
    import pyarrow as pa

    schema = pa.schema(
        {"index": pa.int64(), **{f"{role}_log_prob": pa.list_(pa.float16()) for role in values}}
    )
    path, bounds = token_path(folder, number), np.concatenate([[0], np.cumsum(positions)])
    with (
        atomic_write(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for start in range(0, len(rows), ROWS_PER_RECORD_BATCH):
            some = bounds[start : start + ROWS_PER_RECORD_BATCH + 1]
            index = rows[start : start + len(some) - 1]
            offsets = pa.array((some - some[0]).astype(np.int32))
            lists = [
                pa.ListArray.from_arrays(offsets, pa.array(each[some[0] : some[-1]], pa.float16()))
                for each in values.values()
            ]
            writer.write_batch(pa.record_batch([pa.array(index), *lists], schema=schema))
    return hash_files([path])


def whole_token_hash(folder: str | PathLike[str], number: int, files: object) -> str | None:
    """The hash of a file of log-probabilities per token; None if it is missing or not as `files` ({name:
    hash}, from a manifest) says."""
    path = token_path(folder, number)
    if not path.is_file() or not isinstance(files, dict):
        return None
    digest = hash_files([path])
    return digest if files.get(path.name) == digest else None


class TokenScores:
    """What the tokens of a corpus are compared by, from a score folder whose files have been compared with
    its manifest; they are memory-mapped.

    `identity`: {"rule", "scores": that of the run that has scored, "content": a fingerprint of the files};
    `models`: the names of the models that the rule compares by, by role.

    Args:
        rule: "difference": log p_teacher − log p_reference (what Rho-1, arXiv 2404.07965, calls the excess
            loss, with the reference model in the place of the model in training, and the teacher in that of
            its reference). "teacher_loss", "reference_loss": −log p of one model (the loss of ESLM, arXiv
            2505.19893, by a stored model instead of the one in training).
    Raises:
        UserError: the folder holds no such scores of this corpus, or a file is damaged.
    """

    def __init__(self, folder: str | PathLike[str], corpus: Corpus, rule: str):
        check_no_shard_is_missing(folder, corpus)
        manifest = read_manifest(folder, "score", what="score folder", schema=TokenManifest)
        scored = manifest["identity"]
        again = f"miniplm score --tokens --data {corpus.folder}, into a new folder"
        if not (files := manifest.get("token_files")):
            raise UserError(f"score folder {folder} holds no log-probabilities per token: run {again}")
        if scored["corpus"] != corpus.fingerprint:
            raise UserError(
                f"score folder {folder} holds the tokens of another corpus than {corpus.folder}, which is to "
                f"be trained on: run {again}"
            )
        for role in ROLES_OF_RULE[rule]:
            if scored[role] is None:
                raise UserError(
                    f"score folder {folder} holds no log-probabilities of a {role}, which tokens.rule {rule} "
                    f"needs: score with --{role} too, or choose another rule"
                )
        paths = [token_path(folder, number) for number in range(len(files))]
        if [path.name for path in paths] != list(files):
            raise UserError(f"the manifest of score folder {folder} does not list its files: {REMEDY}")
        _verify(paths, files)
        self.rule, columns = rule, _mapped(paths)
        self.models = {role: manifest[role] for role in ROLES_OF_RULE[rule]}
        self.identity = {"rule": rule, "scores": scored, "content": fingerprint(files)}
        self._rows = {role: ListRows(columns.column(f"{role}_log_prob")) for role in ROLES_OF_RULE[rule]}
        index = columns.column("index").to_numpy()
        if not np.array_equal(index, np.arange(len(corpus))):
            raise UserError(
                f"score folder {folder} does not hold every chunk of {corpus.folder}: run {again}"
            )

    def of(self, chunks: np.ndarray) -> np.ndarray:
        """What the positions of these chunks are compared by, one chunk after the other: float32, the larger
        the better, NaN where there is nothing to compare."""
        values = [
            np.concatenate([np.zeros(0, np.float16), *rows(chunks)]).astype(np.float32)
            for rows in self._rows.values()
        ]
        return values[0] - values[1] if self.rule == "difference" else -values[0]


def _verify(paths: list[Path], files: dict[str, str]) -> None:
    """UserError unless each file is as its hash says; hashes are remembered until a file changes."""
    with file_facts() as memory:
        for path in paths:
            if not path.is_file():
                raise UserError(f"{path} is missing: {REMEDY}")
            if memory.get(path).get("hash") != files[path.name]:
                found, digest = signature(path), hash_files([path])
                if digest != files[path.name]:
                    raise UserError(f"{path} is not as written: {REMEDY}")
                memory.put(path, found, {"hash": digest})


def _mapped(paths: list[Path]) -> Any:
    import pyarrow as pa

    return pa.concat_tables([pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in paths])

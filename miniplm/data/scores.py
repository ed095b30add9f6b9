"""Score folders on disk: what score writes and select reads.

A score folder holds parquet files `scores-00000.parquet`, … with the columns `index` (int64, the row of the
corpus), `num_tokens` (int32, the positions that were scored) and, of `teacher_log_prob`, `reference_log_prob`
(means over those, nats) and `score` (their difference), those that were computed (float32, null where not
finite); beside them `manifest.json`, which holds the hash of each file under `files` (folders from before
there were hashes have page checksums alone). Until the folder is complete, the hash of each file that is done
is in a file of its own, `.scores-00000.json.tmp`: so processes that share the work write nothing in common.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ..runtime.errors import UserError, reason
from ..runtime.files import atomic_write, hash_files, read_json, write_json
from ..runtime.locks import PATIENCE, lock
from ..runtime.schema import Count, Record, Seed

ROLES = ("teacher", "reference")
SCORE_COLUMNS = ("teacher_log_prob", "reference_log_prob", "score")
WRITERS = ("score", "proxy score")  # the stages that write a score folder
REMEDY = "run score again, it writes what is damaged or missing anew"


class ScoreIdentity(Record):
    """What determines scores, as far as others compare it."""

    corpus: str  # fingerprint
    teacher: str | None  # hash of its weights, where it has scored
    reference: str | None
    dtype: str
    document_mask: bool
    sample: Annotated[float, Field(gt=0, lt=1)] | None = None  # the share of each domain's chunks
    seed: Seed = 0  # of the sample
    proxy: str | None = None  # hash of the proxy that predicted them


class ScoreManifest(Record):
    """What a score folder says of itself."""

    identity: ScoreIdentity
    teacher: str | None  # name
    reference: str | None
    vocab_size: Count  # the ids that the softmax covered
    predicted: dict[str, Any] | None = None  # by what kind of proxy, and how well that agrees
    files: dict[str, str] | None = None  # name → hash


def columns_of(roles: Iterable[str]) -> list[str]:
    """The score columns of a folder with these of the ROLES; the last is the one that says most."""
    present = [f"{role}_log_prob" for role in ROLES if role in roles]
    return [*present, "score"] if len(present) == len(ROLES) else present


def shard_path(folder: str | PathLike[str], number: int) -> Path:
    """The score file number 0, 1, … of a folder."""
    return Path(folder) / f"scores-{number:05d}.parquet"


def _schema(columns: Iterable[str]) -> Any:
    import pyarrow as pa

    return pa.schema(
        {"index": pa.int64(), "num_tokens": pa.int32(), **{name: pa.float32() for name in columns}}
    )


# ---- writing ----


def write_shard(
    folder: str | PathLike[str],
    number: int,
    rows: np.ndarray,
    columns: list[str],
    values: dict[str, np.ndarray],
) -> str:
    """Write the scores of the chunks `rows` (int64, ascending) atomically and return the hash of the file.

    Args:
        values: "num_tokens" and each of the columns, [len(rows)]; null is written where one is not finite.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = [pa.array(rows), pa.array(values["num_tokens"].astype(np.int32))]
    arrays += [pa.array(values[name].astype(np.float32), mask=~np.isfinite(values[name])) for name in columns]
    path = shard_path(folder, number)
    with atomic_write(path) as temporary:
        pq.write_table(pa.table(arrays, schema=_schema(columns)), temporary, write_page_checksum=True)
    return hash_files([path])


def whole_hash(
    folder: str | PathLike[str],
    number: int,
    rows: np.ndarray,
    columns: list[str],
    files: Mapping[str, str] | None,
) -> str | None:
    """The hash of a score file of exactly these rows and columns; None if it is missing or damaged.

    Args:
        files: the hashes by name that the folder's manifest holds; None of a folder from before there were
            any, whose files are judged by their page checksums.
    """
    path = shard_path(folder, number)
    if not path.is_file():
        return None
    digest = hash_files([path])
    if files is not None:
        return digest if files.get(path.name) == digest else None
    try:
        table = _read_shard(path)
        index = table["index"].to_numpy()
    except Exception:  # Arrow raises many kinds
        return None
    whole = table.schema.equals(_schema(columns)) and np.array_equal(index, rows)
    return digest if whole else None


def _hashes_path(folder: str | PathLike[str], number: int) -> Path:
    return Path(folder) / f".scores-{number:05d}.json.tmp"


@contextlib.contextmanager
def writing_shard(folder: str | PathLike[str], number: int) -> Iterator[dict[str, str]]:
    """Yield a dict for {name: hash} of the files of a shard, which the block writes, one process at a time;
    it is recorded when the block ends."""
    refusal = f"another process has been writing score file {number} of {folder} for minutes: stop it"
    with lock(Path(folder) / f".scores-{number:05d}.lock.tmp", refusal, PATIENCE):
        hashes: dict[str, str] = {}
        yield hashes
        write_json(_hashes_path(folder, number), hashes)


def known_hashes(
    folder: str | PathLike[str], manifest: Mapping[str, Any], number: int
) -> tuple[dict[str, str] | None, dict[str, str] | None]:
    """The hashes by name of the files of a shard that is done, and of others: of score files (None in a
    complete folder from before there were any), and of those of tokens."""
    own: Any = {}
    with contextlib.suppress(UserError, OSError):
        own = read_json(_hashes_path(folder, number))
    files, token_files = (manifest.get(key) for key in ("files", "token_files"))
    if files is None and manifest.get("complete"):
        return None, token_files
    both = [{**known, **own} if isinstance(known, dict) else own for known in (files, token_files)]
    return both[0], both[1]


def unfinished_shards(folder: str | PathLike[str], manifest: Mapping[str, Any], shards: int) -> list[Path]:
    """Of so many score files those that nobody has finished; what is in the others is not looked at."""
    missing = []
    for number in range(shards):
        path, (known, _) = shard_path(folder, number), known_hashes(folder, manifest, number)
        if not path.exists() or (known is not None and path.name not in known):
            missing.append(path)
    return missing


def remove_shard_hashes(folder: str | PathLike[str]) -> None:
    """Remove the files of hashes: the manifest holds them now."""
    for path in Path(folder).glob(".scores-*.json.tmp"):
        path.unlink(missing_ok=True)


def score_figures(folder: str | PathLike[str], shards: int, column: str) -> dict[str, Any]:
    """Of the first `shards` files: rows, scored tokens, and of `column` the number not finite, the mean and
    the share below 0 (None where nothing is finite)."""
    rows = tokens = finite = below = 0
    total = 0.0
    for number in range(shards):
        table = _read_shard(shard_path(folder, number))
        values = table[column].drop_null().to_numpy()
        rows += table.num_rows
        tokens += int(table["num_tokens"].to_numpy().sum(dtype=np.int64))
        finite += len(values)
        below += int((values < 0).sum())
        total += float(values.sum(dtype=np.float64))
    return {
        "rows": rows,
        "tokens": tokens,
        "non_finite": rows - finite,
        "mean": total / finite if finite else None,
        "below_zero": below / finite if finite else None,
    }


# ---- reading ----


def read_scores(
    folder: str | PathLike[str],
    rows: int,
    names: Sequence[str],
    files: Mapping[str, str] | None = None,
    sample: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The score columns `names` (float32 [rows], NaN where null) and num_tokens (int32 [rows]) of a score
    folder, by row of the corpus.

    The files may hold the rows in any order.

    Args:
        files: the hashes by name that the folder's manifest holds, if it does.
        sample: int64, the rows that were scored, where not all of them were; the others are NaN, and 0.
    Raises:
        UserError: not every row of a corpus of `rows`, or of the sample, is there exactly once; a file is
            damaged.
    """
    import pyarrow.compute as pc

    result = {
        "num_tokens": np.zeros(rows, np.int32),
        **{name: np.full(rows, np.nan, np.float32) for name in names},
    }
    seen, entries = np.zeros(rows, bool), 0
    for path in _intact_files(Path(folder), files):
        table = _read_columns(path, names)
        index = pc.fill_null(table["index"], -1).to_numpy()
        if len(index) and (index.min() < 0 or index.max() >= rows):
            raise UserError(
                f"{path} holds scores of chunks that the corpus of {rows} chunks does not have: score the "
                f"corpus again into a new folder"
            )
        seen[index] = True
        entries += len(index)
        result["num_tokens"][index] = pc.fill_null(table["num_tokens"], 0).to_numpy()
        for name in names:
            result[name][index] = table[name].to_numpy()
    wanted = np.ones(rows, bool)
    if sample is not None:
        wanted[:] = False
        wanted[sample] = True
    if entries != wanted.sum() or (seen != wanted).any():
        what = "corpus" if sample is None else "sample"
        raise UserError(
            f"score folder {folder} has {entries} entries for the {wanted.sum()} chunks of the {what} and "
            f"none for {(wanted & ~seen).sum()} of them: {REMEDY}"
        )
    return result


def _intact_files(folder: Path, files: Mapping[str, str] | None) -> list[Path]:
    """The score files; UserError where one is not as its hash says."""
    if files is None:
        return sorted(folder.glob("scores-*.parquet"))
    paths = [shard_path(folder, number) for number in range(len(files))]
    if [path.name for path in paths] != list(files):
        raise UserError(f"the manifest of score folder {folder} does not list its files: {REMEDY}")
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing: {REMEDY}")
        if hash_files([path]) != files[path.name]:
            raise UserError(f"{path} is not as written: {REMEDY}")
    return paths


def _read_columns(path: Path, names: Sequence[str]) -> Any:
    schema = _schema(names)
    try:
        table = _read_shard(path, schema.names).select(schema.names).cast(schema)
        table.validate(full=True)
        return table
    except Exception as error:  # Arrow raises many kinds
        raise UserError(f"{path} cannot be read ({reason(error)}): {REMEDY}") from error


def _read_shard(path: Path, columns: list[str] | None = None) -> Any:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read(columns)

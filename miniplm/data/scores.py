"""Score folders on disk: what score writes and select reads.

A score folder holds parquet files `scores-00000.parquet`, … with the columns `index` (int64, the row of the
corpus), `num_tokens` (int32, the positions that were scored) and, of `teacher_log_prob`, `reference_log_prob`
(means over those, nats) and `score` (their difference), those that were computed (float32, null where not
finite); beside them `manifest.json`.
"""

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import UserError
from ..runtime.files import atomic_write
from ..runtime.schema import Count, Record

ROLES = ("teacher", "reference")
SCORE_COLUMNS = ("teacher_log_prob", "reference_log_prob", "score")


class ScoreIdentity(Record):
    """What determines scores, as far as select compares it."""

    corpus: str  # fingerprint
    teacher: str | None  # hash of its weights, where it has scored
    reference: str | None
    dtype: str
    document_mask: bool


class ScoreManifest(Record):
    """What a score folder says of itself."""

    identity: ScoreIdentity
    teacher: str | None  # name
    reference: str | None
    vocab_size: Count  # the ids that the softmax covered


def columns_of(roles: Any) -> list[str]:
    """The score columns of a folder with these of the ROLES; the last is the one that says most."""
    return [f"{role}_log_prob" for role in ROLES if role in roles] + ["score"] * (len(roles) == 2)


def shard_path(folder: str | PathLike[str], number: int) -> Path:
    """The score file number 0, 1, … of a folder."""
    return Path(folder) / f"scores-{number:05d}.parquet"


def _schema(columns: Any) -> Any:
    import pyarrow as pa

    return pa.schema(
        {"index": pa.int64(), "num_tokens": pa.int32(), **{name: pa.float32() for name in columns}}
    )


def write_shard(
    folder: str | PathLike[str], number: int, rows: range, columns: list[str], values: dict[str, np.ndarray]
) -> None:
    """Write the scores of `rows` of the corpus atomically.

    Args:
        values: "num_tokens" and each of the columns, [len(rows)]; null is written where one is not finite.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = [pa.array(np.arange(rows.start, rows.stop)), pa.array(values["num_tokens"].astype(np.int32))]
    arrays += [pa.array(values[name].astype(np.float32), mask=~np.isfinite(values[name])) for name in columns]
    with atomic_write(shard_path(folder, number)) as temporary:
        pq.write_table(pa.table(arrays, schema=_schema(columns)), temporary, write_page_checksum=True)


def is_whole(folder: str | PathLike[str], number: int, rows: range, columns: list[str]) -> bool:
    """Is this score file there, undamaged (by its checksums), and of exactly these rows and columns?"""
    import pyarrow as pa

    try:
        table = _read_shard(shard_path(folder, number))
    except (OSError, pa.ArrowException):
        return False
    return table.schema.equals(_schema(columns)) and np.array_equal(
        table["index"].to_numpy(), np.arange(rows.start, rows.stop)
    )


def _read_shard(path: Path) -> Any:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read()


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


def read_scores(folder: str | PathLike[str], rows: int, names: Any) -> dict[str, np.ndarray]:
    """The score columns `names` (float32 [rows], NaN where null) and num_tokens (int32 [rows]) of a score
    folder, by row of the corpus.

    The files may hold the rows in any order.

    Raises:
        UserError: not every row of a corpus of `rows` is there exactly once; a file cannot be read.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    schema = _schema(names)
    result = {
        "num_tokens": np.zeros(rows, np.int32),
        **{name: np.full(rows, np.nan, np.float32) for name in names},
    }
    seen, entries = np.zeros(rows, bool), 0
    for path in sorted(Path(folder).glob("scores-*.parquet")):
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                table = file.read(schema.names).select(schema.names).cast(schema)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise UserError(
                f"{path} cannot be read ({str(error).splitlines()[0]}): run score again, it writes damaged "
                f"files anew"
            ) from error
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
    if entries != rows or not seen.all():
        raise UserError(
            f"score folder {folder} has {entries} entries for the {rows} chunks of the corpus and none for "
            f"{rows - seen.sum()} of them: "
            "run score again, it writes missing files anew"
        )
    return result

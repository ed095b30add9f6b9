"""A corpus as Parquet files with the text of each chunk: what the Hugging Face Hub shows."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .corpus import Corpus

FILE_BYTES = 256 * 2**20  # of a file's columns in memory; it is smaller on disk

Decode = Callable[[list[list[int]]], list[str]]


def write_parquet(corpus: Corpus, decode: Decode, folder: Path, advance: Callable[[int], None]) -> None:
    """Write train-00000-of-00002.parquet, … into a new folder: `text`, then the columns of the corpus.

    Args:
        decode: the texts of chunks of ids.
        advance: told how many chunks more are written.
    """
    import pyarrow.parquet as pq

    folder.mkdir()
    paths: list[Path] = []
    writer, size = None, 0
    for table in _tables(corpus, decode):
        if writer is None:
            paths.append(folder / f"{len(paths)}.parquet")
            writer, size = pq.ParquetWriter(paths[-1], table.schema), 0
        writer.write_table(table)  # a row group: some megabytes, which a viewer reads alone
        size += table.nbytes
        advance(table.num_rows)
        if size >= FILE_BYTES:
            writer.close()
            writer = None
    if writer:
        writer.close()
    for number, path in enumerate(paths):
        path.rename(folder / f"train-{number:05d}-of-{len(paths):05d}.parquet")


def _tables(corpus: Corpus, decode: Decode) -> Iterator[Any]:
    """Arrow tables of about a thousand chunks with their text."""
    import pyarrow as pa

    for batch in corpus.table.to_batches():
        columns = {"text": pa.array(decode(batch.column("input_ids").to_pylist()), pa.string())}
        columns |= {name: batch.column(name) for name in batch.schema.names}
        yield pa.table(columns)

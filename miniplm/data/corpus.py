"""Corpus folders on disk: what prepare, select, retokenize and synthesize write, and all others read.

A corpus is a folder that `datasets.load_from_disk` opens: Arrow files `data-00000.arrow`, … with the columns
`input_ids` (int32 list), `domain` (string), `num_tokens` (int32, the length of input_ids) and, once selected,
`teacher_log_prob`, `reference_log_prob`, `score` (float32); beside them `manifest.json` and the tokenizer in
`tokenizer/`. A row is a chunk.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.artifacts import damaged_file, read_manifest
from ..runtime.errors import UserError
from ..runtime.file_facts import file_facts, signature
from ..runtime.files import atomic_write, fingerprint, hash_files, read_json, write_json
from ..runtime.schema import Count, Record
from .chunking import Chunk
from .list_rows import ListRows
from .scores import SCORE_COLUMNS
from .verify import (
    COLUMNS,
    Damaged,
    ShardFacts,
    hash_of,
    tokenizer_hashes,
    verify_ids,
    verify_shards,
    verify_tokenizer,
)

TOKENIZER = "tokenizer"  # the folder in a corpus
STATE, INFO = "state.json", "dataset_info.json"  # what `datasets` reads first
WRITERS = ("prepare", "select", "retokenize", "synthesize")  # the stages that write a corpus
ROWS_PER_RECORD_BATCH = 1_000  # as datasets writes them


class CorpusManifest(Record):
    """What a corpus says of itself: prepare's counts, or select's, and what they were made with."""

    fingerprint: str  # of the content
    rows: Count  # chunks
    tokens: Count
    predictions: Count  # positions whose input is no end of text
    domains: dict[str, Any]  # name → counts
    bad_records: Count
    eos_token_id: Count
    vocab_size: Count  # the tokenizer's length
    tokenizer_fingerprint: str
    max_length: Count  # predictions per chunk
    source: str
    files: dict[str, str] | None = None  # name → hash, of all but the manifest; corpora of before have none


class Corpus:
    """A complete corpus folder, memory-mapped, once its files have been compared with its manifest.

    `len(corpus)` chunks; `eos_token_id`; `fingerprint` of the content; `manifest`; `tokenizer` (its folder);
    `highest_id` of the chunks; `table`, all of it in Arrow.

    Raises:
        UserError: there is no complete corpus.
        Damaged: it is not what was written.
    """

    def __init__(self, folder: str | PathLike[str]):
        self.folder = Path(folder)
        self.manifest = read_manifest(folder, *WRITERS, what="corpus", schema=CorpusManifest)
        self.tokenizer = str(self.folder / TOKENIZER)
        self.eos_token_id: int = self.manifest["eos_token_id"]
        self.fingerprint: str = self.manifest["fingerprint"]
        try:
            self._paths = [self.folder / name for name in _listed_shards(self.folder)]
            facts = _verify(self.folder, self._paths, self.manifest)
        except Damaged as error:
            raise Damaged(
                f"corpus {folder} is damaged: {error}: restore it, or run its {self.manifest['stage']} "
                f"command again, which mends it",
                error.reason,
            ) from None
        self.highest_id = max(found.highest for found in facts)
        self.table = _mapped(self._paths)
        self._rows = ListRows(self.table.column("input_ids"))

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def has_scores(self) -> bool:
        """Is it a refined corpus?"""
        return "score" in self.table.column_names

    @property
    def is_cut(self) -> bool:
        """Whether each chunk stands for itself: others were dropped between them, or their ends rewritten."""
        return self.has_scores or "synthesis" in self.manifest

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """int64 [chunks], the ids in each."""
        return self.table.column("num_tokens").to_numpy().astype(np.int64)

    @cached_property
    def domains(self) -> tuple[np.ndarray, list[str]]:
        """(codes int32 [chunks], names): chunk i is of domain names[codes[i]]."""
        import pyarrow as pa

        encoded = self.table.column("domain").dictionary_encode().unify_dictionaries()
        names = encoded.chunk(0).dictionary.to_pylist() if encoded.num_chunks else []
        codes = [chunk.indices for chunk in encoded.chunks]
        return (pa.concat_arrays(codes).to_numpy() if codes else np.zeros(0, np.int32)), names

    def rows(self, indices: Any) -> list[np.ndarray]:
        """The chunks at `indices` (any order, repeats allowed), each int32 [num_tokens], views of the mapped
        files."""
        return self._rows(indices)

    def filtered(self, keep: np.ndarray, table_bytes: int) -> Iterator[Any]:
        """The chunks where keep (bool [chunks]) holds, in order, as Arrow tables of about table_bytes.

        They have the columns COLUMNS.

        The files are read, not mapped: mapped pages would count as memory of this process until the system
        takes them back.
        """
        import pyarrow as pa

        pieces: list[Any] = []
        size, start = 0, 0
        for batch in self._batches():
            mask = keep[start : start + batch.num_rows]
            start += batch.num_rows
            if not mask.any():
                continue
            pieces.append(batch.select(list(COLUMNS)).filter(pa.array(mask)))
            size += pieces[-1].nbytes
            if size >= table_bytes:
                yield pa.Table.from_batches(pieces).combine_chunks()
                pieces, size = [], 0
        if pieces:
            yield pa.Table.from_batches(pieces).combine_chunks()

    def taken(self, indices: np.ndarray) -> Any:
        """The chunks at `indices` (int64, at least one), in that order, as an Arrow table of COLUMNS. They
        are read where they lie: of a corpus larger than memory slowly."""
        import pyarrow as pa

        codes, names = self.domains
        parts = np.split(indices, range(ROWS_PER_RECORD_BATCH, len(indices), ROWS_PER_RECORD_BATCH))
        ids = [_list_array(self.rows(part)) for part in parts]
        domains = [pa.DictionaryArray.from_arrays(codes[part], names).cast(pa.string()) for part in parts]
        lengths = pa.array(self.num_tokens[indices], pa.int32())
        return pa.table([pa.chunked_array(ids), pa.chunked_array(domains), lengths], names=list(COLUMNS))

    def _batches(self) -> Iterator[Any]:
        import pyarrow as pa

        for path in self._paths:
            with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
                yield from reader


def _listed_shards(folder: Path) -> list[str]:
    """The names of the Arrow files, from state.json, which write_dataset_files wrote."""
    try:
        files = read_json(folder / STATE)["_data_files"]
        names = [file["filename"] for file in files]
    except (UserError, TypeError, KeyError):
        names = []
    if not names or names != [shard_name(number) for number in range(len(names))]:
        raise Damaged(f"{STATE} is missing or not as written")
    try:
        columns = list(read_json(folder / INFO)["features"])
    except (UserError, TypeError, KeyError):
        columns = []
    if tuple(columns) not in (COLUMNS, COLUMNS + SCORE_COLUMNS):
        raise Damaged(f"{INFO} is missing or not as written")
    return names


def _verify(folder: Path, paths: list[Path], manifest: dict[str, Any]) -> list[ShardFacts]:
    """The facts of the Arrow files; Damaged unless they and the tokenizer are what the manifest says."""
    files = manifest.get("files") or {}
    with file_facts() as memory:
        facts = verify_shards(paths, manifest["fingerprint"], memory, files)
        tokenizer = verify_tokenizer(folder / TOKENIZER, manifest, memory)
    others = {name: digest for name, digest in files.items() if not name.endswith(".arrow")}
    if damage := damaged_file(folder, others):
        raise Damaged(damage)
    verify_ids(paths, facts, tokenizer.ids)
    counts = {
        "rows": sum(found.chunks for found in facts),
        "tokens": sum(found.tokens for found in facts),
        "vocab_size": tokenizer.tokens,
    }
    for key, count in counts.items():
        if count != manifest[key]:
            what = {"rows": "chunks", "vocab_size": "tokens of the tokenizer"}.get(key, key)
            raise Damaged(f"its files hold {count:,} {what}, its manifest says {manifest[key]:,}")
    return facts


def _mapped(paths: list[Path]) -> Any:
    import pyarrow as pa

    return pa.concat_tables([pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in paths])


def changed_shard(folder: str | PathLike[str], hashes: list[str]) -> str | None:
    """The name of the first of the Arrow files 0, 1, … that is missing or has another hash; None if all are
    as they were written."""
    with file_facts() as memory:
        for number, digest in enumerate(hashes):
            path = Path(folder) / shard_name(number)
            if not path.is_file() or hash_of(path, memory) != digest:
                return path.name
    return None


# ---- writing ----


def write_chunks(
    folder: str | PathLike[str], number: int, chunks: list[Chunk], scores: dict[str, Any] | None = None
) -> str:
    """Write one Arrow file of a corpus from chunks (domain, ids) and, for a refined one, their score columns
    atomically and return the hash of its bytes."""
    import pyarrow as pa

    ids, domains = [], []
    for start in range(0, len(chunks), ROWS_PER_RECORD_BATCH):
        part = chunks[start : start + ROWS_PER_RECORD_BATCH]
        ids.append(_list_array([chunk for _, chunk in part]))
        domains.append(pa.array([domain for domain, _ in part], pa.string()))
    lengths = pa.array([len(chunk) for _, chunk in chunks], pa.int32())
    columns = {"input_ids": pa.chunked_array(ids), "domain": pa.chunked_array(domains), "num_tokens": lengths}
    return write_shard(folder, number, columns | (scores or {}))


def _list_array(chunks: Sequence[np.ndarray]) -> Any:
    """The chunks (at least one) as a list array of Arrow."""
    import pyarrow as pa

    offsets = np.cumsum([0, *(len(chunk) for chunk in chunks)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(chunks))


def _features(with_scores: bool) -> Any:
    from datasets import Features, List, Value

    columns = {"input_ids": List(Value("int32")), "domain": Value("string"), "num_tokens": Value("int32")}
    if with_scores:
        columns |= {name: Value("float32") for name in SCORE_COLUMNS}
    return Features(columns)


def shard_name(number: int) -> str:
    return f"data-{number:05d}.arrow"


def shard_paths(folder: str | PathLike[str]) -> Iterable[Path]:
    """The Arrow files in a folder, of a complete corpus or not."""
    return Path(folder).glob("data-*.arrow")


def write_shard(folder: str | PathLike[str], number: int, columns: dict[str, Any]) -> str:
    """Write one Arrow file of a corpus atomically and return the hash of its bytes.

    Args:
        columns: the columns by name, in any order, as Arrow arrays; the score columns all or none.
    """
    import pyarrow as pa

    schema = _features("score" in columns).arrow_schema
    table = pa.table([columns[name] for name in schema.names], schema=schema)
    path = Path(folder) / shard_name(number)
    with (
        atomic_write(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        writer.write_table(table, max_chunksize=ROWS_PER_RECORD_BATCH)
    return _remember(path, table)


def _remember(path: Path, table: Any) -> str:
    """The hash of the file that holds this table; what is in it is remembered, so that it is not read for
    that again."""
    import pyarrow.compute as pc

    ids = [pc.min_max(chunk.flatten()).as_py() for chunk in table["input_ids"].chunks]
    ids = [bounds for bounds in ids if bounds["min"] is not None]
    found = signature(path)
    facts = ShardFacts(
        hash=hash_files([path]),
        chunks=table.num_rows,
        tokens=pc.sum(table["num_tokens"]).as_py() or 0,
        lowest=min((bounds["min"] for bounds in ids), default=0),
        highest=max((bounds["max"] for bounds in ids), default=-1),
        fault=None,
    )
    with file_facts() as memory:
        memory.put(path, found, facts.model_dump())
    return facts.hash


def file_hashes(folder: str | PathLike[str], hashes: list[str]) -> dict[str, str]:
    """The hashes of all files of a corpus but its manifest, for that.

    Args:
        hashes: what write_shard returned, for the files 0, 1, …
    """
    shards = {shard_name(number): digest for number, digest in enumerate(hashes)}
    others = {name: hash_files([Path(folder) / name]) for name in (STATE, INFO)}
    return shards | others | tokenizer_hashes(Path(folder) / TOKENIZER)


def write_dataset_files(folder: str | PathLike[str], hashes: list[str], with_scores: bool) -> str:
    """Write dataset_info.json and state.json, which make the folder one that `datasets.load_from_disk`
    opens, and return the fingerprint of the corpus' content.

    Args:
        hashes: what write_shard returned, for the files 0, 1, …
    """
    content = fingerprint(hashes)
    info = {
        "citation": "",
        "description": "",
        "features": _features(with_scores).to_dict(),
        "homepage": "",
        "license": "",
    }
    write_json(Path(folder) / INFO, info)
    write_json(
        Path(folder) / STATE,
        {
            "_data_files": [{"filename": shard_name(number)} for number in range(len(hashes))],
            "_fingerprint": content,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        },
    )
    return content

"""Is a corpus what its manifest says? Its Arrow files, the ids in them, its tokenizer.

The fingerprint in the manifest is over the hashes of the Arrow files, in order. Each file is hashed and
looked through once; what came of it is remembered until the file changes (runtime/file_facts.py).
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from ..runtime.artifacts import damaged_file, record_output, recorded
from ..runtime.errors import UserError, reason
from ..runtime.file_facts import FileFacts, file_facts, signature
from ..runtime.files import atomic_folder, fingerprint, hash_files, read_json
from ..runtime.progress import Progress, note
from ..runtime.schema import Count, Record
from ..runtime.workers import cores
from .scores import SCORE_COLUMNS
from .tokenizer import (
    content_fingerprint,
    read_vocabulary,
    save_tokenizer,
    tokenizer_fingerprint,
    vocabulary_fingerprint,
)

COLUMNS = ("input_ids", "domain", "num_tokens")  # of a corpus; a refined one has SCORE_COLUMNS too
MAX_HASHING_THREADS = 4  # disks are not faster for more
SILENT_BYTES = 1 << 31  # so many are read without a progress bar
MAX_FILES_NAMED = 3


class Damaged(UserError):
    """A corpus, or a file of it, is not what was written. `reason`: what is damaged, in words that follow
    "but"."""

    def __init__(self, text: str, reason: str | None = None):
        super().__init__(text)
        self.reason = reason or text


class ShardFacts(Record):
    """What is in an Arrow file of a corpus.

    hash: of its bytes; chunks, tokens: how many; lowest, highest: of the ids (0 and −1 without any); fault:
    what is wrong with its content, None if nothing is.
    """

    hash: str
    chunks: Count
    tokens: Count
    lowest: int
    highest: int
    fault: str | None


class TokenizerFacts(Record):
    """What is in a tokenizer.json.

    eos, eos_token: the id of EOS, and its token; content, vocabulary: fingerprints of all of it and of its
    vocabulary, both with that id; tokens: how many there are; ids: one more than the highest.
    """

    eos: int
    eos_token: str | None
    content: str
    vocabulary: str
    tokens: Count
    ids: Count


AnyFacts = TypeVar("AnyFacts", ShardFacts, TokenizerFacts)


def _recall(memory: FileFacts, path: Path, schema: type[AnyFacts], latest: bool = False) -> AnyFacts | None:
    """The facts of a file as it is, or as it last was; None where they are not known."""
    try:
        return schema.model_validate(memory.latest(path) if latest else memory.get(path))
    except ValidationError:
        return None


# ---- Arrow files ----


def verify_shards(
    paths: Sequence[Path], expected: str, memory: FileFacts, written: Mapping[str, str] = MappingProxyType({})
) -> list[ShardFacts]:
    """The facts of the Arrow files of a corpus, in order.

    Args:
        expected: the fingerprint of their hashes.
        written: these hashes by name, where the manifest has them.
    Raises:
        Damaged: files are missing, are not as they were written, or do not hold chunks.
    """
    if missing := [path.name for path in paths if not path.is_file()]:
        raise Damaged(f"{_listed(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    known = [_recall(memory, path, ShardFacts) for path in paths]
    before = [signature(path) for path in paths]
    hashes = _hashes(paths, known)
    if fingerprint(hashes) != expected and any(known):
        known = [None] * len(paths)
        hashes = _hashes(paths, known)
    if fingerprint(hashes) != expected:
        raise Damaged(_who_is_damaged(paths, hashes, written, memory))
    result = []
    for path, digest, facts, found in zip(paths, hashes, known, before, strict=True):
        if facts is None:
            facts = read_shard(path, digest)
            if signature(path) == found:
                memory.put(path, found, facts.model_dump())
        if facts.fault:
            raise Damaged(f"{path.name} {facts.fault}")
        result.append(facts)
    return result


def hash_of(path: Path, memory: FileFacts) -> str:
    """The hash of an Arrow file, read where it is not remembered."""
    return _hashes([path], [_recall(memory, path, ShardFacts)])[0]


def _hashes(paths: Sequence[Path], known: Sequence[ShardFacts | None]) -> list[str]:
    """The hash of each file, read where it is not known."""
    unknown = [path for path, facts in zip(paths, known, strict=True) if facts is None]
    sizes = [path.stat().st_size for path in unknown]
    read: Iterator[str] = (hash_files([path]) for path in unknown)
    if sum(sizes) > SILENT_BYTES:
        read = iter(_watched_hashes(unknown, sizes))
    return [next(read) if facts is None else facts.hash for facts in known]


def _watched_hashes(paths: Sequence[Path], sizes: Sequence[int]) -> list[str]:
    hashes = []
    with (
        Progress("verify", sum(sizes), "bytes") as progress,
        ThreadPoolExecutor(min(MAX_HASHING_THREADS, cores())) as pool,
    ):
        for size, digest in zip(sizes, pool.map(lambda path: hash_files([path]), paths), strict=True):
            progress.update(size)
            hashes.append(digest)
    return hashes


def _who_is_damaged(
    paths: Sequence[Path], hashes: Sequence[str], written: Mapping[str, str], memory: FileFacts
) -> str:
    """In words, which of the files is not as it was written: the one whose hash was another, or that cannot
    be read; else any of them."""
    changed, unreadable = [], []
    for path, digest in zip(paths, hashes, strict=True):
        remembered = _recall(memory, path, ShardFacts, latest=True)
        was = written.get(path.name) or (remembered and remembered.hash)
        if was and was != digest:
            changed.append(path.name)
        elif fault := read_shard(path, digest).fault:
            unreadable.append((path.name, fault))
    if changed:
        return f"{_listed(changed)} {'is' if len(changed) == 1 else 'are'} not as written"
    if unreadable:
        return " ".join(unreadable[0])
    if len(paths) == 1:
        return f"{paths[0].name} is not as written"
    return f"its files {paths[0].name} to {paths[-1].name} are not all as written"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_FILES_NAMED:,} more" if len(names) > MAX_FILES_NAMED else ""
    return ", ".join(names[:MAX_FILES_NAMED]) + more


def read_shard(path: Path, digest: str) -> ShardFacts:
    """The facts of an Arrow file with this hash: all of it is read, a record batch at a time."""
    import pyarrow as pa
    import pyarrow.compute as pc

    chunks, tokens, lowest, highest = 0, 0, 0, -1
    fault: str | None = None
    try:
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
            fault = _schema_fault(reader.schema)
            for batch in () if fault else reader:
                if fault := _batch_fault(batch, chunks):
                    break
                ids = pc.min_max(batch.column("input_ids").flatten()).as_py()
                if batch.num_rows:
                    lowest = min(ids["min"], lowest if chunks else ids["min"])
                    highest = max(ids["max"], highest)
                chunks += batch.num_rows
                tokens += pc.sum(batch.column("num_tokens")).as_py() or 0
    except Exception as error:  # Arrow raises many kinds
        fault = f"cannot be read ({reason(error)})"
    return ShardFacts(hash=digest, chunks=chunks, tokens=tokens, lowest=lowest, highest=highest, fault=fault)


def _schema_fault(schema: Any) -> str | None:
    import pyarrow as pa

    types = {name: schema.field(name).type for name in schema.names}
    ids = types.pop("input_ids", None)
    expected = {"domain": pa.string(), "num_tokens": pa.int32()}
    if set(types) - set(expected):
        expected |= {name: pa.float32() for name in SCORE_COLUMNS}
    is_list = ids is not None and pa.types.is_list(ids) and ids.value_type == pa.int32()
    return None if is_list and types == expected else "does not have the columns of a corpus"


def _batch_fault(batch: Any, first: int) -> str | None:
    """What is wrong with a record batch whose first chunk is number `first` of its file."""
    batch.validate(full=True)  # offsets and text
    ids, num_tokens = batch.column("input_ids"), batch.column("num_tokens")
    for name in COLUMNS:
        column = batch.column(name)
        if column.null_count:
            number = first + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            return f"holds a chunk without {name} (number {number:,})"
    if ids.flatten().null_count:
        return "holds a chunk with an id that is null"
    lengths, said = ids.value_lengths().to_numpy(), num_tokens.to_numpy()
    if not lengths.all():
        return f"holds a chunk without ids (number {first + int(np.argmin(lengths)):,})"
    if (lengths != said).any():
        number = int(np.argmax(lengths != said))
        return f"says that chunk {first + number:,} has {said[number]:,} ids, and it has {lengths[number]:,}"
    return None


def verify_ids(paths: Sequence[Path], facts: Sequence[ShardFacts], ids: int) -> None:
    """Damaged unless every id in the files is one of 0, 1, …, ids − 1."""
    for path, found in zip(paths, facts, strict=True):
        wrong = found.lowest if found.lowest < 0 else found.highest
        if not 0 <= wrong < ids and found.chunks:
            raise Damaged(f"{path.name} holds the id {wrong}, the tokenizer has the ids 0 to {ids - 1}")


# ---- the tokenizer ----


def verify_tokenizer(folder: Path, manifest: Mapping[str, Any], memory: FileFacts) -> TokenizerFacts:
    """The facts of the tokenizer of a corpus with this manifest.

    The fingerprint of the vocabulary is in every manifest, that of the whole content in prepare's.

    Raises:
        Damaged: its files are missing or are not as they were written.
    """
    path, eos = folder / "tokenizer.json", manifest["eos_token_id"]
    place = f"{folder.name}/{path.name}"
    if not path.is_file():
        raise Damaged(f"{place} is missing")
    found = signature(path)
    facts = _recall(memory, path, TokenizerFacts)
    if facts is None or facts.eos != eos:
        facts = _read_tokenizer(path, place, eos)
        if signature(path) == found:
            memory.put(path, found, facts.model_dump())
    content = manifest["identity"].get("tokenizer") if manifest["stage"] != "select" else None
    if facts.vocabulary != manifest["tokenizer_fingerprint"] or facts.content != (content or facts.content):
        raise Damaged(f"{place} is not as written")
    settings = folder / "tokenizer_config.json"
    if facts.eos_token is None or _eos_token(settings) != facts.eos_token:
        raise Damaged(f"{folder.name}/{settings.name} does not name the token {facts.eos_token!r} as EOS")
    return facts


def tokenizer_hashes(folder: Path) -> dict[str, str]:
    """The hashes of the files of a corpus's tokenizer, by their names in the corpus."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder.parent).as_posix(): hash_files([path]) for path in paths}


def write_tokenizer(tokenizer: Any, corpus: Path, identity: Mapping[str, Any]) -> None:
    """Write the tokenizer of a corpus that prepare makes, unless it is there as it should be, and its hashes
    into the manifest."""
    expected = {
        "stage": "prepare",
        "identity": identity,
        "eos_token_id": tokenizer.eos_token_id,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
    }
    folder, files = corpus / "tokenizer", recorded(corpus).get("files")
    files = files if isinstance(files, dict) else {}
    written = {name: digest for name, digest in files.items() if name.startswith(folder.name)}
    if folder.exists():
        try:
            with file_facts() as memory:
                verify_tokenizer(folder, expected, memory)
            if damage := damaged_file(corpus, written):
                raise Damaged(damage)
            return
        except Damaged as error:
            note(f"corpus {corpus}: {error.reason}: the tokenizer is written anew")
            shutil.rmtree(folder)
    with atomic_folder(folder) as temporary:
        save_tokenizer(tokenizer, temporary)
    others = {name: digest for name, digest in files.items() if name not in written}
    record_output(corpus, {"files": others | tokenizer_hashes(folder)})


def _read_tokenizer(path: Path, place: str, eos: int) -> TokenizerFacts:
    try:
        text = path.read_text(encoding="utf-8")
        vocabulary = read_vocabulary(text)
    except ValueError as error:
        raise Damaged(f"{place} cannot be read ({reason(error)})") from error
    return TokenizerFacts(
        eos=eos,
        eos_token={index: token for token, index in vocabulary.items()}.get(eos),
        content=content_fingerprint(without_layout(text), eos),
        vocabulary=vocabulary_fingerprint(vocabulary, eos),
        tokens=len(vocabulary),
        ids=max(vocabulary.values(), default=-1) + 1,
    )


def without_layout(text: str) -> str:
    """JSON without the white space between its parts, and otherwise letter by letter as it was."""
    return "".join(re.findall(r'"[^"\\]*(?:\\.[^"\\]*)*"|[^\s"]+', text))


def _eos_token(path: Path) -> str | None:
    """The token that a tokenizer_config.json names as the end of a document."""
    settings = read_json(path) if path.is_file() else None
    token = settings.get("eos_token") if isinstance(settings, dict) else None
    if isinstance(token, dict):  # as transformers writes a token with properties
        token = token.get("content")
    return token if isinstance(token, str) else None

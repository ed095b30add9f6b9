"""Stage 1, prepare: text → a corpus of token chunks.

Worker processes turn blocks of records into ids (data/encoding.py), the main process cuts them into chunks
(data/chunking.py has the rule) and writes the corpus (data/corpus.py).
"""

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import PrepareConfig
from ..data.chunking import Chunk, Chunker
from ..data.corpus import (
    TOKENIZER,
    Corpus,
    file_hashes,
    shard_paths,
    write_chunks,
    write_dataset_files,
)
from ..data.encoding import Documents, Encoder, EncoderSettings
from ..data.progress_file import PROGRESS, read_progress, save_progress
from ..data.sources import START, Position, Source, open_source
from ..data.tokenizer import content_fingerprint, load_tokenizer, set_eos, tokenizer_fingerprint
from ..data.verify import Damaged, tokenizer_hashes, write_tokenizer
from ..runtime.artifacts import MANIFEST, complete_output, exclusive, open_output, reopen_output
from ..runtime.errors import UserError
from ..runtime.progress import Progress, note
from ..runtime.text import printable
from ..runtime.wall_time import WALL_TIME, timed
from ..runtime.workers import cores, ordered_map

MAX_BAD_RECORDS_REPORTED = 5
MAX_LEFT_OUT_REPORTED = 5  # files
MAX_DOMAINS_SHOWN = 30  # the largest
MAX_NAME_SHOWN = 60  # characters
MIN_RECORDS_FOR_SHARE = 10_000  # before so many, a share of bad ones is not yet trusted


def prepare(config: PrepareConfig) -> None:
    """Write the corpus folder `config.output` (see data/corpus.py) and print a summary.

    The same command continues a stopped run after its last whole file and ends in the same bytes, whatever
    `workers` is. Of a complete corpus it mends what is damaged.

    Raises:
        UserError: the source, the tokenizer or the output folder cannot be used, or more records are bad than
            allowed.
    """
    columns = [config.text_column]
    if config.domain_column is not None:
        columns.append(config.domain_column)
    source = open_source(config.data, columns, config.subset, config.split)
    tokenizer = load_tokenizer(config.tokenizer)
    set_eos(tokenizer, config.tokenizer, config.eos_token)
    folder = Path(config.output)
    identity = _identity(config, source, tokenizer)
    complete, ours = open_output(folder, "prepare", identity), False
    try:
        with exclusive(folder):
            ours = True
            write_tokenizer(tokenizer, folder, identity)
            if complete and _is_whole(folder, source):
                return
            with timed(folder):
                reopen_output(folder, {"files": tokenizer_hashes(folder / TOKENIZER)})
                run = _write_corpus(config, source, tokenizer, folder)
                _finish(config, source, tokenizer, folder, run)
    except UserError:
        if ours and not complete and not (folder / PROGRESS).exists():
            _discard(folder)
        raise


def _is_whole(folder: Path, source: Source) -> bool:
    """Whether a corpus that was complete still is; says so, or what is lost."""
    (folder / PROGRESS).unlink(missing_ok=True)
    try:
        Corpus(folder)
    except Damaged as error:
        note(f"corpus {folder} was complete, but {error.reason}: it is written anew")
        return False
    print(printable(f"corpus {folder} is complete, nothing to do"))
    if source.changed_ns > (folder / MANIFEST).stat().st_mtime_ns:
        note(
            f"data {source.name} was written to after this corpus was: if its text is another now, prepare "
            f"it into another --output"
        )
    return True


def _identity(config: PrepareConfig, source: Source, tokenizer: Any) -> dict[str, Any]:
    settings = ("text_column", "domain_column", "max_length", "take", "shard_tokens")
    return {
        "source": source.identity,
        "tokenizer": content_fingerprint(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id),
        **{name: getattr(config, name) for name in settings},
    }


def _discard(folder: Path) -> None:
    """Remove a run that has nothing to continue from, so that a corrected command can have the name; never
    anything else."""
    for path in [folder / MANIFEST, folder / WALL_TIME, *shard_paths(folder)]:
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


# ---- from records to files ----


class BadRecords:
    """Counts the records that cannot be read, reports the first few, and stops the run when they are too
    many."""

    def __init__(self, allowed: float):
        self.allowed, self.records, self.count = allowed, 0, 0
        self.first: str | None = None

    def add(self, documents: Documents) -> None:
        self.records += documents.records
        self.first = self.first or next(iter(documents.bad), None)
        reported, self.count = self.count, self.count + len(documents.bad)
        self._stop_above(self.allowed * max(self.records, MIN_RECORDS_FOR_SHARE))
        for text in documents.bad[: max(0, MAX_BAD_RECORDS_REPORTED - reported)]:
            note(f"prepare: skipped {text}")

    def finish(self) -> None:
        self._stop_above(self.allowed * self.records)

    def _stop_above(self, limit: float) -> None:
        if self.count > limit:
            raise UserError(
                f"{self.first} ({self.count:,} bad of {self.records:,} records, more than "
                f"--max-bad-fraction {self.allowed:g} allows): "
                "correct the data or the column names, or raise --max-bad-fraction to skip such records"
            )

    def state(self) -> dict[str, Any]:
        return {"records": self.records, "count": self.count, "first": self.first}

    def load(self, state: dict[str, Any]) -> None:
        self.records, self.count, self.first = state["records"], state["count"], state["first"]


@dataclass
class _Run:
    """How far a run has come: what a stopped one continues from.

    position: in the source, after the last record that the files hold; read: bytes of the source before it;
    hashes: of the corpus files written.
    """

    chunker: Chunker
    bad: BadRecords
    position: Position = START
    read: int = 0
    hashes: list[str] = field(default_factory=list)

    def save(self, folder: Path, source: Source) -> None:
        state = {
            "position": self.position,
            "read": self.read,
            "hashes": self.hashes,
            "chunker": self.chunker.state(),
            "bad": self.bad.state(),
            "source": source.state,
        }
        save_progress(folder, state)

    def load(self, state: dict[str, Any]) -> None:
        self.position, self.read, self.hashes = state["position"], state["read"], state["hashes"]
        self.chunker.load(state["chunker"])
        self.bad.load(state["bad"])


def _write_corpus(config: PrepareConfig, source: Source, tokenizer: Any, folder: Path) -> _Run:
    """Write the corpus files, from the start or from where a stopped run was."""
    _report_left_out(config.data, source)
    eos = tokenizer.eos_token_id
    run = _Run(Chunker(config.max_length + 1, eos), BadRecords(config.max_bad_fraction))
    if state := read_progress(folder, source.state, source.name):
        run.load(state)
    settings = EncoderSettings(
        str(folder / TOKENIZER / "tokenizer.json"), eos, config.text_column, config.domain_column, config.take
    )
    blocks = source.blocks(run.position)
    encoded = ordered_map(Encoder, settings, blocks, config.workers or cores())
    chunks: list[Chunk] = []  # of the next file
    tokens = 0  # in them
    with contextlib.closing(encoded):
        for documents in _watched(encoded, source.size, run.read):
            run.bad.add(documents)
            completed = run.chunker.add(
                documents.ids, documents.boundary, documents.lengths, documents.domains
            )
            chunks += completed
            tokens += sum(len(ids) for _, ids in completed)
            run.position, run.read = documents.next, run.read + documents.size
            if tokens >= config.shard_tokens:
                run.hashes.append(write_chunks(folder, len(run.hashes), chunks))
                run.save(folder, source)
                chunks, tokens = [], 0
    run.bad.finish()
    if not run.chunker.domains:
        share = "" if tuple(config.take) == (0.0, 1.0) else f" of the share {list(config.take)}"
        raise UserError(
            f"data {config.data} holds no document{share} ({run.bad.records:,} records were read): give data "
            f"with text"
        )
    run.hashes.append(write_chunks(folder, len(run.hashes), chunks + run.chunker.finish()))
    return run


def _report_left_out(data: str, source: Source) -> None:
    if source.left_out:
        shown = ", ".join(source.left_out[:MAX_LEFT_OUT_REPORTED])
        more = len(source.left_out) - MAX_LEFT_OUT_REPORTED
        note(f"of folder {data} is left out: {shown}{f' and {more:,} more' if more > 0 else ''}")


def _watched(encoded: Iterator[Documents], size: int | None, read: int) -> Iterator[Documents]:
    """The same documents, with their progress shown: of `size` bytes, `read` of them by an earlier run."""
    tokens, begun = 0, time.monotonic()
    with Progress("prepare", size, "bytes", read) as progress:
        for documents in encoded:
            tokens += len(documents.ids)
            progress.note(f"{tokens / (time.monotonic() - begun):,.0f} tokens/s")
            progress.update(documents.size)
            yield documents


# ---- the end ----


def _finish(config: PrepareConfig, source: Source, tokenizer: Any, folder: Path, run: _Run) -> None:
    domains = run.chunker.domains
    total = {key: sum(counts[key] for counts in domains.values()) for key in ("documents", "rows", "tokens")}
    complete_output(
        folder,
        {
            "fingerprint": write_dataset_files(folder, run.hashes, with_scores=False),
            "rows": total["rows"],
            "tokens": total["tokens"],
            "predictions": run.chunker.predictions,
            "domains": domains,
            "bad_records": run.bad.count,
            "eos_token_id": tokenizer.eos_token_id,
            "vocab_size": len(tokenizer),
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "max_length": config.max_length,
            "source": source.name,
            "files": file_hashes(folder, run.hashes),
        },
    )
    (folder / PROGRESS).unlink(missing_ok=True)
    _print_summary(folder, domains, total, run.bad.count)


def _print_summary(folder: Path, domains: dict[str, dict[str, int]], total: dict[str, int], bad: int) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    headings = {"documents": "documents", "rows": "chunks", "tokens": "tokens"}
    table = Table("domain", *(Column(headings[key], justify="right") for key in total))
    names = sorted(domains, key=lambda name: -domains[name]["tokens"])
    for name in names[:MAX_DOMAINS_SHOWN]:
        shown = name if len(name) <= MAX_NAME_SHOWN else f"{name[:MAX_NAME_SHOWN]}…"
        # Text: a domain's name may look like markup.
        table.add_row(Text(printable(shown)), *(f"{domains[name][key]:,}" for key in total))
    if len(names) > MAX_DOMAINS_SHOWN:
        table.add_row(f"… {len(names) - MAX_DOMAINS_SHOWN:,} more")
    table.add_section()
    table.add_row("all", *(f"{count:,}" for count in total.values()))
    Console().print(table)
    print(printable(f"corpus {folder} written; {bad:,} bad records skipped"))

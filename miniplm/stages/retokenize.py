"""Retokenize: a corpus in the ids of another tokenizer, for students of another family.

The chunks are decoded, split at EOS and encoded anew by worker processes (data/retokenizing.py). The
documents of what prepare wrote are joined first and cut into chunks as prepare cuts them. Each chunk of a
refined or a synthesized corpus stands for itself: what was cut apart stays so, and its new chunks have its
score.
"""

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..config import RetokenizeConfig
from ..data.chunking import Chunk, Chunker
from ..data.corpus import TOKENIZER, Corpus, file_hashes, write_chunks, write_dataset_files
from ..data.progress_file import PROGRESS, read_progress, save_progress
from ..data.retokenizing import Encoded, Piece, Retokenizer, RetokenizerSettings, Unit, pieces_of
from ..data.scores import SCORE_COLUMNS
from ..data.tokenizer import bos_of, content_fingerprint, load_tokenizer, set_eos, tokenizer_fingerprint
from ..data.verify import Damaged, tokenizer_hashes, write_tokenizer
from ..runtime.artifacts import complete_output, exclusive, open_output, reopen_output
from ..runtime.progress import Progress, note
from ..runtime.text import printable
from ..runtime.wall_time import timed
from ..runtime.workers import cores, ordered_map

BATCH_TOKENS = 1 << 16  # what a worker gets at a time
CARRIED = ("parent", "selection", "scores", "synthesis")  # what a corpus says of where its chunks are from


def retokenize(config: RetokenizeConfig) -> None:
    """Write the corpus folder `config.output` (see data/corpus.py) and print a summary.

    The same command continues a stopped run after its last whole file and ends in the same bytes, whatever
    `workers` is. Of a complete corpus it mends what is damaged.

    Raises:
        UserError: the corpus, the tokenizer or the output folder cannot be used.
    """
    corpus = Corpus(config.data)
    tokenizer = load_tokenizer(config.tokenizer)
    set_eos(tokenizer, config.tokenizer, config.eos_token)
    max_length = config.max_length or corpus.manifest["max_length"]
    bos = bos_of(tokenizer, config.tokenizer, config.add_bos)
    folder = Path(config.output)
    identity = {
        "corpus": corpus.fingerprint,
        "tokenizer": content_fingerprint(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id),
        "bos_token_id": bos,
        "max_length": max_length,
        "shard_tokens": config.shard_tokens,
    }
    complete = open_output(folder, "retokenize", identity)
    with exclusive(folder):
        write_tokenizer(tokenizer, folder, identity)
        if complete and _is_whole(folder):
            return
        settings = RetokenizerSettings(
            str(Path(corpus.tokenizer) / "tokenizer.json"),
            corpus.eos_token_id,
            corpus.manifest["identity"].get("bos_token_id"),
            str(folder / TOKENIZER / "tokenizer.json"),
            tokenizer.eos_token_id,
            bos,
        )
        run = _Run(Chunker(max_length + 1, tokenizer.eos_token_id))
        with timed(folder):
            reopen_output(folder, {"files": tokenizer_hashes(folder / TOKENIZER)})
            _write_corpus(config, corpus, settings, run)
            results = _finish(folder, corpus, tokenizer, max_length, run)
    _print_summary(config, corpus, results)


def _is_whole(folder: Path) -> bool:
    """Whether a corpus that was complete still is; says so, or what is lost."""
    (folder / PROGRESS).unlink(missing_ok=True)
    try:
        Corpus(folder)
    except Damaged as error:
        note(f"corpus {folder} was complete, but {error.reason}: it is written anew")
        return False
    print(printable(f"corpus {folder} is complete, nothing to do"))
    return True


@dataclass
class _Run:
    """How far a run has come: what a stopped one continues from.

    chunk: the first of the old chunks that the files do not hold; open: per domain, the ids of the document
    that it goes on with; hashes: of the files written; lost, first_lost: pieces that do not come back as the
    same text, and the old chunk where the first of them ends.
    """

    chunker: Chunker
    chunk: int = 0
    open: dict[str, list[np.ndarray]] = field(default_factory=dict)
    hashes: list[str] = field(default_factory=list)
    lost: int = 0
    first_lost: int | None = None

    def save(self, folder: Path, corpus: Corpus) -> None:
        state = {
            "source": corpus.fingerprint,
            "hashes": self.hashes,
            "chunk": self.chunk,
            "open": {domain: np.concatenate(parts).tolist() for domain, parts in self.open.items() if parts},
            "lost": [self.lost, self.first_lost],
            "chunker": self.chunker.state(),
        }
        save_progress(folder, state)

    def load(self, state: dict[str, Any]) -> None:
        self.hashes, self.chunk = state["hashes"], state["chunk"]
        self.open = {domain: [np.array(ids, np.int32)] for domain, ids in state["open"].items()}
        self.lost, self.first_lost = state["lost"]
        self.chunker.load(state["chunker"])

    def count_lost(self, encoded: Encoded) -> None:
        if encoded.lost and self.first_lost is None:
            self.first_lost = encoded.chunk
        self.lost += encoded.lost


@dataclass(frozen=True)
class _Batch:
    """Units for a worker, and where reading stands behind them: as in _Run."""

    units: list[Unit]
    chunk: int
    open: dict[str, list[np.ndarray]]


def _write_corpus(config: RetokenizeConfig, corpus: Corpus, settings: RetokenizerSettings, run: _Run) -> None:
    """Write the corpus files, from the start or from where a stopped run was."""
    folder = Path(config.output)
    if state := read_progress(folder, corpus.fingerprint, config.data):
        run.load(state)
    batches, waiting = _batches(corpus, settings.old_bos, run.chunk, run.open), deque[_Batch]()

    def units() -> Iterator[list[Unit]]:
        for batch in batches:
            waiting.append(batch)
            yield batch.units

    rows: list[tuple[Chunk, int]] = []  # of the next file, with the old chunk of each
    encoded = ordered_map(Retokenizer, settings, units(), config.workers or cores())
    with contextlib.closing(encoded), Progress("retokenize", len(corpus), "chunks", run.chunk) as progress:
        for results in encoded:
            batch = waiting.popleft()
            for result in results:
                run.count_lost(result)
            rows += _cut(corpus, run.chunker, results)
            progress.update(batch.chunk - run.chunk)
            run.chunk, run.open = batch.chunk, batch.open
            if sum(len(ids) for (_, ids), _ in rows) >= config.shard_tokens:
                run.hashes.append(_write_file(corpus, folder, len(run.hashes), rows))
                run.save(folder, corpus)
                rows = []
    if not corpus.is_cut:
        rows += [(chunk, 0) for chunk in run.chunker.finish()]
    if rows or not run.hashes:
        run.hashes.append(_write_file(corpus, folder, len(run.hashes), rows))


def _batches(
    corpus: Corpus, bos: int | None, start: int, still_open: dict[str, list[np.ndarray]]
) -> Iterator[_Batch]:
    """The documents of a corpus, or the chunks of one that is cut, from chunk `start` on.

    Args:
        bos: what its documents begin with.
    """
    codes, names = corpus.domains
    still_open = {domain: list(parts) for domain, parts in still_open.items()}
    units: list[Unit] = []
    tokens = 0
    for chunk in range(start, len(corpus)):
        ids, domain = corpus.rows([chunk])[0], names[codes[chunk]]
        if corpus.is_cut:
            pieces = pieces_of(ids, corpus.eos_token_id, begins=ids[0] == bos)
            units.append(Unit(list(pieces), domain, chunk))
        else:
            parts = still_open.setdefault(domain, [])
            for piece in pieces_of(ids, corpus.eos_token_id, True):
                parts.append(piece.ids)
                if piece.ends:
                    units.append(Unit([Piece(np.concatenate(parts), True, True)], domain, chunk))
                    parts.clear()
        tokens += len(ids)
        if tokens >= BATCH_TOKENS:
            yield _Batch(units, chunk + 1, {domain: list(parts) for domain, parts in still_open.items()})
            units, tokens = [], 0
    for domain, parts in still_open.items():  # documents without an end, as no corpus of prepare has them
        if parts:
            units.append(Unit([Piece(np.concatenate(parts), True, False)], domain, len(corpus) - 1))
    yield _Batch(units, len(corpus), {})


def _cut(corpus: Corpus, chunker: Chunker, units: list[Encoded]) -> list[tuple[Chunk, int]]:
    """The new chunks that the units complete, with the old chunk that each comes from (0 without scores)."""
    if corpus.is_cut:
        return [
            (chunk, unit.chunk)
            for unit in units
            for chunk in chunker.alone(unit.ids, unit.boundary, unit.domain)
        ]
    ids = np.concatenate([np.zeros(0, np.int32), *(unit.ids for unit in units)])
    boundary = np.concatenate([np.zeros(0, bool), *(unit.boundary for unit in units)])
    lengths = np.fromiter((len(unit.ids) for unit in units), np.int64, len(units))
    return [(chunk, 0) for chunk in chunker.add(ids, boundary, lengths, [unit.domain for unit in units])]


def _write_file(corpus: Corpus, folder: Path, number: int, rows: list[tuple[Chunk, int]]) -> str:
    """Write an Arrow file of new chunks, with the scores of the old chunks that they come from; its hash."""
    scores = None
    if corpus.has_scores:
        old = corpus.table.select(list(SCORE_COLUMNS)).take([source for _, source in rows])
        scores = {name: old.column(name) for name in SCORE_COLUMNS}
    return write_chunks(folder, number, [chunk for chunk, _ in rows], scores)


def _finish(folder: Path, corpus: Corpus, tokenizer: Any, max_length: int, run: _Run) -> dict[str, Any]:
    """Complete the corpus; what its manifest says beside its identity."""
    domains = run.chunker.domains
    results = {
        "fingerprint": write_dataset_files(folder, run.hashes, with_scores=corpus.has_scores),
        "rows": sum(counts["rows"] for counts in domains.values()),
        "tokens": sum(counts["tokens"] for counts in domains.values()),
        "predictions": run.chunker.predictions,
        "domains": domains,
        "bad_records": corpus.manifest["bad_records"],
        "eos_token_id": tokenizer.eos_token_id,
        "vocab_size": len(tokenizer),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "max_length": max_length,
        "source": corpus.manifest["source"],
        "lost": {"pieces": run.lost, "first_chunk": run.first_lost},
        **{key: corpus.manifest[key] for key in CARRIED if key in corpus.manifest},
        "files": file_hashes(folder, run.hashes),
    }
    complete_output(folder, results)
    (folder / PROGRESS).unlink(missing_ok=True)
    return results


def _print_summary(config: RetokenizeConfig, corpus: Corpus, results: dict[str, Any]) -> None:
    lost, first = results["lost"]["pieces"], results["lost"]["first_chunk"]
    print(
        printable(
            f"corpus {config.output} written: {corpus.manifest['rows']:,} chunks of "
            f"{corpus.manifest['tokens']:,} tokens are {results['rows']:,} chunks of "
            f"{results['tokens']:,} tokens"
        )
    )
    if lost:
        note(
            f"{lost:,} texts do not come back letter by letter, the first of them in chunk {first:,} of "
            f"{config.data}: tokenizer {config.tokenizer} cannot spell them, or they were cut within a letter"
        )
    else:
        print("every text comes back letter by letter")

"""Stage 1, prepare: text → a corpus of token chunks.

The chunking rule. The documents of one domain form one stream of token ids: each document's ids, then EOS.
(An empty document is just EOS. No other special token is added, and text that spells a special token is
encoded as text, as far as the tokenizer can: one that reaches a special id by its ordinary vocabulary still
does.)

There is a *boundary* after position i of the stream if token i is EOS, or its text contains a newline, or all
of these hold:
  (a) its text, without closing quotes and brackets at its end (CLOSERS), ends in one of . ! ? ;
  (b) the text of token i + 1 starts with a space (EOS has no text);
  (c) the bracket depth after token i is 0. Each of ( [ { in a token's text adds 1, each of ) ] } takes 1
  away, never below 0; after
      EOS and after a token with a newline the depth is 0 again.

With L = max_length + 1: while the stream holds more than L ids, its first L ids are backed up to the last
boundary among them (no boundary: all L are taken) and become a chunk; the rest carries over. At the end of
the source what each domain has left, L ids at most, becomes its last chunk. Chunks are written in the order
in which reading the documents completes them, the last chunks in the order in which the domains first
appeared. The chunks of a domain, joined, are its stream: nothing is lost, nothing is added. (Gu et al., arXiv
2410.17215; the authors drop the last chunks and their lookahead is a list per tokenizer.)

A boundary depends on nothing outside its document, so worker processes find it; only the cutting is
sequential.
"""

import contextlib
import hashlib
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import PrepareConfig
from ..data import corpus as storage
from ..data.sources import START, Block, open_source, read_record
from ..data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_fingerprint
from ..runtime.artifacts import MANIFEST, complete_output, open_output
from ..runtime.errors import UserError
from ..runtime.files import atomic_folder, fingerprint, read_json, write_json
from ..runtime.progress import Progress
from ..runtime.workers import cores, ordered_map

CLOSERS = "\"'”’»)]}"
PROGRESS = "progress.json"
REPORTED = 5  # so many bad records are shown one by one
SHOWN = 30  # so many domains, the largest, are shown one by one
PATIENCE = 10_000  # records before which a share of bad ones is not yet trusted
NEWLINE_OR_EOS, SENTENCE_END, SPACE, BRACKET = 1, 2, 4, 8
RESET = -(1 << 32)  # takes any depth below 0; int64 holds 2^31 of them


# The chunking rule.


@dataclass(frozen=True)
class BoundaryTable:
    """What the chunking rule asks of a token id, as arrays over the ids.

    kind: uint8, the sum of NEWLINE_OR_EOS, SENTENCE_END (a), SPACE (b), BRACKET, where each holds. A token
    takes the bracket depth d to max(d + net, floor), both int64: exact, because every single bracket does,
    and such steps compose to one.
    """

    kind: np.ndarray
    net: np.ndarray
    floor: np.ndarray


def boundary_table(tokenizer, eos_token_id: int) -> BoundaryTable:
    """The table of a `tokenizers.Tokenizer`."""
    texts = _token_texts(tokenizer)
    kind, net, floor = (
        np.zeros(len(texts), np.uint8),
        np.zeros(len(texts), np.int64),
        np.zeros(len(texts), np.int64),
    )
    for index, text in enumerate(texts):
        if "\n" in text or index == eos_token_id:
            kind[index], net[index] = (
                NEWLINE_OR_EOS | (SPACE if text.startswith(" ") and index != eos_token_id else 0),
                RESET,
            )
            continue
        kind[index] = SENTENCE_END * text.rstrip(CLOSERS).endswith(
            (".", "!", "?", ";")
        ) | SPACE * text.startswith(" ")
        for character in text:
            if character in "([{":
                net[index], floor[index] = net[index] + 1, floor[index] + 1
                kind[index] |= BRACKET
            elif character in ")]}":
                net[index], floor[index] = net[index] - 1, max(floor[index] - 1, 0)
                kind[index] |= BRACKET
    return BoundaryTable(kind, net, floor)


def _token_texts(tokenizer) -> list[str]:
    """What every id adds to a text: decoded behind an "a", for alone it may lose its leading space. "" for
    unused ids."""
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    anchor = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
    prefix = tokenizer.decode(anchor, skip_special_tokens=False)
    joined = tokenizer.decode_batch([[*anchor, index] for index in range(size)], skip_special_tokens=False)
    return [
        text[len(prefix) :]
        if text.startswith(prefix)
        else tokenizer.decode([index], skip_special_tokens=False)
        for index, text in enumerate(joined)
    ]


def boundaries(ids: np.ndarray, table: BoundaryTable) -> np.ndarray:
    """bool [n]: whether there is a boundary after each of the ids [n], which are whole documents with their
    EOS."""
    kind = table.kind[ids]
    result = (kind & NEWLINE_OR_EOS) != 0
    ends = np.flatnonzero(((kind[:-1] & SENTENCE_END) != 0) & ((kind[1:] & SPACE) != 0))
    # The depth after the k-th bracket or reset is the running composition of max(d + net, floor) from d = 0.
    steps = np.flatnonzero(kind & (BRACKET | NEWLINE_OR_EOS))
    total = np.cumsum(table.net[ids[steps]])
    depth = total + np.maximum.accumulate(table.floor[ids[steps]] - total)
    before = np.searchsorted(steps, ends, side="right")  # steps up to and including the token itself
    result[ends] |= np.concatenate([[0], depth])[before] == 0
    return result


def chunk_ends(boundary: np.ndarray, size: int) -> list[int]:
    """The ends of the chunks that are complete in a stream with these boundaries [n]: chunk k is ids[ends[k -
    1]:ends[k]]."""
    last = np.flatnonzero(boundary) + 1
    ends, start = [], 0
    while len(boundary) - start > size:
        index = int(np.searchsorted(last, start + size, side="right"))
        start = int(last[index - 1]) if index and last[index - 1] > start else start + size
        ends.append(start)
    return ends


class Chunker:
    """Cuts the streams of all domains as their documents come.

    domains: {name: {"documents", "rows", "tokens"}} in the order of first appearance; predictions: positions
    whose input is not EOS.
    """

    def __init__(self, size: int, eos_token_id: int):
        self.size, self.eos_token_id = size, eos_token_id
        self.domains: dict[str, dict[str, int]] = {}
        self.predictions = 0
        self._rest: dict[
            str, tuple[np.ndarray, np.ndarray]
        ] = {}  # domain → ids and boundaries that no chunk has yet

    def add(self, documents: "Documents") -> list[tuple[str, np.ndarray]]:
        """The chunks (domain, ids) that these documents complete, in the order in which they do."""
        bounds = np.concatenate([[0], np.cumsum(documents.lengths)])
        of_domain: dict[str, list[int]] = {}
        for number, domain in enumerate(documents.domains):
            of_domain.setdefault(domain, []).append(number)
        completed = []
        for domain, numbers in of_domain.items():
            self.domains.setdefault(domain, {"documents": 0, "rows": 0, "tokens": 0})["documents"] += len(
                numbers
            )
            parts = (
                [slice(bounds[number], bounds[number + 1]) for number in numbers]
                if len(of_domain) > 1
                else [slice(None)]
            )
            rest_ids, rest_boundary = self._rest.get(domain, (np.zeros(0, np.int32), np.zeros(0, bool)))
            ids = np.concatenate([rest_ids, *(documents.ids[part] for part in parts)])
            boundary = np.concatenate([rest_boundary, *(documents.boundary[part] for part in parts)])
            ends = chunk_ends(boundary, self.size)
            starts = np.array([0, *ends])
            # A chunk is completed by the first document that takes the stream past start + size.
            stream = len(rest_ids) + np.cumsum(documents.lengths[numbers])
            by = np.array(numbers)[np.searchsorted(stream, starts[:-1] + self.size, side="right")]
            completed += [
                (number, domain, ids[start:end])
                for number, start, end in zip(by.tolist(), starts[:-1], ends, strict=True)
            ]
            self._rest[domain] = ids[starts[-1] :].copy(), boundary[starts[-1] :].copy()
        completed.sort(key=lambda chunk: chunk[0])
        return [self._count(domain, ids) for _, domain, ids in completed]

    def finish(self) -> list[tuple[str, np.ndarray]]:
        """The last chunk of each domain."""
        return [self._count(domain, ids) for domain, (ids, _) in self._rest.items()]

    def _count(self, domain: str, ids: np.ndarray):
        self.domains[domain]["rows"] += 1
        self.domains[domain]["tokens"] += len(ids)
        self.predictions += int(np.count_nonzero(ids[:-1] != self.eos_token_id))
        return domain, ids

    def state(self) -> dict:
        rest = {
            domain: [ids.tolist(), np.flatnonzero(boundary).tolist()]
            for domain, (ids, boundary) in self._rest.items()
        }
        return {"domains": self.domains, "predictions": self.predictions, "rest": rest}

    def load(self, state: dict):
        self.domains, self.predictions = state["domains"], state["predictions"]
        for domain, (ids, at) in state["rest"].items():
            self._rest[domain] = np.array(ids, np.int32), np.isin(np.arange(len(ids)), at)


# Blocks of records → documents, in worker processes that import neither torch nor transformers.


@dataclass(frozen=True)
class Documents:
    """Encoded documents: ids int32 [n] and boundary bool [n] of all of them, EOS included; lengths int64 and
    domains of each.

    records: how many were looked at; bad: where and why some could not be read; next, size: as of their
    Block.
    """

    ids: np.ndarray
    boundary: np.ndarray
    lengths: np.ndarray
    domains: list[str]
    records: int
    bad: list[str]
    next: tuple[int, int, int]
    size: int


@dataclass(frozen=True)
class EncoderSettings:
    tokenizer: str  # a tokenizer.json
    eos_token_id: int
    text_column: str
    domain_column: str | None
    take: tuple[float, float]


class Encoder:
    """Encodes a Block: parse, check, take or leave, tokenize, find the boundaries."""

    def __init__(self, settings: EncoderSettings):
        from tokenizers import Tokenizer

        self.settings = settings
        self.tokenizer = Tokenizer.from_file(settings.tokenizer)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.add_special_tokens([self.tokenizer.id_to_token(settings.eos_token_id)])
        self.table = boundary_table(self.tokenizer, settings.eos_token_id)
        self.tokenizer.encode_special_tokens = (
            True  # text that spells a special token, EOS among them, stays text
        )

    def __call__(self, block: Block) -> Documents:
        texts, domains, bad, records = [], [], [], 0
        for index, record in enumerate(block.records):
            if isinstance(record, bytes) and not record.strip():
                continue  # a blank line
            records += 1
            try:
                text, domain = read_record(
                    record, block.columns, self.settings.text_column, self.settings.domain_column
                )
            except ValueError as error:
                bad.append(f"{block.where(index)}: {error}")
            else:
                if self._taken(text):
                    texts.append(text)
                    domains.append(domain)
        try:
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:
            raise UserError(
                f"the tokenizer cannot encode the text at {block.where(0)} or soon after ({error}): use one "
                f"that can"
            ) from error
        eos = self.settings.eos_token_id
        documents = [np.array([*encoding.ids, eos], np.int32) for encoding in encodings]
        ids = np.concatenate([np.zeros(0, np.int32), *documents])
        lengths = np.fromiter(map(len, documents), np.int64, len(documents))
        return Documents(
            ids, boundaries(ids, self.table), lengths, domains, records, bad, block.next, block.size
        )

    def _taken(self, text: str) -> bool:
        start, stop = self.settings.take
        if (start, stop) == (0.0, 1.0):
            return True
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return start <= (int.from_bytes(digest, "big") >> 11) / (1 << 53) < stop


# The stage.


def prepare(config: PrepareConfig) -> None:
    """Write the corpus folder `config.output` (see storage.py) and print a summary.

    The same command continues a stopped run after its last whole file and ends in the same bytes, whatever
    `workers` is.

    Raises:
        UserError: the source, the tokenizer or the output folder cannot be used, or more records are bad than
            allowed.
    """
    columns = [config.text_column] + ([config.domain_column] if config.domain_column is not None else [])
    source = open_source(config.data, columns, config.subset, config.split)
    tokenizer = load_tokenizer(config.tokenizer)
    _set_eos(tokenizer, config)
    folder = Path(config.output)
    identity = {
        "source": source.identity,
        "tokenizer": fingerprint([tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id]),
        **{
            name: getattr(config, name)
            for name in ("text_column", "domain_column", "max_length", "take", "shard_tokens")
        },
    }
    if open_output(folder, "prepare", identity):
        (folder / PROGRESS).unlink(missing_ok=True)
        print(f"corpus {folder} is complete, nothing to do")
        return
    try:
        hashes, chunker, bad = _write_shards(config, source, tokenizer, folder)
    except UserError:
        if not (folder / PROGRESS).exists():
            _discard(folder)
        raise
    total = {
        key: sum(counts[key] for counts in chunker.domains.values())
        for key in ("documents", "rows", "tokens")
    }
    complete_output(
        folder,
        {
            "fingerprint": storage.write_dataset_files(folder, hashes, with_scores=False),
            "rows": total["rows"],
            "tokens": total["tokens"],
            "predictions": chunker.predictions,
            "domains": chunker.domains,
            "bad_records": bad,
            "eos_token_id": tokenizer.eos_token_id,
            "vocab_size": len(tokenizer),
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "max_length": config.max_length,
            "source": source.name,
        },
    )
    (folder / PROGRESS).unlink(missing_ok=True)
    _print_summary(folder, chunker.domains, total, bad)


def _discard(folder: Path):
    """Remove a run that has nothing to continue from, so that a corrected command can have the name; never
    anything else."""
    for path in [folder / MANIFEST, *folder.glob("data-*.arrow")]:
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _set_eos(tokenizer, config: PrepareConfig):
    if config.eos_token is not None:
        if config.eos_token not in tokenizer.get_vocab():
            raise UserError(
                f"tokenizer {config.tokenizer} has no token {config.eos_token!r}: give --eos-token one that "
                f"it has"
            )
        tokenizer.eos_token = config.eos_token
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer {config.tokenizer} names no token that ends a document: give one with --eos-token"
        )


def _write_shards(config: PrepareConfig, source, tokenizer, folder: Path):
    """Write the tokenizer and the corpus files; returns (hashes of the files, the Chunker, the number of bad
    records)."""
    if not (folder / "tokenizer").exists():
        with atomic_folder(folder / "tokenizer") as temporary:
            save_tokenizer(tokenizer, temporary)
    settings = EncoderSettings(
        str(folder / "tokenizer" / "tokenizer.json"),
        tokenizer.eos_token_id,
        config.text_column,
        config.domain_column,
        config.take,
    )
    chunker, bad = Chunker(config.max_length + 1, tokenizer.eos_token_id), BadRecords(config.max_bad_fraction)
    position, read, hashes = START, 0, []
    if (folder / PROGRESS).exists():
        state = read_json(folder / PROGRESS)
        position, read, hashes = state["position"], state["read"], state["hashes"]
        chunker.load(state["chunker"])
        bad.load(state["bad"])
    rows, tokens, all_tokens, begun = [], 0, 0, time.monotonic()
    encoded = ordered_map(Encoder, settings, source.blocks(position), config.workers or cores())
    with contextlib.closing(encoded), Progress("prepare", source.size, "bytes", read) as progress:
        for documents in encoded:
            bad.add(documents)
            rows += (new := chunker.add(documents))
            tokens += sum(len(ids) for _, ids in new)
            all_tokens += len(documents.ids)
            read += documents.size
            progress.note(f"{all_tokens / (time.monotonic() - begun):,.0f} tokens/s")
            progress.update(documents.size)
            if tokens >= config.shard_tokens:
                hashes.append(_write_shard(folder, len(hashes), rows))
                rows, tokens = [], 0
                write_json(
                    folder / PROGRESS,
                    {
                        "position": documents.next,
                        "read": read,
                        "hashes": hashes,
                        "chunker": chunker.state(),
                        "bad": bad.state(),
                    },
                )
    bad.finish()
    if not chunker.domains:
        raise UserError(
            f"data {config.data} holds no document"
            + ("" if tuple(config.take) == (0.0, 1.0) else f" of the share {list(config.take)}")
            + f" ({bad.records:,} records were read): give data with text"
        )
    hashes.append(_write_shard(folder, len(hashes), rows + chunker.finish()))
    return hashes, chunker, bad.count


def _write_shard(folder: Path, number: int, rows: list) -> str:
    import pyarrow as pa

    ids, domains = [], []
    for start in range(0, len(rows), storage.ROWS_PER_RECORD_BATCH):
        part = rows[start : start + storage.ROWS_PER_RECORD_BATCH]
        offsets = np.cumsum([0, *(len(chunk) for _, chunk in part)], dtype=np.int32)
        ids.append(pa.ListArray.from_arrays(offsets, np.concatenate([chunk for _, chunk in part])))
        domains.append(pa.array([domain for domain, _ in part], pa.string()))
    lengths = pa.array([len(chunk) for _, chunk in rows], pa.int32())
    return storage.write_shard(
        folder,
        number,
        {"input_ids": pa.chunked_array(ids), "domain": pa.chunked_array(domains), "num_tokens": lengths},
    )


class BadRecords:
    """Counts the records that cannot be read, reports the first few, and stops the run when they are too
    many."""

    def __init__(self, allowed: float):
        self.allowed, self.records, self.count, self.first = allowed, 0, 0, None

    def add(self, documents: Documents):
        self.records += documents.records
        self.first = self.first or next(iter(documents.bad), None)
        reported, self.count = self.count, self.count + len(documents.bad)
        self._stop_above(self.allowed * max(self.records, PATIENCE))
        for text in documents.bad[: max(0, REPORTED - reported)]:
            print(f"prepare: skipped {text}", file=sys.stderr)

    def finish(self):
        self._stop_above(self.allowed * self.records)

    def _stop_above(self, limit: float):
        if self.count > limit:
            raise UserError(
                f"{self.first} ({self.count:,} bad of {self.records:,} records, more than "
                f"--max-bad-fraction {self.allowed:g} allows): "
                "correct the data or the column names, or raise --max-bad-fraction to skip such records"
            )

    def state(self) -> dict:
        return {"records": self.records, "count": self.count, "first": self.first}

    def load(self, state: dict):
        self.records, self.count, self.first = state["records"], state["count"], state["first"]


def _print_summary(folder: Path, domains: dict, total: dict, bad: int):
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table("domain", *(Column(key, justify="right") for key in total))
    names = sorted(domains, key=lambda name: -domains[name]["tokens"])
    for name in names[:SHOWN]:
        table.add_row(escape(name), *(f"{domains[name][key]:,}" for key in total))
    if names[SHOWN:]:
        table.add_row(f"… {len(names) - SHOWN:,} more")
    table.add_section()
    table.add_row("all", *(f"{count:,}" for count in total.values()))
    Console().print(table)
    print(f"corpus {folder} written; {bad:,} bad records skipped")

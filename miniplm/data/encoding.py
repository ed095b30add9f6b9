"""Records → token ids, in worker processes that import neither torch nor transformers nor Arrow."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import UserError, reason
from ..runtime.guarded import call_within
from .chunking import boundaries, boundary_table
from .records import read_record
from .sources import Block, Position
from .tokenizer import panics_as_errors

SECONDS_PER_BLOCK, SECONDS_PER_MIB = 120, 20  # of text: far more than a tokenizer takes


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
    next: Position
    size: int


@dataclass(frozen=True)
class EncoderSettings:
    """What an Encoder is made from; it crosses to the worker processes.

    tokenizer: the path of a tokenizer.json; take: the share of the documents to take, as a range of a hash of
    their text.
    """

    tokenizer: str
    eos_token_id: int
    text_column: str
    domain_column: str | None
    take: tuple[float, float]


class Encoder:
    """Encodes a Block: parse, check, take or leave, tokenize, find the boundaries."""

    def __init__(self, settings: EncoderSettings):
        from tokenizers import Tokenizer

        self.settings = settings
        # Read here: tokenizers opens no file whose name is not UTF-8.
        self.tokenizer = Tokenizer.from_str(Path(settings.tokenizer).read_text(encoding="utf-8"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.add_special_tokens([self.tokenizer.id_to_token(settings.eos_token_id)])
        try:
            with panics_as_errors():
                self.table = call_within(
                    SECONDS_PER_BLOCK, lambda: boundary_table(self.tokenizer, settings.eos_token_id)
                )
        except Exception as error:
            raise UserError(
                f"the tokenizer cannot decode its own tokens ({reason(error)}): use one that can"
            ) from error
        # Text that spells a special token, EOS among them, stays text.
        self.tokenizer.encode_special_tokens = True

    def __call__(self, block: Block) -> Documents:
        """The documents of the block; UserError where the tokenizer fails, or takes too long."""
        texts, domains, bad, records = self._read(block)
        try:
            encodings = self._encode(texts)
        except Exception as error:  # tokenizers raises Exception itself
            raise UserError(
                f"the tokenizer cannot encode the text at {block.where(0)} or soon after ({reason(error)}): "
                f"use one that can"
            ) from error
        eos = self.settings.eos_token_id
        documents = [np.array([*encoding.ids, eos], np.int32) for encoding in encodings]
        ids = np.concatenate([np.zeros(0, np.int32), *documents])
        lengths = np.fromiter(map(len, documents), np.int64, len(documents))
        return Documents(
            ids, boundaries(ids, self.table), lengths, domains, records, bad, block.next, block.size
        )

    def _encode(self, texts: list[str]) -> list[Any]:
        """The encodings of the texts. A regular expression in a tokenizer may take for ever."""
        seconds = SECONDS_PER_BLOCK + SECONDS_PER_MIB * (sum(map(len, texts)) >> 20)
        with panics_as_errors():
            return call_within(
                seconds, lambda: self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            )

    def _read(self, block: Block) -> tuple[list[str], list[str], list[str], int]:
        """(texts and domains of the documents taken, where and why records are bad, number of records)."""
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
                if is_taken(text, self.settings.take):
                    texts.append(text)
                    domains.append(domain)
        return texts, domains, bad, records


def is_taken(text: str, take: tuple[float, float]) -> bool:
    """Whether a document is in this share of all, a range of a hash of its text."""
    start, stop = take
    if (start, stop) == (0.0, 1.0):
        return True
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return start <= (int.from_bytes(digest, "big") >> 11) / (1 << 53) < stop

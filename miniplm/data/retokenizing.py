"""Ids of one tokenizer → ids of another, in worker processes that import neither torch nor transformers.

What is decoded is a *piece*: the ids between two ends of documents, without them. The first and the last
piece of a chunk may be parts of a document.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import UserError, reason
from ..runtime.guarded import call_within
from .chunking import boundaries, boundary_table
from .encoding import SECONDS_PER_BLOCK, SECONDS_PER_MIB
from .tokenizer import panics_as_errors

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no UTF-8 are decoded to


@dataclass(frozen=True)
class Piece:
    """ids int32 [n], EOS not among them; begins: a document begins with them; ends: EOS follows."""

    ids: np.ndarray
    begins: bool
    ends: bool


@dataclass(frozen=True)
class Unit:
    """What is to be encoded together: consecutive pieces of one domain. chunk: the number of the last chunk
    that they come from."""

    pieces: list[Piece]
    domain: str
    chunk: int


@dataclass(frozen=True)
class Encoded:
    """A unit in ids of the new tokenizer: ids int32 [n], boundary bool [n] (data/chunking.py). lost: how many
    of its pieces do not come back as the text that they were."""

    ids: np.ndarray
    boundary: np.ndarray
    domain: str
    chunk: int
    lost: int


def pieces_of(ids: np.ndarray, eos_token_id: int, begins: bool) -> Iterator[Piece]:
    """The pieces of ids [n], the first of which begins a document or not. Each but the last has an end;
    without ids behind the last EOS that one has too."""
    start = 0
    for end in np.flatnonzero(ids == eos_token_id).tolist():
        yield Piece(ids[start:end], begins, True)
        start, begins = end + 1, True
    if start < len(ids):
        yield Piece(ids[start:], begins, False)


@dataclass(frozen=True)
class RetokenizerSettings:
    """What a Retokenizer is made from: paths of the two tokenizer.json, the ids of EOS, and of the BOS that
    the old one's documents begin with and the new one's shall (None: with none)."""

    old: str
    old_eos: int
    old_bos: int | None
    new: str
    new_eos: int
    new_bos: int | None


class Retokenizer:
    """Encodes units anew, and looks whether their text comes back."""

    def __init__(self, settings: RetokenizerSettings):
        self.settings = settings
        self.old, self.new = _open(settings.old, settings.old_eos), _open(settings.new, settings.new_eos)
        self.table = boundary_table(self.new, settings.new_eos)
        # Text that spells a special token stays text.
        self.old.encode_special_tokens = self.new.encode_special_tokens = True

    def __call__(self, units: list[Unit]) -> list[Encoded]:
        """The units in new ids; UserError where a tokenizer fails, or takes too long."""
        pieces = [piece for unit in units for piece in unit.pieces]
        seconds = SECONDS_PER_BLOCK + SECONDS_PER_MIB * (sum(len(piece.ids) for piece in pieces) >> 17)
        try:
            with panics_as_errors():
                encoded = iter(call_within(seconds, lambda: self._encode(pieces)))
        except Exception as error:  # tokenizers raises Exception itself
            raise UserError(
                f"the text of chunk {units[0].chunk:,} or soon after cannot be encoded anew "
                f"({reason(error)}): use another tokenizer"
            ) from error
        return [self._joined(unit, [next(encoded) for _ in unit.pieces]) for unit in units]

    def _joined(self, unit: Unit, encoded: list[tuple[list[int], bool]]) -> Encoded:
        parts = []
        for piece, (new_ids, _) in zip(unit.pieces, encoded, strict=True):
            head = [] if self.settings.new_bos is None or not piece.begins else [self.settings.new_bos]
            parts.append([*head, *new_ids, *([self.settings.new_eos] if piece.ends else [])])
        ids = np.array([index for part in parts for index in part], np.int32)
        lost = sum(lost for _, lost in encoded)
        return Encoded(ids, boundaries(ids, self.table), unit.domain, unit.chunk, lost)

    def _encode(self, pieces: list[Piece]) -> list[tuple[list[int], bool]]:
        """(new ids, whether something of the text is lost) of each piece."""
        old_ids = [self._without_bos(piece) for piece in pieces]
        texts = self.old.decode_batch(old_ids, skip_special_tokens=False)
        again = [encoding.ids for encoding in self.old.encode_batch_fast(texts, add_special_tokens=False)]
        kept = [
            ids == old or self._same_text(ids, text)
            for ids, old, text in zip(again, old_ids, texts, strict=True)
        ]
        texts = [
            text if whole else _without_broken_ends(text, piece)
            for text, whole, piece in zip(texts, kept, pieces, strict=True)
        ]
        new_ids = [encoding.ids for encoding in self.new.encode_batch_fast(texts, add_special_tokens=False)]
        back = self.new.decode_batch(new_ids, skip_special_tokens=False)
        return [
            (ids, not whole or decoded != text)
            for ids, whole, decoded, text in zip(new_ids, kept, back, texts, strict=True)
        ]

    def _without_bos(self, piece: Piece) -> list[int]:
        ids: list[int] = piece.ids.tolist()
        return ids[1:] if piece.begins and ids and ids[0] == self.settings.old_bos else ids

    def _same_text(self, ids: list[int], text: str) -> bool:
        """Whether what a piece's text is encoded to, where that is not its ids (it was cut within a word), is
        that text."""
        return BROKEN not in text and self.old.decode(ids, skip_special_tokens=False) == text


def _without_broken_ends(text: str, piece: Piece) -> str:
    """The text without the rest of a letter that was cut in two where the document was."""
    text = text if piece.begins else text.lstrip(BROKEN)
    return text if piece.ends else text.rstrip(BROKEN)


def _open(path: str, eos_token_id: int) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_special_tokens([tokenizer.id_to_token(eos_token_id)])
    return tokenizer

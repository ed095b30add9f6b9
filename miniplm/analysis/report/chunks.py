"""Chunks of a corpus to read, their tokens with what they were compared by."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ...data.corpus import Corpus
from ...data.scores import ROLES
from ...data.token_scores import TokenScores
from ...data.tokenizer import load_tokenizer, tokenizer_errors
from .scores import Scored, extremes

EXAMPLES = 3  # chunks of each kind
SHOWN_TOKENS = 180  # of a chunk
SHOWN_LETTERS, PIECE_LETTERS = 1_200, 80  # of a chunk, of a token
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a part of a letter decodes to
MAX_PARTS = 8  # tokens of one letter
STEPS = (0.25, 0.75, 1.5, 3.0)  # nats: where a colour becomes stronger


class Piece(NamedTuple):
    """Text of one token, or of several that share a letter; style: its colour; value: log p_teacher −
    log p_reference in nats, None where it is not known."""

    text: str
    style: str
    value: float | None


class Example(NamedTuple):
    """score: nats per token; more: the tokens that are not shown."""

    domain: str
    score: float
    tokens: int
    pieces: list[Piece]
    more: int


class Examples(NamedTuple):
    title: str
    chunks: list[Example]


class ChunkReader:
    """The chunks of a scored corpus as they are shown."""

    def __init__(self, scored: Scored, corpus: Corpus):
        self.scored, self.corpus = scored, corpus
        self.tokenizer = load_tokenizer(corpus.tokenizer)
        self.token_scores = _token_scores(scored, corpus)

    @property
    def is_coloured(self) -> bool:
        return bool(self.token_scores)

    def examples(self, kept: np.ndarray) -> list[Examples]:
        """The best and the worst that were kept and dropped; kept: bool [chunks]."""
        score = self.scored.score
        (best, lowest), (highest, worst) = (extremes(score, each, EXAMPLES) for each in (kept, ~kept))
        kinds = {
            "Best kept": best,
            "Worst kept, just above the cut": lowest,
            "Best dropped, just below the cut": highest,
            "Worst dropped": worst,
        }
        return [Examples(title, [self._example(int(row)) for row in rows]) for title, rows in kinds.items()]

    def _example(self, row: int) -> Example:
        codes, names = self.corpus.domains
        ids = self.corpus.rows([row])[0].tolist()
        values = np.full(len(ids), np.nan)
        if self.token_scores:
            found = [each.of(np.array([row])) for each in self.token_scores]
            with np.errstate(invalid="ignore"):
                values[1:] = found[0] if len(found) == 1 else found[1] - found[0]
        with tokenizer_errors(str(self.corpus.folder)):
            pieces = coloured(split(self.tokenizer, ids[:SHOWN_TOKENS]), values)
        shown, letters = 0, 0
        while shown < len(pieces) and letters < SHOWN_LETTERS:
            letters += len(pieces[shown][0].text)
            shown += 1
        more = len(ids) - sum(count for _, count in pieces[:shown])
        texts = [piece for piece, _ in pieces[:shown]]
        return Example(names[codes[row]], float(self.scored.score[row]), len(ids), texts, more)


def _token_scores(scored: Scored, corpus: Corpus) -> list[TokenScores]:
    """Of one folder with both models, or of the teacher's and the reference's; [] where they were not
    kept."""
    if not all(manifest.get("token_files") for _, manifest in scored.folders):
        return []
    if len(scored.folders) == 1:
        return [TokenScores(scored.folders[0][0], corpus, "difference")]
    rules = [f"{role}_loss" for role in ROLES]
    return [TokenScores(path, corpus, rule) for (path, _), rule in zip(scored.folders, rules, strict=True)]


def split(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, int]]:
    """The text of ids in parts: (text, how many ids it is of). Ids that share a letter stay together."""

    def decode(start: int, stop: int) -> str:
        return tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False)

    parts = []
    before = start = 0  # the part before this one is decoded with it: spaces depend on it
    for stop in range(1, len(ids) + 1):
        text, known = decode(before, stop), decode(before, start)
        if text.endswith(UNFINISHED) and stop - start < MAX_PARTS and stop < len(ids):
            continue
        parts.append((text[len(known) :], stop - start))
        before, start = start, stop
    return parts


def coloured(parts: Sequence[tuple[str, int]], values: np.ndarray) -> list[tuple[Piece, int]]:
    """The parts with the mean of what their ids are compared by (float [ids or more], NaN where there is
    none), and how many ids each is of."""
    result, place = [], 0
    for text, count in parts:
        some = values[place : place + count]
        some = some[np.isfinite(some)]
        value = float(some.mean()) if len(some) else None
        if len(text) > PIECE_LETTERS:
            text = text[:PIECE_LETTERS] + "…"
        result.append((Piece(text, style_of(value), value), count))
        place += count
    return result


def style_of(value: float | None) -> str:
    """ "p1" … "p4" where the teacher finds a token likelier, "n1" … "n4" where the reference does, "" in
    between."""
    strength = 0 if value is None else sum(abs(value) >= step for step in STEPS)
    if value is None or not strength:
        return ""
    return f"{'p' if value > 0 else 'n'}{strength}"

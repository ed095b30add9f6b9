"""The chunking rule: streams of token ids → chunks.

The documents of one domain form one stream of token ids: each document's ids, then EOS. (An empty document is
just EOS. No other special token is added, and text that spells a special token is encoded as text, as far as
the tokenizer can: one that reaches a special id by its ordinary vocabulary still does.)

There is a *boundary* after position i of the stream if token i is EOS, or its text contains a newline, or all
of these hold:
  (a) its text, without closing quotes and brackets at its end (CLOSERS), ends in one of . ! ? ;
  (b) the text of token i + 1 starts with a space (EOS has no text);
  (c) the bracket depth after token i is 0. Each of ( [ { in a token's text adds 1, each of ) ] } takes 1
      away, never below 0; after EOS and after a token with a newline the depth is 0 again.

With L = max_length + 1: while the stream holds more than L ids, its first L ids are backed up to the last
boundary among them (no boundary: all L are taken) and become a chunk; the rest carries over. At the end of
the source what each domain has left, L ids at most, becomes its last chunk. Chunks are written in the order
in which reading the documents completes them, the last chunks in the order in which the domains first
appeared. The chunks of a domain, joined, are its stream: nothing is lost, nothing is added. (Gu et al., arXiv
2410.17215; the authors drop the last chunks and their lookahead is a list per tokenizer.)

A boundary depends on nothing outside its document, so worker processes find it; only the cutting is
sequential.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

CLOSERS = "\"'”’»)]}"
NEWLINE_OR_EOS, SENTENCE_END, SPACE, BRACKET = 1, 2, 4, 8
RESET = -(1 << 32)  # takes any depth below 0; int64 holds 2^31 of them


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


def boundary_table(tokenizer: Any, eos_token_id: int) -> BoundaryTable:
    """The table of a `tokenizers.Tokenizer`."""
    texts = token_texts(tokenizer)
    kind = np.zeros(len(texts), np.uint8)
    net, floor = np.zeros(len(texts), np.int64), np.zeros(len(texts), np.int64)
    for index, text in enumerate(texts):
        if text.startswith(" ") and index != eos_token_id:
            kind[index] |= SPACE
        if "\n" in text or index == eos_token_id:
            kind[index] |= NEWLINE_OR_EOS
            net[index] = RESET
            continue
        if text.rstrip(CLOSERS).endswith((".", "!", "?", ";")):
            kind[index] |= SENTENCE_END
        for character in text:
            if character in "([{":
                net[index], floor[index] = net[index] + 1, floor[index] + 1
                kind[index] |= BRACKET
            elif character in ")]}":
                net[index], floor[index] = net[index] - 1, max(floor[index] - 1, 0)
                kind[index] |= BRACKET
    return BoundaryTable(kind, net, floor)


def token_texts(tokenizer: Any) -> list[str]:
    """What every id of a `tokenizers.Tokenizer` adds to a text: decoded behind an "a", for alone it may lose
    its leading space. "" for unused ids."""
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
    """The ends of the chunks that are complete in a stream with these boundaries [n]: chunk k is
    ids[ends[k − 1]:ends[k]]."""
    last = np.flatnonzero(boundary) + 1
    ends, start = [], 0
    while len(boundary) - start > size:
        index = int(np.searchsorted(last, start + size, side="right"))
        start = int(last[index - 1]) if index and last[index - 1] > start else start + size
        ends.append(start)
    return ends


Chunk = tuple[str, np.ndarray]  # its domain, its ids (int32)


class Chunker:
    """Cuts the streams of all domains as their documents come.

    domains: {name: {"documents", "rows", "tokens"}} in the order of first appearance, rows being chunks;
    predictions: positions whose input is not EOS.

    Args:
        size: ids per chunk, at most.
    """

    def __init__(self, size: int, eos_token_id: int):
        self.size, self.eos_token_id = size, eos_token_id
        self.domains: dict[str, dict[str, int]] = {}
        self.predictions = 0
        self._rest: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # ids and boundaries that no chunk has yet

    def add(
        self, ids: np.ndarray, boundary: np.ndarray, lengths: np.ndarray, domains: list[str]
    ) -> list[Chunk]:
        """The chunks that these documents complete, in the order in which they do.

        Args:
            ids, boundary: int32 [n] and bool [n] of all documents, each with its EOS.
            lengths, domains: int64 [documents] and the names, of each document.
        """
        starts = np.concatenate([[0], np.cumsum(lengths)])
        documents_of: dict[str, list[int]] = {}
        for number, domain in enumerate(domains):
            documents_of.setdefault(domain, []).append(number)
        completed: list[tuple[int, str, np.ndarray]] = []
        for domain, numbers in documents_of.items():
            counts = self.domains.setdefault(domain, {"documents": 0, "rows": 0, "tokens": 0})
            counts["documents"] += len(numbers)
            parts = [slice(None)]
            if len(documents_of) > 1:
                parts = [slice(starts[number], starts[number + 1]) for number in numbers]
            completed += self._extend(domain, ids, boundary, parts, np.array(numbers), lengths[numbers])
        completed.sort(key=lambda chunk: chunk[0])
        return [self._count(domain, chunk) for _, domain, chunk in completed]

    def _extend(
        self,
        domain: str,
        ids: np.ndarray,
        boundary: np.ndarray,
        parts: list[slice],
        numbers: np.ndarray,
        lengths: np.ndarray,
    ) -> list[tuple[int, str, np.ndarray]]:
        """Add the documents `numbers` of these lengths, which are the parts of ids, to a domain's stream:
        (the document that completes it, the domain, the chunk's ids) for each chunk that becomes complete."""
        rest_ids, rest_boundary = self._rest.get(domain, (np.zeros(0, np.int32), np.zeros(0, bool)))
        stream = np.concatenate([rest_ids, *(ids[part] for part in parts)])
        stream_boundary = np.concatenate([rest_boundary, *(boundary[part] for part in parts)])
        ends = chunk_ends(stream_boundary, self.size)
        starts = np.array([0, *ends])
        # A chunk is completed by the first document that takes the stream past start + size.
        length_after = len(rest_ids) + np.cumsum(lengths)
        by = numbers[np.searchsorted(length_after, starts[:-1] + self.size, side="right")]
        self._rest[domain] = stream[starts[-1] :].copy(), stream_boundary[starts[-1] :].copy()
        return [
            (number, domain, stream[start:end])
            for number, start, end in zip(by.tolist(), starts[:-1], ends, strict=True)
        ]

    def alone(self, ids: np.ndarray, boundary: np.ndarray, domain: str) -> list[Chunk]:
        """The chunks of ids [n] with these boundaries [n] that share a chunk with no others."""
        self.domains.setdefault(domain, {"rows": 0, "tokens": 0})
        parts = np.split(ids, chunk_ends(boundary, self.size))
        return [self._count(domain, part) for part in parts if len(part)]

    def finish(self) -> list[Chunk]:
        """The last chunk of each domain."""
        return [self._count(domain, ids) for domain, (ids, _) in self._rest.items()]

    def _count(self, domain: str, ids: np.ndarray) -> Chunk:
        self.domains[domain]["rows"] += 1
        self.domains[domain]["tokens"] += len(ids)
        self.predictions += int(np.count_nonzero(ids[:-1] != self.eos_token_id))
        return domain, ids

    def state(self) -> dict[str, Any]:
        """All of it, JSON-able, for load."""
        rest = {
            domain: [ids.tolist(), np.flatnonzero(boundary).tolist()]
            for domain, (ids, boundary) in self._rest.items()
        }
        return {"domains": self.domains, "predictions": self.predictions, "rest": rest}

    def load(self, state: dict[str, Any]) -> None:
        """Go on where state() was taken."""
        self.domains, self.predictions = state["domains"], state["predictions"]
        for domain, (ids, at) in state["rest"].items():
            self._rest[domain] = np.array(ids, np.int32), np.isin(np.arange(len(ids)), at)

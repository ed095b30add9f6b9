"""The chunking rule once more, as data/chunking.py states it: token by token and character by character."""

import json
from pathlib import Path

EOS = "<|endoftext|>"


def oracle_is_boundary(stream, i, texts, eos) -> bool:
    if stream[i] == eos or "\n" in texts[stream[i]]:
        return True
    text = texts[stream[i]]
    while text and text[-1] in "\"'”’»)]}":
        text = text[:-1]
    if (
        text[-1:] not in (".", "!", "?", ";")
        or i + 1 == len(stream)
        or stream[i + 1] == eos
        or texts[stream[i + 1]][:1] != " "
    ):
        return False
    start = i
    while start > 0 and stream[start - 1] != eos and "\n" not in texts[stream[start - 1]]:
        start -= 1
    depth = 0
    for token in stream[start : i + 1]:
        for character in texts[token]:
            depth = depth + 1 if character in "([{" else max(0, depth - 1) if character in ")]}" else depth
    return depth == 0


def oracle_chunks(documents, texts, eos, size):
    """(domain, ids) of every chunk, in order, of documents (domain, ids without EOS)."""
    streams, starts, chunks = {}, {}, []
    for domain, ids in documents:
        stream = streams.setdefault(domain, [])
        stream += [*ids, eos]
        start = starts.setdefault(domain, 0)
        while len(stream) - start > size:
            end = start + size
            while end > start and not oracle_is_boundary(stream, end - 1, texts, eos):
                end -= 1
            end = end if end > start else start + size
            chunks.append((domain, stream[start:end]))
            start = starts[domain] = end
    return chunks + [(domain, stream[starts[domain] :]) for domain, stream in streams.items()]


def byte_level_texts(folder):
    """The texts of the tiny tokenizer's ids from its own alphabet, without a decoder."""
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256)]
    to_byte = {chr(byte): byte for byte in alphabet} | {
        chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in alphabet)
    }
    vocabulary = json.loads(Path(folder, "tokenizer.json").read_text())["model"]["vocab"]
    return {
        index: token if token == EOS else bytes(to_byte[c] for c in token).decode(errors="replace")
        for token, index in vocabulary.items()
    }

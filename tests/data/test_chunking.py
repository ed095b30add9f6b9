"""The chunking rule: against a naive oracle on streams made to break it, by hand, and for each family of
tokenizers."""

import json
import random

import numpy as np
import pytest
from chunk_oracle import EOS, oracle_chunks, oracle_is_boundary
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from miniplm.data.chunking import Chunker, boundaries, boundary_table, chunk_ends, token_texts

# A vocabulary made to break the rule: every text is one token, as it stands.
TEXTS = [
    EOS,
    "a",
    " a",
    ".",
    " .",
    "!",
    "? ",
    ";",
    '."',
    ".)",
    ".’”",
    " (",
    "(",
    ")",
    "([{",
    "]",
    "}}",
    ")(",
    "(.)",
    ").",
    "\n",
    ".\n",
    "\n (",
    " ",
    '"',
    "»",
    "…",
    "é.",
    "。",
    "",
]


def toy_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(
        models.WordLevel({text or "<nothing>": index for index, text in enumerate(TEXTS)}, unk_token="a")
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("<nothing>", ""), decoders.Fuse()])
    return tokenizer


def as_documents(batch, table, eos):
    """What Chunker.add takes, of documents (domain, ids without EOS)."""
    ids = np.array([token for _, document in batch for token in [*document, eos]], np.int32)
    lengths = np.array([len(document) + 1 for _, document in batch], np.int64)
    return ids, boundaries(ids, table), lengths, [domain for domain, _ in batch]


def chunked(documents, table, eos, size, rng):
    """The chunks that Chunker gives when the documents come in random batches, its state going through JSON
    now and then."""
    chunker, chunks = Chunker(size, eos), []
    while documents:
        batch, documents = documents[: (count := rng.randrange(1, 6))], documents[count:]
        chunks += chunker.add(*as_documents(batch, table, eos))
        if rng.random() < 0.3:
            state, chunker = json.loads(json.dumps(chunker.state())), Chunker(size, eos)
            chunker.load(state)
    chunks += chunker.finish()
    return [(domain, ids.tolist()) for domain, ids in chunks], chunker


@pytest.mark.parametrize("seed", range(60))
def test_chunks_are_the_oracles(seed):
    rng = random.Random(seed)
    table = boundary_table(toy_tokenizer(), 0)
    common = rng.sample(
        range(len(TEXTS)), rng.randrange(1, len(TEXTS))
    )  # EOS may be among them: a token as any other, and a boundary
    domains = "xyz"[: rng.randrange(1, 4)]
    documents = [
        (rng.choice(domains), rng.choices(common, k=rng.choice([0, 0, 1, 2, 7, 40])))
        for _ in range(rng.randrange(1, 30))
    ]
    for size in (2, 3, 5, 17, 64):
        chunks, chunker = chunked(documents, table, 0, size, rng)
        assert chunks == oracle_chunks(documents, TEXTS, 0, size)
        for domain in {domain for domain, _ in documents}:
            ids = [ids for name, ids in chunks if name == domain]
            own = [document for name, document in documents if name == domain]
            assert [token for chunk in ids for token in chunk] == [
                token for document in own for token in [*document, 0]
            ]
            assert chunker.domains[domain] == {
                "documents": len(own),
                "rows": len(ids),
                "tokens": sum(map(len, ids)),
            }
        assert chunker.predictions == sum(token != 0 for _, ids in chunks for token in ids[:-1])


@pytest.mark.parametrize(
    "tokens, expected",
    [
        (["a", ".", " a"], [0, 1, 0]),
        (["a", ".", "a"], [0, 0, 0]),
        (["a", "."], [0, 0]),
        ([" a", "? ", " a"], [0, 0, 0]),
        (['."', " a"], [1, 0]),
        ([".)", " a"], [1, 0]),
        ([".’”", " ."], [1, 0]),
        ([")", " a"], [0, 0]),
        ([".", '"', " a"], [0, 0, 0]),
        ([" (", ".", " a", ")", ".", " a"], [0, 0, 0, 0, 1, 0]),
        (["([{", "}}", ".", " a", ").", " a"], [0, 0, 0, 0, 1, 0]),
        ([")", "(", ".", " a"], [0, 0, 0, 0]),
        ([")(", ".", " a"], [0, 0, 0]),
        (["(.)", ".", " a"], [0, 1, 0]),
        (["(", "\n", ".", " a"], [0, 1, 1, 0]),
        (["\n (", ".", " a"], [1, 1, 0]),
        (["(", EOS, ".", " a"], [0, 1, 1, 0]),
        ([".", EOS, " a"], [0, 1, 0]),
        (["。", " a"], [0, 0]),
        ([".", " "], [1, 0]),
    ],
    ids=str,
)
def test_boundaries_by_hand(tokens, expected):
    ids = np.array([TEXTS.index(token) for token in tokens], np.int32)
    assert boundaries(ids, boundary_table(toy_tokenizer(), 0)).tolist() == [bool(value) for value in expected]
    assert [oracle_is_boundary(ids.tolist(), i, TEXTS, 0) for i in range(len(ids))] == [
        bool(value) for value in expected
    ]


def test_chunk_ends():
    def ends(pattern, size):
        return chunk_ends(np.array([character == "|" for character in pattern]), size)

    assert ends("", 3) == ends("...", 3) == ends("|||", 3) == []
    assert (
        ends("....", 3) == [3]
        and ends("|...", 3) == [1]
        and ends(".|.|....", 4) == [4]
        and ends(".|.......", 4) == [2, 6]
    )
    assert ends("|" * 7, 3) == [3, 6] and ends("..|..|..|.", 5) == [3, 6]


# What a token id adds to a text, for each family of tokenizers.


def added_texts(tokenizer: Tokenizer, text: str):
    """The texts of the ids of `text` as the boundary table sees them."""
    texts = token_texts(tokenizer)
    return [texts[index] for index in tokenizer.encode(text, add_special_tokens=False).ids]


def test_token_texts_byte_level(tiny_tokenizer):
    tokenizer = Tokenizer.from_file(f"{tiny_tokenizer}/tokenizer.json")
    text = 'The teacher (small) reads.\r\n "It" learns; zzz\t\n\n end.'
    assert "".join(added_texts(tokenizer, text)) == text
    assert set("".join(added_texts(tokenizer, "🙃"))) == {"\ufffd"}  # an emoji split over tokens
    texts = token_texts(tokenizer)
    assert len(texts) == 500 and texts[0] == EOS


def test_token_texts_sentencepiece():
    pieces = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdeT.(",
        "▁T",
        "ab",
        "▁ab",
    ]
    model = models.BPE(
        {piece: index for index, piece in enumerate(pieces)},
        [("▁", "T"), ("a", "b"), ("▁", "ab")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    assert added_texts(tokenizer, "ab ab.\nT (d") == [" ab", " ab", ".", "\n", "T", " ", "(", "d"]
    ids = np.array([*tokenizer.encode("ab (c. ab) ab. Tab\nab. ab").ids, 1], np.int32)
    found = boundaries(ids, boundary_table(tokenizer, 1))
    assert [tokenizer.id_to_token(index) for index in ids[found]] == [
        ".",
        "<0x0A>",
        ".",
        "</s>",
    ] and not found[:4].any()


def test_token_texts_unigram():
    pieces = [("<unk>", 0.0), ("▁", -5.0), ("▁a", -1.0), ("a", -2.0), ("b", -2.0), (".", -2.0), ("▁b.", -1.5)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert added_texts(tokenizer, "a a. b.a") == [" a", " a", ".", " b.", "a"]


def test_token_texts_wordpiece():
    vocabulary = {
        token: index for index, token in enumerate(["[UNK]", "[SEP]", "a", "##b", "c", ".", "(", ")"])
    }
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    assert added_texts(tokenizer, "ab c. (c)") == [" a", "b", " c", ".", " (", " c", " )"]
    ids = np.array([*tokenizer.encode("ab. c (ab. c) c.").ids, 1], np.int32)
    assert np.flatnonzero(boundaries(ids, boundary_table(tokenizer, 1))).tolist() == [
        2,
        len(ids) - 1,
    ]  # the last . is followed by EOS


def test_token_texts_with_holes():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, ".": 3, " b": 90}, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    texts = token_texts(tokenizer)
    assert len(texts) == 91 and (texts[0], texts[3], texts[90]) == ("a", ".", " b") and not any(texts[4:90])

"""prepare: what it writes, on text made to break it."""

import json
import random
import shutil
import time

import numpy as np
import pyarrow.parquet
import pytest
from chunk_oracle import EOS, byte_level_texts, oracle_chunks
from outputs import contents
from texts import make_text, write_jsonl
from tokenizers import AddedToken, Tokenizer

from miniplm.config import PrepareConfig
from miniplm.data import readers
from miniplm.data.corpus import Corpus
from miniplm.data.tokenizer import load_tokenizer
from miniplm.runtime.errors import UserError
from miniplm.stages.prepare import prepare

ADVERSARIAL = [
    "",
    "",
    "no sentence end " * 40,
    "word. " * 100,
    "(((never. closed. " * 30,
    "((a. b. [c. {d. }] ) e. f.) g. " * 10,
    ")]} a. b) c. (",
    "\n",
    "line\r\nnext\r\n\r\nlast",
    "🙂🙃 🤖. 👩‍👩‍👧‍👦! 漢字。かな。 é; " * 12,
    "x" * 3_000,
    "a",
    ".",
    " ",
    EOS,
    f"text {EOS} and. {EOS}",
    "\x00\x01\ufffe.",
    "(\n. a. " * 20,
    'He said "no." Then (she. said) "yes!" twice; ' * 8,
    "\u2028\u2029\x85.",
    "end.",
    "",
    "3.14 e.g. U.S.A. ..." * 9,
]


def test_adversarial_text_end_to_end(tiny_tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1_000)
    rng = random.Random(3)
    texts = [
        rng.choice([rng.choice(ADVERSARIAL), make_text(rng, rng.randrange(60))]) for _ in range(200)
    ] + ADVERSARIAL
    domains = [rng.choice(["web", "böoks", "", "[/b]"]) for _ in texts]
    data = write_jsonl(tmp_path / "data.jsonl", texts, domains)
    config = PrepareConfig(
        data=data,
        tokenizer=tiny_tokenizer,
        output=str(tmp_path / "out"),
        domain_column="domain",
        max_length=40,
        workers=1,
        shard_tokens=5_000,
    )
    prepare(config)
    plain = Tokenizer.from_file(f"{tiny_tokenizer}/tokenizer.json")
    plain.encode_special_tokens = True
    expected = oracle_chunks(
        [(domain, plain.encode(text).ids) for domain, text in zip(domains, texts, strict=True)],
        byte_level_texts(tiny_tokenizer),
        0,
        41,
    )
    table = Corpus(tmp_path / "out").table
    assert table.column("domain").to_pylist() == [domain for domain, _ in expected]
    assert table.column("input_ids").to_pylist() == [ids for _, ids in expected]
    assert table.column("num_tokens").to_pylist() == [len(ids) for _, ids in expected]
    manifest = Corpus(tmp_path / "out").manifest
    tokens = [token for _, ids in expected for token in ids]
    assert tokens.count(0) == len(texts)  # no EOS but the documents' own
    assert (manifest["rows"], manifest["tokens"], manifest["bad_records"]) == (len(expected), len(tokens), 0)
    assert manifest["predictions"] == sum(token != 0 for _, ids in expected for token in ids[:-1])
    assert list(manifest["domains"]) == list(dict.fromkeys(domains))
    assert sum(counts["documents"] for counts in manifest["domains"].values()) == len(texts)
    facts = ("eos_token_id", "vocab_size", "max_length", "source")
    assert [manifest[key] for key in facts] == [0, 500, 40, "data.jsonl"]
    assert len(list((tmp_path / "out").glob("data-*.arrow"))) > 3
    assert not (tmp_path / "out" / "progress.json").exists()
    assert str(tmp_path).encode() not in b"".join(contents(tmp_path / "out").values())
    decoded = plain.decode(
        [token for domain, ids in expected if domain == "web" for token in ids], skip_special_tokens=False
    )
    assert decoded == "".join(
        text + EOS for text, domain in zip(texts, domains, strict=True) if domain == "web"
    )
    before, printed = contents(tmp_path / "out"), capsys.readouterr().out
    assert (
        f"{len(expected):,}" in printed
        and f"{len(texts)}" in printed
        and "böoks" in printed
        and "[/b]" in printed
    )
    prepare(config)
    assert "nothing to do" in capsys.readouterr().out and contents(tmp_path / "out") == before


def test_a_long_document_without_a_space(tiny_tokenizer, tmp_path):
    rng = random.Random(5)
    text = "".join(rng.choices("abcdefghijklmnop", k=1_000_000))
    data = write_jsonl(tmp_path / "data.jsonl", [text])
    start = time.process_time()
    prepare(PrepareConfig(data=data, tokenizer=tiny_tokenizer, output=str(tmp_path / "out"), workers=1))
    assert time.process_time() - start < 30
    chunks = Corpus(tmp_path / "out")
    lengths = chunks.num_tokens
    assert (lengths[:-1] == 1025).all() and 0 < lengths[-1] <= 1025
    assert (
        Tokenizer.from_file(f"{tiny_tokenizer}/tokenizer.json").decode(
            np.concatenate(chunks.rows(range(len(chunks))))[:-1].tolist()
        )
        == text
    )


def test_same_bytes_for_any_number_of_workers_and_any_source_format(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 2_000)
    rng = random.Random(0)
    texts = [make_text(rng, 30) for _ in range(150)]
    write_jsonl(tmp_path / "data.jsonl", texts, [rng.choice("ab") for _ in texts])
    outputs = []
    for workers in (1, 2, 3):
        prepare(
            PrepareConfig(
                data=str(tmp_path / "data.jsonl"),
                tokenizer=tiny_tokenizer,
                output=str(tmp_path / f"out{workers}"),
                workers=workers,
                domain_column="domain",
                max_length=50,
                shard_tokens=2_000,
            )
        )
        outputs.append(contents(tmp_path / f"out{workers}"))
    assert outputs[0] == outputs[1] == outputs[2] and len(outputs[0]) > 6
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    prepare(
        PrepareConfig(
            data=str(tmp_path / "data.parquet"),
            tokenizer=tiny_tokenizer,
            output=str(tmp_path / "parquet"),
            workers=1,
            domain_column="domain",
            max_length=50,
            shard_tokens=2_000,
        )
    )
    assert Corpus(tmp_path / "parquet").table.equals(Corpus(tmp_path / "out1").table)


def test_take_splits(tiny_tokenizer, tmp_path):
    rng = random.Random(0)
    texts = [make_text(rng, 5) for _ in range(2_000)]
    data = write_jsonl(tmp_path / "data.jsonl", texts + texts[:100])
    parts = []
    for number, take in enumerate([(0.0, 0.2), (0.2, 1.0), (0.0, 1.0)]):
        prepare(
            PrepareConfig(
                data=data,
                tokenizer=tiny_tokenizer,
                output=str(tmp_path / str(number)),
                workers=1,
                take=take,
                max_length=64,
            )
        )
        chunks = Corpus(tmp_path / str(number))
        ids = np.concatenate(chunks.rows(range(len(chunks)))).tolist()
        parts.append(load_tokenizer(tiny_tokenizer).decode(ids, skip_special_tokens=False).split(EOS)[:-1])
    assert sorted(parts[0] + parts[1]) == sorted(parts[2]) == sorted(texts + texts[:100])
    assert not set(parts[0]) & set(parts[1])  # equal texts are in the same part
    assert 0.15 < len(parts[0]) / len(parts[2]) < 0.25


def test_eos_token(tiny_tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast

    data = write_jsonl(tmp_path / "data.jsonl", ["a <end> b", "c"])
    backend = Tokenizer.from_file(f"{tiny_tokenizer}/tokenizer.json")
    backend.add_tokens(
        [AddedToken("<end>", special=False)]
    )  # not special: found in text, unless prepare sees to it
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "tokenizer")
    config = dict(data=data, tokenizer=str(tmp_path / "tokenizer"), output=str(tmp_path / "out"), workers=1)
    with pytest.raises(UserError, match="names no token that ends a document: give one with --eos-token"):
        prepare(PrepareConfig(**config))
    with pytest.raises(UserError, match="has no token '<stop>': give --eos-token one that it has"):
        prepare(PrepareConfig(**config, eos_token="<stop>"))
    assert not (tmp_path / "out").exists()
    prepare(PrepareConfig(**config, eos_token="<end>"))
    chunks = Corpus(tmp_path / "out")
    assert chunks.eos_token_id == 500 and chunks.rows([0])[0].tolist().count(500) == 2
    assert load_tokenizer(chunks.tokenizer).eos_token == "<end>"


def test_a_tokenizer_that_truncates_and_pads_is_not_obeyed(tiny_tokenizer, tmp_path):
    backend = Tokenizer.from_file(f"{tiny_tokenizer}/tokenizer.json")
    texts = ["The teacher scores every token of a chunk. " * 4, "a"]
    expected = [token for text in texts for token in [*backend.encode(text).ids, 0]]
    backend.enable_truncation(4)
    backend.enable_padding(length=8, pad_id=1)
    shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer")
    backend.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    data = write_jsonl(tmp_path / "data.jsonl", texts)
    prepare(
        PrepareConfig(
            data=data, tokenizer=str(tmp_path / "tokenizer"), output=str(tmp_path / "out"), workers=1
        )
    )
    assert Corpus(tmp_path / "out").rows([0])[0].tolist() == expected


def test_integers_name_domains(tiny_tokenizer, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", ["a", "b", "c"], [7, "x", 7])
    prepare(
        PrepareConfig(
            data=data,
            tokenizer=tiny_tokenizer,
            output=str(tmp_path / "out"),
            workers=1,
            domain_column="domain",
        )
    )
    assert Corpus(tmp_path / "out").table.column("domain").to_pylist() == ["7", "x"]


def test_a_thousand_domains_do_not_flood_the_summary(tiny_tokenizer, tmp_path, capsys):
    data = write_jsonl(tmp_path / "data.jsonl", ["a"] * 1_000, [f"d{number}" for number in range(1_000)])
    prepare(
        PrepareConfig(
            data=data,
            tokenizer=tiny_tokenizer,
            output=str(tmp_path / "out"),
            workers=1,
            domain_column="domain",
        )
    )
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) < 50 and "970 more" in printed and "2,000" in printed
    assert Corpus(tmp_path / "out").table.column("domain").to_pylist() == [
        f"d{number}" for number in range(1_000)
    ]

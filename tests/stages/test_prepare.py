"""prepare: what it writes, on text made to break it; bad records; a user's mistakes."""

import gzip
import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from test_chunking import EOS, byte_level_texts, oracle_chunks
from texts import make_text
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from miniplm.config import PrepareConfig
from miniplm.data import sources
from miniplm.data.corpus import Corpus
from miniplm.data.tokenizer import load_tokenizer
from miniplm.runtime.artifacts import open_output
from miniplm.runtime.errors import UserError
from miniplm.stages import prepare as corpus
from miniplm.stages.prepare import prepare


def write_jsonl(path, texts, domains=None) -> str:
    rows = [
        {"text": text} if domains is None else {"text": text, "domain": domain}
        for text, domain in zip(texts, domains or texts, strict=True)
    ]
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline=""
    )
    return str(path)


def contents(folder) -> dict:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


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
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1_000)
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
    assert (manifest["eos_token_id"], manifest["vocab_size"], manifest["max_length"], manifest["source"]) == (
        0,
        500,
        40,
        "data.jsonl",
    )
    assert (
        len(list((tmp_path / "out").glob("data-*.arrow"))) > 3
        and not (tmp_path / "out" / "progress.json").exists()
    )
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
    monkeypatch.setattr(sources, "BLOCK_BYTES", 2_000)
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


# Bad records.

BAD = {
    b'{"text": "cut off': "not valid JSON .Invalid control character at, column 18",
    b'{"text": 1}': "column 'text' is of type int, not text",
    b'{"text": null}': "column 'text' is null, not text",
    b'{"text": ["a"]}': "column 'text' is of type list",
    b'{"body": "a", "id": 3}': r"no column 'text' .there are: 'body', 'id'.",
    b"{}": "no column 'text' .there are: none.",
    b'["text"]': "a JSON value of type list, not an object",
    b"null": "a JSON value null, not an object",
    b'"text"': "a JSON value of type str",
    b'{"text": "\xff\xfe"}': "not UTF-8 .byte 0xff at 10",
    b'{"text": "\\ud83d"}': "column .text. holds half of a surrogate pair",
    b"[" * 200_000: "not valid JSON .nested too deeply",
    b'{"text": "a"} {"text": "b"}': "not valid JSON .Extra data",
    b"\x00\x00": "not valid JSON",
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:30].decode("latin-1"))
def test_the_first_bad_record_stops_the_run(tiny_tokenizer, tmp_path, line):
    data = tmp_path / "data.jsonl"
    data.write_bytes(b'{"text": "good"}\r\n\n   \n' + line + b'\n{"text": "good"}\n')
    config = PrepareConfig(data=str(data), tokenizer=tiny_tokenizer, output=str(tmp_path / "out"), workers=1)
    with pytest.raises(UserError, match=f"^{data}:4: {BAD[line]}") as caught:
        prepare(config)
    assert "--max-bad-fraction" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()  # nothing half-written: the corrected command can have the name


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"text": "a"}, r"no column 'domain' .there are: 'text'."),
        ({"text": "a", "domain": None}, "column 'domain' is null, not the name of a domain"),
        ({"text": "a", "domain": 1.5}, "of type float"),
        ({"text": "a", "domain": True}, "of type bool"),
        ({"text": "a", "domain": {}}, "of type dict"),
    ],
    ids=str,
)
def test_bad_domains(tiny_tokenizer, tmp_path, row, reason):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(row))
    with pytest.raises(UserError, match=f"^{data}:1: .*{reason}"):
        prepare(
            PrepareConfig(
                data=str(data),
                tokenizer=tiny_tokenizer,
                output=str(tmp_path / "out"),
                workers=1,
                domain_column="domain",
            )
        )


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


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_records_within_the_allowance_are_counted_and_reported(tiny_tokenizer, tmp_path, capsys, workers):
    data = tmp_path / "data.jsonl"
    data.write_bytes(
        b"".join(
            b"{bad\n" if number % 10 == 0 else b'{"text": "good %d"}\n' % number for number in range(200)
        )
    )
    config = dict(data=str(data), tokenizer=tiny_tokenizer, workers=workers)
    prepare(PrepareConfig(**config, output=str(tmp_path / "out"), max_bad_fraction=0.1))
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "skipped" in line]
    assert [line.split(": ")[1] for line in lines] == [
        f"skipped {data}:{number}" for number in (1, 11, 21, 31, 41)
    ]
    assert "20 bad records" in captured.out
    manifest = Corpus(tmp_path / "out").manifest
    assert manifest["bad_records"] == 20 and manifest["domains"]["default"]["documents"] == 180
    with pytest.raises(
        UserError,
        match=rf"^{data}:1: not valid JSON .* \(20 bad of 200 records, more than --max-bad-fraction 0.099 "
        rf"allows\)",
    ):
        prepare(
            PrepareConfig(**config, output=str(tmp_path / "other"), max_bad_fraction=0.099)
        )  # at the end, over all records
    assert not (tmp_path / "other").exists()


def test_too_many_bad_records_stop_the_run_early(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 200)
    monkeypatch.setattr(corpus, "PATIENCE", 100)
    data = tmp_path / "data.jsonl"
    data.write_bytes(b'{"text": "good"}\n' * 50 + b"{bad\n" * 5_000)
    with pytest.raises(UserError, match=r"data.jsonl:51: .* of (\d+) records") as caught:
        prepare(
            PrepareConfig(
                data=str(data),
                tokenizer=tiny_tokenizer,
                output=str(tmp_path / "out"),
                workers=1,
                max_bad_fraction=0.5,
            )
        )
    assert "of 5,050 records" not in str(caught.value)


def test_a_larger_allowance_continues_the_stopped_run(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 500)
    rng = random.Random(0)
    data = tmp_path / "data.jsonl"
    write_jsonl(data, [make_text(rng, 30) for _ in range(50)])
    data.write_bytes(data.read_bytes() + b"{bad\n")
    config = dict(
        data=str(data),
        tokenizer=tiny_tokenizer,
        output=str(tmp_path / "out"),
        workers=1,
        shard_tokens=500,
        max_length=64,
    )
    with pytest.raises(UserError, match=r"data.jsonl:51: not valid JSON"):
        prepare(PrepareConfig(**config))
    first = (tmp_path / "out" / "data-00000.arrow").stat()
    prepare(PrepareConfig(**config, max_bad_fraction=0.1))
    assert (tmp_path / "out" / "data-00000.arrow").stat().st_ino == first.st_ino  # not written again
    prepare(PrepareConfig(**config | {"output": str(tmp_path / "whole")}, max_bad_fraction=0.1))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# Other mistakes.


@pytest.mark.parametrize(
    "content, take", [(b"", (0.0, 1.0)), (b"\n\n \n", (0.0, 1.0)), (b'{"text": "a"}\n', (0.0, 1e-9))]
)
def test_an_empty_corpus_is_refused(tiny_tokenizer, tmp_path, content, take):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"data.jsonl holds no document"):
        prepare(
            PrepareConfig(
                data=str(tmp_path / "data.jsonl"),
                tokenizer=tiny_tokenizer,
                output=str(tmp_path / "out"),
                workers=1,
                take=take,
            )
        )
    assert not (tmp_path / "out").exists()


def test_a_failed_run_removes_only_what_it_wrote(tiny_tokenizer, tmp_path, monkeypatch):
    def begin(folder, *arguments):
        complete = open_output(folder, *arguments)
        (folder / "notes.txt").write_text("somebody's")
        return complete

    monkeypatch.setattr(corpus, "open_output", begin)
    data = write_jsonl(tmp_path / "data.jsonl", ["good"])
    with pytest.raises(UserError, match="no column 'body'"):
        prepare(
            PrepareConfig(
                data=data,
                tokenizer=tiny_tokenizer,
                output=str(tmp_path / "out"),
                workers=1,
                text_column="body",
            )
        )
    assert list(contents(tmp_path / "out")) == ["notes.txt"]


def test_a_source_that_breaks_off_is_refused(tiny_tokenizer, tmp_path):
    data = tmp_path / "data.jsonl.gz"
    data.write_bytes(gzip.compress(b'{"text": "good"}\n' * 1000)[:-9])
    with pytest.raises(UserError, match=f"^{data} cannot be read"):
        prepare(
            PrepareConfig(data=str(data), tokenizer=tiny_tokenizer, output=str(tmp_path / "out"), workers=1)
        )
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_fails(tmp_path):
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.WordLevel({"a": 0, "</s>": 1}, unk_token="[UNK]")
    )  # no [UNK] in the vocabulary
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(
        tmp_path / "tokenizer"
    )
    data = write_jsonl(tmp_path / "data.jsonl", ["a", "unknown"])
    with pytest.raises(
        UserError, match=r"the tokenizer cannot encode the text at .*data.jsonl:1 or soon after"
    ):
        prepare(
            PrepareConfig(
                data=data, tokenizer=str(tmp_path / "tokenizer"), output=str(tmp_path / "out"), workers=1
            )
        )


def test_output_of_another_run_is_refused(tiny_tokenizer, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", ["a"])
    config = dict(data=data, tokenizer=tiny_tokenizer, output=str(tmp_path / "out"), workers=1)
    prepare(PrepareConfig(**config))
    before = contents(tmp_path / "out")
    for change in (
        {"max_length": 5},
        {"text_column": "other"},
        {"take": (0.0, 0.5)},
        {"shard_tokens": 10},
        {"domain_column": "text"},
    ):
        with pytest.raises(UserError, match=f"holds another prepare run .{next(iter(change))}"):
            prepare(PrepareConfig(**config | change))
    write_jsonl(tmp_path / "data.jsonl", ["b"])
    with pytest.raises(UserError, match=r"holds another prepare run \(source"):
        prepare(PrepareConfig(**config))
    assert contents(tmp_path / "out") == before

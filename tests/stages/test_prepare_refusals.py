"""prepare: bad records, and a user's mistakes."""

import gzip
import json
import random

import pytest
from outputs import contents
from texts import make_text, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers

from miniplm.config import PrepareConfig
from miniplm.data import readers
from miniplm.data.corpus import Corpus
from miniplm.runtime.artifacts import open_output
from miniplm.runtime.errors import UserError
from miniplm.stages import prepare as stage
from miniplm.stages.prepare import prepare

BAD = {
    b'{"text": "cut off': "not valid JSON .column 18",
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
    b'{"text": "a"} {"text": "b"}': "not valid JSON .column 15",
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
    monkeypatch.setattr(readers, "BLOCK_BYTES", 200)
    monkeypatch.setattr(stage, "MIN_RECORDS_FOR_SHARE", 100)
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
    monkeypatch.setattr(readers, "BLOCK_BYTES", 500)
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


# --- other mistakes ---


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

    monkeypatch.setattr(stage, "open_output", begin)
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
        models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="[UNK]")
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

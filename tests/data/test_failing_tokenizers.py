"""Tokenizers that panic, or search for ever: one line, in time, wherever text is encoded."""

import json
import shutil
import time

import pytest
from texts import write_jsonl

from miniplm.cli import main
from miniplm.config import PrepareConfig
from miniplm.data import encoding
from miniplm.runtime.errors import UserError
from miniplm.stages.prepare import prepare

PANICS = {"type": "Prepend", "prepend": ""}
GIVES_UP = {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": "z"}  # after 10 million steps


@pytest.fixture
def spoiled(tiny_tokenizer, tmp_path):
    """spoiled(normalizer): the folder of the tiny tokenizer with this normalizer."""

    def make(normalizer) -> str:
        folder = shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer")
        content = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(content | {"normalizer": normalizer}))
        return str(folder)

    return make


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("normalizer", [PANICS, GIVES_UP])
def test_prepare(spoiled, tmp_path, capfd, normalizer, workers):
    data, output = write_jsonl(tmp_path / "data.jsonl", ["good", "x" * 60]), str(tmp_path / "out")
    arguments = ["--data", data, "--tokenizer", spoiled(normalizer), "--output", output]
    assert main(["prepare", *arguments, "--workers", str(workers)]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"miniplm prepare: the tokenizer cannot encode the text at {data}:1 or soon after")
    assert (
        "(the tokenizers library panicked)" in said
        and said.count("\n") == 1
        and not (tmp_path / "out").exists()
    )


@pytest.mark.slow
def test_prepare_leaves_a_search_that_does_not_end(spoiled, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "SECONDS_PER_BLOCK", 2)
    data = write_jsonl(
        tmp_path / "data.jsonl", [("x" * 19 + " ") * 2_000]
    )  # at each x just short of giving up
    settings = dict(data=data, tokenizer=spoiled(GIVES_UP), output=str(tmp_path / "out"), workers=1)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"cannot encode .*data.jsonl:1 .*no answer within 2 seconds"):
        prepare(PrepareConfig(**settings))
    assert time.monotonic() - start < 30


def test_generate(spoiled, tiny_model, tmp_path, capfd):
    model = tiny_model(tmp_path / "model")
    shutil.copytree(spoiled(PANICS), model, dirs_exist_ok=True)
    capfd.readouterr()
    assert main(["generate", "--model", model, "--prompt", "xyz"]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"miniplm generate: the tokenizer of {model} cannot encode a text (the tokenizers")
    assert "panicked" in said and said.count("\n") == 1

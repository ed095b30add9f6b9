"""Models that come without tokenizer files: every command that wants a tokenizer says so."""

import shutil

import pytest

from miniplm.cli import main


@pytest.fixture
def bare(teacher, tmp_path) -> str:
    """The teacher without its tokenizer, of which transformers makes up an empty one."""
    folder = tmp_path / "bare"
    shutil.copytree(teacher, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    return str(folder)


@pytest.mark.parametrize(
    "arguments",
    [
        "score --data {corpus} --teacher {bare} --reference {whole} --output {output}",
        "score --data {corpus} --teacher {whole} --reference {bare} --output {output}",
        "evaluate --data {corpus} --model {bare} --output {output}",
        "generate --model {bare} --prompt x",
        "train --data {corpus} --init_from {bare} --output {output}",
        "train --data {corpus} --distill.teacher {bare} --output {output}",
        "prepare --data {bare}/data.txt --tokenizer {bare} --output {output}",
    ],
)
def test_one_line_names_the_way_out(arguments, bare, teacher, tiny_corpus, tmp_path, capfd):
    output = tmp_path / "output"
    (tmp_path / "bare" / "data.txt").write_text("text")
    filled = [
        part.format(corpus=tiny_corpus, bare=bare, whole=teacher, output=output) for part in arguments.split()
    ]
    assert main(filled) == 2
    said = capfd.readouterr()
    assert said.err.startswith(f"miniplm {filled[0]}: folder {bare} holds no tokenizer files: put ")
    assert said.err.count("\n") == 1 and said.out == "" and not output.exists()

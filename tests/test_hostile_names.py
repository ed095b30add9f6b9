"""Names that a terminal would obey, through the whole pipeline: of folders, files, models, domains, text."""

import json
import os
import random
import shutil

import pytest
from texts import make_text

from miniplm.cli import main
from miniplm.config import ExportConfig, GenerateConfig, PrepareConfig, ScoreConfig

NAME = "a\x1b[31m\u202e"
SHOWN = r"a\x1b[31m\u202e"


@pytest.fixture
def place(tiny_tokenizer, tiny_model, tmp_path, monkeypatch):
    """A folder with data, a tokenizer and models of such names; the commands run in it."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    rows = [json.dumps({"text": make_text(rng, 40) + NAME, "domain": NAME}) + "\n" for _ in range(40)]
    data = tmp_path / NAME
    data.mkdir()
    (data / f"{NAME}.jsonl").write_text("".join(rows[:30]))
    (data / os.fsdecode(b"\xff\xfe.jsonl")).write_text("".join(rows[30:]) + "{" + NAME)
    for left_out in ("b.JSONL", "c.json", f"{NAME}.csv", os.fsdecode(b"\xfd.csv")):
        (data / left_out).touch()
    (data / "link").symlink_to("nowhere")
    (data / "linked").symlink_to(tmp_path)
    os.mkfifo(data / "pipe.jsonl")
    shutil.copytree(tiny_tokenizer, f"tokenizer-{NAME}")
    tiny_model(f"teacher-{NAME}", seed=0)
    tiny_model(f"reference-{NAME}", seed=1)
    return tmp_path


def test_nothing_that_a_terminal_obeys_is_printed(place, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    commands = {
        "prepare": f"--data {NAME} --tokenizer tokenizer-{NAME} --domain_column domain "
        f"--max_bad_fraction 0.5 --max_length 64 --workers 1 --output corpus-{NAME}",
        "score": f"--data corpus-{NAME} --teacher teacher-{NAME} --reference reference-{NAME} "
        f"--output scores-{NAME}",
        "select": f"--data corpus-{NAME} --scores scores-{NAME} --output refined-{NAME}",
        "train": f"--data refined-{NAME} --init_from reference-{NAME} --distill.teacher teacher-{NAME} "
        f"--steps 1 --batch_tokens 256 --output run-{NAME}",
        "evaluate": f"--data corpus-{NAME} --model run-{NAME} --output loss-{NAME}.json",
        "export": f"--checkpoint run-{NAME} --evaluation loss-{NAME}.json --output model-{NAME}",
        "export data": f"--data refined-{NAME} --name {NAME} --output data-{NAME}",
        "generate": f"--model model-{NAME} --max_new_tokens 3 --prompt {NAME}",
    }
    capfd.readouterr()
    for command, arguments in commands.items():
        for _ in range(2):  # the second one finds it complete
            assert main([*command.split(), *arguments.split()]) == 0
            printed = "".join(capfd.readouterr())
            assert printed.replace("\n", "").replace("\r", "").isprintable()
            assert SHOWN in printed
    for folder in ("model", "data"):
        card = (place / f"{folder}-{NAME}" / "README.md").read_text()
        assert card.replace("\n", "").isprintable()


def test_what_of_a_folder_is_left_out_is_named(place, capfd):
    arguments = f"--data {NAME} --tokenizer tokenizer-{NAME} --max_bad_fraction 0.5 --workers 1 --output out"
    assert main(["prepare", *arguments.split()]) == 0
    said = capfd.readouterr().err
    assert (
        f"of folder {SHOWN} is left out: {SHOWN}.csv (of no known type), b.JSONL (of no known type)" in said
    )
    assert "link (a link to nothing), linked (a linked folder) and 2 more" in said
    assert rf"skipped {SHOWN}/\udcff\udcfe.jsonl:11: not valid JSON" in said
    manifest = json.loads((place / "out" / "manifest.json").read_text())
    assert manifest["identity"]["source"]["files"] == 2 and manifest["rows"]


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        (PrepareConfig, {"data": "a", "tokenizer": "\udcff", "output": "o"}),
        (PrepareConfig, {"data": "a", "tokenizer": "t", "output": "\udcff"}),
        (PrepareConfig, {"data": "\ud800", "tokenizer": "t", "output": "o"}),
        (ScoreConfig, {"data": "a", "teacher": "\udcff", "output": "o"}),
        (ScoreConfig, {"data": "\udcff", "teacher": "t", "output": "o"}),
        (GenerateConfig, {"model": "m", "prompt": "\udcff"}),
        (ExportConfig, {"checkpoint": "c", "output": "o", "language": ["\udcff"]}),
    ],
)
def test_names_for_libraries_that_take_utf_8_alone(settings, values):
    with pytest.raises(ValueError, match=r"must be UTF-8, got .*: rename it"):
        settings(**values)
    PrepareConfig(data="\udcff", tokenizer="t", output="o")  # only Python opens it

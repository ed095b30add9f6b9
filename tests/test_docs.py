"""What the pages show holds: commands and flags are those that there are, and what can be run is run."""

import os
import re
import shutil

import pytest
from blocks import Block, blocks, code_in_sentences, command_of, commands, lines, unknown_flags
from source_tree import ROOT

from miniplm import config
from miniplm.cli import COMMANDS, main

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = {"comparison.md"}  # has flags of other programs
PRESENT = [  # pages of docs/decisions stay as they were when flags had other names
    page for page in PAGES if page.parent.name != "decisions" and page.name not in OTHERS
]
BLOCKS = [block for page in PRESENT for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language in ("", "sh", "bash")]
PYTHON = [block for block in BLOCKS if block.language == "python"]
QUICKSTART = ROOT / "docs/quickstart.md"
ALONE = [block for block in PYTHON if block.run and block.page != QUICKSTART]
MODEL = "HuggingFaceTB/SmolLM2-135M"  # what the pages take from the Hub; here a folder of that name

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("block", [block for block in SHELL if any(commands(block))], ids=str)
def test_commands_are_understood(block, monkeypatch):
    """Flags and values, by the parser that the command line has; files of settings are those in configs/."""
    monkeypatch.chdir(ROOT)
    for words in commands(block):
        name, rest = command_of(words)
        assert name, f"there is no command {words[0]}"
        config.from_arguments(COMMANDS[name][0], rest, prog="miniplm")


@pytest.mark.parametrize("page", PRESENT, ids=lambda page: page.name)
def test_flags_in_sentences_exist(page):
    wrong = {code: flags for code in code_in_sentences(page) if (flags := unknown_flags(code))}
    assert not wrong


def test_scripts_and_targets_exist():
    """`make TARGET` and `python FILE --flags`."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    harness = (ROOT / "benchmarks/harness.py").read_text(encoding="utf-8")
    seen = 0
    for words in (words for block in SHELL for words in lines(block)):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.M), words
        elif words[0].endswith("python") and words[1].endswith(".py"):
            source = (ROOT / words[1]).read_text(encoding="utf-8") + harness
            assert all(word in source for word in words if word.startswith("--")), words
        else:
            continue
        seen += 1
    assert seen > 10


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, tiny_model):
    """A folder in which all of docs/quickstart.md was done, with a tiny model for the one from the Hub, and
    two steps of each training."""
    folder = tmp_path_factory.mktemp("quickstart")
    tiny_model(folder / MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in (block for block in blocks(QUICKSTART) if block.run):
            if block.language == "python":
                run_python(block)
            for words in commands(block) if block.language == "" else ():
                assert main([*words, *(["--steps", "2"] if words[0] == "train" else [])]) == 0, words
    return folder


def run_python(block: Block) -> None:
    exec(compile("\n" * block.line + block.text, str(block.page), "exec"), {"__name__": "__main__"})


def test_quickstart(quickstart):
    made = {path.name for path in (quickstart / "runs").iterdir()}
    named = set(re.findall(r"runs/([\w.-]+)", QUICKSTART.read_text(encoding="utf-8"))) - {"quickstart"}
    assert made == named and (quickstart / "runs/model/model.safetensors").exists()


@pytest.mark.parametrize("block", ALONE, ids=str)
def test_python_runs(block, request, tmp_path, monkeypatch):
    """Each by itself, and where it names them with the quickstart's folders."""
    if "runs/" in block.text:
        made = request.getfixturevalue("quickstart") / "runs"
        shutil.copytree(made, tmp_path / "runs", copy_function=os.link)
        shutil.copytree(made.parent / MODEL, tmp_path / MODEL, copy_function=os.link)
    if block.page.name == "README.md":  # its sizes are the paper's: settings are read, and no stage runs
        for name in re.findall(r"miniplm\.(\w+)\(", block.text):
            monkeypatch.setattr(f"miniplm.stages.{name}.{name}", lambda settings: None)
    monkeypatch.chdir(tmp_path)
    run_python(block)


def test_pages_have_what_is_to_be_run():
    pages = {"quickstart.md", "kernels.md", "commands.md", "transformers.md"}
    assert {block.page.name for block in PYTHON} >= pages
    assert sum(len(list(commands(block))) for block in SHELL) > 50
    assert all(compile(block.text, str(block), "exec") for block in PYTHON)


@pytest.mark.parametrize(
    "text, flags",
    [
        ("score --sampel 0.05", ["sampel"]),
        ("miniplm proxy fit --kind ngram --per-domain", ["per-domain"]),
        ("--no-such", ["no-such"]),
        ("train --no-shuffle --teacher M --eval-data D --distill.alpha 1", []),
        ("uv pip install --python .venv", []),
    ],
)
def test_a_wrong_flag_is_seen(text, flags):
    assert unknown_flags(text) == flags

"""The command line as a user meets it: exit codes, one plain line, no traceback."""

import importlib
import inspect
import re
import shutil
import subprocess
import sys

import pytest

from miniplm import config
from miniplm.cli import COMMANDS, main
from miniplm.runtime.errors import RunError, UserError


def test_the_table_of_commands_is_the_table_of_stages_and_three_more():
    assert [*COMMANDS] == [*config.STAGES, "ledger", "report", "run", "demo"]
    for name, (settings, module) in COMMANDS.items():
        function = getattr(importlib.import_module(f"miniplm.{module}"), name)
        assert next(iter(inspect.get_annotations(function, eval_str=True).values())) is settings


def test_overview_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name.replace('_', ' ')} " in text for name in COMMANDS)
    assert main([]) == 2
    assert main(["--version"]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command.split("_"), "--help"])
    assert ended.value.code == 0
    own = {"generate": "--prompt", "ledger": "--runs"}
    assert own.get(command, "--output") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "no such command"),
        (["proxy"], "miniplm proxy: no such command; choose from prepare, score, proxy fit, proxy score,"),
        (
            ["proxy", "fit", "--data", "nowhere", "--scores", "s", "--output", "o"],
            "miniplm proxy fit: corpus",
        ),
        (["proxy", "score", "--data", "d"], "required (see miniplm proxy score --help)"),
        (["score", "--data", "nowhere", "--output", "o", "--teacher", "t"], "corpus nowhere does not exist"),
        (["select", "--data", "nowhere", "--scores", "s", "--output", "o"], "corpus nowhere does not exist"),
        (["train", "--data", "nowhere", "--output", "o"], "corpus nowhere does not exist"),
        (["evaluate", "--data", "nowhere", "--model", "m"], "corpus nowhere does not exist"),
        (["prepare", "--data", "nowhere.jsonl", "--tokenizer", "t", "--output", "o"], "nowhere.jsonl"),
        (["generate", "--model", "./nowhere", "--prompt", "x"], "nowhere"),
        (["export", "--checkpoint", "nowhere", "--output", "o"], "nowhere"),
        (["export", "data", "--data", "nowhere", "--output", "o"], "nowhere"),
        (["run", "--config", "nowhere.yaml", "--output", "o"], "nowhere.yaml"),
        (["ledger", "nowhere"], "run nowhere does not exist"),
        (["ledger", "--json", "a", "b"], "json takes one value, got 2"),
        (
            ["select", "--data", "d", "--scores", "s", "--output", "o", "--ratio", "2"],
            "ratio must be above 0",
        ),
        (["select", "--data", "d", "--scores", "s", "--output", ""], "output must not be empty"),
        (["export", "--checkpoint", "c", "--output", "."], "output must have a name of its own, got '.'"),
        (["train", "--data", "d", "--output", "/dev/null"], "'/dev/null' is neither a folder nor a file"),
        (["train", "--data", "d", "--output", "o", "--device", "meta"], "device 'meta' is not known"),
        (
            ["train", "--data", "d", "--output", "o", "--optimizer.betas", "2", "3"],
            "betas must be two numbers",
        ),
        (["demo", "--output", ""], "output must not be empty"),
        (["demo", "--output", ".."], "output must have a name of its own, got '..'"),
        (["run", "--config", "c", "--output", "/"], "output must have a name of its own, got '/'"),
        (["run", "--config", "/dev/zero", "--output", "o"], "/dev/zero is not a file"),
        (["prepare", "--data", "x" * 300, "--tokenizer", "t", "--output", "o"], "x" * 300),
    ],
)
def test_a_users_mistake_is_exit_2_and_one_line_and_writes_nothing(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert re.match(rf"miniplm {arguments[0]}( fit| score| data)?: ", said)
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback_and_changes_no_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", "nowhere", "--output", "o", "--debug"]) == 2
    *traceback, last = capsys.readouterr().err.strip().splitlines()
    assert traceback[0] == "Traceback (most recent call last):" and "UserError" in traceback[-1]
    assert last == "miniplm train: corpus nowhere does not exist"


@pytest.mark.parametrize("module", ["miniplm", "miniplm.cli"])
def test_python_m(module, tmp_path):
    command = [sys.executable, "-m", module, "select", "--data", "d"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    line = "miniplm select: scores and output are required (see miniplm select --help)\n"
    assert result.stderr == line


@pytest.fixture
def failing(monkeypatch, capsys):
    """failing(error, *arguments): (exit code, stderr) of a command in which this error is raised."""
    import miniplm.demo.command

    def fail(error, *arguments):
        def demo(_):
            raise error

        monkeypatch.setattr(miniplm.demo.command, "demo", demo)
        return main(["demo", *arguments]), capsys.readouterr().err

    return fail


class PanicException(BaseException):
    """As libraries in Rust raise it."""

    __module__ = "builtins"


@pytest.mark.parametrize(
    "error",
    [KeyError("lost"), ValueError("a\nb"), OSError("no number"), MemoryError(), PanicException("lost")],
)
def test_a_bug_is_exit_1_and_one_line_without_the_errors_text(failing, error):
    code, said = failing(error)
    kind = type(error).__name__
    assert (
        code == 1 and said.startswith(f"miniplm demo: unexpected {kind} at cli.py:") and said.count("\n") == 1
    )
    assert said.endswith(" (--debug shows the traceback)\n")
    assert not any(word in said for word in ("lost", "a b", "no number"))
    code, said = failing(error, "--debug")
    assert code == 1 and said.startswith("Traceback") and f"\n{kind}" in said


def test_a_run_that_failed_says_why(failing):
    code, said = failing(RunError("the loss is not finite: lower the learning rate"))
    assert (code, said) == (1, "miniplm demo: the loss is not finite: lower the learning rate\n")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "demo/x"),
        shutil.Error([("demo/x", "b", "[Errno 28] No space left on device: 'demo/x' -> 'b'")]),
    ],
)
def test_an_operating_system_error_is_exit_2(failing, error):
    line = "[Errno 28] No space left on device: 'demo/x': make room, then run the same command again"
    assert failing(error) == (2, f"miniplm demo: {line}\n")


def test_a_network_error_is_exit_2(failing):
    code, said = failing(ConnectionError("https://…\n<html>"))
    assert code == 2 and said.startswith("miniplm demo: the network failed (ConnectionError)")
    assert "html" not in said


def test_what_a_terminal_obeys_is_written_out(failing):
    assert failing(UserError("a\x1b[31m\u202eb")) == (2, "miniplm demo: a\\x1b[31m\\u202eb\n")


def test_interrupt_is_130(failing):
    code, said = failing(KeyboardInterrupt())
    assert code == 130 and "the same command continues" in said

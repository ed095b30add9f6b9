"""The command line as a user meets it: exit codes, one plain line, no traceback."""

import shutil
import subprocess
import sys

import pytest

from miniplm.cli import COMMANDS, main


def run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "miniplm.cli", *arguments], capture_output=True, text=True, cwd=cwd
    )


def test_overview_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert main([]) == 2
    assert main(["--version"]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert ("--prompt" if command == "generate" else "--output") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "no such command"),
        (["score", "--data", "nowhere", "--output", "o", "--teacher", "t"], "corpus nowhere does not exist"),
        (["select", "--data", "nowhere", "--scores", "s", "--output", "o"], "corpus nowhere does not exist"),
        (["train", "--data", "nowhere", "--output", "o"], "corpus nowhere does not exist"),
        (["evaluate", "--data", "nowhere", "--model", "m"], "corpus nowhere does not exist"),
        (["prepare", "--data", "nowhere.jsonl", "--tokenizer", "t", "--output", "o"], "nowhere.jsonl"),
        (["generate", "--model", "./nowhere", "--prompt", "x"], "nowhere"),
        (["export", "--checkpoint", "nowhere", "--output", "o"], "nowhere"),
        (["run", "--config", "nowhere.yaml", "--output", "o"], "nowhere.yaml"),
        (
            ["select", "--data", "d", "--scores", "s", "--output", "o", "--ratio", "2"],
            "ratio must be above 0",
        ),
    ],
)
def test_a_users_mistake_is_exit_2_and_one_line_and_writes_nothing(arguments, message, tmp_path):
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path):
    result = run("train", "--data", "nowhere", "--output", "o", "--debug", cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_a_bug_is_exit_1_and_one_line(monkeypatch, capsys):
    import miniplm.pipeline

    def broken(_):
        raise KeyError("lost")

    monkeypatch.setattr(miniplm.pipeline, "demo", broken)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "miniplm demo: KeyError: 'lost' (--debug shows the traceback)\n"


def test_an_operating_system_error_is_exit_2(monkeypatch, capsys):
    import miniplm.pipeline

    for error in [
        OSError(28, "No space left on device", "demo/x"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'")]),
    ]:

        def full(_, error=error):
            raise error

        monkeypatch.setattr(miniplm.pipeline, "demo", full)
        assert main(["demo"]) == 2
        said = capsys.readouterr().err
        assert (
            said.count("\n") == 1
            and "[Errno 28] No space left" in said
            and said.endswith(": make room, then run the same command again\n")
        )


def test_interrupt_is_130(monkeypatch, capsys):
    import miniplm.pipeline

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(miniplm.pipeline, "demo", interrupted)
    assert main(["demo"]) == 130
    assert "the same command continues" in capsys.readouterr().err

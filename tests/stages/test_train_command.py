"""miniplm train as a command: its flags, its exit codes, one process to a folder."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import make_config, make_teachers, metrics

from miniplm.runtime.artifacts import exclusive
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json

SHAPE = (
    "--model.hidden_size 32 --model.intermediate_size 64 --model.num_hidden_layers 1 "
    "--model.num_attention_heads 4"
).split()


def command(data, output, *arguments) -> list[str]:
    """The command that trains a tiny model."""
    paths = ["--data", data, "--output", str(output)]
    return [sys.executable, "-m", "miniplm.cli", "train", *paths, "--device", "cpu", *SHAPE, *arguments]


def run(data, output, *arguments):
    return subprocess.run(command(data, output, *arguments), capture_output=True, text=True)


def wait_for(pattern, output, process):
    """Until a file of this pattern is in `output`; what the process said, should it end before."""
    deadline = time.monotonic() + 120
    while not list(Path(output).glob(pattern)) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


@pytest.fixture
def config(tiny_corpus, tmp_path):
    return make_config(tiny_corpus, tmp_path / "out")


@pytest.mark.slow
def test_stopped_command_exits_with_the_signal_and_one_line(config, tmp_path):
    arguments = command(config.data, config.output, "--steps", "100000", "--batch_tokens", "300")
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    wait_for("metrics.jsonl", config.output, process)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    last = err.splitlines()[-1]
    assert last.startswith("stopped at step ") and last.endswith(": the same command continues")
    assert "Traceback" not in err and out == ""


def test_two_processes_do_not_train_into_one_folder(config):
    """The second is refused in one line, while the first lives; a kill frees the folder."""
    arguments = command(
        config.data,
        config.output,
        *["--steps", "100000", "--batch-tokens", "200", "--checkpoint.interval", "5"],
    )
    first = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_for("checkpoints/step-*", config.output, first)
        second = subprocess.run(arguments, capture_output=True, text=True)
        assert second.returncode == 2, second.stderr
        assert f"another process is writing to {config.output}: wait for it" in second.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    with exclusive(config.output):
        pass
    with (
        exclusive(config.output),
        pytest.raises(UserError, match="another process is writing"),
        exclusive(config.output),
    ):
        pass


@pytest.fixture(scope="module")
def teachers(tiny_model, tmp_path_factory):
    return make_teachers(tiny_model, tmp_path_factory.mktemp("teachers"))


def test_flags_of_a_teacher(tiny_corpus, teachers, tmp_path):
    """By their names of before there were groups, which stay."""
    short = "--steps 3 --batch_tokens 300 --peak_tflops 1".split()
    distill = ["--teacher", teachers["adapted"], "--alpha", "0.3", "--temperature", "2"]
    done = run(tiny_corpus, tmp_path / "out", *distill, *short)
    assert done.returncode == 0, done.stderr
    (line,) = metrics(tmp_path / "out")
    expected = 0.7 * line["cross_entropy"] + 0.3 * line["kl_divergence"]
    assert line["loss"] == pytest.approx(expected, rel=1e-5) and line["kl_divergence"] > 0
    assert "0.7 · cross-entropy + 0.3 · KL divergence" in done.stderr and "trained 3 steps" in done.stdout
    manifest = read_json(tmp_path / "out" / "manifest.json")
    assert manifest["complete"] and manifest["teacher"] == "adapted"
    for arguments in (
        ["--distill.teacher", teachers["wider"], "--distill.alpha", "2"],
        ["--alpha", "0.3"],
        ["--teacher", str(tmp_path / "nowhere")],
    ):
        refused = run(tiny_corpus, tmp_path / "other", *arguments, *short)
        assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1, refused.stderr
        assert not (tmp_path / "other").exists()

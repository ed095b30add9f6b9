"""miniplm train as a command: its flags, its exit codes, one process to a folder."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import (
    make_config,
    make_teachers,
    metrics,
)

from miniplm.runtime.artifacts import exclusive
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json


@pytest.fixture
def config(tiny_corpus, tmp_path):
    return make_config(tiny_corpus, tmp_path / "out")


@pytest.mark.slow
def test_stopped_command_exits_with_the_signal_and_one_line(config, tiny_corpus, tmp_path):
    command = [
        sys.executable,
        "-m",
        "miniplm.cli",
        "train",
        "--data",
        tiny_corpus,
        "--output",
        config.output,
        "--model.hidden_size",
        "32",
        "--model.num_hidden_layers",
        "1",
        "--model.num_attention_heads",
        "4",
        "--steps",
        "100000",
        "--batch_tokens",
        "300",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    deadline = time.monotonic() + 120
    while not Path(config.output, "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("stopped at step ") and err.endswith(
        ": the same command continues\n"
    )
    assert "Traceback" not in err and out == ""


def test_two_processes_do_not_train_into_one_folder(config):
    """The second is refused in one line, while the first lives; a kill frees the folder."""
    arguments = [
        "--data",
        config.data,
        "--output",
        config.output,
        "--steps",
        "100000",
        "--batch-tokens",
        "200",
        "--device",
        "cpu",
    ]
    arguments += [
        f"--model.{name}={getattr(config.model, name)}"
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ]
    command = [sys.executable, "-m", "miniplm.cli", "train", *arguments, "--checkpoint-interval", "5"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(Path(config.output).glob("checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        second = subprocess.run(command, capture_output=True, text=True)
        assert (
            second.returncode == 2
            and f"another process is writing to {config.output}: wait for it" in second.stderr
        ), second.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
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


def command(data, output, *arguments, **settings):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "miniplm.cli",
            "train",
            "--data",
            data,
            "--output",
            str(output),
            "--device",
            "cpu",
            *arguments,
        ],
        capture_output=True,
        text=True,
        **settings,
    )


def test_command_line(tiny_corpus, teachers, tmp_path):
    shape = [
        "--model.hidden_size",
        "32",
        "--model.num_hidden_layers",
        "1",
        "--model.num_attention_heads",
        "4",
        "--model.intermediate_size",
        "64",
    ]
    shape += ["--steps", "3", "--batch_tokens", "300", "--peak_tflops", "1"]
    done = command(
        tiny_corpus,
        tmp_path / "out",
        "--teacher",
        teachers["adapted"],
        "--alpha",
        "0.3",
        "--temperature",
        "2",
        *shape,
    )
    assert done.returncode == 0, done.stderr
    (line,) = metrics(tmp_path / "out")
    assert (
        line["loss"] == pytest.approx(0.7 * line["cross_entropy"] + 0.3 * line["kl_divergence"], rel=1e-5)
        and line["kl_divergence"] > 0
    )
    assert "0.7 · cross-entropy + 0.3 · KL divergence" in done.stderr and "trained 3 steps" in done.stdout
    manifest = read_json(tmp_path / "out" / "manifest.json")
    assert manifest["complete"] and manifest["teacher"] == "adapted"
    for arguments in (
        ["--teacher", teachers["wider"], "--alpha", "2"],
        ["--alpha", "0.3"],
        ["--teacher", str(tmp_path / "nowhere")],
    ):
        refused = command(tiny_corpus, tmp_path / "other", *arguments, *shape)
        assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1, refused.stderr
        assert not (tmp_path / "other").exists()

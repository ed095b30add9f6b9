"""train, stopped by signals, kills and a full disk at any moment: it ends like a run that nothing stops."""

import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import pytest
from training_runs import check_equal_runs, files, make_config, metrics, stop_after

from miniplm.data.corpus import Corpus
from miniplm.data.order import DataOrder
from miniplm.runtime.files import read_json
from miniplm.runtime.interrupts import Interrupted
from miniplm.stages.train import train
from miniplm.training import loop
from miniplm.training import step as training_step
from miniplm.training.checkpoints import latest_checkpoint


@pytest.fixture
def config(tiny_corpus, tmp_path):
    return make_config(tiny_corpus, tmp_path / "out")


@pytest.fixture(scope="module")
def whole(tiny_corpus, tmp_path_factory):
    """The config of a run that nothing stopped."""
    config = make_config(tiny_corpus, tmp_path_factory.mktemp("whole") / "out")
    train(config)
    return config


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(function, *arguments) → a process, forked from one that has the modules loaded and has not
    computed anything."""
    context, here = multiprocessing.get_context("forkserver"), os.getcwd()
    context.set_forkserver_preload(
        [
            "miniplm.stages.train",
            "datasets",
            "torch.utils.tensorboard",
            "transformers.models.qwen2.modeling_qwen2",
            "transformers.models.auto.tokenization_auto",
        ]
    )
    os.chdir(
        tmp_path_factory.mktemp("elsewhere")
    )  # not where a folder `kernels` would hide the package that transformers looks for
    forkserver.ensure_running()
    os.chdir(here)

    def start(function, *arguments):
        process = context.Process(target=function, args=arguments)
        process.start()
        return process

    return start


def wait_for_line(output, step, process):
    """Until metrics.jsonl has come past `step`."""
    path, deadline = Path(output) / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and process.is_alive():
        try:
            if json.loads(path.read_text().splitlines()[-1])["step"] >= step:
                return
        except (OSError, IndexError, json.JSONDecodeError):
            pass
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_at_random_moments_it_ends_alike(config, whole, number, start):
    generator, kills = random.Random(number), 0
    for step in (1, 6, 10, 17):
        process = start(train, config)
        wait_for_line(config.output, step, process)
        time.sleep(generator.uniform(0, 0.05))
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)
        process.join(60)
        expected = -number if number == signal.SIGKILL else 128 + number
        assert process.exitcode in (0, expected)
        kills += process.exitcode == expected
        if number != signal.SIGKILL and process.exitcode:  # the last finished step was saved
            saved = read_json(Path(latest_checkpoint(config.output)) / "trainer_state.json")["state"]["step"]
            assert saved >= max(line["step"] for line in metrics(config.output))
    assert kills >= 2
    train(config)
    check_equal_runs(config.output, whole.output)
    assert not list(Path(config.output, "checkpoints").glob(".*"))


def killed_while(module, function, call, config):
    """train(), killed at the end of the given call of a function."""
    module, calls = sys.modules[f"miniplm.{module}"], itertools.count(1)
    original = getattr(module, function)

    def dying(*arguments):
        result = original(*arguments)
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, function, dying)
    train(config)


@pytest.mark.parametrize(
    "module, function, call",
    [
        ("training.step", "summed_loss", 30),  # within a step
        ("training.loop", "eval_loss", 2),
        ("training.loop", "save_checkpoint", 4),
        ("training.loop", "prune_checkpoints", 5),
        ("stages.train", "complete_output", 1),
        ("training.checkpoints", "hash_files", 20),
        ("training.checkpoints", "write_json", 5),
    ],
)
def test_killed_between_two_writes_it_ends_alike(config, whole, module, function, call, start):
    process = start(killed_while, module, function, call, config)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    train(config)
    check_equal_runs(config.output, whole.output)


@pytest.mark.parametrize(
    "module, function, call",
    [
        (training_step, "summed_loss", 1),
        (training_step, "summed_loss", 30),
        (loop, "eval_loss", 2),
        (loop, "eval_loss", 3),
        (loop, "save_checkpoint", 2),
        (loop, "train_step", 9),
    ],
)
def test_stopped_at_a_given_call_it_ends_alike(config, whole, module, function, call, monkeypatch, capsys):
    """Within a step, within an evaluation (at a checkpoint's step too, and at the last), within a save; and
    again when continued."""
    original, stops = getattr(module, function), 0
    for _ in range(2):
        calls = itertools.count(1)

        def stopping(*arguments, calls=calls, **keywords):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments, **keywords)

        with monkeypatch.context() as patch, suppress(Interrupted):
            patch.setattr(module, function, stopping)
            train(config)
            continue
        stops += 1
        assert "stopped at step" in capsys.readouterr().err
        assert (
            signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            and signal.getsignal(signal.SIGINT) == signal.default_int_handler
        )
    assert stops >= 1
    train(config)
    check_equal_runs(config.output, whole.output)


def test_at_the_ends_of_epochs_it_ends_alike(config, monkeypatch, start, tmp_path):
    """Stopped where an epoch ends, killed between two micro-batches of the next one's first step, and stopped
    where that ends."""
    config = replace(config, batch_tokens=216)
    assert DataOrder(Corpus(config.data).num_tokens, 216, config.seed).epoch_tokens == 8 * 216
    stop_after(config, 8, monkeypatch)
    process = start(killed_while, "training.step", "summed_loss", 2, config)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert latest_checkpoint(config.output).endswith("step-00000008")
    stop_after(config, 8, monkeypatch)
    assert latest_checkpoint(config.output).endswith("step-00000016")
    train(config)
    whole = replace(config, output=str(tmp_path / "whole"))
    train(whole)
    check_equal_runs(config.output, whole.output)


def test_stop_gives_up_the_step_under_way(config, monkeypatch, capsys):
    loss, calls = training_step.summed_loss, itertools.count(1)

    def stopping(*arguments):
        if next(calls) == 2:  # of the step's four micro-batches
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
        patch.setattr(training_step, "summed_loss", stopping)
        train(config)
    assert stopped.value.code == 130
    assert capsys.readouterr().err.endswith("stopped at step 0: the same command continues\n")
    assert not Path(config.output, "checkpoints").exists() and metrics(config.output) == []


def hang_in_first_step(config):
    def hang(*_):
        Path(config.output, "hanging").touch()
        time.sleep(120)
        raise AssertionError("not killed")

    training_step.summed_loss = hang
    train(config)


def test_second_signal_ends_at_once(config, start):
    process = start(hang_in_first_step, config)
    deadline = time.monotonic() + 60
    while not Path(config.output, "hanging").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(1)
    assert process.is_alive()  # the first one waits for the step
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == -signal.SIGTERM


def limited(config, size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write past the limit fails as on a full disk
    try:
        train(config)
    except OSError as error:
        sys.exit("checkpoint" in str(error) and 42)


def test_full_disk_leaves_the_last_checkpoint(config, whole, monkeypatch, start):
    stop_after(config, 14, monkeypatch)
    before = files(Path(config.output) / "checkpoints")
    process = start(limited, config, 60_000)
    process.join(60)
    assert process.exitcode == 42
    assert files(Path(config.output) / "checkpoints") == before
    train(config)
    check_equal_runs(config.output, whole.output)

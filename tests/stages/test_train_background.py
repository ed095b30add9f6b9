"""train goes on while a checkpoint is written; what becomes of the write is waited for, and told."""

import errno
import itertools
import os
import resource
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import exit_codes, forked, run_ranks, started
from training_runs import check_equal_runs, make_config, metrics, truncate

from miniplm.config import CheckpointConfig
from miniplm.runtime.interrupts import Interrupted
from miniplm.stages.train import train
from miniplm.training import checkpoints, loop
from miniplm.training.checkpoints import checkpoint_folder, checkpoint_folders


@pytest.fixture(scope="module")
def whole(tiny_corpus, tmp_path_factory):
    """The config of a run that keeps all of its checkpoints, and that nothing stopped."""
    config = make_config(tiny_corpus, tmp_path_factory.mktemp("whole") / "out")
    config = replace(config, checkpoint=CheckpointConfig(interval=6, keep=9))
    train(config)
    return config


@pytest.fixture
def config(whole, tmp_path):
    return replace(whole, output=str(tmp_path / "out"))


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    return forked(tmp_path_factory.mktemp("elsewhere"))


def names(config):
    return [folder.name for folder in checkpoint_folders(config.output)]


def test_steps_are_taken_while_a_checkpoint_is_written(config, whole, monkeypatch):
    """That of step 6 is not written before step 9 is done; that of step 12 waits for it, and holds the state
    of step 12."""
    save, step, taken, done = loop.save_checkpoint, loop.train_step, itertools.count(1), threading.Event()
    threads = []

    def late(*arguments):
        threads.append(threading.current_thread())
        assert done.wait(60), "no step is taken meanwhile"
        save(*arguments)

    def counted(*arguments):
        result = step(*arguments)
        if next(taken) == 9:
            assert names(config) == []
            done.set()
        return result

    monkeypatch.setattr(loop, "save_checkpoint", late)
    monkeypatch.setattr(loop, "train_step", counted)
    train(config)
    assert len(threads) == 5 and threading.main_thread() not in threads and len(set(threads)) == 1
    assert not threads[0].is_alive()
    check_equal_runs(config.output, whole.output)


def test_an_interrupt_waits_for_the_write_in_flight(config, whole, monkeypatch):
    """And so does its own checkpoint: there is one copy at a time."""
    save, snapshot, waited, copies = loop.save_checkpoint, loop.take_snapshot, [], []

    def slow(*arguments):
        time.sleep(0.5)
        save(*arguments)
        waited.append(1)

    def copied(*arguments):
        copies.append(len(waited))
        return snapshot(*arguments)

    step, taken = loop.train_step, itertools.count(1)

    def stopping(*arguments):
        if next(taken) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    said = []
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop, "save_checkpoint", slow)
        patch.setattr(loop, "take_snapshot", copied)
        patch.setattr(loop, "train_step", stopping)
        patch.setattr(loop, "note", lambda text: said.append((text, len(waited))))
        train(config)
    assert said == [("stopped at step 7: the same command continues", 2)]
    assert copies == [0, 1]
    assert names(config) == ["step-00000006", "step-00000007"]
    train(config)
    shutil.rmtree(checkpoint_folder(config.output, 7))
    check_equal_runs(config.output, whole.output)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_write_that_fails_ends_the_run_at_the_next_step(config, whole, number, monkeypatch):
    """That of step 12: the one before is kept, and continued from."""
    save, step, failed, taken = loop.save_checkpoint, loop.train_step, threading.Event(), []

    def failing(folder, *arguments):
        if folder.name == "step-00000012":
            failed.set()
            raise OSError(number, os.strerror(number), str(folder))
        save(folder, *arguments)

    def counted(*arguments):
        taken.append(1)
        if len(taken) == 13:
            assert failed.wait(60)
            time.sleep(0.3)  # in which the thread ends the job
        return step(*arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="step-00000012") as raised:
        patch.setattr(loop, "save_checkpoint", failing)
        patch.setattr(loop, "train_step", counted)
        train(config)
    assert raised.value.errno == number and len(taken) == 13
    assert names(config) == ["step-00000006"]
    train(config)
    check_equal_runs(config.output, whole.output)


# ---- several ranks ----


def train_rank(rank, config):
    train(config)


def failing_write(rank, config, step, what):
    """Train; the write of a step's checkpoint meets a full disk, or is its rank's last, in the middle of it:
    the files are there, but not what they are."""
    save, hash_files, number = loop.save_checkpoint, checkpoints.hash_files, f"{step:08d}"

    def limited(folder, *arguments):
        if number in folder.name:
            time.sleep(0.2)  # other steps are under way
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        save(folder, *arguments)

    def dying(files):
        if number in str(files[0]):
            os.kill(os.getpid(), signal.SIGKILL)
        return hash_files(files)

    if what == "full":
        signal.signal(
            signal.SIGXFSZ, signal.SIG_IGN
        )  # so that a write past the limit fails as on a full disk
        loop.save_checkpoint = limited
    else:
        checkpoints.hash_files = dying
    train(config)


def test_ranks_end_together_where_a_write_fails_or_its_rank_dies(config, context, tmp_path):
    """Then they go on from the checkpoint before, and where that one is damaged from the one before it."""
    config = replace(config, checkpoint=CheckpointConfig(interval=6))
    with started(context, tmp_path / "full", 2, failing_write, config, 12, "full") as ranks:
        assert exit_codes(ranks, 60) == [2, 1], [rank.said() for rank in ranks]
    assert ranks[0].said().splitlines()[-1].startswith("[Errno 27] File too large: ")
    assert ranks[1].said().splitlines()[-1].startswith("rank 0 of 2 could not go on")
    assert not any("Traceback" in rank.said() for rank in ranks)
    assert names(config) == ["step-00000006"]

    with started(context, tmp_path / "dies", 2, failing_write, config, 18, "dies") as ranks:
        assert exit_codes(ranks, 60) == [-signal.SIGKILL, 1], [rank.said() for rank in ranks]
    assert ranks[1].said().splitlines()[-1].startswith("rank 0 of 2 no longer answers")
    assert names(config) == ["step-00000006", "step-00000012"]
    half = Path(config.output, "checkpoints", ".step-00000018.tmp")
    assert {file.name for file in half.iterdir()} >= {"model.safetensors", "optimizer.safetensors"}

    truncate(Path(config.output, "checkpoints", "step-00000012", "optimizer.safetensors"))
    [first, _] = run_ranks(context, tmp_path / "again", 2, train_rank, config)
    assert "step-00000012 is damaged (optimizer.safetensors is not as it was written)" in first.said()
    assert "continuing from step-00000006" in first.said()
    assert metrics(config.output)[-1]["step"] == 26
    assert names(config) == ["step-00000024", "step-00000026"]
    assert not list(Path(config.output, "checkpoints").glob(".*"))


def killed_together(rank, config):
    """Train, in steps that take a while."""
    step = loop.train_step

    def slow(*arguments):
        time.sleep(0.05)
        return step(*arguments)

    loop.train_step = slow
    train(config)


def test_all_killed_the_same_command_continues(config, whole, context, tmp_path):
    config = replace(config, checkpoint=CheckpointConfig(interval=2))
    with started(context, tmp_path / "killed", 2, killed_together, config) as ranks:
        deadline = time.monotonic() + 120
        while not names(config) and time.monotonic() < deadline:
            time.sleep(0.01)
        for rank in ranks:
            os.kill(rank.process.pid, signal.SIGKILL)
        assert exit_codes(ranks, 60) == [-signal.SIGKILL] * 2
    train(config)  # on one
    assert [line["step"] for line in metrics(config.output)] == [
        line["step"] for line in metrics(whole.output)
    ]
    for line, expected in zip(metrics(config.output), metrics(whole.output), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)

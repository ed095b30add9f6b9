"""train, stopped: by signals and kills at any moment, by losses that are not finite, by a full disk. All end
like a run that nothing stops."""

import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from training_runs import check_equal_runs, files, make_config, metrics, stop_after, truncate

from miniplm.config import CheckpointConfig, EvalConfig
from miniplm.data.order import global_batch
from miniplm.models.loading import load_model
from miniplm.runtime.artifacts import exclusive
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json
from miniplm.stages import train as training
from miniplm.stages.train import TrainingDiverged, learning_rate, make_optimizer, train, train_step
from miniplm.training import checkpoints
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


# ---- stops and kills ----


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
        ("stages.train", "held_out_loss", 2),
        ("stages.train", "save_checkpoint", 4),
        ("stages.train", "prune_checkpoints", 5),
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
    "function, call",
    [
        ("summed_loss", 1),
        ("summed_loss", 30),
        ("held_out_loss", 2),
        ("held_out_loss", 3),
        ("save_checkpoint", 2),
        ("train_step", 9),
    ],
)
def test_stopped_at_a_given_call_it_ends_alike(config, whole, function, call, monkeypatch, capsys):
    """Within a step, within an evaluation (at a checkpoint's step too, and at the last), within a save; and
    again when continued."""
    original, stops = getattr(training, function), 0
    for _ in range(2):
        calls = itertools.count(1)

        def stopping(*arguments, calls=calls, **keywords):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments, **keywords)

        with monkeypatch.context() as patch, suppress(training.Interrupted):
            patch.setattr(training, function, stopping)
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


def test_stop_gives_up_the_step_under_way(config, monkeypatch, capsys):
    loss, calls = training.summed_loss, itertools.count(1)

    def stopping(*arguments):
        if next(calls) == 2:  # of the step's four micro-batches
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*arguments)

    with monkeypatch.context() as patch, pytest.raises(training.Interrupted) as stopped:
        patch.setattr(training, "summed_loss", stopping)
        train(config)
    assert stopped.value.code == 130
    assert capsys.readouterr().err.endswith("stopped at step 0: the same command continues\n")
    assert not Path(config.output, "checkpoints").exists() and metrics(config.output) == []


def hang_in_first_step(config):
    def hang(*_):
        Path(config.output, "hanging").touch()
        time.sleep(120)
        raise AssertionError("not killed")

    training.summed_loss = hang
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


def test_metrics_of_a_cut_off_line_and_of_later_steps_are_dropped(tmp_path):
    lines = [json.dumps({"step": step, "loss": step / 3}) + "\n" for step in (2, 4, 6, 8)]
    for cut, kept in [
        (lines[3][:-9], lines[:3]),
        (lines[3][:-1], lines[:3]),
        (lines[3], lines[:4]),
        ("", lines[:3]),
    ]:
        (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]) + cut)
        written = checkpoints.Metrics(tmp_path, 100)
        assert written.last == json.loads(kept[-1])
        written.close()
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(kept)
    written = checkpoints.Metrics(tmp_path, 5)
    written.write({"step": 6, "loss": 0.5})
    written.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2]) + '{"step": 6, "loss": 0.5}\n'


def test_runs_without_tensorboard(config, whole, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(config)
    assert capsys.readouterr().err.count("tensorboard is not installed") == 1
    check_equal_runs(config.output, whole.output)


# ---- losses that are not finite ----


def poison(monkeypatch, steps, kind):
    """Make the loss or the gradient of these steps (1, 2, …) of the next run NaN or infinite."""
    original_step, original_loss, now = training.train_step, training.summed_loss, []

    def counted_step(*arguments):
        now.append(1)
        return original_step(*arguments)

    def poisoned_loss(model, batch, dtype):
        loss = original_loss(model, batch, dtype)
        if len(now) not in steps or not torch.is_grad_enabled():
            return loss
        if kind == "gradient":
            return loss + (model.head_weight.sum() * 0).sqrt()  # adds 0, whose gradient is 0 · ∞
        return loss * kind

    monkeypatch.setattr(training, "train_step", counted_step)
    monkeypatch.setattr(training, "summed_loss", poisoned_loss)


@pytest.mark.parametrize("kind", [math.nan, math.inf, "gradient"])
def test_step_that_is_not_finite_is_skipped(config, kind, monkeypatch, capsys):
    config = replace(config, steps=12, log_interval=3, checkpoint=CheckpointConfig(interval=1, keep=12))
    with monkeypatch.context() as patch:
        poison(patch, {5, 6, 9}, kind)
        train(config)
    lines = {line["step"]: line for line in metrics(config.output)}
    assert sorted(lines) == [3, 5, 6, 9, 12]
    assert [step for step, line in lines.items() if line.get("skipped")] == [5, 6, 9]
    for step in (5, 6, 9):
        assert lines[step]["grad_norm"] is None and lines[step]["lr"] == learning_rate(
            step, 12, config.optimizer
        )
    assert (
        lines[6]["loss"] is None and lines[5]["loss"] and lines[9]["loss"]
    )  # nothing since the line before; the steps 4; 7 and 8
    err = capsys.readouterr().err
    assert [f"step {step} skipped: loss " in err for step in range(1, 13)] == [
        step in (5, 6, 9) for step in range(1, 13)
    ]
    manifest = read_json(f"{config.output}/manifest.json")
    assert manifest["skipped"] == 3 and manifest["steps"] == 12

    def weights(step):
        return checkpoints.checkpoint_folder(config.output, step).joinpath("model.safetensors").read_bytes()

    assert weights(4) == weights(5) == weights(6) != weights(7)

    # Weights and moments go on as if the skipped steps had not been: the same updates with the same rates and
    # rows.
    model = training._initial_model(config, setup := training._set_up(config))
    optimizer = make_optimizer(model, config.optimizer)
    for step in (1, 2, 3, 4, 7, 8, 10, 11, 12):
        batch = global_batch(
            setup.corpus.rows(setup.order.step(step - 1)),
            setup.corpus.eos_token_id,
            config.micro_batch_tokens,
        )
        train_step(model, optimizer, batch, learning_rate(step, 12, config.optimizer), 1.0, torch.float32)
    ours = load_model(latest_checkpoint(config.output))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours.parameters(), strict=True))


def test_skips_survive_a_stop(config, monkeypatch):
    """A run stopped within a row of skipped steps counts on, and skips what the uninterrupted run skips."""
    config = replace(config, steps=12, max_skipped_steps=4, eval=EvalConfig())
    other = replace(config, output=config.output + "2")
    with monkeypatch.context() as patch:
        poison(patch, {5, 6, 7}, math.nan)
        train(config)
    with monkeypatch.context() as patch, pytest.raises(training.Interrupted):
        poison(patch, {5, 6, 7}, math.nan)
        patch.setattr(
            training, "note", lambda text: "step 6 skipped" in text and os.kill(os.getpid(), signal.SIGTERM)
        )
        train(other)
    with monkeypatch.context() as patch:
        poison(patch, {1}, math.nan)  # its first step is step 7
        train(other)
    check_equal_runs(config.output, other.output)


def test_too_many_in_a_row_stop_the_run(config, monkeypatch, tmp_path):
    config = replace(config, checkpoint=CheckpointConfig(interval=2, keep=1))  # max_skipped_steps 10
    good, copy = checkpoints.checkpoint_folder(config.output, 6), tmp_path / "copy"

    def keep_copy(folder, *arguments):
        checkpoints.save_checkpoint(folder, *arguments)
        if folder == good:
            shutil.copytree(folder, copy)

    with monkeypatch.context() as patch, pytest.raises(TrainingDiverged) as raised:
        poison(patch, set(range(7, 17)), "gradient")
        patch.setattr(training, "save_checkpoint", keep_copy)
        train(config)
    assert "10 steps in a row, up to step 16" in str(raised.value) and "\n" not in str(raised.value)
    assert files(good) == files(copy) and files(copy)
    assert not checkpoints.checkpoint_folder(config.output, 16).exists()
    assert [line["step"] for line in metrics(config.output) if line.get("skipped")] == list(range(7, 17))
    assert not read_json(f"{config.output}/manifest.json")["complete"]

    with (
        monkeypatch.context() as patch,
        pytest.raises(TrainingDiverged, match="10 steps in a row, up to step 16"),
    ):
        poison(patch, {1, 2}, math.nan)  # the skips before the latest checkpoint, that of step 14, count on
        train(config)
    train(config)  # what made the loss NaN is gone
    assert read_json(f"{config.output}/manifest.json")["skipped"] == 8
    assert [path.name for path in Path(config.output, "checkpoints").iterdir()] == ["step-00000026"]


def test_nine_in_a_row_do_not_stop_the_run(config, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, {*range(3, 12), *range(13, 22)}, math.inf)
        train(config)
    assert read_json(f"{config.output}/manifest.json")["skipped"] == 18


# ---- damage ----


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, name",
    [
        (truncate, "model.safetensors"),
        (truncate, "trainer_state.json"),
        (flip, "optimizer.safetensors"),
        (Path.unlink, "config.json"),
        (Path.unlink, "trainer_state.json"),
    ],
)
def test_damaged_checkpoint_gives_way_to_the_one_before(config, whole, damage, name, monkeypatch, capsys):
    stop_after(config, 14, monkeypatch)
    folder = Path(config.output) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000012", "step-00000014"]
    identity = read_json(folder / "step-00000012" / "trainer_state.json")["identity"]
    damage(folder / "step-00000014" / name)
    (folder / "step-00000012" / "README.md").write_text("a file of the user's does no harm")
    (folder / ".step-00000013.tmp").mkdir()  # what a kill leaves of a checkpoint that was being written
    capsys.readouterr()
    checkpoint, state = checkpoints.find_checkpoint(config.output, identity)
    assert (checkpoint, state.step) == (folder / "step-00000012", 12)
    err = capsys.readouterr().err
    assert "step-00000014 is damaged" in err and "continuing from step-00000012" in err
    assert list(folder.iterdir()) == [checkpoint]  # the damaged one is nobody's latest any more
    train(config)
    check_equal_runs(config.output, whole.output)


def test_all_checkpoints_damaged_is_an_error_that_removes_nothing(config, monkeypatch):
    stop_after(config, 14, monkeypatch)
    for path in Path(config.output).glob("checkpoints/*/model.safetensors"):
        truncate(path)
    before = files(config.output)
    with pytest.raises(
        UserError,
        match=r"step-00000014 is damaged \(model.safetensors is not as it was written\) and there is no "
        r"whole one before it",
    ):
        train(config)
    assert files(config.output) == before


def test_checkpoint_of_another_run_is_refused(config, whole, monkeypatch):
    stop_after(replace(config, seed=99), 5, monkeypatch)
    shutil.copytree(
        Path(whole.output) / "checkpoints" / "step-00000026",
        Path(config.output) / "checkpoints" / "step-00000026",
    )
    with pytest.raises(UserError, match="step-00000026 belongs to another run"):
        train(replace(config, seed=99))


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


def test_changed_intervals_continue_the_run(config, whole, monkeypatch):
    stop_after(config, 14, monkeypatch)
    train(
        replace(
            config,
            checkpoint=CheckpointConfig(interval=7, keep=1),
            max_skipped_steps=3,
            eval=replace(config.eval, interval=100),
            log_interval=40,
        )
    )
    assert [path.name for path in Path(config.output, "checkpoints").iterdir()] == ["step-00000026"]
    assert metrics(config.output)[-1]["eval_loss"] == metrics(whole.output)[-1]["eval_loss"]


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

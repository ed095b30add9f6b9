"""train and what it finds damaged, lost or in the way: a run ends like one without, or says what to do."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from training_runs import (
    check_equal_runs,
    files,
    make_config,
    metrics,
    stop_after,
    truncate,
)

from miniplm.config import (
    CheckpointConfig,
)
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json
from miniplm.stages.train import train
from miniplm.training.checkpoints import find_checkpoint, latest_checkpoint


@pytest.fixture
def config(tiny_corpus, tmp_path):
    return make_config(tiny_corpus, tmp_path / "out")


@pytest.fixture(scope="module")
def whole(tiny_corpus, tmp_path_factory):
    """The config of a run that nothing stopped."""
    config = make_config(tiny_corpus, tmp_path_factory.mktemp("whole") / "out")
    train(config)
    return config


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
    found = find_checkpoint(config.output, identity)
    assert (found.folder, found.state.step) == (folder / "step-00000012", 12)
    err = capsys.readouterr().err
    assert "step-00000014 is damaged" in err and "continuing from step-00000012" in err
    assert list(folder.iterdir()) == [found.folder]  # the damaged one is nobody's latest any more
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


def test_runs_without_tensorboard(config, whole, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(config)
    assert capsys.readouterr().err.count("tensorboard is not installed") == 1
    check_equal_runs(config.output, whole.output)


OLD_NAMES = {"optimizer_steps": "updates", "loss_components": "parts", "last_logged_step": "line_step"}


@pytest.mark.parametrize("left_out", [[], ["loss_components", "micro_batch_tokens"]])
def test_checkpoint_of_before_continues(config, whole, left_out, monkeypatch):
    """One whose state has the names of then, fewer fields, and no checksum."""
    stop_after(config, 14, monkeypatch)
    path = Path(latest_checkpoint(config.output)) / "trainer_state.json"
    found = read_json(path)
    del found["checksum"]
    state = {name: value for name, value in found["state"].items() if name not in left_out}
    found["state"] = {OLD_NAMES.get(name, name): value for name, value in state.items()}
    assert {"updates", "line_step"} < found["state"].keys()
    path.write_text(json.dumps(found))
    train(config)
    check_equal_runs(config.output, whole.output)

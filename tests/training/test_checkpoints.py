"""A checkpoint on disk: whole it opens, and no file of it changes without being noticed."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from training_runs import STUDENT, flip_bit, truncate

from miniplm.config import OptimizerConfig
from miniplm.models.decoder import Decoder, student_config
from miniplm.runtime.distributed import ALONE
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import fingerprint, read_json
from miniplm.training.checkpoints import (
    Checkpoint,
    DamagedCheckpoint,
    checkpoint_folder,
    checkpoint_folders,
    find_checkpoint,
    latest_checkpoint,
    load_optimizer,
    prune_checkpoints,
    read_checkpoint,
    read_training_output,
    save_checkpoint,
)
from miniplm.training.snapshot import take_snapshot
from miniplm.training.state import TrainState, state_from_json, state_to_json
from miniplm.training.step import make_optimizer

STATE = TrainState(
    step=7,
    optimizer_steps=6,
    tokens=1_400,
    skipped_in_a_row=1,
    grad_norm=0.123456789,
    losses=[3.25, 3.0000001],
    loss_components=[[3.5, 0.1], [3.0, 0.2]],
    last_logged_step=4,
    micro_batch_tokens=2_048,
)


@pytest.fixture(scope="module")
def trained(tiny_tokenizer, tmp_path_factory):
    """(model, optimizer after one update, folder of a checkpoint of both with STATE)."""
    model = Decoder(student_config(dataclasses.replace(STUDENT, vocab_size=40), 40, 0))
    optimizer = make_optimizer(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    folder = checkpoint_folder(tmp_path_factory.mktemp("run"), 7)
    save_checkpoint(folder, model, take_snapshot(model, optimizer, STATE, ALONE), tiny_tokenizer, "abcd")
    return model, optimizer, folder


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A copy of the checkpoint."""
    return Path(shutil.copytree(trained[2], checkpoint_folder(tmp_path / "run", 7)))


def test_what_is_saved_is_read(trained, folder):
    model, optimizer, _ = trained
    assert read_checkpoint(folder) == Checkpoint(folder, "abcd", STATE)
    other = Decoder(model.config)
    loaded = make_optimizer(other, OptimizerConfig())
    load_optimizer(loaded, other, folder, STATE.optimizer_steps)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[ours][name], loaded.state[theirs][name])
        assert loaded.state[theirs]["step"] == 6


def test_equal_states_write_equal_bytes(trained, tiny_tokenizer, tmp_path):
    model, optimizer, folder = trained
    again = checkpoint_folder(tmp_path, 7)
    save_checkpoint(again, model, take_snapshot(model, optimizer, STATE, ALONE), tiny_tokenizer, "abcd")
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


# ---- damage ----


@pytest.mark.slow
def test_no_bit_of_a_checkpoint_flips_unnoticed(folder):
    """Bits of every file at random, of the state's file many: refused, or read as it was (a letter of the
    layout)."""
    generator, whole = random.Random(0), read_checkpoint(folder)
    assert {"config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json"} < {
        path.name for path in folder.iterdir()
    }
    for path in sorted(folder.iterdir()):
        content, refused = path.read_bytes(), 0
        flips = 1_000 if path.name == "trainer_state.json" else 25
        for _ in range(flips):
            flip_bit(path, generator)
            try:
                assert read_checkpoint(folder) == whole
            except DamagedCheckpoint as error:
                assert path.name in str(error) and "\n" not in str(error)
                refused += 1
            path.write_bytes(content)
        assert refused >= 0.85 * flips, path.name


@pytest.mark.parametrize("damage", [truncate, Path.unlink, lambda path: path.write_bytes(b"")])
def test_files_that_are_missing_or_cut_are_named(folder, damage):
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        damage(path)
        with pytest.raises(DamagedCheckpoint, match=path.name):
            read_checkpoint(folder)
        if path.name == "optimizer.safetensors":  # a model is loaded without it
            assert read_checkpoint(folder, with_optimizer=False).state == STATE
        path.write_bytes(content)
    assert read_checkpoint(folder).state == STATE


def change(path, key, value):
    """Change a value in the state's file as a hand would, checksum and all."""
    content = read_json(path)
    del content["checksum"]
    place = content["state"] if key in content["state"] else content
    place[key] = value
    path.write_text(json.dumps({**content, "checksum": fingerprint(content)}))


@pytest.mark.parametrize(
    "key, value",
    [
        ("identity", None),
        ("files", []),
        ("files", {"model.safetensors": 1}),
        ("files", {}),
        ("state", None),
        ("state", {"steps": 7}),
        ("step", 8),  # not that of its folder
        ("step", "7"),
        ("step", -7),
        ("optimizer_steps", 8),
        ("tokens", 1.5),
        ("skipped_in_a_row", True),
        ("grad_norm", "high"),
        ("losses", None),
        ("losses", [None]),
        ("loss_components", [[1.0]]),
        ("loss_components", [3.0, 0.2]),
        ("last_logged_step", None),
        ("micro_batch_tokens", 0),
    ],
)
def test_values_that_cannot_be_are_refused(folder, key, value):
    change(folder / "trainer_state.json", key, value)
    with pytest.raises(DamagedCheckpoint, match=r"trainer_state.json is") as raised:
        read_checkpoint(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "[" * 100_000, "9" * 5_000, '{"step": 1', "\ud800"])
def test_a_state_that_is_none_is_refused(folder, text):
    (folder / "trainer_state.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DamagedCheckpoint, match=r"trainer_state.json is not as it was written"):
        read_checkpoint(folder)


def test_state_of_before_is_read():
    """Under the names of then, and without those fields that came later; without a checksum."""
    state = {"step": 3, "updates": 2, "tokens": 9, "skipped_in_a_row": 1, "grad_norm": None}
    state |= {"losses": [1.5], "line_step": 1}
    content = {"identity": "abcd", "state": state, "files": {}}
    expected = TrainState(
        step=3, optimizer_steps=2, tokens=9, skipped_in_a_row=1, losses=[1.5], last_logged_step=1
    )
    assert state_from_json(content) == ("abcd", expected, {})
    later = {**content, "state": {**state, "parts": [[1.0, 0.5]], "micro_batch_tokens": 64}}
    expected = expected.model_copy(update={"loss_components": [[1.0, 0.5]], "micro_batch_tokens": 64})
    assert state_from_json(later)[1] == expected
    written = json.loads(json.dumps(state_to_json("abcd", expected, {})))
    assert state_from_json(written)[1] == expected
    written["state"]["losses"] = [2.5]
    with pytest.raises(ValueError, match="checksum"):
        state_from_json(written)


# ---- the checkpoints of an output ----


def test_the_latest_checkpoint_is_that_of_the_highest_step(tmp_path):
    assert latest_checkpoint("org/name") == "org/name"
    for name in (
        "step-00000900",
        "step-00001000",
        "step-100000000",
        "step-old",
        "best",
        ".step-00000001.tmp",
    ):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-200000000").touch()  # no folder
    names = ["step-00000900", "step-00001000", "step-100000000"]
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == names
    assert latest_checkpoint(tmp_path) == latest_checkpoint(str(tmp_path))
    assert latest_checkpoint(tmp_path).endswith("step-100000000")
    prune_checkpoints(tmp_path, 2)
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == names[1:]


def test_a_model_is_not_loaded_from_a_damaged_checkpoint(folder):
    for name in (folder.parents[1], folder):  # the training output; the checkpoint itself
        assert latest_checkpoint(name) == str(folder)
    truncate(folder / "optimizer.safetensors")  # which no model needs
    assert latest_checkpoint(folder) == str(folder)
    flip_bit(folder / "model.safetensors", random.Random(0))
    for name in (folder.parents[1], folder):
        with pytest.raises(UserError, match=r"is damaged \(model.safetensors is not .*: give an earlier one"):
            latest_checkpoint(name)


def test_a_checkpoint_of_transformers_trainer_is_none_of_ours(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": []}))
    assert latest_checkpoint(tmp_path) == str(tmp_path)


def test_a_run_whose_files_do_not_belong_together_is_refused(folder):
    run = folder.parents[1]
    with pytest.raises(UserError, match="neither a training output"):
        read_training_output(run)
    for manifest in ([], {"stage": "prepare", "identity": {}}, {"stage": "train", "identity": {}}):
        (run / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="does not belong to the run"):
            read_training_output(run)
    with pytest.raises(UserError, match="belongs to another run"):
        find_checkpoint(run, "another")
    assert find_checkpoint(run, "abcd").folder == folder

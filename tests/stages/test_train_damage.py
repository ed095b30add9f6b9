"""train and what it finds damaged, lost or in the way: a run ends like one without, or says what to do."""

import json
import random
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from training_runs import check_equal_runs, files, flip_bit, make_config, metrics, stop_after, truncate

from miniplm.cli import main
from miniplm.config import CheckpointConfig
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json
from miniplm.stages.train import train
from miniplm.training.checkpoints import checkpoint_folder, find_checkpoint, latest_checkpoint


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
        r"intact one before it",
    ):
        train(config)
    assert files(config.output) == before


# ---- a complete run of which something is lost ----


@pytest.fixture
def done(whole, tmp_path):
    """The config of a complete run, to be damaged."""
    shutil.copytree(whole.output, tmp_path / "done")
    return replace(whole, output=str(tmp_path / "done"))


@pytest.mark.parametrize("damage", [truncate, Path.unlink, flip])
@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json", "trainer_state.json"],
)
def test_a_complete_run_mends_its_last_checkpoint(done, whole, damage, name, capsys):
    damage(checkpoint_folder(done.output, 26) / name)
    train(done)
    said = capsys.readouterr()
    assert "nothing to do" not in said.out and "trained 26 steps" in said.out
    assert re.search(rf"was complete, but checkpoint step-00000026 is damaged \({name} is ", said.err)
    assert "continuing after step 24" in said.err
    check_equal_runs(done.output, whole.output)


def test_a_complete_run_mends_what_else_it_lost(done, whole, capsys):
    """Its last checkpoint, the last lines of its metrics, the results in its manifest."""

    def mended(lost):
        train(done)
        said = capsys.readouterr()
        assert f"was complete, but {lost}" in said.err and "trained 26 steps" in said.out
        check_equal_runs(done.output, whole.output)

    shutil.rmtree(checkpoint_folder(done.output, 26))
    mended("its last checkpoint is gone")
    lines = Path(done.output, "metrics.jsonl")
    truncate(lines)
    mended("1 lines of its metrics are damaged or missing")
    lines.write_bytes(b"".join(lines.read_bytes().splitlines(keepends=True)[:-1]))
    mended("the last line of its metrics is gone")
    manifest = Path(done.output, "manifest.json")
    for key in ("skipped", "parameters", "max_length"):  # the last one's of the corpus
        manifest.write_text(re.sub(rf'"{key}": \d+', f'"{key}": 77', manifest.read_text()))
        export = ["export", "--checkpoint", done.output, "--output", done.output + "-model"]
        assert main(export) == 2
        assert f"{manifest} is not as written: run its train command again" in capsys.readouterr().err
        train(done)
        assert f"{manifest} is not as written: what came of its run" in capsys.readouterr().err
        check_equal_runs(done.output, whole.output)
    lines.write_bytes(lines.read_bytes() + b'{"step": 26, "loss": NaN}\n')
    mended("1 lines of its metrics are damaged or missing")
    content = lines.read_bytes().splitlines(keepends=True)
    lines.write_bytes(b"".join(content[:3] + content[4:]))
    train(done)
    assert "but 1 lines of its metrics are damaged" in capsys.readouterr().err
    found = metrics(done.output)
    assert [line["after"] for line in found][1:] == [line["step"] for line in found][:-1]
    lines.unlink()
    train(done)
    assert "the last lines up to step 24 are lost" in capsys.readouterr().err
    assert metrics(done.output) == [{**metrics(whole.output)[-1], "after": 0}]  # what the checkpoint knows
    train(done)
    assert "complete, nothing to do" in capsys.readouterr().out


def test_a_complete_run_says_what_it_cannot_mend(done, capsys):
    before = files(done.output)
    flip(checkpoint_folder(done.output, 24) / "model.safetensors")
    train(done)
    said = capsys.readouterr()
    assert "nothing to do" in said.out
    assert "step-00000024 is damaged (model.safetensors is not as it was written)" in said.err
    flip(checkpoint_folder(done.output, 26) / "model.safetensors")
    with pytest.raises(UserError, match=r"step-00000026 is damaged .* and there is no intact one before it"):
        train(done)
    manifest = read_json(Path(done.output) / "manifest.json")
    assert manifest["complete"] and files(done.output).keys() == before.keys()
    shutil.rmtree(Path(done.output) / "checkpoints")
    with pytest.raises(UserError, match="was complete, but its checkpoints are gone: delete it"):
        train(done)


@pytest.mark.parametrize("command", ["evaluate", "generate", "export"])
def test_no_command_reads_a_damaged_checkpoint(done, command, tmp_path, capsys):
    """A bit of each file that it reads: one line, and nothing written."""
    generator, folder = random.Random(command), checkpoint_folder(done.output, 26)
    arguments = {
        "evaluate": ["--model", done.output, "--data", done.data, "--output", str(tmp_path / "out")],
        "generate": ["--model", done.output, "--prompt", "a"],
        "export": ["--checkpoint", done.output, "--output", str(tmp_path / "out")],
    }[command]
    read = [path for path in sorted(folder.iterdir()) if path.name != "optimizer.safetensors"]
    for path in read:
        content = path.read_bytes()
        while True:  # a flip that leaves the state as it was, in the layout of its JSON, changes nothing
            flip_bit(path, generator)
            if path.name != "trainer_state.json" or not _is_same_json(path, content):
                break
            path.write_bytes(content)
        assert main([command, *arguments]) == 2, path.name
        said = capsys.readouterr()
        assert said.out == "" and len(said.err.splitlines()) == 1
        assert re.search(rf"step-00000026 is damaged \({path.name} is not", said.err)
        assert not (tmp_path / "out").exists()
        path.write_bytes(content)
    assert main([command, *arguments]) == 0


def _is_same_json(path, content):
    try:
        return json.loads(path.read_text()) == json.loads(content)
    except ValueError:
        return False


# ---- what else may have changed ----


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
def test_checkpoint_of_before_continues(config, whole, left_out, monkeypatch, capsys):
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
    assert "continuing after step 14 of 26" in capsys.readouterr().err  # not from the one before
    check_equal_runs(config.output, whole.output)

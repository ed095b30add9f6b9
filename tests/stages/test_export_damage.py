"""Exports that were damaged after they were complete, training outputs and evaluations that are not as they
were written, and two exports at once: one line each, and nothing is written."""

import json
import random
import subprocess
import sys

import pytest
from export_runs import card, contents, publish, rewrite, rewrite_losses
from training_runs import flip_bit, truncate

from miniplm.runtime.artifacts import MANIFEST
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import fingerprint, read_json, write_json

FILES = ("README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def refused(checkpoint, output, message, **settings):
    """The export is refused with one line, and leaves the folder as it is."""
    before = contents(output) if output.exists() else None
    with pytest.raises(UserError, match=message) as caught:
        publish(checkpoint, output, **settings)
    assert "\n" not in str(caught.value)
    assert (contents(output) if output.exists() else None) == before


@pytest.fixture
def exported(work, tmp_path):
    return publish(work / "refined-student", tmp_path / "model")


def forget_hashes(folder):
    """As exports were before their manifest held hashes."""
    manifest = read_json(folder / MANIFEST)
    del manifest["files"]
    write_json(folder / MANIFEST, manifest)


@pytest.mark.parametrize("name", [*FILES, "model.safetensors"])
def test_damaged_files_are_not_complete(work, exported, name):
    path = exported / name
    whole = path.read_bytes()
    for damage in (
        truncate,
        lambda path: flip_bit(path, random.Random(0)),
        lambda path: path.write_bytes(b""),
    ):
        damage(path)
        refused(work / "refined-student", exported, f"complete, but {name} is not as it was written: restore")
    path.unlink()
    refused(work / "refined-student", exported, f"complete, but {name} is missing: restore")
    path.write_bytes(whole)
    publish(work / "refined-student", exported)


def test_damaged_manifests_are_not_complete(work, exported):
    whole = (exported / MANIFEST).read_bytes()
    manifest = json.loads(whole)
    for files in ([], None, {}, {**manifest["files"], "config.json": 3}, {"config.json": "0"}):
        write_json(exported / MANIFEST, {**manifest, "files": files})
        refused(work / "refined-student", exported, "complete, but ")
    for content in (whole[:-20], b"", b"[" * 10**5, whole.replace(b"true", b"false", 1)):
        (exported / MANIFEST).write_bytes(content)
        refused(work / "refined-student", exported, "not valid JSON|not a complete export")
    (exported / MANIFEST).unlink()
    refused(work / "refined-student", exported, "not empty")


def test_exports_without_hashes_are_complete_too(work, exported, capsys):
    forget_hashes(exported)
    before = contents(exported)
    capsys.readouterr()
    publish(work / "refined-student", exported)
    assert "nothing to do" in capsys.readouterr().out and contents(exported) == before


@pytest.mark.parametrize("name", [*FILES, "model.safetensors"])
def test_files_missing_from_an_export_without_hashes(work, exported, name):
    forget_hashes(exported)
    (exported / name).unlink()
    refused(work / "refined-student", exported, f"complete, but {name} is missing")


@pytest.mark.parametrize("name", [*FILES[1:], "model.safetensors"])
def test_files_cut_in_an_export_without_hashes(work, exported, name):
    forget_hashes(exported)
    path = exported / name
    path.write_bytes(path.read_bytes()[:-20])
    refused(work / "refined-student", exported, f"complete, but {name} is not as it was written")


HOLDER = """
import sys
from miniplm.runtime.files import atomic_folder
with atomic_folder(sys.argv[1]):
    print("writing", flush=True)
    sys.stdin.readline()
"""


def test_two_exports_at_once(work, tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "model")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "writing\n"
        refused(work / "refined-student", tmp_path / "model", "another process is writing")
        other.kill()
    publish(work / "refined-student", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_that_ends_while_another_one_begins(work, tmp_path, monkeypatch):
    """Both found nothing there: the second sees it at the end."""
    from miniplm.stages import export as stage

    write = stage._write_model

    def slowly(*arguments):
        write(*arguments)
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "theirs").touch()

    monkeypatch.setattr(stage, "_write_model", slowly)
    with pytest.raises(UserError, match="in the meantime"):
        publish(work / "refined-student", tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


CHANGES = {
    "no corpus's source": lambda manifest: manifest["corpus"].pop("source"),
    "a source that is no text": lambda manifest: manifest["corpus"].update(source=["x"]),
    "a corpus that is a list": lambda manifest: manifest.update(corpus=[manifest["corpus"]]),
    "rows that are text": lambda manifest: manifest["corpus"].update(rows="20"),
    "negative tokens": lambda manifest: manifest["corpus"].update(tokens=-1),
    "no domains": lambda manifest: manifest["corpus"].update(domains=None),
    "no rule": lambda manifest: manifest["corpus"]["selection"].update(rule={}),
    "two rules": lambda manifest: manifest["corpus"]["selection"]["rule"].update(threshold=0.0),
    "no teacher": lambda manifest: manifest["corpus"].update(scores=[{"reference": "x"}]),
    "no kept": lambda manifest: manifest["corpus"]["selection"].pop("kept"),
    "parameters beyond all": lambda manifest: manifest.update(parameters=2**70),
    "no optimizer": lambda manifest: manifest["identity"].pop("optimizer"),
    "one beta": lambda manifest: manifest["identity"]["optimizer"].update(betas=[0.9]),
    "steps of text": lambda manifest: manifest["identity"].update(steps="6"),
    "a seed beyond all": lambda manifest: manifest["identity"].update(seed=10**100),
    "a teacher without alpha": lambda manifest: manifest["identity"].update(teacher="0123"),
    "complete or not": lambda manifest: manifest.update(complete=1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_manifests_of_training_that_cannot_be(student_run, tmp_path, change):
    rewrite(student_run, change)
    message = r"manifest\.json is not as train wrote it \(.+\): restore it"
    refused(student_run, tmp_path / "out", message)


def test_metrics_that_the_manifest_contradicts(student_run, tmp_path):
    path = student_run / "metrics.jsonl"
    whole = path.read_text()
    *first, last = whole.splitlines(keepends=True)
    line = json.loads(last)
    line["loss"] += 0.5
    path.write_text("".join([*first, json.dumps(line) + "\n"]))
    refused(student_run, tmp_path / "out", rf"1 lines of {path} are damaged or missing: restore")
    del line["checksum"]
    line["checksum"] = fingerprint(line)
    path.write_text("".join([*first, json.dumps(line) + "\n"]))
    refused(student_run, tmp_path / "out", "another loss of step 6: restore")
    path.write_text(whole)
    expected = card(publish(student_run, tmp_path / "whole", name="model")).text
    path.unlink()  # the manifest of a run that has ended holds its last losses too
    assert card(publish(student_run, tmp_path / "out", name="model")).text == expected.replace("whole", "out")


def test_evaluations_that_are_not_as_they_were_written(work, tmp_path):
    path = tmp_path / "losses.json"
    rewrite_losses(work, path, lambda losses: None)
    whole = path.read_bytes()
    checkpoint, settings = work / "refined-student", {"evaluation": str(path)}
    for content in (whole[:-30], b"", b"[" * 10**5, b'{"loss": ' + b"9" * 5000 + b"}"):
        path.write_bytes(content)
        refused(checkpoint, tmp_path / "out", "not valid JSON", **settings)
    for content in (b"[]", b"null", b'"x"', b"{}", whole.replace(b'"loss": ', b'"loss": 1', 1)):
        path.write_bytes(content)
        refused(
            checkpoint, tmp_path / "out", r"is not an evaluation as evaluate writes it \(.+\)", **settings
        )
    refused(checkpoint, tmp_path / "out", "not a regular file", evaluation=str(tmp_path))

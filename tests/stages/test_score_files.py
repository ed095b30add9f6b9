"""score: the files of a run, resuming, and what is refused."""

import json
import random
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpora import chunks_of, read_score_files, write_corpus
from outputs import contents, kill_and_restart
from scoring_runs import SMALL, run_score

from miniplm.cli import main
from miniplm.config import ScoreConfig
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json
from miniplm.stages.score import score


def test_equal_runs_write_equal_bytes(tiny_corpus, teacher, reference, scores, tmp_path, capsys):
    run_score(tiny_corpus, tmp_path / "s", teacher=teacher, reference=reference)
    assert contents(tmp_path / "s") == contents(scores)
    assert sorted(contents(scores)) == [
        "manifest.json",
        *(f"scores-{number:05d}.parquet" for number in range(6)),
    ]
    assert str(tmp_path) not in (tmp_path / "s" / "manifest.json").read_text()
    values = read_score_files(scores)["score"]
    printed = capsys.readouterr().out
    assert "Scored 40 chunks" in printed and "1 not finite" in printed
    assert (
        f"{np.nanmean(values):.4f}" in printed
        and f"{np.mean(values[np.isfinite(values)] < 0):.1%}" in printed
    )


def test_complete_run_is_left_alone_and_damage_is_repaired(
    tiny_corpus, teacher, reference, scores, tmp_path, capsys
):
    folder = tmp_path / "s"
    shutil.copytree(scores, folder)
    config = ScoreConfig(data=tiny_corpus, teacher=teacher, reference=reference, output=str(folder), **SMALL)
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    score(config)
    assert "nothing to do" in capsys.readouterr().out
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before

    shard = [folder / f"scores-{number:05d}.parquet" for number in range(6)]
    shard[0].unlink()
    shard[1].write_bytes(shard[1].read_bytes()[:-20])
    column = pq.read_metadata(shard[2]).row_group(0).column(4)
    data = bytearray(shard[2].read_bytes())
    data[column.dictionary_page_offset + column.total_compressed_size - 1] ^= 1  # one bit of the scores
    shard[2].write_bytes(data)
    shutil.copy(shard[3], shard[4])  # whole, but of other rows
    score(config)
    assert contents(folder) == contents(scores)
    assert shard[3].stat().st_ino == before[shard[3].name] and shard[5].stat().st_ino == before[shard[5].name]


@pytest.mark.slow
def test_kill_at_random_moments_ends_in_the_same_bytes(tiny_corpus, teacher, reference, tmp_path):
    on_cpu = dict(device="cpu", dtype="float32")
    options = dict(data=tiny_corpus, teacher=teacher, reference=reference, shard_chunks=1, **on_cpu)
    score(ScoreConfig(output=str(tmp_path / "whole"), **options))
    folder = tmp_path / "killed"
    targets = [0, *sorted(random.Random(1).sample(range(1, 36), 5))]
    setup = (
        "import datasets, pyarrow.parquet, safetensors, transformers; from miniplm.config import "
        "ScoreConfig; "
        "from miniplm.stages.score import score; "
        "transformers.AutoTokenizer, transformers.LlamaConfig, transformers.Qwen2Config, "
        "transformers.Qwen3Config"
    )  # imported when named
    struck = kill_and_restart(
        setup, f"score(ScoreConfig(output={str(folder)!r}, **{options!r}))", folder, "*.parquet", targets
    )
    assert struck >= 3  # on a busy machine a run may end before the blow
    assert contents(folder) == contents(tmp_path / "whole")


# --- refusals ---


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("corpus", "corpus was"),
        ("teacher", "teacher was"),
        ("config", "reference was"),
        ("batch_tokens", "batch_tokens was 100"),
        ("document_mask", "document_mask was false"),
        ("vocab_size", "vocab_size was null"),
        ("role", "reference was"),
    ],
)
def test_another_run_into_the_same_folder_is_refused(
    tiny_corpus, tiny_tokenizer, tiny_model, teacher, reference, scores, tmp_path, change, words
):
    folder = tmp_path / "s"
    shutil.copytree(scores, folder)
    options = dict(data=tiny_corpus, teacher=teacher, reference=reference, output=str(folder), **SMALL)
    if change == "corpus":
        options["data"] = write_corpus(tmp_path / "corpus", chunks_of(tiny_corpus)[:-1], tiny_tokenizer)
    elif change == "teacher":
        options["teacher"] = tiny_model(tmp_path / "other", seed=9)
    elif change == "config":  # the same weights with another RoPE base are another model
        options["reference"] = shutil.copytree(reference, tmp_path / "other")
        settings = json.loads((tmp_path / "other" / "config.json").read_text())
        settings["rope_parameters"]["rope_theta"] = 1e3
        (tmp_path / "other" / "config.json").write_text(json.dumps(settings))
    elif change == "role":
        options["reference"] = None
    else:
        options[change] = {"batch_tokens": 101, "document_mask": True, "vocab_size": 500}[change]
    with pytest.raises(UserError, match=words):
        score(ScoreConfig(**options))
    assert contents(folder) == contents(scores)


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def swap_tokens(folder):
    """Two tokens of the vocabulary change their ids."""
    settings = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    (first, one), (second, other) = [item for item in vocabulary.items() if item[1] in (40, 41)]
    vocabulary[first], vocabulary[second] = other, one
    (folder / "tokenizer.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("role", ["teacher", "reference"])
@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        (cut_weights, "model.safetensors is not a whole safetensors file"),
        (swap_tokens, "has id 40"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_unusable_model(tiny_corpus, teacher, reference, tmp_path, capsys, role, spoiled, words):
    broken = shutil.copytree(teacher, tmp_path / "broken")
    spoiled(broken)
    names = {"teacher": teacher, "reference": reference, role: str(broken)}
    arguments = [
        f"--{key}={value}"
        for key, value in {"data": tiny_corpus, "output": tmp_path / "s", "device": "cpu", **names}.items()
    ]
    assert main(["score", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and str(broken) in error and error.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_softmax_that_does_not_cover_the_corpus(tiny_corpus, tiny_model, teacher, tmp_path):
    highest = max(max(chunk) for chunk in chunks_of(tiny_corpus))
    short = tiny_model(tmp_path / "short", seed=4, vocab_size=highest)
    for options in (
        dict(teacher=teacher, reference=short),
        dict(teacher=short),
        dict(teacher=teacher, vocab_size=highest),
    ):
        with pytest.raises(UserError, match=f"ids up to {highest}, the softmax covers only {highest}:"):
            run_score(tiny_corpus, tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()
    # One more id, and it is covered: what the tokenizer has beyond the corpus does not matter.
    run_score(tiny_corpus, tmp_path / "s", teacher=teacher, vocab_size=highest + 1)


def test_unusable_corpus_and_output(tiny_corpus, teacher, tmp_path):
    corpus = shutil.copytree(tiny_corpus, tmp_path / "corpus")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for output, words in (("full", "not empty"), ("file", "is a file")):
        with pytest.raises(UserError, match=words):
            run_score(str(corpus), tmp_path / output, teacher=teacher)
    manifest = read_json(corpus / "manifest.json")
    (corpus / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    with pytest.raises(UserError, match="not complete"):
        run_score(str(corpus), tmp_path / "s", teacher=teacher)
    with pytest.raises(UserError, match="does not exist"):
        run_score(str(tmp_path / "nothing"), tmp_path / "s", teacher=teacher)
    assert not (tmp_path / "s").exists()

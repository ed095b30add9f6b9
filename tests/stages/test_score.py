"""score: equality with transformers' own logits, resuming, refusals, what is not finite."""

import json
import os
import random
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from miniplm.cli import main
from miniplm.config import ScoreConfig
from miniplm.data import corpus as storage
from miniplm.runtime import artifacts
from miniplm.runtime.errors import UserError
from miniplm.stages.score import score

SMALL = dict(shard_chunks=7, batch_tokens=100, device="cpu")  # 6 files, several batches in each


@pytest.fixture(scope="module")
def teacher(tiny_model, tmp_path_factory) -> str:
    return tiny_model(tmp_path_factory.mktemp("teacher"), seed=0)


@pytest.fixture(scope="module")
def reference(tiny_model, tmp_path_factory) -> str:
    return tiny_model(tmp_path_factory.mktemp("reference"), seed=1, hidden_size=16)


@pytest.fixture(scope="module")
def scores(tiny_corpus, teacher, reference, tmp_path_factory) -> Path:
    """The score folder of an uninterrupted run with both models."""
    folder = tmp_path_factory.mktemp("scores") / "scores"
    score(ScoreConfig(data=tiny_corpus, teacher=teacher, reference=reference, output=str(folder), **SMALL))
    return folder


def chunks_of(corpus) -> list[list[int]]:
    from datasets import load_from_disk

    return load_from_disk(str(corpus))["input_ids"][:]


def read(folder) -> dict[str, np.ndarray]:
    """The columns of all score files in the order of their names, NaN for null."""
    tables = [pq.read_table(path) for path in sorted(Path(folder).glob("*.parquet"))]
    return {
        name: np.concatenate([table[name].to_numpy() for table in tables]) for name in tables[0].column_names
    }


def files(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def true_log_probs(name, chunks, eos: int, document_mask: bool, vocab_size: int | None = None) -> list[float]:
    """Mean log-probability of every chunk from transformers' logits, one document or chunk at a time; NaN
    where nothing counts."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    means = []
    for chunk in chunks:
        inputs, targets = chunk[:-1], chunk[1:]
        ends = [i + 1 for i, token in enumerate(inputs) if token == eos] if document_mask else []
        bounds = sorted({0, *ends, len(inputs)})
        values = []
        for start, stop in pairwise(bounds):
            with torch.no_grad():
                logits = model(torch.tensor([inputs[start:stop]])).logits[0].double()[:, :vocab_size]
            log_prob = logits.log_softmax(-1)[torch.arange(stop - start), torch.tensor(targets[start:stop])]
            values += [
                value
                for value, token in zip(log_prob.tolist(), inputs[start:stop], strict=True)
                if token != eos
            ]
        means.append(float(np.mean(values)) if values else float("nan"))
    return means


def copy_corpus(source, folder, chunks) -> str:
    """A corpus like `source` with other chunks."""
    import pyarrow as pa

    manifest = artifacts.read_manifest(source)
    artifacts.open_output(folder, "prepare", {"made": "for this test"})
    columns = {
        "input_ids": pa.array(chunks, pa.list_(pa.int32())),
        "domain": pa.array(["a"] * len(chunks)),
        "num_tokens": pa.array(list(map(len, chunks)), pa.int32()),
    }
    content = storage.write_dataset_files(
        folder, [storage.write_shard(folder, 0, columns)], with_scores=False
    )
    shutil.copytree(Path(source) / "tokenizer", Path(folder) / "tokenizer")
    carried = {key: value for key, value in manifest.items() if key not in ("stage", "identity", "complete")}
    artifacts.complete_output(folder, {**carried, "fingerprint": content, "rows": len(chunks)})
    return str(folder)


# --- values ---


@pytest.mark.parametrize("document_mask", [False, True])
def test_scores_equal_transformers_logits(tiny_corpus, teacher, reference, tmp_path, document_mask):
    score(
        ScoreConfig(
            data=tiny_corpus,
            teacher=teacher,
            reference=reference,
            output=str(tmp_path / "s"),
            document_mask=document_mask,
            **SMALL,
        )
    )
    found, chunks = read(tmp_path / "s"), chunks_of(tiny_corpus)
    truth = {name: np.array(true_log_probs(name, chunks, 0, document_mask)) for name in (teacher, reference)}
    np.testing.assert_allclose(found["teacher_log_prob"], truth[teacher], atol=1e-4, rtol=0)
    np.testing.assert_allclose(found["reference_log_prob"], truth[reference], atol=1e-4, rtol=0)
    np.testing.assert_allclose(found["score"], truth[teacher] - truth[reference], atol=1e-4, rtol=0)
    assert found["index"].tolist() == list(range(len(chunks)))
    assert found["num_tokens"].tolist() == [sum(token != 0 for token in chunk[:-1]) for chunk in chunks]
    # The test would not see a mask that is ignored if it made no difference here.
    other = np.array(true_log_probs(teacher, chunks, 0, not document_mask))
    assert np.nanmax(np.abs(other - truth[teacher])) > 1e-2


def test_rows_with_nothing_to_score_are_null(tiny_corpus, teacher, reference, tmp_path):
    chunks = [[0], [5], [0, 7], [7, 0], [0, 0, 0], [9, 8, 0, 3], [0] * 30 + [4], [1] * 65]
    corpus = copy_corpus(tiny_corpus, tmp_path / "corpus", chunks)
    score(
        ScoreConfig(
            data=corpus,
            teacher=teacher,
            reference=reference,
            output=str(tmp_path / "s"),
            shard_chunks=3,
            device="cpu",
        )
    )
    found, truth = read(tmp_path / "s"), true_log_probs(teacher, chunks, 0, False)
    assert found["num_tokens"].tolist() == [0, 0, 0, 1, 0, 2, 0, 64]
    for name in ("teacher_log_prob", "reference_log_prob", "score"):
        assert np.isnan(found[name]).tolist() == [True, True, True, False, True, False, True, False]
    np.testing.assert_allclose(found["teacher_log_prob"], truth, atol=1e-4, rtol=0)
    assert pq.read_table(tmp_path / "s" / "scores-00000.parquet")["score"].null_count == 3  # null, not NaN
    assert artifacts.read_json(tmp_path / "s" / "manifest.json")["non_finite"] == 5


def test_one_model_at_a_time_equals_both(tiny_corpus, teacher, reference, scores, tmp_path):
    both = read(scores)
    for role, name in (("teacher", teacher), ("reference", reference)):
        score(ScoreConfig(data=tiny_corpus, output=str(tmp_path / role), **{role: name}, **SMALL))
        alone = read(tmp_path / role)
        assert list(alone) == ["index", "num_tokens", f"{role}_log_prob"]
        assert (alone["num_tokens"] == both["num_tokens"]).all()
        np.testing.assert_allclose(alone[f"{role}_log_prob"], both[f"{role}_log_prob"], atol=1e-6, rtol=0)


def test_heads_of_unequal_height(tiny_corpus, tiny_model, reference, tmp_path):
    """Both softmaxes run over the ids that both heads have; alone, vocab_size says so."""
    tall = tiny_model(tmp_path / "tall", seed=2, vocab_size=640)
    chunks = chunks_of(tiny_corpus)[:20]
    corpus = copy_corpus(tiny_corpus, tmp_path / "corpus", chunks)
    score(ScoreConfig(data=corpus, teacher=tall, reference=reference, output=str(tmp_path / "both"), **SMALL))
    score(ScoreConfig(data=corpus, teacher=tall, output=str(tmp_path / "cut"), vocab_size=500, **SMALL))
    score(ScoreConfig(data=corpus, teacher=tall, output=str(tmp_path / "whole"), **SMALL))
    cut, whole = (true_log_probs(tall, chunks, 0, False, size) for size in (500, 640))
    for folder, truth, size in (("both", cut, 500), ("cut", cut, 500), ("whole", whole, 640)):
        np.testing.assert_allclose(read(tmp_path / folder)["teacher_log_prob"], truth, atol=1e-4, rtol=0)
        assert artifacts.read_json(tmp_path / folder / "manifest.json")["vocab_size"] == size
    assert np.nanmax(np.abs(np.subtract(cut, whole))) > 1e-2


def test_batches_and_files_change_no_score(tiny_corpus, teacher, reference, scores, tmp_path):
    score(
        ScoreConfig(
            data=tiny_corpus,
            teacher=teacher,
            reference=reference,
            output=str(tmp_path / "s"),
            shard_chunks=1000,
            batch_tokens=1,
            device="cpu",
        )
    )
    assert [path.name for path in (tmp_path / "s").glob("*.parquet")] == ["scores-00000.parquet"]
    for name, values in read(tmp_path / "s").items():
        np.testing.assert_allclose(values, read(scores)[name], atol=1e-5, rtol=0)


def test_nan_weights_give_null(tiny_corpus, teacher, reference, tmp_path):
    broken = spoil(teacher, tmp_path / "broken", "model.norm.weight", slice(None))
    score(
        ScoreConfig(
            data=tiny_corpus, teacher=broken, reference=reference, output=str(tmp_path / "s"), **SMALL
        )
    )
    found, manifest = read(tmp_path / "s"), artifacts.read_json(tmp_path / "s" / "manifest.json")
    assert np.isnan(found["score"]).all() and np.isnan(found["teacher_log_prob"]).all()
    assert np.isfinite(found["reference_log_prob"]).sum() == 39  # all but the row of one token
    assert (manifest["non_finite"], manifest["mean"], manifest["below_zero"]) == (40, None, None)


def test_nan_stays_in_its_row(tiny_corpus, tiny_model, reference, tmp_path):
    """One id's embedding is NaN: the rows that read it are null, and their neighbours in the batch are as
    without it."""
    clean = tiny_model(tmp_path / "clean", seed=3, tie_word_embeddings=False)
    chunks = chunks_of(tiny_corpus)
    token = next(token for token in range(1, 500) if 5 <= sum(token in chunk[:-1] for chunk in chunks) <= 20)
    broken = spoil(clean, tmp_path / "broken", "model.embed_tokens.weight", token)
    for name in (clean, broken):
        score(
            ScoreConfig(data=tiny_corpus, teacher=name, reference=reference, output=name + "-scores", **SMALL)
        )
    whole, found = (read(name + "-scores")["score"] for name in (clean, broken))
    hit = np.array([token in chunk[:-1] for chunk in chunks])
    assert np.isnan(found[hit]).all()
    np.testing.assert_array_equal(found[~hit], whole[~hit])


def spoil(source, folder, tensor: str, index) -> str:
    """A copy of a model with NaN in a tensor."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    weights[tensor][index] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


# --- files ---


def test_equal_runs_write_equal_bytes(tiny_corpus, teacher, reference, scores, tmp_path, capsys):
    score(
        ScoreConfig(
            data=tiny_corpus, teacher=teacher, reference=reference, output=str(tmp_path / "s"), **SMALL
        )
    )
    assert files(tmp_path / "s") == files(scores)
    assert sorted(files(scores)) == [
        "manifest.json",
        *(f"scores-{number:05d}.parquet" for number in range(6)),
    ]
    assert str(tmp_path) not in (tmp_path / "s" / "manifest.json").read_text()
    values = read(scores)["score"]
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
    assert files(folder) == files(scores)
    assert shard[3].stat().st_ino == before[shard[3].name] and shard[5].stat().st_ino == before[shard[5].name]


def kill_and_restart(setup: str, call: str, output, pattern: str, targets) -> int:
    """Run the Python code `call` in processes that die by SIGKILL shortly after `output` holds 1, 2, …
    (`targets`) files like `pattern`, each process continuing after the last; then once to its end. Returns
    how many were killed before it."""
    script = """
import json, os, pathlib, random, signal, sys, time, traceback
setup, call, output, pattern, targets = json.loads(sys.argv[1])
rng, struck = random.Random(0), 0
exec(setup)  # the imports, once: processes are forked before torch computes anything
for target in [*targets, None]:
    child = os.fork()
    if child == 0:
        try:
            exec(call)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if target is None:
        sys.exit(f"the last process failed, status {status}") if (status := os.waitpid(child, 0)[1]) else print(struck)
        break
    while len(list(pathlib.Path(output).glob(pattern))) < target and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.01))
    os.kill(child, signal.SIGKILL)
    struck += os.WIFSIGNALED(os.waitpid(child, 0)[1])
"""
    arguments = json.dumps([setup, call, str(output), pattern, list(targets)])
    run = subprocess.run(
        [sys.executable, "-c", script, arguments],
        capture_output=True,
        text=True,
        cwd=output.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout.split()[-1])


@pytest.mark.slow
def test_kill_at_random_moments_ends_in_the_same_bytes(tiny_corpus, teacher, reference, tmp_path):
    options = dict(data=tiny_corpus, teacher=teacher, reference=reference, shard_chunks=1, device="cpu")
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
    assert files(folder) == files(tmp_path / "whole")


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
    tiny_corpus, tiny_model, teacher, reference, scores, tmp_path, change, words
):
    folder = tmp_path / "s"
    shutil.copytree(scores, folder)
    options = dict(data=tiny_corpus, teacher=teacher, reference=reference, output=str(folder), **SMALL)
    if change == "corpus":
        options["data"] = copy_corpus(tiny_corpus, tmp_path / "corpus", chunks_of(tiny_corpus)[:-1])
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
    assert files(folder) == files(scores)


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
            score(ScoreConfig(data=tiny_corpus, output=str(tmp_path / "s"), device="cpu", **options))
    assert not (tmp_path / "s").exists()
    # One more id, and it is covered: what the tokenizer has beyond the corpus does not matter.
    score(
        ScoreConfig(
            data=tiny_corpus,
            output=str(tmp_path / "s"),
            teacher=teacher,
            vocab_size=highest + 1,
            device="cpu",
        )
    )


def test_unusable_corpus_and_output(tiny_corpus, teacher, tmp_path):
    corpus = shutil.copytree(tiny_corpus, tmp_path / "corpus")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for output, words in (("full", "not empty"), ("file", "is a file")):
        with pytest.raises(UserError, match=words):
            score(ScoreConfig(data=str(corpus), teacher=teacher, output=str(tmp_path / output)))
    manifest = artifacts.read_json(corpus / "manifest.json")
    (corpus / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    with pytest.raises(UserError, match="not complete"):
        score(ScoreConfig(data=str(corpus), teacher=teacher, output=str(tmp_path / "s")))
    with pytest.raises(UserError, match="does not exist"):
        score(ScoreConfig(data=str(tmp_path / "nothing"), teacher=teacher, output=str(tmp_path / "s")))
    assert not (tmp_path / "s").exists()

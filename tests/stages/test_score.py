"""score: equality with transformers' own logits, and what is not finite."""

import shutil
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from corpora import chunks_of, read_score_files, write_corpus
from scoring_runs import run_score

from miniplm.runtime.files import read_json


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


@pytest.mark.parametrize("document_mask", [False, True])
def test_scores_equal_transformers_logits(tiny_corpus, teacher, reference, tmp_path, document_mask):
    run_score(tiny_corpus, tmp_path / "s", teacher=teacher, reference=reference, document_mask=document_mask)
    found, chunks = read_score_files(tmp_path / "s"), chunks_of(tiny_corpus)
    truth = {name: np.array(true_log_probs(name, chunks, 0, document_mask)) for name in (teacher, reference)}
    np.testing.assert_allclose(found["teacher_log_prob"], truth[teacher], atol=1e-4, rtol=0)
    np.testing.assert_allclose(found["reference_log_prob"], truth[reference], atol=1e-4, rtol=0)
    np.testing.assert_allclose(found["score"], truth[teacher] - truth[reference], atol=1e-4, rtol=0)
    assert found["index"].tolist() == list(range(len(chunks)))
    assert found["num_tokens"].tolist() == [sum(token != 0 for token in chunk[:-1]) for chunk in chunks]
    # The test would not see a mask that is ignored if it made no difference here.
    other = np.array(true_log_probs(teacher, chunks, 0, not document_mask))
    assert np.nanmax(np.abs(other - truth[teacher])) > 1e-2


def test_rows_with_nothing_to_score_are_null(tiny_tokenizer, teacher, reference, tmp_path):
    chunks = [[0], [5], [0, 7], [7, 0], [0, 0, 0], [9, 8, 0, 3], [0] * 30 + [4], [1] * 65]
    corpus = write_corpus(tmp_path / "corpus", chunks, tiny_tokenizer)
    run_score(corpus, tmp_path / "s", teacher=teacher, reference=reference, shard_chunks=3)
    found, truth = read_score_files(tmp_path / "s"), true_log_probs(teacher, chunks, 0, False)
    assert found["num_tokens"].tolist() == [0, 0, 0, 1, 0, 2, 0, 64]
    for name in ("teacher_log_prob", "reference_log_prob", "score"):
        assert np.isnan(found[name]).tolist() == [True, True, True, False, True, False, True, False]
    np.testing.assert_allclose(found["teacher_log_prob"], truth, atol=1e-4, rtol=0)
    assert pq.read_table(tmp_path / "s" / "scores-00000.parquet")["score"].null_count == 3  # null, not NaN
    assert read_json(tmp_path / "s" / "manifest.json")["non_finite"] == 5


def test_one_model_at_a_time_equals_both(tiny_corpus, teacher, reference, scores, tmp_path):
    both = read_score_files(scores)
    for role, name in (("teacher", teacher), ("reference", reference)):
        run_score(tiny_corpus, tmp_path / role, **{role: name})
        alone = read_score_files(tmp_path / role)
        assert list(alone) == ["index", "num_tokens", f"{role}_log_prob"]
        assert (alone["num_tokens"] == both["num_tokens"]).all()
        np.testing.assert_allclose(alone[f"{role}_log_prob"], both[f"{role}_log_prob"], atol=1e-6, rtol=0)


def test_heads_of_unequal_height(tiny_corpus, tiny_tokenizer, tiny_model, reference, tmp_path):
    """Both softmaxes run over the ids that both heads have; alone, vocab_size says so."""
    tall = tiny_model(tmp_path / "tall", seed=2, vocab_size=640)
    chunks = chunks_of(tiny_corpus)[:20]
    corpus = write_corpus(tmp_path / "corpus", chunks, tiny_tokenizer)
    run_score(corpus, tmp_path / "both", teacher=tall, reference=reference)
    run_score(corpus, tmp_path / "cut", teacher=tall, vocab_size=500)
    run_score(corpus, tmp_path / "whole", teacher=tall)
    cut, whole = (true_log_probs(tall, chunks, 0, False, size) for size in (500, 640))
    for folder, truth, size in (("both", cut, 500), ("cut", cut, 500), ("whole", whole, 640)):
        np.testing.assert_allclose(
            read_score_files(tmp_path / folder)["teacher_log_prob"], truth, atol=1e-4, rtol=0
        )
        assert read_json(tmp_path / folder / "manifest.json")["vocab_size"] == size
    assert np.nanmax(np.abs(np.subtract(cut, whole))) > 1e-2


def test_batches_and_files_change_no_score(tiny_corpus, teacher, reference, scores, tmp_path):
    run_score(
        tiny_corpus, tmp_path / "s", teacher=teacher, reference=reference, shard_chunks=1000, batch_tokens=1
    )
    assert [path.name for path in (tmp_path / "s").glob("*.parquet")] == ["scores-00000.parquet"]
    for name, values in read_score_files(tmp_path / "s").items():
        np.testing.assert_allclose(values, read_score_files(scores)[name], atol=1e-5, rtol=0)


def test_nan_weights_give_null(tiny_corpus, teacher, reference, tmp_path):
    broken = spoil(teacher, tmp_path / "broken", "model.norm.weight", slice(None))
    run_score(tiny_corpus, tmp_path / "s", teacher=broken, reference=reference)
    found, manifest = read_score_files(tmp_path / "s"), read_json(tmp_path / "s" / "manifest.json")
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
        run_score(tiny_corpus, name + "-scores", teacher=name, reference=reference)
    whole, found = (read_score_files(name + "-scores")["score"] for name in (clean, broken))
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

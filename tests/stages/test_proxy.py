"""proxy fit and proxy score: what is learnt, what is written, resuming, and what is refused."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpora import chunks_of, forget_checksums, read_score_files, write_corpus
from outputs import contents
from proxy_runs import NGRAM, Stopped, fit, load_proxy, predict, random_chunks, stop_at_call
from scoring_runs import run_score

from miniplm.analysis import score_shards
from miniplm.cli import main
from miniplm.config import NgramConfig, ProxyFitConfig, ProxyScoreConfig, SelectConfig
from miniplm.data.corpus import Corpus
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json
from miniplm.stages import proxy_fit as fit_stage
from miniplm.stages import proxy_score as predict_stage
from miniplm.stages.proxy_fit import proxy_fit
from miniplm.stages.proxy_score import proxy_score
from miniplm.stages.select import select
from miniplm.training import ridge


@pytest.fixture(scope="module")
def corpus(proxy_corpus) -> str:
    return proxy_corpus


@pytest.fixture(scope="module")
def proxy(corpus, sample, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit") / "proxy"
    proxy_fit(ProxyFitConfig(corpus, str(sample), str(folder), ngram=NGRAM))
    return folder


@pytest.fixture(scope="module")
def predicted(corpus, proxy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predicted") / "scores"
    proxy_score(ProxyScoreConfig(corpus, str(proxy), str(folder), shard_chunks=70))
    return folder


# ---- the sample ----


def test_sample_is_marked_and_its_scores_are_those_of_the_whole(corpus, sample, teacher, reference, tmp_path):
    run_score(corpus, tmp_path / "whole", teacher=teacher, reference=reference)
    whole, part = read_score_files(tmp_path / "whole"), read_score_files(sample)
    domain = np.arange(300) % 5 == 0
    assert (domain[part["index"]].sum(), len(part["index"])) == (30, 150)
    assert (np.diff(part["index"]) > 0).all()
    for name in ("num_tokens", "teacher_log_prob", "reference_log_prob", "score"):
        np.testing.assert_allclose(part[name], whole[name][part["index"]], atol=1e-5, rtol=0)
    manifest = read_json(sample / "manifest.json")
    assert (manifest["identity"]["sample"], manifest["identity"]["seed"]) == (0.5, 0)
    assert manifest["flops"]["teacher"] * 2 == pytest.approx(
        read_json(tmp_path / "whole" / "manifest.json")["flops"]["teacher"], rel=0.1
    )
    assert "sample" not in read_json(tmp_path / "whole" / "manifest.json")["identity"]


def test_a_stopped_sample_ends_in_the_same_bytes(corpus, sample, teacher, reference, tmp_path, monkeypatch):
    options = dict(teacher=teacher, reference=reference, sample=0.5, shard_chunks=20)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at_call(patch, score_shards, "write_shard", 4)
        run_score(corpus, tmp_path / "s", **options)
    assert len(list((tmp_path / "s").glob("*.parquet"))) == 3
    with pytest.raises(UserError, match=r"sample was 0\.5, is now 0\.4"):
        run_score(corpus, tmp_path / "s", **options | {"sample": 0.4})
    with pytest.raises(UserError, match="seed was 0, is now 1"):
        run_score(corpus, tmp_path / "s", **options, seed=1)
    run_score(corpus, tmp_path / "s", **options)
    assert contents(tmp_path / "s") == contents(sample)


def test_select_refuses_a_sample(corpus, sample, tmp_path, capsys):
    arguments = ["--data", corpus, "--scores", str(sample), "--output", str(tmp_path / "r")]
    assert main(["select", *arguments]) == 2
    error = capsys.readouterr().err
    assert "holds the scores of a sample" in error and "miniplm proxy fit" in error
    assert error.count("\n") == 1 and not (tmp_path / "r").exists()


def test_an_incomplete_sample_is_not_learnt_from(corpus, sample, tmp_path):
    broken = shutil.copytree(sample, tmp_path / "s")
    (broken / "scores-00003.parquet").unlink()
    with pytest.raises(UserError, match=r"scores-00003\.parquet is missing: run score again"):
        fit(corpus, broken, tmp_path / "proxy")
    # Without hashes the chunks themselves tell.
    forget_checksums(broken)
    with pytest.raises(UserError, match="130 entries for the 150 chunks of the sample and none for 20"):
        fit(corpus, broken, tmp_path / "proxy")
    assert not (tmp_path / "proxy").exists()


# ---- the fit ----


def test_what_is_learnt_ranks_what_was_held_out(corpus, proxy, sample, capsys):
    manifest = read_json(proxy / "manifest.json")
    found, part = manifest["held_out"], read_score_files(sample)
    finite = part["index"][np.isfinite(part["score"])]
    order = np.random.default_rng(0).permutation(finite)
    held_out = np.sort(order[: round(0.1 * len(finite))])
    assert (found["rows"], manifest["chunks"]) == (len(held_out), len(finite) - len(held_out))
    true = part["score"][np.searchsorted(part["index"], held_out)].astype(float)
    predicted = load_proxy(proxy).predict([np.array(chunks_of(corpus)[chunk]) for chunk in held_out])[1]
    ranks = [np.argsort(np.argsort(values)) for values in (true, predicted)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-6) and found["spearman"] > 0.7
    kept = [rank >= len(rank) - len(rank) // 2 for rank in ranks]
    assert found["equal_selections"] == (kept[0] == kept[1]).mean()
    assert [found["slope"], found["intercept"]] == pytest.approx(np.polyfit(predicted, true, 1).tolist())
    assert sum(part["rows"] for part in found["bins"]) == len(held_out)
    assert min(part["predicted"] for part in found["bins"]) == found["bins"][0]["predicted"]


def test_a_stopped_fit_ends_in_the_same_bytes(corpus, sample, proxy, tmp_path, monkeypatch):
    folder = tmp_path / "proxy"
    monkeypatch.setattr(fit_stage, "SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at_call(patch, ridge, "improve", 6)
        fit(corpus, sample, folder)
    assert (folder / "state.safetensors").exists()
    with pytest.raises(UserError, match="holds another proxy fit run"):
        fit(corpus, sample, folder, seed=1)
    passes = []
    improve = ridge.improve
    monkeypatch.setattr(ridge, "improve", lambda *arguments: passes.append(1) or improve(*arguments))
    fit(corpus, sample, folder)
    assert contents(folder) == contents(proxy)
    resumed = len(passes)
    fit(corpus, sample, tmp_path / "whole")
    assert resumed == len(passes) - resumed - 5


def test_a_damaged_state_starts_over(corpus, sample, proxy, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "proxy"
    for damage in (lambda data: data[:-9], lambda data: data[:-9] + b"x" + data[-8:], lambda data: b""):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(fit_stage, "SAVE_SECONDS", 0.0)
            stop_at_call(patch, ridge, "improve", 4)
            fit(corpus, sample, folder)
        (folder / "state.safetensors").write_bytes(damage((folder / "state.safetensors").read_bytes()))
        fit(corpus, sample, folder)
        assert "state.safetensors is not as written" in capsys.readouterr().err
        assert contents(folder) == contents(proxy)
        shutil.rmtree(folder)


def test_a_complete_fit_is_left_alone_and_damage_is_mended(corpus, sample, proxy, tmp_path, capsys):
    folder = shutil.copytree(proxy, tmp_path / "proxy")
    fit(corpus, sample, folder)
    assert "nothing to do" in capsys.readouterr().out
    weights = folder / "proxy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    with pytest.raises(UserError, match=r"is damaged: proxy\.safetensors is not as it was written"):
        predict(corpus, folder, tmp_path / "s")
    weights.unlink()
    with pytest.raises(UserError, match=r"is damaged: proxy\.safetensors is missing"):
        predict(corpus, folder, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    fit(corpus, sample, folder)
    assert contents(folder) == contents(proxy)


def test_low_agreement_is_told(corpus, sample, tmp_path, capsys):
    fit(corpus, sample, tmp_path / "good")
    assert "agree poorly" not in capsys.readouterr().err
    fit(corpus, sample, tmp_path / "bad", ngram=NgramConfig(buckets=1))
    assert "agree poorly" in capsys.readouterr().err


def test_scores_that_cannot_be_learnt_from(corpus, sample, predicted, teacher, tiny_tokenizer, tmp_path):
    run_score(corpus, tmp_path / "alone", teacher=teacher, sample=0.1)
    other = write_corpus(tmp_path / "other", random_chunks(1, 30), tiny_tokenizer)
    for data, scores, words in [
        (corpus, tmp_path / "alone", "no scores of a reference: score with both models"),
        (corpus, predicted, "holds what a proxy predicted"),
        (other, sample, "holds the scores of another corpus"),
        (corpus, tmp_path / "nowhere", "score folder .* does not exist"),
    ]:
        with pytest.raises(UserError, match=words):
            fit(data, scores, tmp_path / "proxy")
    with pytest.raises(UserError, match="150 finite scores, 2 of them to be held out; at least 10 must be"):
        fit(corpus, sample, tmp_path / "proxy", held_out=0.01)
    assert not (tmp_path / "proxy").exists()


# ---- the predictions ----


def test_predictions_have_the_form_of_scores(corpus, proxy, predicted, sample):
    found, chunks = read_score_files(predicted), [np.array(ids) for ids in chunks_of(corpus)]
    counts, scores = load_proxy(proxy).predict(chunks)
    assert found["index"].tolist() == list(range(300))
    assert found["num_tokens"].tolist() == counts.tolist()
    assert (
        found["num_tokens"][read_score_files(sample)["index"]].tolist()
        == read_score_files(sample)["num_tokens"].tolist()
    )
    np.testing.assert_array_equal(found["score"], scores.astype(np.float32))
    assert np.flatnonzero(np.isnan(found["score"])).tolist() == [7]
    assert np.isnan(found["teacher_log_prob"]).all() and np.isnan(found["reference_log_prob"]).all()
    schemas = [pq.read_schema(folder / "scores-00000.parquet") for folder in (predicted, sample)]
    assert schemas[0].equals(schemas[1])


def test_a_stopped_prediction_ends_in_the_same_bytes(corpus, proxy, predicted, tmp_path, monkeypatch):
    folder = tmp_path / "s"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at_call(patch, predict_stage, "write_shard", 3)
        predict(corpus, proxy, folder)
    with pytest.raises(UserError, match="is not complete: run its 'proxy score' command again"):
        select_ratio(corpus, folder, tmp_path / "r")
    (folder / "scores-00001.parquet").write_bytes(b"")
    predict(corpus, proxy, folder)
    assert contents(folder) == contents(predicted)
    (folder / "scores-00004.parquet").unlink()
    predict(corpus, proxy, folder)
    assert contents(folder) == contents(predicted)


def test_a_corpus_of_other_ids_is_refused(corpus, proxy, tmp_path, tiny_tokenizer, capsys):
    same = write_corpus(tmp_path / "same", random_chunks(1, 30), tiny_tokenizer)
    predict(same, proxy, tmp_path / "s")
    assert "was fitted to another corpus" in capsys.readouterr().err
    settings = shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer")
    text = (settings / "tokenizer.json").read_text()
    (settings / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|end|>"))
    config = (settings / "tokenizer_config.json").read_text()
    (settings / "tokenizer_config.json").write_text(config.replace("<|endoftext|>", "<|end|>"))
    other = write_corpus(tmp_path / "other", random_chunks(1, 30), settings)
    with pytest.raises(UserError, match="fitted to ids of another tokenizer"):
        predict(other, proxy, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def select_ratio(corpus, scores, output, **settings) -> None:
    select(SelectConfig(str(corpus), [str(scores)], str(output), **settings))


def test_select_takes_predictions_as_they_are(corpus, predicted, tmp_path, capsys):
    select_ratio(corpus, predicted, tmp_path / "r", ratio=0.3, compare=corpus)
    score = read_score_files(predicted)["score"]
    best = sorted(np.argsort(-np.where(np.isnan(score), -np.inf, score), kind="stable")[:90].tolist())
    assert chunks_of(tmp_path / "r") == [chunks_of(corpus)[chunk] for chunk in best]
    table = Corpus(tmp_path / "r").table
    np.testing.assert_array_equal(table["score"].to_numpy(), score[best])
    assert table["teacher_log_prob"].null_count == table["reference_log_prob"].null_count == 90
    (summary,) = read_json(tmp_path / "r" / "manifest.json")["scores"]
    assert summary["predicted"]["kind"] == "ngram" and summary["teacher"] == "teacher0"
    for rule in ("ratio", "normalised", "teacher", "reference"):
        with pytest.raises(UserError, match=f"holds predicted scores, which are differences: .* {rule}, or"):
            select_ratio(corpus, predicted, tmp_path / "t", score=rule)
    select_ratio(corpus, predicted, tmp_path / "random", random_seed=3)

"""score in bfloat16 on the CPU: its agreement with float32 is told, and auto takes it where it agrees."""

import numpy as np
import pytest
import torch
from corpora import chunks_of, read_score_files
from outputs import contents
from scoring_runs import run_score

from miniplm.analysis import score_plan
from miniplm.analysis import score_shards as stage
from miniplm.analysis.scoring import score_batch
from miniplm.data.batches import pack
from miniplm.data.selection import rank_agreement
from miniplm.models.loading import load_model
from miniplm.runtime.files import read_json

AGREES, DISAGREES = 0.9951, 0.995


@pytest.fixture
def cpu(monkeypatch):
    """cpu(has, equal): this CPU has instructions for bfloat16 or not, and that share of a sample is selected
    or dropped alike."""

    def stand_in(has: bool, equal: float | None = None):
        monkeypatch.setattr(score_plan, "cpu_multiplies_bf16", lambda: has)
        if equal is not None:
            agreement = {"rows": 40, "spearman": 0.99, "equal_selections": equal}
            monkeypatch.setattr(stage, "rank_agreement", lambda before, after: agreement)

    return stand_in


def test_agreement_is_told(tiny_corpus, teacher, reference, tmp_path, capsys):
    options = dict(teacher=teacher, reference=reference, shard_chunks=1000)
    run_score(tiny_corpus, tmp_path / "float32", **options)
    assert "against" not in capsys.readouterr().out
    run_score(tiny_corpus, tmp_path / "bfloat16", **options, dtype="bfloat16")
    manifest = read_json(tmp_path / "bfloat16" / "manifest.json")
    exact, rounded = (read_score_files(tmp_path / name)["score"] for name in ("float32", "bfloat16"))
    agreement = rank_agreement(exact, rounded)
    assert manifest["bfloat16_agreement"] == agreement and agreement["spearman"] < 1
    assert (
        f"bfloat16 against float32 on 39 chunks: {agreement['equal_selections']:.1%} "
        in capsys.readouterr().out
    )
    assert manifest["identity"]["dtype"] == "bfloat16"
    assert "bfloat16_agreement" not in read_json(tmp_path / "float32" / "manifest.json")


def test_scores_are_those_of_models_loaded_in_bfloat16(tiny_corpus, teacher, reference, tmp_path):
    run_score(
        tiny_corpus,
        tmp_path / "s",
        teacher=teacher,
        reference=reference,
        dtype="bfloat16",
        batch_tokens=10**6,
        shard_chunks=1000,
    )
    models = {
        role: load_model(name, torch.bfloat16)
        for role, name in (("teacher", teacher), ("reference", reference))
    }
    batch = pack([np.array(chunk) for chunk in chunks_of(tiny_corpus)], 0)
    with torch.inference_mode():
        expected = score_batch(models, batch, 500)["score"].numpy()
    np.testing.assert_array_equal(read_score_files(tmp_path / "s")["score"], expected)


def test_auto_takes_bfloat16(tiny_corpus, teacher, reference, tmp_path, cpu, capsys):
    cpu(True, AGREES)
    models = dict(teacher=teacher, reference=reference)
    run_score(tiny_corpus, tmp_path / "auto", **models, dtype="auto")
    assert "scoring in float32" not in capsys.readouterr().err
    run_score(tiny_corpus, tmp_path / "bfloat16", **models, dtype="bfloat16")
    assert contents(tmp_path / "auto") == contents(tmp_path / "bfloat16")
    assert read_json(tmp_path / "auto" / "manifest.json")["bfloat16_agreement"]["equal_selections"] == AGREES


@pytest.mark.parametrize(
    ("has", "equal", "reason"),
    [
        (False, None, "torch sees no instructions for bfloat16 in this CPU"),
        (True, DISAGREES, "bfloat16 selects or drops 99.5% of 40 chunks alike, more than 99.5% are needed"),
    ],
)
def test_auto_stays_with_float32(
    tiny_corpus, teacher, reference, scores, tmp_path, cpu, capsys, has, equal, reason
):
    cpu(has, equal)
    run_score(tiny_corpus, tmp_path / "s", teacher=teacher, reference=reference, dtype="auto")
    assert f"scoring in float32: {reason}\n" in capsys.readouterr().err
    assert contents(tmp_path / "s") == contents(scores)


def test_auto_with_one_model_stays_with_float32(tiny_corpus, teacher, tmp_path, cpu, capsys):
    cpu(True, AGREES)
    run_score(tiny_corpus, tmp_path / "s", teacher=teacher, dtype="auto")
    assert (
        "scoring in float32: whether bfloat16 selects alike shows only with both" in capsys.readouterr().err
    )
    assert read_json(tmp_path / "s" / "manifest.json")["identity"]["dtype"] == "float32"


def test_nothing_that_can_be_ranked(tiny_corpus, teacher, reference, tmp_path, cpu, monkeypatch, capsys):
    cpu(True)
    monkeypatch.setattr(stage, "_sample_scores", lambda *_: np.full(40, np.nan))
    run_score(tiny_corpus, tmp_path / "s", teacher=teacher, reference=reference, dtype="auto")
    assert "scoring in float32: bfloat16 selects or drops 0.0% of 0 chunks alike" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_has_begun_goes_on_in_its_dtype(tiny_corpus, teacher, reference, tmp_path, cpu, capsys, dtype):
    """On a CPU without the instructions, or with them, or where a sample no longer agrees."""
    options = dict(teacher=teacher, reference=reference, dtype="auto")
    cpu(dtype == "bfloat16", AGREES)
    run_score(tiny_corpus, tmp_path / "s", **options)
    whole = contents(tmp_path / "s")
    assert read_json(tmp_path / "s" / "manifest.json")["identity"]["dtype"] == dtype
    for number, (has, equal) in enumerate([(dtype == "float32", AGREES), (True, AGREES)]):
        (tmp_path / "s" / f"scores-0000{number}.parquet").unlink()
        cpu(has, equal)
        capsys.readouterr()
        run_score(tiny_corpus, tmp_path / "s", **options)
        assert contents(tmp_path / "s") == whole
        assert "scoring in float32" not in capsys.readouterr().err
    (tmp_path / "s" / "scores-00000.parquet").unlink()
    cpu(True, DISAGREES)
    run_score(tiny_corpus, tmp_path / "s", **options)
    assert read_json(tmp_path / "s" / "manifest.json")["identity"]["dtype"] == dtype
    scores = read_score_files(tmp_path / "s")["score"]
    cpu(True, AGREES)
    run_score(tiny_corpus, tmp_path / "other", **{**options, "dtype": dtype})
    np.testing.assert_array_equal(scores, read_score_files(tmp_path / "other")["score"])


def test_the_sample_is_an_eighth_of_the_corpus(tiny_corpus, teacher, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "MIN_AGREEMENT_CHUNKS", 3)
    options = dict(teacher=teacher, reference=reference, dtype="bfloat16")
    for name, limit, rows in (("eighth", 1024, 5), ("fewer", 4, 4), ("least", 1, 3)):
        monkeypatch.setattr(stage, "AGREEMENT_CHUNKS", limit)
        run_score(tiny_corpus, tmp_path / name, **options)
        assert read_json(tmp_path / name / "manifest.json")["bfloat16_agreement"]["rows"] == rows

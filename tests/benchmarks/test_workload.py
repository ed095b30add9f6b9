"""The workload of the pipeline's benchmark: models as published, chunks as prepare makes them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import peers  # noqa: E402
import workload  # noqa: E402

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the benchmarks run at full size"
)


def test_the_models_are_those_of_the_published_configs():
    for name, file in (
        ("104M", "qwen_104m_reference"),
        ("200M", "qwen_200m"),
        ("500M", "qwen_500m"),
        ("1.2B", "qwen_1.2b"),
    ):
        settings = yaml.safe_load((ROOT / "configs" / f"{file}.yaml").read_text())["model"]
        assert settings.pop("vocab_size") == 151_936
        assert {key: getattr(workload.MODELS[name], key) for key in settings} == settings


def test_chunks_are_like_those_of_prepare():
    job = workload.make_job(["toy"], "cpu", torch.float32, 64, spread=False)
    chunks = workload.synthetic_chunks(200, job, seed=3)
    lengths, ids = np.array([len(chunk) for chunk in chunks]), np.concatenate(chunks)
    assert len(chunks) == 200 and lengths.max() <= 65 and 30 < lengths.mean() < 60
    assert ids.min() == workload.EOS and ids.max() < 500
    documents = (ids == workload.EOS).sum()
    assert 100 < documents < 600  # of 38 ids in the mean
    counts = np.bincount(ids, minlength=500)[1:]
    assert (
        0.08 < counts[0] / len(ids) < 0.16 and counts[:100].sum() > 2 * counts[100:].sum()
    )  # p(1) = ln 2 / ln 500 = 0.11
    assert all(
        np.array_equal(a, b) for a, b in zip(chunks, workload.synthetic_chunks(200, job, seed=3), strict=True)
    )


def test_padding_leaves_out_what_is_not_predicted():
    ids, targets, mask = peers.pad([np.array([5, 0, 7, 8]), np.array([9, 4])], width=4)
    assert ids.tolist() == [[5, 0, 7, 0], [9, 0, 0, 0]]
    assert targets.tolist() == [[0, -100, 8, -100], [4, -100, -100, -100]]
    assert mask.tolist() == [[True, True, True, False], [True, False, False, False]]

"""Scoring and training on the Triton kernels end in the numbers of the reference: on a GPU, or in Triton's interpreter."""

import copy

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from miniplm.batches import pack
from miniplm.config import OptimizerConfig
from miniplm.decoder import Decoder
from miniplm.scoring import score_batch
from miniplm.training import Teacher, make_optimizer, train_step

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EOS = 0


def decoder(config_class=LlamaConfig, **overrides):
    settings = dict(vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                    initializer_range=0.3, tie_word_embeddings=True)
    torch.manual_seed(0)
    return Decoder(config_class(**{**settings, **overrides})).to(DEVICE)


def batch(document_mask):
    rows = [torch.randint(1, 101, (n,), generator=torch.Generator().manual_seed(n)).numpy() for n in (40, 2, 17)]
    rows[0][[10, 25]] = EOS
    return pack(rows, EOS, document_mask)


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("roles", [("teacher", "reference"), ("teacher",)])
def test_scores(roles, document_mask, monkeypatch):
    models = {"teacher": decoder(Qwen3Config, vocab_size=103), "reference": decoder(hidden_size=16, num_key_value_heads=2)}
    models = {role: models[role].eval() for role in roles}
    results = []
    for choice in ("reference", "triton"):
        monkeypatch.setenv("MINIPLM_KERNELS", choice)
        with torch.inference_mode():
            results.append(score_batch(models, batch(document_mask).to(torch.device(DEVICE)), 101))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5, equal_nan=True, check_dtype=False)


@pytest.mark.parametrize("with_teacher", [False, True])
def test_training(with_teacher, monkeypatch):
    """Two steps: losses, gradient norms and weights."""
    start, results = decoder(), []
    teacher = Teacher(decoder(vocab_size=107, hidden_size=48).requires_grad_(False).eval(), 0.3, 1.0) if with_teacher else None
    for choice in ("reference", "triton"):
        monkeypatch.setenv("MINIPLM_KERNELS", choice)
        model = copy.deepcopy(start)
        optimizer = make_optimizer(model, OptimizerConfig())
        figures = [train_step(model, optimizer, [batch(False), batch(True)], 1e-3, 1.0, torch.float32, teacher=teacher) for _ in range(2)]
        results.append((torch.tensor(figures), torch.cat([parameter.detach().flatten() for parameter in model.parameters()])))
    assert results[0][0].isfinite().all()
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=0)
    difference = (results[1][1] - results[0][1]).norm() / results[0][1].norm()
    assert difference < 1e-4, difference

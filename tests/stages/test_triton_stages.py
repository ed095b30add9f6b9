"""Scoring and training on the Triton kernels end in the numbers of the reference: on a GPU, or in Triton's
interpreter."""

import contextlib
import copy
import warnings

import pytest
import torch
from scoring_runs import needs_scaled_rows
from transformers import LlamaConfig, Qwen3Config

from miniplm.analysis.scoring import score_batch
from miniplm.config import OptimizerConfig
from miniplm.data.batches import pack
from miniplm.models.decoder import Decoder
from miniplm.models.float8 import to_float8
from miniplm.training import step as training_step
from miniplm.training.step import Teacher, make_optimizer, train_step

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EOS = 0


def decoder(config_class=LlamaConfig, **overrides):
    settings = dict(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return Decoder(config_class(**{**settings, **overrides})).to(DEVICE)


def batch(document_mask):
    rows = [
        torch.randint(1, 101, (n,), generator=torch.Generator().manual_seed(n)).numpy() for n in (40, 2, 17)
    ]
    rows[0][[10, 25]] = EOS
    return pack(rows, EOS, document_mask)


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("roles", [("teacher", "reference"), ("teacher",)])
def test_scores(roles, document_mask, monkeypatch):
    models = {
        "teacher": decoder(Qwen3Config, vocab_size=103),
        "reference": decoder(hidden_size=16, num_key_value_heads=2),
    }
    models = {role: models[role].eval() for role in roles}
    results = []
    for choice in ("reference", "triton"):
        monkeypatch.setenv("MINIPLM_KERNELS", choice)
        with torch.inference_mode():
            results.append(score_batch(models, batch(document_mask).to(torch.device(DEVICE)), 101))
    torch.testing.assert_close(
        results[1], results[0], rtol=1e-4, atol=1e-5, equal_nan=True, check_dtype=False
    )


@pytest.mark.parametrize("with_teacher", [False, True])
def test_training(with_teacher, monkeypatch):
    """Two steps: losses, gradient norms and weights."""
    start, results = decoder(), []
    teacher = (
        Teacher(decoder(vocab_size=107, hidden_size=48).requires_grad_(False).eval(), 0.3, 1.0)
        if with_teacher
        else None
    )
    for choice in ("reference", "triton"):
        monkeypatch.setenv("MINIPLM_KERNELS", choice)
        model = copy.deepcopy(start)
        optimizer = make_optimizer(model, OptimizerConfig())
        figures = [
            train_step(
                model, optimizer, [batch(False), batch(True)], 1e-3, 1.0, torch.float32, teacher=teacher
            )
            for _ in range(2)
        ]
        results.append(
            (
                torch.tensor(figures),
                torch.cat([parameter.detach().flatten() for parameter in model.parameters()]),
            )
        )
    assert results[0][0].isfinite().all()
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=0)
    difference = (results[1][1] - results[0][1]).norm() / results[0][1].norm()
    assert difference < 1e-4, difference


@needs_scaled_rows
def test_float8_scores(monkeypatch):
    """Rounded to float8 in the kernel and in the reference; near those without float8 both times."""
    dtype = (
        torch.bfloat16 if DEVICE == "cuda" else torch.float32
    )  # which of them torch's scaled product takes
    plain, results = (
        {
            "teacher": decoder(Qwen3Config).to(dtype),
            "reference": decoder(hidden_size=16, num_key_value_heads=2).to(dtype),
        },
        [],
    )
    models = {role: to_float8(copy.deepcopy(model)) for role, model in plain.items()}
    rows = pack(
        [torch.randint(1, 101, (12,)).numpy() for _ in range(32)], EOS
    )  # of three scores the error would scatter
    for choice, scored in (("reference", plain), ("reference", models), ("triton", models)):
        monkeypatch.setenv("MINIPLM_KERNELS", choice)
        with torch.inference_mode():
            results.append(score_batch(scored, rows.to(torch.device(DEVICE)), 101)["score"].float())
    exact, reference, triton = results
    assert 1e-3 < (reference - exact).norm() / exact.norm() < 0.2
    assert (triton - reference).norm() < 0.2 * (
        reference - exact
    ).norm() or DEVICE == "cuda"  # there bfloat16 is as coarse
    assert (triton - exact).norm() / exact.norm() < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_a_step_that_is_not_finite_changes_nothing(dtype, monkeypatch):
    """Neither weights nor moments nor the optimiser's count of steps, though the update is in the queue
    before the host knows; the next step is whole."""
    model = decoder()
    optimizer = make_optimizer(model, OptimizerConfig())

    def step(scale):
        with monkeypatch.context() as patch:
            original = training_step.summed_loss
            patch.setattr(training_step, "summed_loss", lambda *arguments: original(*arguments) * scale)
            return train_step(model, optimizer, [batch(False)], 1e-3, 1.0, dtype)

    def everything():
        return [x.detach().clone() for p in model.parameters() for x in (p, *optimizer.state[p].values())]

    step(1.0)
    before = everything()
    for scale in (float("nan"), float("inf")):
        step(scale)
        assert all(torch.equal(one, two) for one, two in zip(before, everything(), strict=True))
    step(1.0)
    assert not any(torch.equal(one, two) for one, two in zip(before, everything(), strict=True))


# --- the host does not wait for the GPU ---


@contextlib.contextmanager
def waits():
    """Yield a list of the places at which the host waits for the GPU."""
    mode, found = torch.cuda.get_sync_debug_mode(), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    found += [
        str(warning.message)
        for warning in caught
        if "called a synchronizing CUDA operation" in str(warning.message)
    ]


def long_batch():
    return pack(
        [torch.randint(1, 101, (1_500,)).numpy() for _ in range(3)], EOS
    ).pin_memory()  # torch counts many tokens in another way than few


@pytest.mark.gpu
@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_step_waits_once(with_teacher):
    """For its loss, at its end, however many micro-batches there are."""
    model, teacher = (
        decoder(),
        Teacher(decoder(vocab_size=107).bfloat16().requires_grad_(False).eval(), 0.3, 1.0)
        if with_teacher
        else None,
    )
    optimizer, batches = make_optimizer(model, OptimizerConfig()), [long_batch(), batch(True).pin_memory()]

    def step():
        train_step(model, optimizer, batches, 1e-3, 1.0, torch.bfloat16, teacher=teacher)

    step()  # compiles
    with waits() as found:
        step()
    assert len(found) == 1, found


@pytest.mark.gpu
def test_scoring_does_not_wait():
    plain = {
        "teacher": decoder(Qwen3Config, vocab_size=103).bfloat16(),
        "reference": decoder(hidden_size=16, num_key_value_heads=2).bfloat16(),
    }
    pinned = batch(False).pin_memory()
    with torch.inference_mode():
        in_float8 = {role: to_float8(copy.deepcopy(model)) for role, model in plain.items()}
        for models in (plain, in_float8, {"teacher": plain["teacher"]}):
            score_batch(models, pinned.to(torch.device(DEVICE)), 101)  # compiles
            with waits() as found:
                score_batch(models, pinned.to(torch.device(DEVICE)), 101)
            assert not found, found

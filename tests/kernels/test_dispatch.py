"""Which implementation runs, and what every op owes torch.library."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from miniplm.kernels import dispatch, reference
from random_inputs import op_arguments, parameter

from miniplm import kernels

D, V = 8, 11


OPS = list(op_arguments())


def test_every_op_is_here():
    assert sorted(OPS) == sorted(
        schema.name.removeprefix("miniplm::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("miniplm::")
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    """Schema, autograd registration, fake tensors, and tracing with dynamic shapes."""
    example = op_arguments()[name]
    if name.endswith("_backward"):
        example = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in example)
    torch.library.opcheck(getattr(torch.ops.miniplm, name).default, example)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fake_results_are_like_real_ones(name, dtype):
    example = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in op_arguments(dtype)[name])
    torch.library.opcheck(getattr(torch.ops.miniplm, name).default, example, test_utils="test_faketensor")


def model(x, norm, head, qkv, targets, cu_seqlens):
    """Every public op, in one differentiable number."""
    normed, total = kernels.add_rms_norm(x, 2 * x, norm)
    normed = kernels.rms_norm(kernels.swiglu(normed, total), norm)
    q, k, v = (normed @ qkv).view(len(x), 4, -1).split([2, 1, 1], 1)
    q, k = kernels.apply_rotary(q, k, torch.arange(len(x)), torch.tensor([1.0, 0.1, 0.01, 0.001]))
    hidden = kernels.flash_attention(q, k, v, cu_seqlens, len(x))[:, 0] + normed
    teacher = hidden.detach(), head.detach() + 1
    losses = [
        kernels.linear_cross_entropy(hidden, head, targets),
        kernels.linear_cross_entropy(hidden, head, targets, reduction="none").square().sum(),
        kernels.linear_log_prob(hidden, head, targets).sum(),
        kernels.linear_distillation_loss(hidden, head, *teacher, targets).loss,
    ]
    return sum(losses), kernels.difference_score(
        *teacher, hidden.detach(), head.detach(), targets, cu_seqlens
    ).score


def model_arguments(tokens):
    cu_seqlens = torch.tensor([0, 3, 3, tokens], dtype=torch.int32)
    return (
        parameter(tokens, D),
        parameter(D),
        parameter(V, D),
        parameter(D, 4 * D),
        torch.randint(0, V, (tokens,)),
        cu_seqlens,
    )


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_in_one_graph(dynamic):
    """Compiled as one graph: the same bits as without, forward and backward, with and without gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (7, 12):
        example = model_arguments(tokens)
        parameters = example[:4]
        (found, score), (expected, expected_score) = compiled(*example), model(*example)
        torch.testing.assert_close((found, score), (expected, expected_score), rtol=0, atol=0, equal_nan=True)
        for one, two in zip(
            torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
        ):
            assert torch.equal(one, two)
        with torch.no_grad():
            assert torch.equal(compiled(*example)[0], model(*example)[0])


def test_autocast():
    """Every public op takes float32 parameters under autocast; the products inside stay in float32."""
    example = model_arguments(7)
    hidden, _, head, _, targets, _ = example
    others = torch.rand(7), -100, True, True, 1 << 20
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, score = model(*example)
        inside = torch.ops.miniplm.linear_cross_entropy(hidden, head, targets, *others)
    assert loss.dtype == score.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in torch.autograd.grad(loss, example[:4]))
    for one, two in zip(
        inside, torch.ops.miniplm.linear_cross_entropy(hidden, head, targets, *others), strict=True
    ):
        assert torch.equal(one, two)


# --- the choice ---


@pytest.fixture
def fake_kernel(monkeypatch):
    """A "Triton" swiglu that gives sevens."""
    monkeypatch.setattr(dispatch, "TRITON", {})
    monkeypatch.setattr(dispatch, "EXAMPLES", {})
    dispatch.triton("swiglu", None)(lambda gate, up: torch.full_like(gate, 7))


def swiglu_of_ones():
    return kernels.swiglu(torch.ones(2), torch.ones(2))[0].item()


@pytest.mark.parametrize("choice", ["auto", "reference", None])
def test_the_cpu_takes_the_reference(choice, fake_kernel, monkeypatch):
    monkeypatch.delenv("MINIPLM_KERNELS", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if choice:
        monkeypatch.setenv("MINIPLM_KERNELS", choice)
    assert swiglu_of_ones() == pytest.approx(0.7310586)


def test_triton_on_the_cpu_needs_the_interpreter(fake_kernel, monkeypatch):
    monkeypatch.setenv("MINIPLM_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert swiglu_of_ones() == 7
    with pytest.raises(RuntimeError, match="rms_norm has no Triton kernel"):
        kernels.rms_norm(torch.ones(2), torch.ones(2))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        swiglu_of_ones()


def test_a_gpu_takes_triton_where_there_is_a_kernel(fake_kernel, monkeypatch):
    monkeypatch.delenv("MINIPLM_KERNELS", raising=False)
    gpu = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
    exact = SimpleNamespace(device=gpu.device, dtype=torch.float64)
    assert dispatch.implementation("swiglu", reference.swiglu, gpu) is dispatch.TRITON["swiglu"]
    assert dispatch.implementation("rms_norm", reference.rms_norm, gpu) is reference.rms_norm
    assert dispatch.implementation("swiglu", reference.swiglu, exact) is reference.swiglu
    monkeypatch.setenv("MINIPLM_KERNELS", "reference")
    assert dispatch.implementation("swiglu", reference.swiglu, gpu) is reference.swiglu
    monkeypatch.setenv("MINIPLM_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="rms_norm has no Triton kernel"):
        dispatch.implementation("rms_norm", reference.rms_norm, gpu)
    with pytest.raises(RuntimeError, match="float64"):
        dispatch.implementation("swiglu", reference.swiglu, exact)


def test_an_unknown_choice(monkeypatch):
    monkeypatch.setenv("MINIPLM_KERNELS", "cuda")
    with pytest.raises(ValueError, match="MINIPLM_KERNELS is 'cuda'; it must be auto, triton or reference"):
        swiglu_of_ones()


@pytest.mark.slow
def test_import_stands_alone():
    """Without Triton, and without the rest of the package."""
    program = """
import sys
sys.modules["triton"] = None
import torch, miniplm.kernels
print(miniplm.kernels.swiglu(torch.zeros(1), torch.ones(1)).item())
loaded = [name for name in sys.modules if name.startswith("miniplm.")]
print([name for name in loaded if not name.startswith("miniplm.kernels")])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.split("\n")[:2] == ["0.0", "[]"], result.stderr

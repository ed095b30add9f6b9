"""How the kernels' tests measure errors."""

import torch

RELATIVE = {
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}  # largest relative Frobenius error


def assert_accurate(result, plain, truth, relative=None):
    """The largest error against `truth` (float64) is at most twice that of `plain`, the same computation in
    plain PyTorch in the same dtype, plus four roundings of the largest value; and the relative Frobenius
    error is at most `relative`."""
    assert result.shape == truth.shape
    error, plain_error = (value.double() - truth for value in (result, plain))
    floor = 4 * torch.finfo(result.dtype).eps * truth.abs().max()
    assert error.abs().max() <= 2 * plain_error.abs().max() + floor, (
        f"{error.abs().max():.2e}, plain PyTorch {plain_error.abs().max():.2e}"
    )
    relative = relative or RELATIVE[result.dtype]
    assert error.norm() <= relative * truth.norm(), f"relative error {error.norm() / truth.norm():.1e}"


def run(function, inputs, grads):
    """(outputs, gradients for the inputs that are floating point) of `function`, given upstream gradients for
    its outputs."""
    inputs = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = torch.autograd.grad(
        outputs,
        [x for x in inputs if x.requires_grad],
        [g.to(y.dtype) for g, y in zip(grads, outputs, strict=True)],
    )
    return [y.detach() for y in outputs], list(found)


def assert_accurate_everywhere(op, plain, inputs, grads, dtype, relative=None):
    """assert_accurate for every output and gradient of `op`, against `plain` in dtype and in float64. Inputs
    and grads: float64."""
    rounded = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    exact = [x.double() if x.is_floating_point() else x for x in rounded]
    upstream = [g.to(dtype) for g in grads]
    before = [x.clone() for x in rounded]
    results = run(op, rounded, upstream)
    for x, kept in zip(rounded, before, strict=True):
        assert torch.equal(x, kept), "an input was changed"
    for result, plainly, truth in zip(
        results, run(plain, rounded, upstream), run(plain, exact, [g.double() for g in upstream]), strict=True
    ):
        for one, two, three in zip(result, plainly, truth, strict=True):
            assert_accurate(one, two, three, relative)


def strided(x):
    """A copy of x with the same values whose last dimension is not contiguous."""
    return torch.stack((x, x), -1)[..., 0]

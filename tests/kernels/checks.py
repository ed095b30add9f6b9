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


def loss_and_gradients(op, heads, targets, **options):
    """[loss, cross-entropy, divergence, the gradients of the student's hidden states and weight] of a
    distillation loss; heads: the student's hidden states and weight, the teacher's."""
    heads = [*(x.detach().requires_grad_() for x in heads[:2]), *heads[2:]]
    result = op(*heads, targets, **options)
    return [*result, *torch.autograd.grad(result.loss, heads[:2])]


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


def tensors_of(results):
    """All tensors of nested tuples and lists, in order."""
    return (
        [x for part in results for x in tensors_of(part)] if isinstance(results, (tuple, list)) else [results]
    )


def assert_equal_everywhere(found, expected):
    """The tensors of two results of `run`, or of two ops, have the same bits; NaN equals NaN."""
    for one, two in zip(tensors_of(found), tensors_of(expected), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


def assert_close_everywhere(found, expected, **tolerances):
    """torch.testing.assert_close for the tensors of two results of `run`, or of two ops."""
    for one, two in zip(tensors_of(found), tensors_of(expected), strict=True):
        torch.testing.assert_close(one, two, **tolerances)


def remember_calls(monkeypatch, module, *names):
    """A list that gets the name of each of these functions of a module when it is called."""
    calls = []

    def remembering(name, function):
        def call(*arguments):
            calls.append(name)
            return function(*arguments)

        return call

    for name in names:
        monkeypatch.setattr(module, name, remembering(name, getattr(module, name)))
    return calls

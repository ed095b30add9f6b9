"""The student's loss, linear_cross_entropy (mean): forward without gradients, and both = loss with the
gradients of hidden and weight.

There is no backward alone: most contenders compute the gradients during the forward pass. both − forward is
what gradients cost.

    GEMMs              the bare matrix products, one for forward, three for both (logits, dX, dW), into
                       buffers that exist: the floor
    liger-fp32         Liger with the weight's gradient accumulated in float32 (its default: in the weight's
                       dtype)
    gluon              ours with MINIPLM_GLUON=1 (Hopper)
    others             as in log_prob.py; cut-cross-entropy without its gradient filter

All targets count. The loss and both gradients are compared over the whole shape with float64, computed 512
tokens at a time.
"""

from functools import partial

import torch
from gluon import with_gluon
from harness import Case, need_memory, relative_error, run
from log_prob import PEERS, head, prepare_liger
from miniplm.kernels import linear_cross_entropy

CONTENDERS = {**PEERS, "liger-fp32": partial(prepare_liger, accum_dtype=torch.float32)}


def exact(hidden, weight, targets, teacher=None, alpha=0.0):
    """(loss, its gradient for hidden, for weight) in float64; loss = (1 − alpha) · cross-entropy + alpha ·
    KL(teacher ‖ student), means.

    With p the student's and r the teacher's probabilities, d loss / d logits = (p − (1 − alpha) · onehot −
    alpha · r) / T.
    """
    weight = weight.double()
    teacher_weight = teacher[1].double() if teacher else None
    grad_hidden, grad_weight, loss = (
        torch.empty_like(hidden, dtype=torch.float64),
        torch.zeros_like(weight),
        0.0,
    )
    for start in range(0, len(hidden), 512):
        rows = slice(start, start + 512)
        x, y = hidden[rows].double(), targets[rows, None]
        log_p = (x @ weight.T).log_softmax(1)
        loss -= (1 - alpha) * log_p.gather(1, y).sum()
        if teacher:
            log_r = (teacher[0][rows].double() @ teacher_weight.T).log_softmax(1)
            r = log_r.exp()
            loss += alpha * log_r.sub_(log_p).mul_(r).sum()
            gradient = log_p.exp_().sub_(r, alpha=alpha)
        else:
            gradient = log_p.exp_()
        gradient.scatter_add_(1, y, torch.full_like(y, alpha - 1, dtype=torch.float64)).div_(len(hidden))
        grad_hidden[rows] = gradient @ weight
        grad_weight.addmm_(gradient.T, x)
    return loss / len(hidden), grad_hidden, grad_weight


def with_gradients(loss, hidden, weight):
    """A callable: (loss, gradient of hidden, gradient of weight)."""
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))

    def call():
        value = loss(hidden, weight)
        return value.detach(), *torch.autograd.grad(value, (hidden, weight))

    return call


def compare(truth):
    """errors of a Case, for results (loss,) or (loss, gradient of hidden, gradient of weight)."""
    names = ("loss", "grad_hidden", "grad_weight")
    return lambda out: {
        name: relative_error(value, exactly) for name, value, exactly in zip(names, out, truth, strict=False)
    }


def cases(shape, device, dtype):
    T, V = shape["T"], shape["V"]
    hidden, weight = head(T, V, shape["d"], device, dtype)
    targets = torch.randint(V, (T,), device=device)

    def gemms(gradients):
        need_memory(dtype.itemsize * (T * V + (hidden.numel() + weight.numel()) * gradients))
        logits = torch.empty(T, V, device=device, dtype=dtype)
        grads = [torch.empty_like(x) for x in (hidden, weight)] if gradients else ()

        def call():
            torch.mm(hidden, weight.T, out=logits)
            if gradients:
                torch.mm(logits, weight, out=grads[0])
                torch.mm(logits.T, hidden, out=grads[1])

        return call

    def contender(prepare, gradients):
        loss = prepare(T * V, "mean", gradients)
        if gradients:
            return with_gradients(lambda hidden, weight: loss(hidden, weight, targets), hidden, weight)
        return lambda: (loss(hidden, weight, targets),)

    def miniplm(size, reduction, gradients):
        return lambda hidden, weight, targets: linear_cross_entropy(
            hidden, weight, targets, reduction=reduction
        )

    errors = compare(exact(hidden, weight, targets))
    for name, gradients, products in (("forward", False, 1), ("both", True, 3)):
        contenders = {"miniplm": partial(contender, miniplm, gradients), "GEMMs": partial(gemms, gradients)}
        contenders |= {peer: partial(contender, prepare, gradients) for peer, prepare in CONTENDERS.items()}
        contenders["gluon"] = with_gluon(contenders["miniplm"])
        yield Case(name, contenders, flops=2 * products * T * V * shape["d"], errors=errors)


if __name__ == "__main__":
    T = 16_384
    SHAPES = [{"T": T, "V": 151_936, "d": d} for d in (512, 768, 1024, 1536, 2048)]
    SHAPES += [{"T": T, "V": V, "d": 768} for V in (128_256, 49_152)]
    run(
        "cross_entropy",
        __doc__,
        cases,
        SHAPES,
        quick=SHAPES[0:5:2],
        toy=[{"T": 96, "V": 1000, "d": d} for d in (32, 48)],
        baseline="GEMMs",
        by="d",
    )

"""Vanilla KD, linear_distillation_loss with alpha 0.5: forward without gradients, and both = loss with the
student's two gradients.

    GEMMs              the bare matrix products: teacher's and student's logits; for both also the student's
                       two gradients: the floor
    eager, compile     logits of both, 0.5 · cross_entropy(float32) + 0.5 · kl_div(float32)
    liger              0.5 · liger_fused_linear_cross_entropy + 0.5 · liger_fused_linear_jsd with jsd_beta=0,
                       which is KL(teacher ‖ student) (Triton, written for Liger Kernel 0.8.5)
    gluon              ours with MINIPLM_GLUON=1 (Hopper)
    liger-chunked      liger_kernel.chunked_loss.LigerFusedLinearJSDLoss with beta=0 and equal weights
                       (compiled PyTorch, 0.8.5)

Both of Liger's compute the gradients in the forward pass; liger-chunked does so without autograd too.
All targets count. The loss and both gradients are compared over the whole shape with float64, computed 512
tokens at a time.
"""

from functools import partial

import torch
from cross_entropy import compare, exact, with_gradients
from gluon import with_gluon
from harness import Case, need_memory, run
from log_prob import head
from miniplm.kernels import linear_distillation_loss

ALPHA = 0.5


def eager(hidden, weight, teacher_hidden, teacher_weight, targets):
    logits = (hidden @ weight.T).float()
    with torch.no_grad():
        teacher = (teacher_hidden @ teacher_weight.T).float().log_softmax(1)
    divergence = torch.nn.functional.kl_div(
        logits.log_softmax(1), teacher, reduction="batchmean", log_target=True
    )
    return (1 - ALPHA) * torch.nn.functional.cross_entropy(logits, targets) + ALPHA * divergence


def prepare_eager(size, gradients):
    need_memory(size * (30 if gradients else 26))  # six or seven tensors [T, V] in float32
    return eager


def prepare_compile(size, gradients):
    need_memory(size * (16 if gradients else 8))
    torch._dynamo.reset()
    return torch.compile(eager, dynamic=False)


def prepare_liger(size, gradients):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy, liger_fused_linear_jsd

    def loss(hidden, weight, teacher_hidden, teacher_weight, targets):
        cross_entropy = liger_fused_linear_cross_entropy(hidden, weight, targets)
        return (1 - ALPHA) * cross_entropy + ALPHA * liger_fused_linear_jsd(
            hidden, weight, teacher_hidden, teacher_weight, targets, jsd_beta=0.0
        )

    return loss


def prepare_liger_chunked(size, gradients):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    torch._dynamo.reset()
    return LigerFusedLinearJSDLoss(weight_hard_loss=1 - ALPHA, weight_soft_loss=ALPHA, beta=0.0)


def prepare_miniplm(size, gradients):
    return lambda *inputs: linear_distillation_loss(*inputs, alpha=ALPHA).loss


CONTENDERS = {
    "miniplm": prepare_miniplm,
    "eager": prepare_eager,
    "compile": prepare_compile,
    "liger": prepare_liger,
    "liger-chunked": prepare_liger_chunked,
}


def cases(shape, device, dtype):
    T, V = shape["T"], shape["V"]
    hidden, weight = head(T, V, shape["d"], device, dtype)
    teacher = head(T, V, shape["d_teacher"], device, dtype)
    targets = torch.randint(V, (T,), device=device)

    def gemms(gradients):
        need_memory(dtype.itemsize * (T * V + (hidden.numel() + weight.numel()) * gradients))
        logits = torch.empty(T, V, device=device, dtype=dtype)
        grads = [torch.empty_like(x) for x in (hidden, weight)] if gradients else ()

        def call():
            torch.mm(teacher[0], teacher[1].T, out=logits)
            torch.mm(hidden, weight.T, out=logits)
            if gradients:
                torch.mm(logits, weight, out=grads[0])
                torch.mm(logits.T, hidden, out=grads[1])

        return call

    def contender(prepare, gradients):
        loss = prepare(T * V, gradients)
        if gradients:
            return with_gradients(
                lambda hidden, weight: loss(hidden, weight, *teacher, targets), hidden, weight
            )
        return lambda: (loss(hidden, weight, *teacher, targets),)

    errors = compare(exact(hidden, weight, targets, teacher, ALPHA))
    for name, gradients, products in (("forward", False, 1), ("both", True, 3)):
        contenders = {key: partial(contender, prepare, gradients) for key, prepare in CONTENDERS.items()}
        contenders |= {"GEMMs": partial(gemms, gradients), "gluon": with_gluon(contenders["miniplm"])}
        yield Case(
            name, contenders, flops=2 * T * V * (products * shape["d"] + shape["d_teacher"]), errors=errors
        )


if __name__ == "__main__":
    SHAPES = [
        {"T": T, "V": 151_936, "d": d, "d_teacher": 2048}
        for T in (16_384, 8_192)
        for d in (512, 768, 1024, 1536)
    ]
    run(
        "distillation",
        __doc__,
        cases,
        SHAPES,
        quick=SHAPES[0:4:3],
        baseline="GEMMs",
        by="d",
        toy=[{"T": 96, "V": 1000, "d": d, "d_teacher": 64} for d in (32, 48)],
    )

"""Log-probabilities of targets without logits: linear_log_prob, and difference_score with its two models
(shapes with d_reference).

    GEMM
    the logits alone, hidden @ weight.T into one buffer of at most 16,384 rows that is used again: the floor
    eager, compile
    logits, then cross_entropy(logits.float(), reduction="none"), as transformers computes its loss
    torch              torch.nn.functional.linear_cross_entropy with its chunks (torch 2.13 and newer)
    liger              liger_fused_linear_cross_entropy, reduction="none" (written for Liger Kernel 0.8.5)
    liger-cutedsl      its per-token kernel for Hopper (needs nvidia-cutlass-dsl)
    cut-cross-entropy  linear_cross_entropy, filter_eps=None, reduction="none" (written for 25.1.1; the newer
    source has the same arguments)
    quack              no loss per token (0.6.5): listed so that its absence is seen
    gluon              ours with MINIPLM_GLUON=1 (Hopper)

For difference_score each of them runs on both heads, and the mean difference of each document of 1,024 tokens
is taken. All targets count. Hidden states are standard normal, weights such that logits have standard
deviation 2. Errors: log-probabilities of 1,024 tokens spread over the batch, scores of the first 2 documents,
against float64.
"""

import torch
from gluon import with_gluon
from harness import Case, Skip, need_memory, relative_error, run
from miniplm.kernels import difference_score, linear_log_prob

ROWS = 16_384  # of the bare GEMM's buffer
CHECKED = 1_024  # tokens whose log-probability is compared


def head(T, V, d, device, dtype):
    """Hidden states [T, d], head weight [V, d]."""
    return torch.randn(T, d, device=device, dtype=dtype), (
        torch.randn(V, d, device=device) * (2 * d**-0.5)
    ).to(dtype)


def eager(hidden, weight, targets, reduction):
    logits = hidden @ weight.T
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction=reduction)


def prepare_eager(size, reduction, gradients):
    need_memory(
        size * (14 if gradients else 10)
    )  # logits in 2 bytes and 4, log-softmax; backward: its gradient, that of the logits
    return lambda hidden, weight, targets: eager(hidden, weight, targets, reduction)


def prepare_compile(size, reduction, gradients):
    need_memory(size * (8 if gradients else 4))
    torch._dynamo.reset()
    compiled = torch.compile(eager, dynamic=False)
    return lambda hidden, weight, targets: compiled(hidden, weight, targets, reduction)


def prepare_torch(size, reduction, gradients):
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        raise Skip(f"torch {torch.__version__} has no linear_cross_entropy; 2.13 has")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, targets: torch.nn.functional.linear_cross_entropy(
        hidden, weight, targets, reduction=reduction, options=options
    )


def prepare_liger(size, reduction, gradients, accum_dtype=None):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

    return lambda hidden, weight, targets: liger(
        hidden, weight, targets, reduction=reduction, accum_dtype=accum_dtype
    )


def prepare_liger_cutedsl(size, reduction, gradients):
    if reduction == "none":
        from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import (
            LigerFusedScaledCrossEntropySM90Function as Liger,
        )

        return Liger.apply
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import (
        LigerFusedLinearCrossEntropySM90Function as Liger,
    )

    return lambda hidden, weight, targets: Liger.apply(hidden, weight, targets, -100, reduction)


def prepare_cut(size, reduction, gradients):
    from cut_cross_entropy import linear_cross_entropy as cut

    return lambda hidden, weight, targets: cut(hidden, weight, targets, filter_eps=None, reduction=reduction)


def prepare_quack(size, reduction, gradients):
    if reduction == "none":
        raise Skip("quack.linear_cross_entropy gives no loss per token")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy as quack

    return lambda hidden, weight, targets: quack(hidden, weight, targets, reduction=reduction)


# prepare(size = T · V, reduction, whether gradients will be asked for) → loss(hidden, weight, targets)
PEERS = {
    "eager": prepare_eager,
    "compile": prepare_compile,
    "torch": prepare_torch,
    "liger": prepare_liger,
    "liger-cutedsl": prepare_liger_cutedsl,
    "cut-cross-entropy": prepare_cut,
    "quack": prepare_quack,
}


def exact_log_prob(hidden, weight, targets):
    """In float64, 512 tokens at a time."""
    weight = weight.double()
    parts = [
        (x.double() @ weight.T).log_softmax(1).gather(1, y[:, None]).squeeze(1)
        for x, y in zip(hidden.split(512), targets.split(512), strict=True)
    ]
    return torch.cat(parts)


def cases(shape, device, dtype):
    T, V = shape["T"], shape["V"]
    widths = [shape[key] for key in ("d", "d_reference") if key in shape]
    heads = [head(T, V, d, device, dtype) for d in widths]
    targets = torch.randint(V, (T,), device=device)
    length = min(1_024, T // 2)

    def gemm():
        need_memory(min(T, ROWS) * V * dtype.itemsize)
        buffer = torch.empty(min(T, ROWS), V, device=device, dtype=dtype)

        def call():
            for hidden, weight in heads:
                for x in hidden.split(ROWS):
                    torch.mm(x, weight.T, out=buffer[: len(x)])

        return call

    def combine(log_probs):  # what is compared: [T], or the scores [documents]
        return (log_probs[0] - log_probs[1]).view(-1, length).mean(1) if len(heads) == 2 else log_probs[0]

    def peer(prepare):
        def contender():
            loss = prepare(T * V, "none", False)
            return lambda: combine([-loss(*pair, targets).float() for pair in heads])

        return contender

    def miniplm():
        if len(heads) == 1:
            return lambda: linear_log_prob(*heads[0], targets)
        offsets = torch.arange(0, T + 1, length, device=device, dtype=torch.int32)
        return lambda: difference_score(*heads[0], *heads[1], targets, offsets).score

    checked = (
        torch.arange(2 * length, device=device)
        if len(heads) == 2
        else torch.linspace(0, T - 1, min(T, CHECKED), device=device).long()
    )
    truth = combine([exact_log_prob(hidden[checked], weight, targets[checked]) for hidden, weight in heads])
    compared = slice(2) if len(heads) == 2 else checked
    name = "score" if len(heads) == 2 else "log_prob"
    contenders = {"miniplm": miniplm, "GEMM": gemm} | {name: peer(prepare) for name, prepare in PEERS.items()}
    contenders["gluon"] = with_gluon(miniplm)
    yield Case(
        "forward",
        contenders,
        flops=2 * T * V * sum(widths),
        errors=lambda out: {name: relative_error(out[compared], truth)},
    )


if __name__ == "__main__":
    K, D = 1_024, (512, 768, 1024, 1536, 2048)
    SHAPES = [{"T": 16 * K, "V": 151_936, "d": d} for d in D]
    SHAPES += [{"T": T * K, "V": 151_936, "d": 2048, "d_reference": 512} for T in (16, 1, 4, 64)]
    SHAPES += [{"T": T * K, "V": 151_936, "d": d} for T in (1, 4, 64) for d in D]
    SHAPES += [{"T": 16 * K, "V": V, "d": d} for V in (128_256, 49_152) for d in D]
    run(
        "log_prob",
        __doc__,
        cases,
        SHAPES,
        quick=SHAPES[0:5:2] + SHAPES[5:6],
        baseline="GEMM",
        by="d",
        toy=[
            {"T": 96, "V": 1000, "d": 32},
            {"T": 96, "V": 1000, "d": 48},
            {"T": 96, "V": 1000, "d": 48, "d_reference": 32},
        ],
    )

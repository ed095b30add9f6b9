"""The memory-bound ops of the decoder, forward and backward alone (on a graph that is kept): GB/s of the
bytes that each op needs to move.

    rms_norm        x [T, d]; the heads of q [T, 12, 64] as a view of a fused projection where d is 64
    add_rms_norm    x, residual [T, d] → norm, sum; with residual=float32 the sum and its gradient are float32
    rotary          q, k [T, d/D heads of D], positions of documents of 1,024 tokens
    swiglu          gate, up [T, f], two tensors; swiglu_joined: one tensor [T, 2f], and so its gradient
    quantize_rows   x [T, d] → float8, scales; forward alone

    eager, compile  plain PyTorch, statistics in float32 as in transformers; rotary gets tables of cosines and
    sines of [T, D], as there liger           liger_kernel.transformers.functional (written for Liger Kernel
    0.8.5), in_place=False; rotary gets the tables quack           quack.rmsnorm (written for 0.6.5); it has
    no other op of these as a kernel of its own

Every contender has its own copy of the inputs: some write into them. Outputs and gradients are compared over
the whole shape with float64.
"""

import torch
from harness import Case, Skip, relative_error, run

from miniplm import kernels

EPS = 1e-6


def rms_norm(x, weight):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(weight.dtype)


def add_rms_norm(x, residual, weight):
    total = x + residual
    return rms_norm(total, weight), total


def turn(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def rotary(q, k, cos, sin):
    return turn(q, cos[:, None], sin[:, None]), turn(k, cos[:, None], sin[:, None])


def swiglu(gate, up):
    return torch.nn.functional.silu(gate) * up


def swiglu_joined(both):
    return swiglu(*both.chunk(2, -1))


def quantize_rows(x):
    scale = x.abs().amax(1, keepdim=True).to(torch.promote_types(x.dtype, torch.float32)) / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


def liger(name):
    def prepare(*constants):
        if name == "quantize_rows":
            raise Skip("liger has no such op")
        from liger_kernel.transformers import functional

        if name == "rotary":
            cos, sin = (table[None] for table in constants[:2])

            def turned(q, k):
                q, k = functional.liger_rope(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
                return q[0].transpose(0, 1), k[0].transpose(0, 1)

            return turned
        return {
            "rms_norm": lambda x, w: functional.liger_rms_norm(x, w, EPS, in_place=False),
            "add_rms_norm": lambda x, r, w: functional.liger_fused_add_rms_norm(x, r, w, EPS, in_place=False),
            "swiglu": functional.liger_swiglu,
            "swiglu_joined": lambda both: functional.liger_swiglu(*both.chunk(2, -1)),
        }[name]

    return prepare


def quack(name):
    def prepare(*_):
        if name not in ("rms_norm", "add_rms_norm"):
            raise Skip("quack has no kernel of its own for this")
        from quack.rmsnorm import rmsnorm

        if name == "rms_norm":
            return lambda x, w: rmsnorm(x, w, eps=EPS)
        return lambda x, r, w: rmsnorm(x, w, residual=r, residual_dtype=r.dtype, eps=EPS, prenorm=True)

    return prepare


def ours(name):
    def prepare(*constants):
        return {
            "rms_norm": lambda x, w: kernels.rms_norm(x, w, EPS),
            "add_rms_norm": lambda x, r, w: kernels.add_rms_norm(x, r, w, EPS),
            "rotary": lambda q, k: kernels.apply_rotary(q, k, *constants[2:]),
            "swiglu": kernels.swiglu,
            "swiglu_joined": kernels.swiglu,
            "quantize_rows": kernels.quantize_rows,
        }[name]

    return prepare


def plain(name, compiled):
    def prepare(*constants):
        function = globals()[name]
        if compiled:
            torch._dynamo.reset()
            torch._functorch.config.donated_buffer = False  # the backward pass runs many times on one graph
            function = torch.compile(function, dynamic=False)
        return lambda *inputs: function(*inputs, *constants[:2])

    return prepare


CONTENDERS = {
    "miniplm": ours,
    "eager": lambda name: plain(name, False),
    "compile": lambda name: plain(name, True),
    "liger": liger,
    "quack": quack,
}


def make(shape, device, dtype):
    """(inputs, constants: cos, sin, positions, inv_freq of rotary, elements that the forward and the backward
    pass move; 0: it has none)."""
    name, T, d = shape["op"], shape["T"], shape["d"]
    new = lambda *sizes, dtype=dtype: torch.randn(sizes, device=device, dtype=dtype)
    if name == "rms_norm":
        x = new(T, 36, d)[:, :12] if d == 64 else new(T, d)
        return [x, new(d)], [], 2 * x.numel(), 3 * x.numel()
    if name == "add_rms_norm":
        stream = getattr(torch, shape["residual"]) if "residual" in shape else dtype
        ratio = stream.itemsize // dtype.itemsize
        return (
            [new(T, d), new(T, d, dtype=stream), new(d)],
            [],
            (2 + 2 * ratio) * T * d,
            (1 + 3 * ratio + (ratio > 1)) * T * d,
        )
    if name == "rotary":
        D = shape["D"]
        positions, inv_freq = (
            torch.arange(T, device=device) % 1024,
            1e6 ** (-torch.arange(0, D, 2, device=device) / D),
        )
        angles = (positions[:, None] * inv_freq).repeat(1, 2)
        return (
            [new(T, d // D, D), new(T, d // D, D)],
            [angles.cos().to(dtype), angles.sin().to(dtype), positions, inv_freq],
            4 * T * d,
            4 * T * d,
        )
    if name == "quantize_rows":
        return [new(T, d)], [], (1 + 1 / dtype.itemsize) * T * d, 0
    return [new(T, d), new(T, d)] if name == "swiglu" else [new(T, 2 * d)], [], 3 * T * d, 5 * T * d


def exact(name, inputs, constants, grads):
    """(outputs, gradients) in float64; the angles of rotary are products in float32, as in every
    contender."""
    inputs = [x.double().requires_grad_(bool(grads)) for x in inputs]
    if name == "rotary":
        angles = (constants[2][:, None] * constants[3]).repeat(1, 2).double()
        constants = angles.cos(), angles.sin()
    outputs = globals()[name](*inputs, *constants)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [y.detach().double() for y in outputs], torch.autograd.grad(
        outputs, inputs, [g.double() for g in grads]
    ) if grads else []


def cases(shape, device, dtype):
    name = shape["op"]
    inputs, constants, forward_elements, backward_elements = make(shape, device, dtype)
    with torch.no_grad():
        outputs = ours(name)(*constants)(*inputs)
    grads = (
        [torch.randn_like(y) for y in (outputs if isinstance(outputs, tuple) else (outputs,))]
        if backward_elements
        else []
    )
    outputs, gradients = exact(name, inputs, constants, grads)

    def forward(prepare):
        def contender():
            function, own = prepare(*constants), [x.clone() if x.is_contiguous() else x for x in inputs]

            def call():
                with torch.no_grad():
                    out = function(*own)
                return out if isinstance(out, tuple) else (out,)

            return call

        return contender

    def backward(prepare):
        def contender():
            function = prepare(*constants)
            own = [
                x.detach().clone().requires_grad_() if x.is_contiguous() else x.detach().requires_grad_()
                for x in inputs
            ]
            out = function(*own)
            upstream = [g.clone() for g in grads]
            return lambda: torch.autograd.grad(out, own, upstream, retain_graph=True)

        return contender

    def errors(truth, kind):
        return lambda results: {
            f"{kind} {i}": relative_error(*pair) for i, pair in enumerate(zip(results, truth, strict=True))
        }

    prepared = {contender: prepare(name) for contender, prepare in CONTENDERS.items()}
    yield Case(
        "forward",
        {key: forward(value) for key, value in prepared.items()},
        bytes=forward_elements * dtype.itemsize,
        errors=errors(outputs, "output"),
    )
    if backward_elements:
        yield Case(
            "backward",
            {key: backward(value) for key, value in prepared.items()},
            bytes=backward_elements * dtype.itemsize,
            errors=errors(gradients, "gradient"),
        )


if __name__ == "__main__":
    T = 65_536
    SHAPES = [{"op": "rms_norm", "T": T, "d": d} for d in (64, 768, 1536, 4096)] + [
        {"op": "rms_norm", "T": 8192, "d": 16_384}
    ]
    SHAPES += [{"op": "add_rms_norm", "T": T, "d": d} for d in (512, 768, 1024, 1536, 2048, 4096)] + [
        {"op": "add_rms_norm", "T": T, "d": d, "residual": "float32"} for d in (768, 2048)
    ]
    SHAPES += [{"op": "rotary", "T": T, "d": d, "D": D} for d, D in ((768, 64), (1536, 96), (2048, 128))]
    SHAPES += [
        {"op": op, "T": T, "d": d}
        for op in ("swiglu", "swiglu_joined")
        for d in (1408, 2112, 2816, 4224, 5504)
    ]
    SHAPES += [{"op": "quantize_rows", "T": T, "d": d} for d in (512, 2048, 5504)]
    QUICK = [
        shape
        for shape in SHAPES
        if shape["d"] in (768, 2112) or shape == {"op": "quantize_rows", "T": T, "d": 2048}
    ]
    TOY = [
        {"op": "rms_norm", "T": 33, "d": 64},
        {"op": "add_rms_norm", "T": 33, "d": 48},
        {"op": "rotary", "T": 33, "d": 64, "D": 32},
        {"op": "swiglu_joined", "T": 33, "d": 44},
        {"op": "quantize_rows", "T": 33, "d": 44},
    ]
    run("elementwise", __doc__, cases, SHAPES, quick=QUICK, toy=TOY, baseline="eager", by="d")

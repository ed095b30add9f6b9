"""The library's products that a chunk of the losses takes: dx = E · W and dW = Eᵀ · x, by chunk (B tokens).

Settles what kernels/chunks.py counts: whether dx in parts of the vocabulary pays, or the library cuts so long
a sum by itself; what a chunk smaller than a wave costs; what adding to dW's float32 sum costs.

    bf16               torch.mm, the result in the inputs' dtype: the floor
    miniplm            dx in as many parts as chunks.py takes for the chunk; dW added to a sum; both float32
    parts-1 … parts-16 dx in so many parts, float32
    fresh              dW in float32, added to nothing: a first chunk

E is uniform in [0, 1), W standard normal over √V, x standard normal. Errors over 256 rows against float64.
"""

from functools import partial

import torch
from harness import Case, need_memory, relative_error, run
from miniplm.kernels import chunks, tuning
from miniplm.kernels.cross_entropy import add_product, product

ROWS = 256  # that are compared


def parts_of(B, V, d, itemsize, device) -> int:
    """The parts that a call takes whose chunks come to B tokens."""
    processors = tuning.target(torch.device(device)).processors
    return chunks.choose(B, V, d, V * itemsize, B * V * itemsize, processors).parts


def cases(shape, device, dtype):
    B, V, d = (shape[key] for key in ("B", "V", "d"))
    need_memory(dtype.itemsize * B * V + 10 * V * d)
    e = torch.rand(B, V, device=device, dtype=dtype)
    w = (torch.randn(V, d, device=device) * V**-0.5).to(dtype)
    x = torch.randn(B, d, device=device, dtype=dtype)

    def plain(a, b):
        return lambda: lambda: torch.mm(a, b)

    def in_parts(parts):
        return lambda: lambda: product(e, w, parts)

    truth = e[:ROWS].double() @ w.double()
    contenders = {"bf16": plain(e, w), "miniplm": in_parts(parts_of(B, V, d, dtype.itemsize, device))}
    contenders |= {f"parts-{parts}": in_parts(parts) for parts in chunks.PARTS if V % (8 * parts) == 0}
    error = lambda truth, out: {"rows": relative_error(out[:ROWS], truth)}
    yield Case("dx", contenders, flops=2 * B * V * d, errors=partial(error, truth))

    def added():
        total = torch.zeros(V, d, device=device)

        def call():
            add_product(total, e.T, x)  # the first result is compared; later ones only take their time
            return total

        return call

    truth = e.T[:ROWS].double() @ x.double()
    contenders = {"bf16": plain(e.T, x), "miniplm": added, "fresh": lambda: lambda: product(e.T, x)}
    yield Case("dW", contenders, flops=2 * B * V * d, errors=partial(error, truth))


if __name__ == "__main__":
    D = (512, 768, 1024, 1536, 2048)
    SHAPES = [
        {"B": B, "V": 151_936, "d": d}
        for d in D
        for B in (1408, 1536, 1664, 2048, 2816, 3328, 4224, 5632, 8192)
    ]
    run(
        "head_products",
        __doc__,
        cases,
        SHAPES,
        quick=[shape for shape in SHAPES if shape["B"] in (1664, 3328, 8192) and shape["d"] in (512, 1024)],
        toy=[{"B": 96, "V": 1024, "d": d} for d in (32, 48)],
        baseline="bf16",
        by="B",
    )

"""A roofline on paper: FLOPs, bytes, waves and a predicted time for each op at the shapes of docs/design.md.

    python benchmarks/roofline.py [--gpu H100|H200] [--gemm TFLOPS] [--copy GB_PER_S] [--json FILE]

The losses are cut as the ops cut them (kernels/chunks.py), for their own budget of 1 GiB and for that of
`train`, 8,192 tokens; a second table sets beside it what nearly equal chunks, as large as the budget holds,
come to, with dx in one product.

Nothing is measured here. A prediction is written down before an op is timed, so that a figure can show it to
be wrong; its table names what the time is made of. The ceilings are those of a public data sheet or log, or
given: take the ones that a benchmark of the same card measured.

    ideal       the larger of FLOPs over the GEMM's rate and bytes over the copy's rate
    waves       share of the processors that work, on average over the waves of output tiles
    epilogue    of the logits' tiles: what is done to a tile while no product runs, in steps of the product
                (EPILOGUE_STEPS, from the compiler's schedule of the loop for sm_90, not from a clock)
    predicted   products over their waves with the epilogue, plus the traffic that no product covers; of
                attention the products alone, without its exponentials
"""

import argparse
import json
import math
from typing import NamedTuple

import harness  # noqa: F401 (finds the package in a checkout that is not installed)
from miniplm.kernels import chunks

V = 151_936
TOKENS = 16_384
BF16, FP32 = 2, 4
TILE = (128, 256, 64)  # rows, columns and depth of a step of a GEMM-shaped kernel
EPILOGUE_STEPS = 2.55  # with E: 24% of a tile's cycles at d = 512, 14% at 1,024, 7% at 2,048
EPILOGUE_STEPS_OF_SUMS = 2.14  # without, by the compiler's fixed stalls: 1,395 cycles to 1,670


class Gpu(NamedTuple):
    """Ceilings: processors, TFLOP/s of an 8192³ bf16 product, GB/s of a copy (read plus written)."""

    processors: int
    gemm_tflops: float
    copy_gb_per_s: float


# H200: docs/design.md. H100 (SXM): the same processors; the copy by its data sheet's 3,350 GB/s times H200's
# share of its own (4,300 of 4,800).
GPUS = {"H100": Gpu(132, 790, 3000), "H200": Gpu(132, 790, 4300)}


class Part(NamedTuple):
    """One piece of an op: a product (flops, output tiles) or a pass over memory (bytes alone)."""

    name: str
    flops: float = 0
    tiles: int = 0
    bytes: float = 0
    overhead: float = 0  # of a tile, as a share of its products


def product(
    name: str, rows: int, columns: int, depth: int, written: int, overhead: float = 0, parts: int = 1
) -> Part:
    """[rows, depth] × [depth, columns] in bf16, the result `written` bytes an element; the depth in so many
    parts, whose results are written and read in float32."""
    tiles = parts * math.ceil(rows / TILE[0]) * math.ceil(columns / TILE[1])
    size = BF16 * depth * (rows + columns) + written * rows * columns
    size += 2 * FP32 * parts * rows * columns * (parts > 1)
    return Part(name, 2.0 * rows * columns * depth, tiles, size, overhead)


def logits(name: str, tokens: int, d: int, written: int = 0) -> Part:
    steps = EPILOGUE_STEPS if written else EPILOGUE_STEPS_OF_SUMS
    return product(name, tokens, V, d, written, steps / (d / TILE[2]))


def waves(tiles: int, processors: int) -> float:
    """Share of the processors that have a tile, over all waves."""
    return tiles / (math.ceil(tiles / processors) * processors)


def seconds(part: Part, gpu: Gpu) -> float:
    memory = part.bytes / gpu.copy_gb_per_s / 1e9
    if not part.flops:
        return memory
    compute = part.flops / gpu.gemm_tflops / 1e12 / waves(part.tiles, gpu.processors)
    return max(compute * (1 + part.overhead), memory)


def cross_entropy(tokens: int, d: int, cut: chunks.Chunks) -> list[Part]:
    """Loss and both gradients, in chunks: logits, dx, dW; dW's float32 sum is read and written by each chunk
    but the first, and cast once."""
    parts = []
    for number, start in enumerate(range(0, tokens, cut.tokens)):
        size = min(cut.tokens, tokens - start)
        parts += [
            logits("logits", size, d, BF16),
            product("dx", size, d, V, BF16, parts=cut.parts),
            product("dW", V, d, size, FP32),
            Part("dW's sum", bytes=FP32 * V * d * (number > 0)),  # read; the product's own write is counted
        ]
    return [*parts, Part("dW's cast", bytes=(FP32 + BF16) * V * d)]


def distillation(tokens: int, d: int, d_teacher: int, cut: chunks.Chunks) -> list[Part]:
    """As cross_entropy, with the teacher's logits and a pass that reads both exponentials and writes one."""
    parts = []
    for start in range(0, tokens, cut.tokens):
        size = min(cut.tokens, tokens - start)
        parts += [
            logits("teacher's logits", size, d_teacher, BF16),
            Part("combining", bytes=3 * BF16 * size * V),
        ]
    return cross_entropy(tokens, d, cut) + parts


def attention(tokens: int, heads: int, D: int, document: int, products: int) -> list[Part]:
    """Causal attention of packed documents: 2 products forward; backward 7 in two passes, 5 in one, where a
    program does a whole document, and the buffer of dq comes and goes in the L2 cache."""
    pairs = tokens * (document + 1) / 2
    tensors = 4 if products == 2 else 8
    tiles = tokens * heads // (document if products == 5 else TILE[0])
    size = BF16 * tensors * tokens * heads * D
    return [Part("attention", 2.0 * products * pairs * heads * D, tiles, size)]


def elementwise(elements_per_token: float, d: int, tokens: int = 65_536) -> list[Part]:
    return [Part("memory", bytes=BF16 * elements_per_token * tokens * d)]


def cuts(d: int, models: int, budget: int, processors: int) -> tuple[chunks.Chunks, chunks.Chunks]:
    """(nearly equal chunks as large as the budget holds, dx in one product; what the ops take)."""
    bytes_per_token = models * BF16 * V
    blocks = TOKENS // chunks.BLOCK
    count = math.ceil(blocks / max(1, budget // bytes_per_token // chunks.BLOCK))
    equal = chunks.Chunks(math.ceil(blocks / count) * chunks.BLOCK, 1)
    return equal, chunks.choose(TOKENS, V, d, bytes_per_token, budget, processors)


def losses(processors: int, before: bool):
    """As rows, of the two losses, at both budgets; cut as `before` or as the ops do."""
    for models, op in ((1, "linear_cross_entropy"), (2, "linear_distillation_loss")):
        for name, budget in (("1 GiB", 1 << 30), ("train", 8192 * models * BF16 * V)):
            for d in (512, 768, 1024, 1536, 2048):
                cut = cuts(d, models, budget, processors)[not before]
                bare = [
                    product("logits", TOKENS, V, d, BF16),
                    product("dx", TOKENS, d, V, BF16),
                    product("dW", V, d, TOKENS, BF16),
                ]
                shape = {"d": d, "budget": name, "chunk": cut.tokens, "parts": cut.parts}
                if models == 1:
                    yield op, shape, cross_entropy(TOKENS, d, cut), bare
                else:
                    bare.append(product("teacher", TOKENS, V, 2048, BF16))
                    yield op, shape, distillation(TOKENS, d, 2048, cut), bare


def rows(processors: int):
    """(op, shape, parts, parts of what it is compared with)."""
    for d in (512, 768, 1024, 1536, 2048):
        bare = [product("GEMM", TOKENS, V, d, BF16)]
        yield "linear_log_prob", {"T": TOKENS, "d": d}, [logits("logits", TOKENS, d)], bare
    yield from losses(processors, before=False)
    for heads, D in ((12, 64), (16, 128)):
        shape = {"T": TOKENS, "D": D, "document": 1024}
        yield "flash_attention", shape, attention(TOKENS, heads, D, 1024, 2), None
        yield "flash_attention backward", shape, attention(TOKENS, heads, D, 1024, 7), None
    shape = {"T": 65_536, "D": 64, "document": 1024}
    for passes, products in ((2, 7), (1, 5)):
        parts = attention(65_536, 12, 64, 1024, products)
        yield "flash_attention backward", {**shape, "passes": passes}, parts, None
    for op, elements, d in (("rms_norm", 2, 768), ("add_rms_norm", 4, 768), ("swiglu", 3, 2112)):
        yield op, {"T": 65_536, "d": d}, elementwise(elements, d), None


def record(op: str, shape: dict, parts: list[Part], bare, gpu: Gpu) -> dict:
    """The counted and predicted figures of one op at one shape."""
    flops, size = (sum(getattr(part, key) for part in parts) for key in ("flops", "bytes"))
    products = [part for part in parts if part.flops]
    busy = sum(part.flops / waves(part.tiles, gpu.processors) for part in products)
    by_part: dict[str, float] = {}
    for part in parts:
        by_part[part.name] = by_part.get(part.name, 0) + 1e3 * seconds(part, gpu)
    predicted = sum(by_part.values())
    dx = [part for part in products if part.name == "dx"]
    return {
        "op": op,
        "shape": shape,
        "gflops": flops / 1e9,
        "mb": size / 1e6,
        "waves": flops / busy if busy else None,
        "waves_of_dx": len(dx) / sum(1 / waves(part.tiles, gpu.processors) for part in dx) if dx else None,
        "ideal_ms": 1e3 * max(flops / gpu.gemm_tflops / 1e12, size / gpu.copy_gb_per_s / 1e9),
        "predicted_ms": predicted,
        "over_bare_products": predicted / sum(1e3 * seconds(part, gpu) for part in bare) if bare else None,
        "parts_ms": by_part,
    }


def compare(before: list[dict], after: list[dict]) -> str:
    """Both cuts of the losses, side by side."""
    lines = [f"{'op':<26}{'d, budget':<16}{'before: chunk':>14}{'parts':>7}{'dx':>6}{'ms':>8}    after:"]
    for pair in zip(before, after, strict=True):
        cells = (
            f"{found['shape']['chunk']:>14,}{found['shape']['parts']:>7}"
            f"{found['waves_of_dx']:>6.2f}{found['predicted_ms']:>8.1f}"
            for found in pair
        )
        shape = f"{pair[0]['shape']['d']}, {pair[0]['shape']['budget']}"
        lines.append(f"{pair[0]['op']:<26}{shape:<16}" + "".join(cells))
    return "\n".join(lines)


def table(records: list[dict]) -> str:
    heads = ("GFLOP", "MB", "waves", "ideal ms", "predicted", "/ bare")
    lines = [f"{'op':<26}{'shape':<44}" + "".join(f"{head:>11}" for head in heads)]
    for found in records:
        shape = " ".join(f"{key}={value}" for key, value in found["shape"].items())
        keys = (("gflops", ".0f"), ("mb", ".0f"), ("waves", ".2f"), ("ideal_ms", ".3f"))
        cells = [*keys, ("predicted_ms", ".3f"), ("over_bare_products", ".2f")]
        figures = ("-" if found[key] is None else format(found[key], form) for key, form in cells)
        lines.append(f"{found['op']:<26}{shape:<44}" + "".join(f"{figure:>11}" for figure in figures))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=list(GPUS), default="H200")
    parser.add_argument("--gemm", type=float, metavar="TFLOPS", help="the GEMM ceiling that was measured")
    parser.add_argument("--copy", type=float, metavar="GB_PER_S", help="the copy ceiling that was measured")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    gpu = GPUS[options.gpu]
    gpu = Gpu(gpu.processors, options.gemm or gpu.gemm_tflops, options.copy or gpu.copy_gb_per_s)
    records = [record(*row, gpu) for row in rows(gpu.processors)]
    before = [record(*row, gpu) for row in losses(gpu.processors, before=True)]
    print(f"{options.gpu}: {gpu._asdict()}. On paper: nothing is measured.")
    print(table(records))
    after = [found for found in records if found["waves_of_dx"]]
    print(f"\nThe losses' chunks; dx: share of the processors that work on it\n{compare(before, after)}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(
                {
                    "gpu": options.gpu,
                    **gpu._asdict(),
                    "predicted": True,
                    "records": records,
                    "before": before,
                },
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()

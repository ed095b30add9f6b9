"""In which chunks of tokens the losses of the head are computed, and in how many parts the product that makes
dx.

T tokens, V vocabulary, d hidden width. Per chunk of B tokens the losses form dx [B, d] = E [B, V] · W and add
Eᵀ · x to dW [V, d]. A library's product gives each tile of its result [128, 256] to one processor:

    tiles of dx = ⌈B / 128⌉ · ⌈d / 256⌉        waves = ⌈tiles / processors⌉

each wave as long as a sum over all of V, whether every processor has a tile in it or not: on 132 processors
4,224 tokens at d = 1,024, 5,632 at 768 and 8,448 at 512 are one whole wave (33, 44 and 66 blocks of 128
tokens, times 4, 3 and 2), and the 3,328 that 1 GiB holds at V = 151,936 are 79, 59 or 39% of one. Where
chunks cannot be that large, V is cut into p parts of equal length, whose products are one batched product and
are then added: p · tiles of a p-th of the length. dW has thousands of tiles; its waves are full at any size,
but its float32 sum is read and written once per chunk.

So a pair (chunk, parts) costs, in waves over all of V,

    ⌈T / B⌉ · (⌈p · tiles / processors⌉ / p + bytes · FLOPS_PER_BYTE / FLOPs of a wave)
    bytes = 8 · V · d of dW's sum + 8 · p · B · d of the parts
    FLOPs of a wave = 2 · 128 · 256 · V · processors

and the cheapest within the budget is taken. It depends on sizes, the budget and the number of processors
alone, never on what memory is free: the same run on the same kind of GPU adds up in the same order.
"""

import functools
from typing import NamedTuple

BLOCK, TILE_COLUMNS = 128, 256
FLOPS_PER_BYTE = 200  # of products over copies: 184 on an H200, 263 on an H100 (benchmarks/roofline.py)
PARTS = (1, 2, 4, 8, 16)
SHORTEST_PART = 4096  # ids: the start and end of a tile are a few per cent of its sum
PARTS_SHARE = 8  # the parts of dx, float32, take at most this share of the budget beside the logits


class Chunks(NamedTuple):
    """How one call is cut."""

    tokens: int  # of a chunk, whole blocks of 128; the last chunk is what is left
    parts: int  # of the vocabulary in the product that makes dx; they are equal


@functools.lru_cache
def choose(T: int, V: int, d: int, bytes_per_token: int, max_logits_bytes: int, processors: int) -> Chunks:
    """The cheapest chunks, by the count above, whose logits fit into max_logits_bytes; one block of tokens at
    least.

    Args:
        bytes_per_token: of the logits that are kept. processors: of the GPU.
    """
    blocks = -(-T // BLOCK)
    fewest = -(-blocks // max(1, max_logits_bytes // bytes_per_token // BLOCK))  # chunks
    sizes = {-(-blocks // count) for count in range(max(1, fewest), 4 * fewest + 1)}
    wave = 2 * BLOCK * TILE_COLUMNS * V * processors / FLOPS_PER_BYTE  # as bytes

    def fits(parts: int, size: int) -> bool:
        equal = V % (8 * parts) == 0 and V // parts >= SHORTEST_PART  # and aligned to 16 bytes
        return parts == 1 or (equal and 4 * parts * size * BLOCK * d * PARTS_SHARE <= max_logits_bytes)

    def cost(parts: int, size: int) -> float:
        waves = -(-parts * size * -(-d // TILE_COLUMNS) // processors) / parts
        return -(-blocks // size) * (waves + 8 * d * (V + parts * size * BLOCK) / wave)

    pairs = [(parts, size) for parts in PARTS for size in sizes if fits(parts, size)]
    parts, size = min(pairs, key=lambda pair: (round(cost(*pair), 1), pair[0], -pair[1]))
    return Chunks(size * BLOCK, parts)

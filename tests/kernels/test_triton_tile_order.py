"""In which order the programs of the logits kernel take the tiles: seen in Triton's interpreter, which runs
one program after the other."""

from collections import Counter

import pytest
import torch
from miniplm.kernels import logits, tuning

if torch.cuda.is_available():
    pytest.skip("on a GPU the order is not seen", allow_module_level=True)
BLOCK_T, BLOCK_V, WIDTH = 16, 16, 32
BLOCK_BYTES = BLOCK_T * WIDTH * 4  # of x, float32


def number(value):
    """Of what the interpreter has for a number."""
    return int(value.handle.data.item()) if hasattr(value, "handle") else value


@pytest.fixture
def tiles_taken(monkeypatch):
    """tiles_taken(tokens, vocabulary, programs, group): for each program, the (block of tokens, tile of the
    vocabulary) that it takes, in order, without the tile that reaches beyond the vocabulary."""

    def run(tokens, vocabulary, programs, group):
        config = tuning.Config({"BLOCK_T": BLOCK_T, "BLOCK_V": BLOCK_V, "BLOCK_D": 32})
        monkeypatch.setitem(tuning.CANDIDATES, "logsumexp", lambda *_, **__: [config])
        monkeypatch.setattr(tuning, "INTERPRETER", tuning.INTERPRETER._replace(processors=programs))
        monkeypatch.setattr(logits, "GROUP_BYTES", group * BLOCK_BYTES)
        taken = {}
        finish = logits._finish_tile

        def remember(z, offset, e, *rest):
            program, t, v = (number(value) for value in (logits.tl.program_id(0), *rest[:2]))
            if v + BLOCK_V <= vocabulary:
                taken.setdefault(program, []).append((t // BLOCK_T, v // BLOCK_V))
            return finish(z, offset, e, *rest)

        monkeypatch.setattr(logits, "_finish_tile", remember)
        x, w = torch.randn(tokens, WIDTH), torch.randn(vocabulary, WIDTH)
        largest, total = logits.logsumexp_partials(x, w)
        monkeypatch.setattr(logits, "_finish_tile", finish)
        found = torch.logsumexp(largest + total.log(), 0)
        torch.testing.assert_close(found, torch.logsumexp(x @ w.T, 1), rtol=1e-5, atol=1e-5)
        return list(taken.values())

    return run


@pytest.mark.parametrize(
    "tokens, vocabulary, programs, group",
    [
        (70, 150, 4, 2),  # 5 blocks, 9 tiles and a ragged one
        (70, 160, 7, 4),
        (16, 16, 4, 1),
        (130, 75, 3, 8),  # 9 blocks: a group of 8, and one
        (130, 300, 40, 4),  # more programs than items of a group
        (90, 410, 5, 1),
    ],
)
def test_each_tile_once_and_few_blocks_at_a_time(tokens, vocabulary, programs, group, tiles_taken):
    by_program = tiles_taken(tokens, vocabulary, programs, group)
    taken = [place for places in by_program for place in places]
    blocks, tiles = -(-tokens // BLOCK_T), vocabulary // BLOCK_V
    assert Counter(taken) == Counter((block, tile) for block in range(blocks) for tile in range(tiles))
    for places in by_program:  # a group is done before the next begins: W is read once for each
        groups = [block // group for block, _ in places]
        assert groups == sorted(groups)
    size = logits.tiles_per_split(tiles, blocks, programs)
    items = [len({(block, tile // size) for block, tile in places}) for places in by_program]
    assert len(by_program) == min(programs, sum(items)) and max(items) - min(items) <= 1


@pytest.mark.parametrize("width", [512, 768, 1024, 1536, 2048])
def test_a_group_of_x_fits_the_cache(width):
    """At the shapes of the aims (docs/design.md): at most 16 MiB of x at a time, and W at most 4 times."""
    group = logits.token_group(128 * width * 2)
    assert group * 128 * width * 2 <= 16 << 20
    assert -(-16_384 // (128 * group)) <= 4


@pytest.mark.parametrize("block_bytes", [0, 1 << 30])
def test_a_group_has_a_block_at_least(block_bytes):
    assert logits.token_group(block_bytes) >= 1

"""The masks of attn_implementation="miniplm", from transformers' mask functions."""

import inspect

import pytest
import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

from miniplm.models.transformers_masks import Documents, boolean_mask, documents_mask, documents_or_sdpa_mask

# Nine queries and keys, for whichever interface transformers has (see documents_mask).
NEW_INTERFACE = "q_length" in inspect.signature(sdpa_mask).parameters
SIZES = dict(kv_length=9) | (dict(q_length=9) if NEW_INTERFACE else dict(cache_position=torch.arange(9)))


def packed(*lengths):
    """The mask function of documents of these lengths in one row, and how many tokens they are."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (lambda b, h, q, k: (document[q] == document[k]) & (k <= q)), sum(lengths)


OTHER_MASKS = [
    lambda b, h, q, k: (k <= q) | (k < 3),  # a prefix that sees all of itself
    lambda b, h, q, k: (k <= q) & (q - k < 4),
    lambda b, h, q, k: (
        (k <= q) & ((q // 3 == k // 3) | (q < 3)) & ~((q == 5) & (k == 3))
    ),  # blocks, one key left out
    lambda b, h, q, k: (k <= q) & (k != q),
]


@pytest.mark.parametrize("mask_function", OTHER_MASKS)
def test_other_masks(mask_function):
    """They are told, for the layer that uses them to refuse; "sdpa" gets its own mask."""
    arguments = dict(**SIZES, mask_function=mask_function)
    assert documents_mask(1, **arguments).unlike == "a mask that is not causal within documents"
    found = documents_or_sdpa_mask(1, **arguments, allow_is_causal_skip=False)
    assert torch.equal(found, sdpa_mask(1, **arguments, allow_is_causal_skip=False))


def test_a_mask_of_the_users_own():
    arguments = dict(**SIZES, mask_function=lambda b, h, q, k: k <= q)
    assert documents_mask(1, **arguments).unlike == ""
    assert documents_mask(1, **arguments, use_vmap=True).unlike != ""


def test_the_mask_interface_of_transformers_5_0():
    """There the queries come as cache_position."""
    found = documents_mask(
        2, cache_position=torch.arange(4), kv_length=4, kv_offset=0, mask_function=causal_mask_function
    )
    assert found.cu_seqlens.tolist() == [0, 4, 8] and found.order is None


@pytest.mark.parametrize("padding", [None, slice(0, 3), slice(6, 9), slice(2, 5), slice(0, 9), slice(0, 0)])
@pytest.mark.parametrize("function", [causal_mask_function, packed(3, 1, 5)[0], packed(9)[0]])
def test_documents_of_every_shape(function, padding):
    """Eager and traced documents, as a mask of booleans: that of "sdpa" wherever a token is there."""
    mask = None
    if padding is not None:
        mask = torch.ones(2, 9, dtype=torch.bool)
        mask[1, padding] = False
    arguments = dict(**SIZES, mask_function=function, attention_mask=mask)
    expected = sdpa_mask(2, **arguments, allow_is_causal_skip=False).expand(2, 1, 9, 9)
    traced = torch.compile(lambda: documents_mask(2, **arguments), fullgraph=True, backend="eager")()
    kept = torch.ones(2, 9, dtype=torch.bool) if mask is None else mask
    for documents in (documents_mask(2, **arguments), traced):
        assert isinstance(documents, Documents) and not documents.unlike
        assert (documents.cu_seqlens.diff() >= 0).all() and documents.cu_seqlens.dtype == torch.int32
        found = boolean_mask(documents, 2, 9)
        assert torch.equal(found[:, 0][kept], expected[:, 0][kept])
        assert found[:, 0][~kept].any(-1).all()


def test_another_mask_while_tracing():
    """What can be seen without values is told; the rest fails when it runs."""
    window = dict(**SIZES, mask_function=OTHER_MASKS[1])
    compiled = torch.compile(
        lambda **others: documents_mask(1, **window, **others), fullgraph=True, backend="eager"
    )
    assert compiled(local_size=4).unlike == "a window of 4 tokens"
    with pytest.raises(RuntimeError, match='attn_implementation="miniplm" does not support a mask'):
        compiled()

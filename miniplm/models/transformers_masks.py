"""The masks of attn_implementation="miniplm": what transformers' models ask for, as packed documents.

A batch [B, S] is packed: its tokens [B · S] are documents one after the other, told by the rows, by a padding
mask and by position_ids that restart. transformers asks for a mask once per forward pass and hands it to the
attention of every layer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask


class UnsupportedMaskUse(ValueError, AttributeError):
    """A model's own code treats Documents as the tensor that it expects. Also an AttributeError, so that
    hasattr works."""


class Documents(NamedTuple):
    """What our mask functions hand to every layer as attention_mask: the documents among the tokens of a
    batch [B · S].

    cu_seqlens: [documents + 1] int32, over the tokens in the order of `order`.
    order: [N] int64, the tokens as they are computed, padding left out; None: all, as they are.
    unlike: not empty: the mask is another one, in these words, and a layer that uses it refuses.
    """

    cu_seqlens: Tensor
    order: Tensor | None
    unlike: str = ""

    def __getattr__(self, name: str) -> NoReturn:
        raise UnsupportedMaskUse(
            'attn_implementation="miniplm" does not support models that compute with their attention mask '
            f'(here with its {name}): use "sdpa" or "eager"'
        )

    def __getitem__(self, index: Any) -> NoReturn:
        self.__getattr__("elements")


def documents_mask(
    batch_size: int,
    kv_length: int,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **others: Any,
) -> Documents | Tensor | None:
    """transformers' mask interface of "miniplm": the Documents of a padding mask and of position_ids that
    restart.

    Queries that are fewer than the keys (a cache) get the mask of "sdpa", which answers them. A mask that is
    not causal attention within documents is told in Documents.unlike and not refused here: some models make
    masks that no layer uses.
    """
    # transformers before 5.5 gives the queries' positions instead of their number.
    length = others["q_length"] if "q_length" in others else len(others["cache_position"])
    if length != kv_length:
        return sdpa_mask(
            batch_size=batch_size,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device,
            use_vmap=use_vmap,
            **others,
        )
    if mask_function is causal_mask_function and attention_mask is None:
        return Documents(equal_documents(batch_size, length, device), None)
    tracing, most = torch.compiler.is_compiling(), batch_size
    if mask_function is causal_mask_function:
        starts = torch.arange(length, device=device).eq(0).expand(batch_size, -1)
    else:
        window, most = others.get("local_size"), batch_size * length
        starts, within_documents = _starts(batch_size, length, mask_function, device)
        unlike = f"a window of {window} tokens" if window else "a mask that is not causal within documents"
        if use_vmap or (window or length) < length or not (tracing or within_documents):
            return Documents(equal_documents(batch_size, length, device), None, unlike)
        if tracing:  # no value can be read
            torch._assert_async(within_documents, f'attn_implementation="miniplm" does not support {unlike}')
    return _static_documents(starts, attention_mask, most) if tracing else _documents(starts, attention_mask)


def documents_or_sdpa_mask(batch_size: int, kv_length: int, **arguments: Any) -> Documents | Tensor | None:
    """transformers' mask interface of "miniplm_or_sdpa": Documents, or the mask of "sdpa" where it is another
    one."""
    mask = documents_mask(batch_size, kv_length, **arguments)
    if isinstance(mask, Documents) and mask.unlike:
        return sdpa_mask(batch_size=batch_size, kv_length=kv_length, **arguments)
    return mask


def equal_documents(batch_size: int, length: int, device: torch.device | str) -> Tensor:
    """cu_seqlens [B + 1] of a batch whose rows are the documents."""
    return torch.arange(batch_size + 1, dtype=torch.int32, device=device) * length


def boolean_mask(documents: Documents, batch_size: int, length: int) -> Tensor:
    """[B, 1, S, S] for "sdpa": True where a query sees a key. Padding sees itself: a softmax over no key is
    NaN."""
    device, tokens = documents.cu_seqlens.device, batch_size * length
    order = torch.arange(tokens, device=device) if documents.order is None else documents.order
    number = torch.bucketize(torch.arange(len(order), device=device), documents.cu_seqlens, right=True)
    document = number.new_full((tokens,), -1).index_copy(0, order, number).view(batch_size, length)
    same = (document[:, :, None] == document[:, None, :]) & (document >= 0)[:, :, None]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return (same & causal | torch.eye(length, dtype=torch.bool, device=device))[:, None]


def _starts(
    batch_size: int, length: int, mask_function: Callable, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Which tokens [B, S] begin a document, by a mask function of index tensors, and whether the mask is
    causal within documents.

    A token begins one if it does not see the token before it. Each is then asked for itself, the first token
    of its document, the one before that and the one after itself: every mask of transformers fails there
    unless it is what we compute; the caller refuses users' own masks outright.
    """
    row = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros((), dtype=torch.long, device=device)
    i = torch.arange(length, device=device).expand(batch_size, -1)

    def sees(key: Tensor) -> Tensor:
        return (key >= 0) & (key < length) & mask_function(row, head, i, key.clamp(0, length - 1))

    starts = ~sees(i - 1)
    start = torch.where(starts, i, 0).cummax(1).values
    return starts, (sees(i) & sees(start) & ~sees(start - 1) & ~sees(i + 1)).all()


def _documents(starts: Tensor, attention_mask: Tensor | None) -> Documents:
    """Documents of their first tokens [B, S] and a padding mask [B, S]."""
    document, order = starts.flatten().cumsum(0), None
    if attention_mask is not None:
        order = attention_mask.flatten().nonzero()[:, 0]
        document, order = document[order], None if len(order) == len(document) else order
    lengths = document.unique_consecutive(return_counts=True)[1]
    return Documents(F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), order)


def _static_documents(starts: Tensor, attention_mask: Tensor | None, most: int) -> Documents:
    """The same for tracing, in shapes that do not depend on values: `most` documents, empty ones at the end,
    and then the padding as one more."""
    tokens, order = starts.numel(), None
    document = starts.flatten().cumsum(0)
    if attention_mask is not None:
        document = torch.where(attention_mask.flatten().bool(), document, tokens + 1)
        document, order = document.sort(stable=True)
    begins = F.pad(document.diff() != 0, (1, 0), value=True)
    bounds = torch.where(begins, torch.arange(tokens, device=starts.device), tokens).sort().values
    return Documents(F.pad(bounds[: most + 1], (0, 1), value=tokens).to(torch.int32), order)

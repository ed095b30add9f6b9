"""attn_implementation="miniplm": transformers' models with attention on flash_attention.

    "miniplm"           causal attention within documents; what else a model asks for is refused by name
    "miniplm_or_sdpa"   and there, instead of refusing, transformers' "sdpa" does the work

Importing this module makes both known to transformers. Where the queries are not the keys (one or several new
tokens and a cache), "sdpa" does the work in both.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..kernels import flash_attention
from .transformers_masks import (
    Documents,
    boolean_mask,
    documents_mask,
    documents_or_sdpa_mask,
    equal_documents,
)

ATTENTION, ATTENTION_OR_SDPA = "miniplm", "miniplm_or_sdpa"

# What a layer may hand to its attention and flash_attention has not; some versions of "sdpa" take some of it.
EXTRAS = ("softcap", "s_aux", "position_bias", "cache")
EXTRAS_OF_SDPA = tuple(
    name for name in EXTRAS if name in inspect.signature(sdpa_attention_forward).parameters
)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Documents | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface of "miniplm", on flash_attention.

    Args:
        query: [B, Hq, S, D]. key, value: [B, Hk, S, D]; where S differs from the queries' (a cache), "sdpa"
            does the work.
        attention_mask: Documents, or None: each row of the batch is a document.
        kwargs: cu_seq_lens_q, if given, are the documents of the one row of the batch.
    Returns: ([B, S, Hq, D], None); 0 where there is padding (when compiled: numbers that mean nothing).
    Raises:
        ValueError: what this attention does not do, by name.
    """
    arguments = dict(kwargs, scaling=scaling, dropout=dropout, is_causal=is_causal)
    _refuse(_beyond_sdpa(key, query, attention_mask, kwargs), '"eager"')
    if key.shape[2] != query.shape[2]:
        assert not isinstance(attention_mask, Documents)  # refused
        return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
    documents = _documents(query, attention_mask, kwargs)
    beyond = _beyond_flash(module, key, value, documents, sliding_window, arguments)
    _refuse(beyond, f'"{ATTENTION_OR_SDPA}", "sdpa" or "eager"')
    assert not isinstance(documents, Tensor)  # refused
    return _attend(query, key, value, documents, scaling), None


def attention_or_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Documents | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface of "miniplm_or_sdpa": as `attention`, with "sdpa" where that refuses.
    What "sdpa" does not do either is refused."""
    arguments = dict(kwargs, scaling=scaling, dropout=dropout, is_causal=is_causal)
    _refuse(_beyond_sdpa(key, query, attention_mask, kwargs), '"eager"')
    if key.shape[2] == query.shape[2]:
        documents = _documents(query, attention_mask, kwargs)
        if not _beyond_flash(module, key, value, documents, sliding_window, arguments):
            assert not isinstance(documents, Tensor)  # it is beyond flash_attention
            return _attend(query, key, value, documents, scaling), None
        if isinstance(documents, Documents):
            attention_mask = boolean_mask(documents, query.shape[0], query.shape[2])
    assert not isinstance(attention_mask, Documents)  # refused where the keys are not the queries
    return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)


def _documents(query: Tensor, mask: Documents | Tensor | None, kwargs: dict) -> Documents | Tensor | None:
    """The documents of a layer's arguments; a mask that is none of ours, and None, as they are."""
    bounds, key_bounds = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if bounds is None or (isinstance(mask, Documents) and mask.unlike):
        return mask
    wrong = {
        "cu_seq_lens_q of a batch of several rows": query.shape[0] != 1,
        "cu_seq_lens_q together with a padding mask": isinstance(mask, Documents) and mask.order is not None,
        "cu_seq_lens_k unlike cu_seq_lens_q": key_bounds is not None and key_bounds.shape != bounds.shape,
    }
    _refuse([name for name, asked in wrong.items() if asked], '"sdpa" or "eager"')
    return Documents(bounds.to(query.device, torch.int32), None)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents | None, scaling: float | None
) -> Tensor:
    """[B, S, Hq, D] by flash_attention on the packed tokens."""
    B, _, S, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B · S, H, D]
    if documents is None:
        out = flash_attention(q, k, v, equal_documents(B, S, query.device), None, scaling)
    elif documents.order is None:
        out = flash_attention(q, k, v, documents.cu_seqlens, None, scaling)
    else:
        q, k, v = (x[documents.order] for x in (q, k, v))
        out = flash_attention(q, k, v, documents.cu_seqlens, None, scaling)
        out = out.new_zeros(B * S, *out.shape[1:]).index_copy(0, documents.order, out)
    return out.unflatten(0, (B, S))


# ---- refusals in a layer ----


def _beyond_sdpa(key: Tensor, query: Tensor, mask: Documents | Tensor | None, kwargs: dict) -> list[str]:
    """What neither this attention nor "sdpa" does of all that a layer asks for."""
    names = [name for name in EXTRAS if kwargs.get(name) is not None and name not in EXTRAS_OF_SDPA]
    if kwargs.get("output_attentions"):
        names.append("returned attention weights")
    if key.shape[2] != query.shape[2] and isinstance(mask, Documents):
        names.append(f"{key.shape[2]} keys under a mask for {query.shape[2]}")
    return names


def _beyond_flash(
    module: nn.Module,
    key: Tensor,
    value: Tensor,
    mask: Documents | Tensor | None,
    sliding_window: int | None,
    arguments: dict,
) -> list[str]:
    """What "sdpa" does and this attention does not, of all that a layer asks for."""
    names = [name for name in EXTRAS_OF_SDPA if arguments.get(name) is not None]
    is_causal = arguments["is_causal"]
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        names.append("attention that is not causal")
    if arguments["dropout"] > 0:
        names.append("dropout")
    if sliding_window is not None and sliding_window < key.shape[2]:
        names.append(f"a sliding window of {sliding_window} tokens")
    if value.shape[3] != key.shape[3]:
        names.append(_narrow_values(value.shape[3], key.shape[3]))
    if isinstance(mask, Tensor):
        names.append(f"a mask of shape {list(mask.shape)}")
    elif mask is not None and mask.unlike:
        names.append(mask.unlike)
    return names


def _narrow_values(value_width: int, key_width: int) -> str:
    return f"values of width {value_width} beside keys of width {key_width}"


def _refuse(features: list[str], remedy: str) -> None:
    if features:
        raise ValueError(
            f'attn_implementation="{ATTENTION}" does not support {", ".join(features)}: use {remedy}'
        )


# ---- refusals when a model is made or told to use it ----

# Types of models whose code computes with the mask of its attention, or has a table of attentions of its own.
OWN_CODE = (
    "axk2",
    "deepseek_v32",
    "doge",
    "dots3_note_text",
    "git",
    "glm_moe_dsa",
    "hy_v4",
    "qwen4_exp",
    "qwen4_exp_text",
)


def _reaches_attention(model: PreTrainedModel) -> bool:
    """Whether the code of a model's class asks transformers' AttentionInterface for its attention; True where
    the code cannot be read, and for a model that is made of others."""
    classes = [base for base in type(model).__mro__ if issubclass(base, PreTrainedModel)]
    names = {base.__module__ for base in classes if base is not PreTrainedModel}
    try:
        sources = [inspect.getsource(sys.modules[name]) for name in names if name in sys.modules]
    except (OSError, TypeError):
        return True
    if model.config.model_type in OWN_CODE:
        return False
    has_attention = any(re.search(r"^class \w*Attention", source, re.MULTILINE) for source in sources)
    made_of_others = bool(model.config.sub_configs) and not has_attention
    return made_of_others or any("ALL_ATTENTION_FUNCTIONS" in source for source in sources)


def _refuse_model(model: PreTrainedModel) -> None:
    """ValueError for what `attention` would refuse in every pass of a model, as far as its class and its
    config tell, and for what it would leave to a "sdpa" that the model is not made for."""
    if not _reaches_attention(model):
        raise ValueError(
            f"{type(model).__name__} computes its attention, if it has any, in code of its own, which "
            f'attn_implementation="{ATTENTION}" does not reach: leave that out or use "{ATTENTION_OR_SDPA}"'
        )
    if not model._supports_sdpa:
        _refuse([f'{type(model).__name__}, which has no "sdpa" to take over with a cache'], '"eager"')
    config = model.config
    if getattr(config, "qk_nope_head_dim", None) and getattr(config, "v_head_dim", None):  # latent attention
        keys, values = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
        if keys != values:
            _refuse([_narrow_values(values, keys)], f'"{ATTENTION_OR_SDPA}", "sdpa" or "eager"')


def _refusing(get_correct_attn_implementation: Callable[..., str]) -> Callable[..., str]:
    """transformers' check of a requested attention that also refuses models that would run without ours or
    not at all; "miniplm_or_sdpa" leaves those whose own code computes it their own."""

    @functools.wraps(get_correct_attn_implementation)
    def check(self: PreTrainedModel, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        if requested_attention == ATTENTION:
            _refuse_model(self)
        if requested_attention == ATTENTION_OR_SDPA and not _reaches_attention(self):
            requested_attention = None
        return get_correct_attn_implementation(self, requested_attention, *args, **kwargs)

    return check


def register() -> None:
    """Make the two implementations known to transformers; importing this module does it."""
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, documents_mask)
    AttentionInterface.register(ATTENTION_OR_SDPA, attention_or_sdpa)
    AttentionMaskInterface.register(ATTENTION_OR_SDPA, documents_or_sdpa_mask)
    refusing = _refusing(PreTrainedModel.get_correct_attn_implementation)
    PreTrainedModel.get_correct_attn_implementation = refusing  # type: ignore[method-assign]


register()

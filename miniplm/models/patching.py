"""MiniPLM's ops inside other people's transformers models, so that they keep their own trainer.

patch(model)
RMSNorm, SwiGLU, rotary embedding, attention and the loss of a Qwen2, Llama or Qwen3 model run on the ops
unpatch(model)   and as before again
"""

from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from ..kernels import apply_rotary, flash_attention, linear_cross_entropy, rms_norm, swiglu
from ..models.decoder import unsupported_reason

ATTENTION = "miniplm"  # the name of our attention among transformers' implementations

# ---- attention: attn_implementation="miniplm" ----


class Documents(NamedTuple):
    """What our mask function hands to every layer as attention_mask: the documents among the tokens of a
    batch [B · S]."""

    cu_seqlens: torch.Tensor  # [documents + 1] int32, over the tokens that are kept
    kept: torch.Tensor | None  # [N] int64: the tokens that are not padding; None: all


def register():
    """Make attn_implementation="miniplm" known to transformers; importing this module does it."""
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, attention_mask_documents)


def attention_mask_documents(
    batch_size,
    kv_length,
    mask_function=causal_mask_function,
    attention_mask=None,
    device="cpu",
    use_vmap=False,
    **others,
):
    """transformers' mask interface: once per forward pass, the Documents of a padding mask and of
    position_ids that restart.

    Queries that are fewer than the keys (decoding with a cache) get the mask of transformers' "sdpa", which
    answers them.

    Raises:
        ValueError: the mask is not causal attention within documents: a sliding window shorter than the text,
            for one.
    """
    length = (
        others["q_length"] if "q_length" in others else len(others["cache_position"])
    )  # the latter before transformers 5.5
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
        return Documents(_equal_documents(batch_size, length, device), None)
    starts = torch.arange(length, device=device).eq(0).expand(batch_size, -1)
    if mask_function is not causal_mask_function:
        starts = _starts(batch_size, length, mask_function, device)
        if use_vmap or starts is None:
            window = f" (a window of {others['local_size']} tokens)" if others.get("local_size") else ""
            raise ValueError(
                f'attn_implementation="{ATTENTION}" is causal attention within documents; this model asks '
                f"for another mask{window}"
            )
    document, kept = starts.flatten().cumsum(0), None
    if attention_mask is not None:
        kept = attention_mask.flatten().nonzero()[:, 0]
        document, kept = document[kept], None if len(kept) == len(document) else kept
    lengths = document.unique_consecutive(return_counts=True)[1]
    return Documents(F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), kept)


def _equal_documents(batch_size, length, device):
    return torch.arange(batch_size + 1, dtype=torch.int32, device=device) * length


def _starts(batch_size, length, mask_function, device):
    """Which tokens [B, S] begin a document, by a mask function of index tensors; None where it is not causal
    within documents.

    A token begins one if it does not see the token before it. Each is then asked for itself, the first token
    of its document, the one before that and the one after itself: every mask of transformers fails there
    unless it is what we compute; the caller refuses users' own masks outright.
    """
    row, head = (
        torch.arange(batch_size, device=device)[:, None],
        torch.zeros((), dtype=torch.long, device=device),
    )
    i = torch.arange(length, device=device).expand(batch_size, -1)

    def sees(key):
        return (key >= 0) & (key < length) & mask_function(row, head, i, key.clamp(0, length - 1))

    starts = ~sees(i - 1)
    start = torch.where(starts, i, 0).cummax(1).values
    return starts if (sees(i) & sees(start) & ~sees(start - 1) & ~sees(i + 1)).all() else None


def attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    is_causal=None,
    sliding_window=None,
    **kwargs,
):
    """transformers' attention interface on flash_attention.

    Args:
        query: [B, Hq, S, D]. key, value: [B, Hk, S, D]; where S differs from the queries' (decoding with a
            cache), "sdpa" does the work.
        attention_mask: Documents, or None: each row of the batch is a document.
        kwargs: cu_seq_lens_q, if given, are the documents of the one row of the batch.
    Returns: ([B, S, Hq, D], None); 0 where there is padding.
    Raises:
        ValueError: what this attention does not do, by name.
    """
    _refuse(
        {
            "non-causal attention": not (
                getattr(module, "is_causal", True) if is_causal is None else is_causal
            ),
            "dropout": dropout > 0,
            f"a sliding window of {sliding_window} tokens": sliding_window is not None
            and sliding_window < key.shape[2],
            "returned attention weights": kwargs.get("output_attentions", False),
            **{name: kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "cache")},
        }
    )
    B, _, S, _ = query.shape
    if key.shape[2] != S:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    cu_seqlens, kept = _documents(attention_mask, kwargs, B, S, query.device)
    tokens = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]  # [B · S, H, D]
    out = flash_attention(*(x if kept is None else x[kept] for x in tokens), cu_seqlens, None, scaling)
    if kept is not None:
        out = out.new_zeros(B * S, *out.shape[1:]).index_copy(0, kept, out)
    return out.unflatten(0, (B, S)), None


def _documents(attention_mask, kwargs, batch_size, length, device) -> Documents:
    bounds, key_bounds = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    masked = attention_mask is not None and not isinstance(attention_mask, Documents)
    _refuse({f"a mask of shape {list(getattr(attention_mask, 'shape', []))}": masked})
    if bounds is None:
        return attention_mask or Documents(_equal_documents(batch_size, length, device), None)
    _refuse(
        {
            "cu_seq_lens_q of a batch of several rows": batch_size != 1,
            "cu_seq_lens_q together with a padding mask": attention_mask is not None
            and attention_mask.kept is not None,
            "cu_seq_lens_k unlike cu_seq_lens_q": key_bounds is not None and key_bounds.shape != bounds.shape,
        }
    )
    return Documents(bounds.to(device, torch.int32), None)


def _refuse(features: dict):
    if names := [name for name, wanted in features.items() if wanted]:
        raise ValueError(
            f'attn_implementation="{ATTENTION}" has no {", ".join(names)}; use "sdpa" or "eager" for this '
            f"model"
        )


register()


# ---- patch and unpatch: the other ops ----

STATE = "_miniplm_patch"


def patch(model):
    """Make a Qwen2, Llama or Qwen3 model of transformers compute with MiniPLM's ops; returns the model.

    RMSNorm, SwiGLU, rotary embedding and attention are replaced where the model computes them, and in
    training mode, when labels are given, the loss: it is computed without logits, and the output's logits are
    None. In evaluation mode the output is as before. Parameters, hooks, the state dict and the signature of
    forward stay; where no label counts, the loss is 0 and not NaN.

    Patch before the model is wrapped (accelerate, DDP, compile).

    Raises:
        ValueError: the architecture is not one of these, or it is patched already; the line says why.
    """
    if reason := unsupported_reason(model.config):
        raise ValueError(f"this model cannot be patched: {reason}")
    if hasattr(model, STATE):
        raise ValueError("this model is patched already: unpatch it first")
    kind = {"qwen2": "Qwen2", "llama": "Llama", "qwen3": "Qwen3"}[model.config.model_type]
    forwards = {kind + name: forward for name, forward in FORWARDS.items()}
    modules = [module for module in model.modules() if type(module).__name__ in forwards]
    if wrapped := [type(module).__name__ for module in modules if "forward" in vars(module)]:
        raise ValueError(
            f"the forward of {wrapped[0]} has been replaced already: patch the model before anything wraps it"
        )
    setattr(model, STATE, (modules, model.config._attn_implementation))
    model.set_attn_implementation(ATTENTION)
    for module in modules:
        module.forward = MethodType(forwards[type(module).__name__], module)
    return model


def unpatch(model):
    """Undo patch; returns the model.

    Raises:
        ValueError: it is not patched, or something has wrapped its forward since.
    """
    if not hasattr(model, STATE):
        raise ValueError("this model is not patched")
    modules, attention = getattr(model, STATE)
    if wrapped := [
        type(module).__name__
        for module in modules
        if getattr(vars(module).get("forward"), "__func__", None) not in FORWARDS.values()
    ]:
        raise ValueError(
            f"the forward of {wrapped[0]} has been wrapped since it was patched: unwrap it first "
            f"(accelerator.unwrap_model)"
        )
    for module in modules:
        del module.forward
    model.set_attn_implementation(attention)
    delattr(model, STATE)
    return model


def _rms_norm(self, hidden_states):
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _mlp(self, x):
    return self.down_proj(
        swiglu(self.gate_proj(x), self.up_proj(x))
    )  # as modules: adapters and hooks on them stay in effect


def _rotary_embedding(self, x, position_ids):
    """What _attention needs instead of tables of cosines and sines: positions [B · S], inverse frequencies,
    the factor on q·k."""
    return (
        position_ids.expand(x.shape[0], -1).reshape(-1),
        self.inv_freq.to(x.device, torch.float32),
        self.attention_scaling**2,
    )


def _attention(
    self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs
):
    shape = hidden_states.shape[:-1]  # [B, S]
    q, k, v = (
        projection(hidden_states).unflatten(-1, (-1, self.head_dim))
        for projection in (self.q_proj, self.k_proj, self.v_proj)
    )
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    positions, inv_freq, factor = position_embeddings
    q, k = (
        x.unflatten(0, shape) for x in apply_rotary(q.flatten(0, 1), k.flatten(0, 1), positions, inv_freq)
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, self.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    out, weights = attend(
        self,
        q,
        k,
        v,
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling * factor,
        **kwargs,
    )
    return self.o_proj(out.reshape(*shape, -1)), weights


@can_return_tuple
def _causal_lm(
    self,
    input_ids=None,
    attention_mask=None,
    position_ids=None,
    past_key_values=None,
    inputs_embeds=None,
    labels=None,
    use_cache=None,
    logits_to_keep=0,
    **kwargs,
):
    body = dict(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
    )
    plain_loss = type(self.lm_head) is torch.nn.Linear and self.loss_function is ForCausalLMLoss
    if (
        labels is None
        or not self.training
        or not plain_loss
        or isinstance(logits_to_keep, torch.Tensor)
        or logits_to_keep
    ):
        return type(self).forward(self, **body, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
    outputs = self.model(**body, **kwargs)
    loss = _causal_lm_loss(outputs.last_hidden_state, self.lm_head.weight, labels, **kwargs)
    return CausalLMOutputWithPast(
        loss=loss,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def _causal_lm_loss(
    hidden, weight, labels, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **_
):
    """transformers' ForCausalLMLoss, from the hidden states: the mean over the labels, or the sum over
    num_items_in_batch."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(hidden.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = linear_cross_entropy(
        hidden.reshape(len(targets), -1), weight, targets, ignore_index=ignore_index, reduction=reduction
    )
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


FORWARDS = {
    "RMSNorm": _rms_norm,
    "MLP": _mlp,
    "RotaryEmbedding": _rotary_embedding,
    "Attention": _attention,
    "ForCausalLM": _causal_lm,
}

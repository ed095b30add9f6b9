"""MiniPLM's ops inside other people's transformers models, so that they keep their own trainer.

    patch(model)     RMSNorm, SwiGLU, rotary embedding, attention and the loss of a Qwen2, Llama or Qwen3
                     model run on the ops
    unpatch(model)   and as before again

A patched module has a class of this file, derived from transformers' own and of the same name: it is copied,
pickled, wrapped and compiled as the original is.
"""

import inspect
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from ..kernels import apply_rotary, linear_cross_entropy, rms_norm, swiglu
from .decoder import unsupported_reason
from .transformers_attention import ATTENTION
from .transformers_masks import Documents

Patched = Any  # a module of a class in PATCHED.values(); those are made at run time
# What keys and values of before are called: from transformers 5.24 on, cache.
CACHE = "cache" if "cache" in inspect.signature(CausalLMOutputWithPast).parameters else "past_key_values"
Model = TypeVar("Model", bound=nn.Module)
ATTENTION_BEFORE = "_miniplm_attention_before"  # on a patched model: its attention implementation before


# ---- patch and unpatch ----


def patch(model: Model) -> Model:
    """Make a Qwen2, Llama or Qwen3 model of transformers compute with MiniPLM's ops; returns the model.

    RMSNorm, SwiGLU, rotary embedding and attention are replaced where the model computes them, and in
    training mode, when labels are given, the loss: it is computed without logits, and the output's logits are
    None. In evaluation mode the output is as before. Parameters, hooks, the state dict and the signature of
    forward stay; where no label counts, the loss is 0 and not NaN. Where lm_head is not a plain linear layer
    (a bias, hooks, an adapter), the logits are computed and the loss is transformers' own.

    Patch before the model is wrapped (accelerate, DDP, FSDP, compile). A model that accelerate has dispatched
    to devices can be patched, and so can one with adapters of PEFT.

    Raises:
        ValueError: the architecture is not one of these, or it is patched already; the line says why.
    """
    inner = _transformers_model(model)
    if reason := unsupported_reason(inner.config):
        raise ValueError(f"this model cannot be patched: {reason}")
    if hasattr(inner, ATTENTION_BEFORE):
        raise ValueError("this model is patched already: unpatch it first")
    if any(base.__name__ == "FSDPModule" for module in inner.modules() for base in type(module).__mro__):
        raise ValueError("this model is sharded already: patch it before fully_shard")
    modules = [module for module in inner.modules() if type(module) in PATCHED]
    for module in modules:
        if _is_replaced(module):
            raise ValueError(
                f"the forward of {type(module).__name__} has been replaced already: patch the model before "
                f"anything wraps it"
            )
    setattr(inner, ATTENTION_BEFORE, inner.config._attn_implementation)
    inner.set_attn_implementation(ATTENTION)
    for module in modules:
        _change_class(module, PATCHED[type(module)])
    return model


def unpatch(model: Model) -> Model:
    """Undo patch; returns the model, which may have been wrapped since. An attention implementation that was
    chosen since stays.

    Raises:
        ValueError: it is not patched, or it has been sharded since.
    """
    inner = _transformers_model(model)
    if not hasattr(inner, ATTENTION_BEFORE):
        raise ValueError("this model is not patched")
    modules = [module for module in inner.modules() if isinstance(module, tuple(PATCHED.values()))]
    if any(type(module) not in ORIGINAL for module in modules):
        raise ValueError("this model has been sharded since it was patched: it cannot be unpatched")
    for module in modules:
        _change_class(module, ORIGINAL[type(module)])
    if inner.config._attn_implementation == ATTENTION:
        inner.set_attn_implementation(getattr(inner, ATTENTION_BEFORE))
    delattr(inner, ATTENTION_BEFORE)
    return model


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    """The outermost model of transformers in whatever wraps it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(f"{type(model).__name__} holds no model of transformers")


def _is_replaced(module: nn.Module) -> bool:
    """Whether the forward of a module that could be patched has been replaced, by something else than
    accelerate's dispatching."""
    forward = vars(module).get("_old_forward" if "_hf_hook" in vars(module) else "forward", module.forward)
    known = (type(module).forward, PATCHED[type(module)].forward)
    return getattr(forward, "__func__", None) not in known


def _change_class(module: nn.Module, to: type[nn.Module]) -> None:
    """Give a module its patched class, or the original again."""
    own, known = vars(module), (type(module).forward, to.forward)
    module.__class__ = to
    if "_old_forward" in own:  # accelerate calls it from the forward that it puts in place
        own["_old_forward"] = MethodType(to.forward, module)
    elif getattr(own.get("forward"), "__func__", None) in known:  # accelerate's unwrap_model leaves it
        del module.forward


# ---- what the modules compute; each in the signature of transformers' forward ----


def _rms_norm(self: Patched, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _mlp(self: Patched, x: Tensor) -> Tensor:
    # As modules: adapters and hooks on them stay in effect.
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def _rotary_embedding(self: Patched, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, float]:
    """What _attention needs instead of tables of cosines and sines: positions [B · S], inverse frequencies,
    the factor on q·k."""
    return (
        position_ids.expand(x.shape[0], -1).reshape(-1),
        self.inv_freq.to(x.device, torch.float32),
        self.attention_scaling**2,
    )


def _attention(
    self: Patched,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor, float],
    attention_mask: Documents | Tensor | None = None,
    past_key_values: Cache | None = None,
    cache: Cache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    shape = hidden_states.shape[:-1]  # [B, S]
    q, k, v = (
        projection(hidden_states).unflatten(-1, (-1, self.head_dim))
        for projection in (self.q_proj, self.k_proj, self.v_proj)
    )
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    positions, inv_freq, factor = position_embeddings
    q, k = apply_rotary(q.flatten(0, 1), k.flatten(0, 1), positions, inv_freq)
    q, k = q.unflatten(0, shape), k.unflatten(0, shape)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    cache = past_key_values if cache is None else cache
    if cache is not None:
        k, v = cache.update(k, v, self.layer_idx)
    eager = sys.modules[self.transformers_class.__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager)
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


def _causal_lm(
    self: Patched,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: Tensor | int = 0,
    cache: Cache | None = None,
    **kwargs: Any,
) -> CausalLMOutputWithPast | tuple[Any, ...]:
    body: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        CACHE: past_key_values if cache is None else cache,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
    }
    all_logits = not isinstance(logits_to_keep, Tensor) and not logits_to_keep
    plain_loss = _is_plain(self.lm_head) and self.loss_function is ForCausalLMLoss
    if labels is None or not self.training or not plain_loss or not all_logits:
        return self.transformers_class.forward(
            self, **body, labels=labels, logits_to_keep=logits_to_keep, **kwargs
        )
    return_dict = kwargs.pop("return_dict", None)
    outputs = self.model(**body, **kwargs)
    result = CausalLMOutputWithPast(
        loss=_causal_lm_loss(outputs.last_hidden_state, self.lm_head.weight, labels, **kwargs),
        **{CACHE: outputs[CACHE] if CACHE in outputs else None},
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
    as_dict = self.config.return_dict if return_dict is None else return_dict
    return result if as_dict else result.to_tuple()


def _is_plain(head: nn.Module) -> bool:
    """Whether calling the head is x @ weight.T and nothing else: no bias, no hooks, no wrapper."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    own = vars(head).get("forward")  # left by accelerate's hooks, and then a plain layer's, or a wrapper
    plain = own is None or getattr(own, "__func__", None) is nn.Linear.forward
    return type(head) is nn.Linear and head.bias is None and plain and not any(hooks)


def _causal_lm_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss, from the hidden states: the mean over the labels, or the sum over
    num_items_in_batch."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(hidden.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = linear_cross_entropy(
        hidden.reshape(len(targets), -1), weight, targets, ignore_index=ignore_index, reduction=reduction
    )
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


# ---- the patched classes ----


def _patched_class(original: type[nn.Module], compute: Callable[..., Any]) -> type[nn.Module]:
    """A class derived from one of transformers, of the same name but in this file, with another forward."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, patched):  # unpatched, while a wrapper has kept this function
            return type(self).forward(self, *args, **kwargs)
        return compute(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    members = {"forward": forward, "transformers_class": original, "__module__": __name__}
    patched = type(original.__name__, (original,), members)
    return patched


FORWARDS: dict[str, Callable[..., Any]] = {
    "RMSNorm": _rms_norm,
    "MLP": _mlp,
    "RotaryEmbedding": _rotary_embedding,
    "Attention": _attention,
    "ForCausalLM": _causal_lm,
}
PATCHED = {  # transformers' class → ours
    (original := getattr(modeling, kind + name)): _patched_class(original, compute)
    for kind, modeling in (("Qwen2", modeling_qwen2), ("Llama", modeling_llama), ("Qwen3", modeling_qwen3))
    for name, compute in FORWARDS.items()
}
ORIGINAL = {patched: original for original, patched in PATCHED.items()}
globals().update({patched.__name__: patched for patched in ORIGINAL})  # where pickle looks for them

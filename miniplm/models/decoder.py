"""The decoder on the project's own ops: the Qwen2, Llama and Qwen3 architectures under transformers'
parameter names.

So a Hugging Face checkpoint is its state dict as it is, and its state dict is one (see loading.py).
"""

import copy
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import StudentConfig
from ..kernels import add_rms_norm, apply_rotary, flash_attention, rms_norm, swiglu
from ..runtime.errors import UserError, reason
from . import float8
from .base import LanguageModel
from .flops import forward_flops

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
MAX_SHARD_SIZE = "5GB"
# Rotary embeddings whose frequencies do not depend on the length of the text.
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual), the pair that the next residual block needs; no residual: that
        of x."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps), x
        return add_rms_norm(x, residual, self.weight, self.eps)


def fused_linear(x: Tensor, *layers: nn.Linear | float8.Float8Linear) -> Tensor:
    """[T, Σ out]: the results of linear layers for x [T, in], joined: one matrix product, and one for each
    gradient in the backward pass.

    The layers keep their own parameters, under transformers' names, each with its own gradient and optimiser
    state; what is joined is a copy, made at each call (under autocast in its dtype, as the layers would make
    one too). Of weights and results the smaller are joined.
    """
    in_float8 = [layer for layer in layers if isinstance(layer, float8.Float8Linear)]
    if len(in_float8) == len(layers):
        return float8.fused_linear(x, in_float8)
    if in_float8 or len(x) < x.shape[-1]:  # a layer of odd sizes is not in float8
        return torch.cat([layer(x) for layer in layers], -1)
    weight = torch.cat([layer.weight.to(x.dtype) for layer in layers])
    bias = float8.joined([layer.bias for layer in layers])
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, config: "PreTrainedConfig", scale: float):
        super().__init__()
        d, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.scale = _head_dim(config), scale
        qkv_bias = config.model_type == "qwen2" or config.attention_bias
        self.q_proj = nn.Linear(d, heads * self.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(d, kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(d, kv_heads * self.head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(
            heads * self.head_dim, d, bias=config.model_type != "qwen2" and config.attention_bias
        )
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, positions: Tensor, inv_freq: Tensor, cu_seqlens: Tensor, max_seqlen: int | None
    ) -> Tensor:
        qkv = fused_linear(x, self.q_proj, self.k_proj, self.v_proj).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split(
            [layer.out_features // self.head_dim for layer in (self.q_proj, self.k_proj, self.v_proj)], -2
        )  # views [T, H, D]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q)[0], self.k_norm(k)[0]
        q, k = apply_rotary(q, k, positions, inv_freq)
        return self.o_proj(flash_attention(q, k, v, cu_seqlens, max_seqlen, self.scale).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: "PreTrainedConfig"):
        super().__init__()
        bias = config.model_type == "llama" and config.mlp_bias
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(fused_linear(x, self.gate_proj, self.up_proj)))


class Layer(nn.Module):
    def __init__(self, config: "PreTrainedConfig", scale: float):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, scale)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        positions: Tensor,
        inv_freq: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int | None,
    ) -> tuple[Tensor, Tensor]:
        # The sum that ends a block is left to the norm that opens the next one: one pass over the memory
        # instead of two.
        normed, residual = self.input_layernorm(hidden, residual)
        attended = self.self_attn(normed, positions, inv_freq, cu_seqlens, max_seqlen)
        normed, residual = self.post_attention_layernorm(attended, residual)
        return self.mlp(normed), residual


class Body(nn.Module):
    """What transformers calls `model`: all but the head."""

    def __init__(self, config: "PreTrainedConfig", scale: float):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, scale) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(LanguageModel):
    """The Qwen2, Llama and Qwen3 architectures, randomly initialised (normal, config.initializer_range,
    torch's global RNG).

    Args:
        config: a Qwen2Config, LlamaConfig or Qwen3Config for which `unsupported_reason(config)` is None; it
            is copied. Dropout is not applied, and the embedding of pad_token_id is trained like any other.

    Under autocast the residual stream stays in the parameters' float32, as in transformers. Nothing waits for
    the GPU, and shapes depend on those of the arguments alone: `torch.compile(fullgraph=True)` takes it.
    activation_checkpointing: set to True, the backward pass computes each layer anew and only the layers'
    inputs are kept.
    """

    activation_checkpointing = False

    def __init__(self, config: "PreTrainedConfig"):
        super().__init__()
        if reason := unsupported_reason(config):
            raise UserError(f"the decoder cannot compute this architecture: {reason}")
        self.config = copy.deepcopy(config)
        self.inv_freq, attention_scaling = _rope(config)
        # transformers multiplies cos and sin by attention_scaling: the scores q·k then carry its square.
        scale = attention_scaling**2 / _head_dim(config) ** 0.5
        self.model = Body(config, scale)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Decoder":
        # The frequencies follow the parameters to another device, but stay float32 when those become
        # bfloat16.
        super()._apply(fn, recurse)
        if self.head_weight.device.type != "meta":
            self.inv_freq = self.inv_freq.to(self.head_weight.device)
        return self

    @property
    def head_weight(self) -> Tensor:
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None) -> Tensor:
        lengths = cu_seqlens.diff()
        starts = torch.repeat_interleave(cu_seqlens[:-1], lengths, output_size=len(input_ids))
        positions = torch.arange(len(input_ids), device=input_ids.device) - starts
        hidden: Tensor = self.model.embed_tokens(input_ids)
        residual: Tensor | None = None
        for layer in self.model.layers:
            inputs = hidden, residual, positions, self.inv_freq, cu_seqlens, max_seqlen
            if self.activation_checkpointing:
                # Nothing is random here.
                hidden, residual = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden, residual = layer(*inputs)
        return self.model.norm(hidden, residual)[0]

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs per token in documents of `context` tokens: forward_flops of the layers' matrices and
        the head; training takes three times as many."""
        matrices = sum(
            module.weight.numel()
            for module in self.model.layers.modules()
            if isinstance(module, nn.Linear | float8.Float8Linear)
        )
        return forward_flops(
            matrices + self.head_weight.numel(),
            context,
            self.config.num_hidden_layers,
            self.config.num_attention_heads * _head_dim(self.config),
        )

    def save_pretrained(
        self, folder: str | os.PathLike[str], weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write config.json, generation_config.json and model.safetensors (shards and an index above 5 GB)
        for transformers; see LanguageModel."""
        from huggingface_hub import save_torch_state_dict
        from transformers import GenerationConfig

        config = copy.deepcopy(self.config)
        config.architectures = [ARCHITECTURES[config.model_type]]
        config.dtype = self.head_weight.dtype
        config.save_pretrained(folder)
        GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        ).save_pretrained(folder)
        save_torch_state_dict(
            dict(weights or self.state_dict()), os.fspath(folder), max_shard_size=MAX_SHARD_SIZE
        )


def _head_dim(config: "PreTrainedConfig") -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope(config: "PreTrainedConfig") -> tuple[Tensor, float]:
    """Inverse frequencies [D/2] fp32 on the CPU, and the factor on cos and sin."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    with torch.device("cpu"):  # also while the parameters are made on the meta device
        if rope["rope_type"] != "default":
            return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
        size = _head_dim(config)
        return 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)), 1.0


def unsupported_reason(config: "PreTrainedConfig") -> str | None:
    """Why `Decoder` cannot compute a config exactly; None if it can."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    if type(config) not in (LlamaConfig, Qwen2Config, Qwen3Config):
        return f"its type is {config.model_type!r}, not {', '.join(ARCHITECTURES)}"
    if getattr(config, "quantization_config", None):
        return "its weights are quantised"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act!r}, not 'silu'"
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"} and config.model_type != "llama":
        return "it has sliding windows"
    if config.rope_parameters["rope_type"] not in STATIC_ROPE_TYPES:
        return f"its rope type is {config.rope_parameters['rope_type']!r}, not {', '.join(STATIC_ROPE_TYPES)}"
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "it rotates only a part of each head"
    return None


def student_config(config: StudentConfig, vocab_size: int, eos_token_id: int) -> "PreTrainedConfig":
    """transformers' config of a model to train.

    Args:
        vocab_size: the tokenizer's length; the rows of the embedding unless config.vocab_size asks for more.
        eos_token_id: ends documents, and so stands before each: it is the BOS token too.
    """
    from transformers import AutoConfig

    rows = config.vocab_size or vocab_size
    if rows < vocab_size:
        raise UserError(
            f"model.vocab_size {rows} is below the tokenizer's {vocab_size}: leave it out or raise it"
        )
    settings = {
        name: getattr(config, name)
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "tie_word_embeddings",
            "rms_norm_eps",
            "max_position_embeddings",
            "initializer_range",
        )
    }
    if config.head_dim or config.model_type == "qwen3":  # whose default is 128
        settings["head_dim"] = config.head_dim or config.hidden_size // config.num_attention_heads
    try:
        return AutoConfig.for_model(
            config.model_type,
            **settings,
            vocab_size=rows,
            num_key_value_heads=config.num_key_value_heads or config.num_attention_heads,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            bos_token_id=eos_token_id,
            eos_token_id=eos_token_id,
            dtype=torch.float32,
        )
    except Exception as error:  # transformers' own rules
        raise UserError(f"transformers refuses this model: {reason(error)}") from error

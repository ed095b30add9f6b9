"""How many tokens are trained on at a time."""

from typing import Any

import torch

from ..config import MICRO_BATCH_TOKENS
from ..models.base import LanguageModel
from ..runtime.progress import note

MIN_MICRO_BATCH_TOKENS = 1_024  # on a GPU; sizes are multiples of it
HEAD_CHUNK_TOKENS = 8_192  # of the logits in a GPU's memory at a time
USABLE_SHARE = 0.9  # of the free memory; the rest is left to what is not counted
UNKNOWN_MODEL_LAYERS = 64  # of a decoder that keeps as much as a model whose config does not tell its sizes


def head_logits_bytes(model: LanguageModel, itemsize: int, num_models: int = 1) -> int:
    """Bytes of logits that the head holds at a time on a GPU: those of HEAD_CHUNK_TOKENS tokens for each of
    the models, since the head's gradient is read and written once per chunk of tokens."""
    return num_models * HEAD_CHUNK_TOKENS * len(model.head_weight) * itemsize


def activation_bytes(config: Any, itemsize: int, checkpointing: bool = False) -> int:
    """Bytes per token that the forward pass of the decoder keeps for the backward pass.

    A layer keeps the residual stream at both norms in float32, and in the compute dtype: the norms' results,
    the joined q, k and v, rotated q and k, the attention's result, gate and up, and their product. With
    checkpointing a layer keeps its two inputs, and one layer at a time all.

    Args:
        config: transformers' config of the model. AttributeError where it does not tell its sizes.
        itemsize: bytes of the compute dtype.
    """
    config = config.get_text_config()
    width, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    queries, keys = heads * head_dim, config.num_key_value_heads * head_dim
    layer = 8 * width + itemsize * (2 * width + 3 * queries + 3 * keys + 3 * config.intermediate_size)
    if checkpointing:
        return layer + config.num_hidden_layers * (4 + itemsize) * width
    return config.num_hidden_layers * layer


def micro_batch_tokens(
    model: LanguageModel, free_bytes: int, itemsize: int, head_bytes: int, checkpointing: bool = False
) -> int:
    """Tokens of a micro-batch that fit into `free_bytes` of GPU memory, beside the gradients, AdamW's state,
    the head's gradient (all float32) and `head_bytes` of logits.

    A multiple of MIN_MICRO_BATCH_TOKENS up to MICRO_BATCH_TOKENS.gpu.
    """
    gradients_and_optimizer_state = 12 * model.num_parameters()
    head_gradient = 4 * model.head_weight.numel()
    left = USABLE_SHARE * free_bytes - gradients_and_optimizer_state - head_bytes - head_gradient
    try:
        bytes_per_token = activation_bytes(model.config, itemsize, checkpointing)
    except AttributeError:
        bytes_per_token = UNKNOWN_MODEL_LAYERS * 24 * itemsize * model.head_weight.shape[1]
    tokens = int(left / bytes_per_token) // MIN_MICRO_BATCH_TOKENS * MIN_MICRO_BATCH_TOKENS
    return min(MICRO_BATCH_TOKENS.gpu, max(MIN_MICRO_BATCH_TOKENS, tokens))


def choose_micro_batch_tokens(
    model: LanguageModel, device: torch.device, dtype: torch.dtype, with_teacher: bool, checkpointing: bool
) -> int:
    """Tokens of a micro-batch for `model` on its device: on a GPU by the memory that is free there now."""
    if device.type == "cpu":
        return MICRO_BATCH_TOKENS.cpu
    head_bytes = head_logits_bytes(model, dtype.itemsize, 2 if with_teacher else 1)
    free_bytes = torch.cuda.mem_get_info(device)[0]
    tokens = micro_batch_tokens(model, free_bytes, dtype.itemsize, head_bytes, checkpointing)
    note(f"micro-batches of {tokens:,} tokens, by the free memory")
    return tokens

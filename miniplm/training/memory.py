"""How many tokens a GPU can train on at a time."""

LEAST, MOST = 1024, 65_536  # tokens of a micro-batch


def activation_bytes(config, itemsize: int, checkpointing: bool = False) -> int:
    """Bytes per token that the forward pass of the decoder keeps for the backward pass, for transformers'
    config of a model.

    A layer keeps the residual stream at both norms in float32, and in the compute dtype (itemsize bytes): the
    norms' results, the joined q, k and v, rotated q and k, the attention's result, gate and up, and their
    product. With checkpointing a layer keeps its two inputs, and one layer at a time all.
    """
    config = config.get_text_config()
    width, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    queries, keys = heads * head_dim, config.num_key_value_heads * head_dim
    layer = 8 * width + itemsize * (2 * width + 3 * queries + 3 * keys + 3 * config.intermediate_size)
    return (
        layer + config.num_hidden_layers * (4 + itemsize) * width
        if checkpointing
        else config.num_hidden_layers * layer
    )


def micro_batch_tokens(model, free: int, itemsize: int, head_bytes: int, checkpointing: bool = False) -> int:
    """Tokens of a micro-batch that fit into `free` bytes of GPU memory beside the gradients, the moments
    (float32) and head_bytes for the head.

    A multiple of 1,024 up to 65,536; a tenth of the memory is left to what is not counted. A model whose
    config does not tell its sizes is taken for one that keeps as much as a decoder of 64 layers of its width
    would.
    """
    free = 0.9 * free - 12 * model.num_parameters() - head_bytes - 4 * model.head_weight.numel()
    try:
        per_token = activation_bytes(model.config, itemsize, checkpointing)
    except AttributeError:
        per_token = 64 * 24 * itemsize * model.head_weight.shape[1]
    return min(MOST, max(LEAST, int(free / per_token) // LEAST * LEAST))

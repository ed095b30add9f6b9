"""The micro-batch that fits into a GPU's memory."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from miniplm.models.decoder import Decoder
from miniplm.training.memory import activation_bytes, micro_batch_tokens

CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


DOCUMENT = 256  # tokens


def kept_bytes(model, tokens):
    """Bytes that autograd keeps for the backward pass of documents of DOCUMENT tokens, without the
    parameters."""
    storages = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    bounds = torch.arange(0, tokens + 1, DOCUMENT, dtype=torch.int32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden = model(torch.randint(0, 50, (tokens,)), bounds, DOCUMENT)  # held: so are its storages
    return sum(storages.values()) if len(hidden) == tokens else None


def test_what_is_counted_is_what_is_kept():
    """The count against what autograd really keeps, in float32, per token (from two sizes, so that joined
    weights cancel)."""
    model = Decoder(CONFIG)
    kept = kept_bytes(model, 2 * DOCUMENT) - kept_bytes(model, DOCUMENT)
    assert kept / DOCUMENT == pytest.approx(activation_bytes(CONFIG, 4), rel=0.1)


@pytest.mark.parametrize("free_mb", [60, 160])
def test_what_is_chosen_fits_and_more_would_not(free_mb):
    """Against what a float32 step of the decoder really keeps, beside gradients and AdamW's state."""
    model, free, head_bytes = Decoder(CONFIG), free_mb << 20, 4 << 20
    tokens = micro_batch_tokens(model, free, 4, head_bytes)
    assert tokens % 1024 == 0

    def needed(tokens):
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return kept_bytes(model, tokens) + 3 * 4 * parameters + head_bytes

    assert needed(tokens) <= free
    assert needed(tokens + 1024) > 0.8 * free  # a tenth is left to what is not counted


def test_micro_batches():
    def model(parameters, config, vocabulary=151_936, width=1536):
        return SimpleNamespace(
            num_parameters=lambda: parameters,
            config=config,
            head_weight=torch.empty(vocabulary, width, device="meta"),
        )

    student = LlamaConfig(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=4224,
        num_hidden_layers=24,
        num_attention_heads=16,
    )
    large = model(1_200_000_000, student)
    head = 8192 * 151_936 * 2
    sizes = [micro_batch_tokens(large, gib << 30, 2, head) for gib in (20, 40, 80, 140)]
    assert sizes[0] == 1024 < sizes[1] < sizes[2] < sizes[3] == 65_536
    assert micro_batch_tokens(large, 40 << 30, 2, head, checkpointing=True) > 2 * sizes[1]
    assert micro_batch_tokens(large, 0, 2, head) == 1024
    unknown = model(100, SimpleNamespace(get_text_config=lambda: SimpleNamespace()))
    assert 1024 < micro_batch_tokens(unknown, 80 << 30, 2, head) < sizes[2]

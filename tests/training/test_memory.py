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


def kept_bytes(model, tokens):
    """Bytes that autograd keeps for the backward pass, without the parameters."""
    storages = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden = model(torch.randint(0, 50, (tokens,)), torch.tensor([0, tokens], dtype=torch.int32))
    return sum(storages.values()), hidden


def test_what_is_counted_is_what_is_kept():
    """The count against what autograd really keeps, in float32, per token (from two sizes, so that joined
    weights cancel)."""
    model = Decoder(CONFIG)
    (small, *hold), (large, *hold_too) = kept_bytes(model, 256), kept_bytes(model, 512)
    assert hold and hold_too
    assert (large - small) / 256 == pytest.approx(activation_bytes(CONFIG, 4), rel=0.1)


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
    assert sizes == sorted(sizes) and all(size % 1024 == 0 for size in sizes)
    assert sizes[0] >= 1024 and sizes[-1] == 65_536 and 1024 < sizes[2] < 65_536
    assert micro_batch_tokens(large, 40 << 30, 2, head, checkpointing=True) > 2 * sizes[1]
    assert micro_batch_tokens(large, 0, 2, head) == 1024
    unknown = model(100, SimpleNamespace(get_text_config=lambda: SimpleNamespace()))
    assert micro_batch_tokens(unknown, 80 << 30, 2, head) % 1024 == 0

"""FLOPs of whole models by torch's FlopCounterMode: the decoder's own count, and plain models."""

import pytest
import torch
from miniplm.kernels import linear_cross_entropy
from random_models import DECODED, documents, random_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from miniplm.huggingface import patch
from miniplm.models.decoder import Decoder
from miniplm.models.flops import training_flops

CONTEXT, ROWS = 16, 3
TOKENS = CONTEXT * ROWS
NAMES = ["qwen2 gqa", "qwen3 gqa", "llama biased tied"]


def of_attention(config):
    """FLOPs of one of attention's products, over every pair of a row's tokens."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    products = 2 * ROWS * CONTEXT**2 * config.num_attention_heads * head_dim
    return config.num_hidden_layers * products


def count(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def decoder_step(model, input_ids, cu_seqlens, train=True):
    targets = input_ids.roll(-1)
    hidden = model(input_ids, cu_seqlens)
    loss = linear_cross_entropy(hidden, model.head_weight, targets)
    if train:
        loss.backward()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_decoder_counts_itself(name, device):
    """Forward exactly; a training step has attention's scores besides, which its backward pass computes
    anew."""
    with torch.device(device):
        model = Decoder(DECODED[name])
    model.inv_freq = model.inv_freq.to(device)
    batch = [x.to(device) for x in documents([CONTEXT] * ROWS)]
    with torch.no_grad():
        forward = count(lambda: decoder_step(model, *batch, train=False))
    assert forward == TOKENS * model.flops_per_token(CONTEXT)
    again = of_attention(model.config) * (CONTEXT + 1) // (2 * CONTEXT)
    assert count(lambda: decoder_step(model, *batch)) == TOKENS * training_flops(model, CONTEXT) + again


@pytest.mark.parametrize("name", NAMES)
def test_patched_as_plain(name):
    """transformers' eager model counts whole squares of scores, and keeps them for its backward pass. The
    angles of its rotary embedding are a product in some versions; patched, it has none."""
    model = random_model(DECODED[name]).train()
    model.set_attn_implementation("eager")
    input_ids = documents([TOKENS])[0].view(ROWS, CONTEXT)

    def step():
        model(input_ids=input_ids, labels=input_ids).loss.backward()

    positions = torch.arange(CONTEXT)[None]
    plain = count(step) - count(lambda: model.model.rotary_emb(torch.zeros(1), positions))
    patch(model)
    square = of_attention(model.config)
    assert plain - count(step) == 6 * square - 7 * square * (CONTEXT + 1) // (2 * CONTEXT)


def test_transformers_model_on_meta():
    """attn_implementation="miniplm" where no tensor has values."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(DECODED["qwen2 gqa"], attn_implementation="miniplm")
    patch(model).train()
    input_ids = torch.zeros(ROWS, CONTEXT, dtype=torch.int64, device="meta")
    loss = model(input_ids=input_ids, labels=input_ids).loss
    loss.backward()
    assert loss.is_meta and all(parameter.grad.is_meta for parameter in model.parameters())

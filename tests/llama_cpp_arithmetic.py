"""What llama.cpp computes on a CPU, in transformers: the numbers that it rounds, at the places where it does.

ggml multiplies a matrix with activations in the matrix's own format (vec_dot_type in ggml/src/ggml-cpu): for
f16 they are rounded to half precision, for q8_0 to 8 bits and a scale for every 32. Keys and values are kept
in half precision, so queries and probabilities are rounded likewise. What is left between the two is the
order of the sums, and roundings that it tips over.
"""

import copy

import numpy as np
import torch
from transformers import AttentionInterface

# Relative to the norm of the logits. Measured on random models of two layers: f16 4.8e-4 to 6.1e-4 (2.5e-3 to
# 3.9e-3 without the roundings), q8_0 1.6e-7 to 1.7e-2 (5.8e-2 to 7.7e-2).
BOUNDS = {"f16": 1.2e-3, "q8_0": 3e-2}


def half(values):
    return values.half().float()


def eight_bits(values):
    blocks = values.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return ((blocks / scale).round() * half(scale)).flatten(-2)


def attention(module, query, key, value, mask, scaling, **others):
    """One document, causal. q, k, v: [1, H, T, D]; returns [1, T, H, D]."""
    key, value = (half(part).repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    future = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
    scores = (half(query) @ key.transpose(-1, -2) * scaling).masked_fill(future, -torch.inf)
    return (half(scores.softmax(-1)) @ value).transpose(1, 2), None


AttentionInterface.register("llama_cpp", attention)


@torch.inference_mode()
def expected_logits(model, ids, encoding):
    """[T, V]. model: of transformers, in float32, with rows of a multiple of 32; ids: of one document."""
    rounded = half if encoding == "f16" else eight_bits
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.copy_(rounded(parameter))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, inputs: (rounded(inputs[0]),))
    model.set_attn_implementation("llama_cpp")
    return model(torch.tensor([ids])).logits[0]


def found_logits(llama, ids):
    """[T, V] of one document, by llama.cpp."""
    llama.reset()
    llama.eval(ids)
    return torch.from_numpy(np.array(llama.scores[: len(ids)], copy=True))


def assert_computes(llama, model, ids, encoding):
    expected = expected_logits(model, ids, encoding)
    assert (found_logits(llama, ids) - expected).norm() < BOUNDS[encoding] * expected.norm()

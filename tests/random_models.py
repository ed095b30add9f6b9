"""Tiny random models of many architectures, packed documents, and training steps of transformers' models."""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    Qwen2Config,
    Qwen3Config,
)

LENGTHS = [5, 0, 1, 17, 40, 0, 2]  # documents; the longest is past the rope scalings' original context of 16
SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)
DECODED = {
    "qwen2 gqa": Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen2 mha tied": Qwen2Config(**SIZES, num_key_value_heads=4, tie_word_embeddings=True),
    "qwen2 head_dim": Qwen2Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "qwen2 linear": Qwen2Config(
        **SIZES, num_key_value_heads=2, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)
    ),
    "qwen2 unused window": Qwen2Config(
        **SIZES, num_key_value_heads=2, use_sliding_window=True, sliding_window=8, max_window_layers=3
    ),
    "llama mqa": LlamaConfig(**SIZES, num_key_value_heads=1),
    "llama biased tied": LlamaConfig(
        **SIZES, num_key_value_heads=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama mlp bias": LlamaConfig(**SIZES, mlp_bias=True, rms_norm_eps=1e-3),
    "llama llama3": LlamaConfig(**SIZES, num_key_value_heads=2, rope_parameters=LLAMA3),
    "llama yarn": LlamaConfig(**SIZES, num_key_value_heads=2, rope_parameters=YARN),
    "llama yarn factor": LlamaConfig(**SIZES, head_dim=16, rope_parameters={**YARN, "attention_factor": 0.7}),
    "qwen3 gqa": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "qwen3 biased tied yarn": Qwen3Config(
        **SIZES,
        num_key_value_heads=4,
        head_dim=32,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters=YARN,
    ),
}
ADAPTED = {
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        initializer_range=0.3,
    ),
    "mamba": MambaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.3
    ),
    "cohere, scaled logits": CohereConfig(
        **{**SIZES, "eos_token_id": 2}, num_key_value_heads=2, logit_scale=0.3
    ),
    "granite, divided logits": GraniteConfig(**SIZES, num_key_value_heads=2, logits_scaling=3.0),
    "qwen2 sliding window": Qwen2Config(
        **SIZES, num_key_value_heads=2, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "llama dynamic rope": LlamaConfig(
        **SIZES, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
    ),
    "llama longrope": LlamaConfig(
        **SIZES,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=1e4,
            factor=2.0,
            short_factor=[1.0, 1.5, 2.0, 2.5],
            long_factor=[2.0, 3.0, 4.0, 5.0],
            original_max_position_embeddings=48,
        ),
    ),
    "llama gelu": LlamaConfig(**SIZES, hidden_act="gelu"),
}


def random_model(config, seed=0):
    """A transformers model with random weights, biases and norms too (theirs start as zeros and ones)."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(config)
    ).eval()  # transformers keeps and changes the config it is given
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and not name.endswith(
            (".D", "dt_proj.bias")
        ):  # Mamba's dynamics must stay stable
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def documents(lengths=LENGTHS, vocab_size=97, seed=0):
    """Packed random documents: input_ids [T], cu_seqlens [B + 1]."""
    input_ids = torch.randint(0, vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return input_ids, torch.tensor([0, *lengths]).cumsum(0).int()


def split(input_ids, cu_seqlens):
    return [part for part in input_ids.tensor_split(cu_seqlens[1:-1].tolist()) if len(part)]


def transformers_logits(model, input_ids, cu_seqlens):
    """[T, V]: each document on its own, no padding."""
    return torch.cat([model(input_ids=document[None]).logits[0] for document in split(input_ids, cu_seqlens)])


def logits(model, input_ids, cu_seqlens, **options):
    return model(input_ids, cu_seqlens, **options) @ model.head_weight.T


def text_batch(padded=False, seed=0):
    """Two texts of 19 tokens; padded: the second has 12, right-padded."""
    input_ids = documents([38], seed=seed)[0].view(2, 19)
    labels, mask = input_ids.clone(), torch.ones_like(input_ids)
    labels[0, :3] = -100
    if padded:
        input_ids[1, 12:], labels[1, 12:], mask[1, 12:] = 0, -100, 0
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def training_step(model, **inputs):
    """(loss, gradients by name) of a training step."""
    model.zero_grad()
    model.train()
    output = model(**inputs)
    output.loss.backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal_steps(one, two):
    torch.testing.assert_close(one[0].loss, two[0].loss, rtol=1e-5, atol=0)
    assert one[1].keys() == two[1].keys()
    for name, gradient in one[1].items():
        assert (gradient - two[1][name]).norm() <= 2e-4 * two[1][name].norm() + 1e-9, name

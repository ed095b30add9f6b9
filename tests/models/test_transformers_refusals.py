"""What attn_implementation="miniplm" refuses, and where "miniplm_or_sdpa" hands over instead."""

import copy
from types import SimpleNamespace

import pytest
import torch
from random_models import ADAPTED, DECODED, SIZES, random_model
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DogeConfig,
    FalconConfig,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
)

from miniplm.models.transformers_attention import attention, attention_or_sdpa
from miniplm.models.transformers_masks import Documents, UnsupportedMaskUse

WINDOW = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8)
SOFTCAP = Gemma2Config(
    **{**SIZES, "hidden_size": 32},
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=64,
    attn_logit_softcapping=30.0,
)
LLAMA = LlamaConfig(**SIZES)
DROPOUT = LlamaConfig(**SIZES, attention_dropout=0.1)
NARROW_VALUES = DeepseekV3Config(
    **SIZES,
    num_key_value_heads=4,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
    first_k_dense_replace=3,
)
GPT_OSS = GptOssConfig(
    **{**SIZES, "num_hidden_layers": 1}, num_key_value_heads=2, head_dim=8, num_local_experts=2
)
BOUNDS = torch.tensor([0, 5, 9])
PADDED = torch.tensor([[0, *[1] * 8]])
OWN_MASK = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()


def token_ids(*shape):
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "config, what, inputs",
    [
        (WINDOW, "a sliding window of 8 tokens, a window of 8 tokens", {}),
        (ADAPTED["qwen2 sliding window"], "window of 8 tokens", {}),
        (WINDOW, "window of 8 tokens", {"attention_mask": PADDED}),
        (WINDOW, "window of 8 tokens", {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS}),
        (DROPOUT, "dropout", {"train": True}),
        (LLAMA, "a mask of shape", {"attention_mask": OWN_MASK}),
        (LLAMA, "attention weights: use .eager.", {"output_attentions": True}),
        (LLAMA, "several rows", {"rows": 2, "cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS}),
        (LLAMA, "padding mask", {"attention_mask": PADDED, "cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS}),
        (LLAMA, "cu_seq_lens_k unlike", {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS[1:]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(config, what, inputs):
    inputs = dict(inputs)
    model = random_model(config).train(inputs.pop("train", False))
    model.set_attn_implementation("miniplm")
    with pytest.raises(ValueError, match=f'attn_implementation="miniplm" does not support .*{what}'):
        model(token_ids(inputs.pop("rows", 1), 9), use_cache=False, **inputs)


@pytest.mark.parametrize(
    "what, arguments",
    [
        ("attention that is not causal", {"module": SimpleNamespace(is_causal=False)}),
        ("attention that is not causal", {"is_causal": False}),
        ("s_aux: use .eager.", {"s_aux": torch.zeros(2)}),
        ("softcap: use .eager.", {"softcap": 30.0}),
        ("values of width 6 beside keys of width 8", {"value": torch.randn(1, 2, 4, 6)}),
        ("position_bias", {"position_bias": torch.zeros(1, 2, 4, 4)}),
        (
            "keys under a mask for 4",
            {"key": torch.randn(1, 2, 5, 8), "attention_mask": Documents(None, None)},
        ),
    ],
)
def test_refusals_of_the_attention(what, arguments):
    arguments = {"module": SimpleNamespace(), "attention_mask": None, **arguments}
    tensors = dict.fromkeys(("query", "key", "value"), torch.randn(1, 2, 4, 8))
    with pytest.raises(ValueError, match=what):
        attention(**{**tensors, **arguments})


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "config",
    [WINDOW, ADAPTED["qwen2 sliding window"], NARROW_VALUES],
    ids=["window", "some layers with a window", "narrow values"],
)
def test_sdpa_where_asked_for(config, padded):
    model = random_model(config)
    mask = torch.ones(2, 19, dtype=torch.int64)
    mask[1, 12:] = 1 - int(padded)
    inputs = dict(input_ids=token_ids(2, 19), attention_mask=mask, use_cache=False)
    results = []
    for name in ("eager", "miniplm_or_sdpa"):
        model.set_attn_implementation(name)
        results.append(model(**inputs).logits[mask.bool()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_sdpa_sees_the_documents():
    """Given as bounds or as positions that restart, where the layer asks for what only "sdpa" has."""
    model = random_model(NARROW_VALUES)
    positions = torch.cat([torch.arange(5), torch.arange(4)])[None]
    inputs = dict(input_ids=token_ids(1, 9), position_ids=positions, use_cache=False)
    model.set_attn_implementation("eager")
    expected = model(**inputs).logits
    model.set_attn_implementation("miniplm_or_sdpa")
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    bounds = dict(cu_seq_lens_q=BOUNDS, cu_seq_lens_k=BOUNDS)
    torch.testing.assert_close(model(**inputs, **bounds).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_sdpa_has_not_is_refused_in_both():
    model = random_model(SOFTCAP)
    with pytest.raises(ValueError, match=r"scaled_dot_product_attention|softcap"):  # by the version's choice
        model.set_attn_implementation("miniplm_or_sdpa")
        model(token_ids(1, 9))
    query = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="softcap"):
        attention_or_sdpa(SimpleNamespace(), query, query, query, None, softcap=30.0)


OWN_CODE = [
    FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
    MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=8),
    DogeConfig(**{**SIZES, "num_hidden_layers": 1}),
]


@pytest.mark.parametrize("config", OWN_CODE, ids=lambda config: config.model_type)
def test_models_that_do_not_reach_the_attention(config):
    """At once, by name; and with their own attention where "sdpa" will do."""
    with pytest.raises(ValueError, match=r"ForCausalLM computes its attention.*code of its own"):
        AutoModelForCausalLM.from_config(config, attn_implementation="miniplm")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="miniplm_or_sdpa")
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert model(token_ids(1, 9)).logits.isfinite().all()


@pytest.mark.parametrize(
    "config, what",
    [
        (NARROW_VALUES, "values of width 8 beside keys of width 12: use .miniplm_or_sdpa."),
        (GPT_OSS, "GptOssForCausalLM, which has no .sdpa. to take over with a cache: use .eager."),
    ],
    ids=["narrow values", "no sdpa"],
)
def test_models_of_which_every_pass_would_be_refused(config, what):
    """At once, when they are made or told to use it; and they stay as they were."""
    with pytest.raises(ValueError, match=what):
        AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="miniplm")
    model = random_model(config)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=what):
        model.set_attn_implementation("miniplm")
    assert model.config._attn_implementation == before


def test_latent_attention_of_equal_widths():
    """The op computes it."""
    config = copy.deepcopy(NARROW_VALUES)
    config.v_head_dim = config.qk_head_dim
    model = random_model(config)
    model.set_attn_implementation("eager")
    expected = model(token_ids(2, 9)).logits
    model.set_attn_implementation("miniplm")
    torch.testing.assert_close(model(token_ids(2, 9)).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_class_of_ones_own_reaches_it():
    class Own(type(random_model(LLAMA))):
        pass

    assert Own._from_config(DECODED["llama mqa"], attn_implementation="miniplm") is not None


def test_documents_taken_for_a_tensor():
    documents = Documents(BOUNDS, None)
    for use in (lambda: documents.dtype, lambda: documents[:, 0]):
        with pytest.raises(UnsupportedMaskUse, match="does not support models that compute with their"):
            use()
    assert not hasattr(documents, "to") and documents.cu_seqlens is BOUNDS

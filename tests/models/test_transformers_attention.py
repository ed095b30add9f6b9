"""attn_implementation="miniplm": transformers' models with and without it."""

import pytest
import torch
from random_models import ADAPTED, DECODED, SIZES, random_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    DynamicCache,
    MistralConfig,
    Qwen2MoeConfig,
)

from miniplm.models import transformers_attention

MODELS = {
    name: (DECODED | ADAPTED)[name]
    for name in (
        "qwen2 gqa",
        "llama mqa",
        "qwen3 gqa",
        "gpt_neox",
        "gpt2",
        "cohere, scaled logits",
        "granite, divided logits",
    )
}
LENGTHS = [5, 1, 9, 4]


@pytest.fixture
def calls(monkeypatch):
    """The cu_seqlens of every call of flash_attention."""
    seen, op = [], transformers_attention.flash_attention
    monkeypatch.setattr(
        transformers_attention,
        "flash_attention",
        lambda q, k, v, bounds, *others: seen.append(bounds.tolist()) or op(q, k, v, bounds, *others),
    )
    return seen


def token_ids(*shape):
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(0))


def logits_and_gradients(model, implementation, keep=None, **inputs):
    """Logits of the tokens `keep` of [B, S] (all), and the gradients of a sum over them."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    logits = logits if keep is None else logits[keep]
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal(one, two):
    torch.testing.assert_close(one[0], two[0], rtol=1e-4, atol=1e-4)
    for name, gradient in one[1].items():
        assert (gradient - two[1][name]).norm() <= 2e-4 * two[1][name].norm() + 1e-9, name


@pytest.mark.parametrize("name", MODELS)
def test_from_pretrained(name, tmp_path, calls):
    random_model(MODELS[name]).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="miniplm")
    input_ids = token_ids(2, 19)
    found = logits_and_gradients(model, "miniplm", input_ids=input_ids)
    assert calls == [[0, 19, 38]] * model.config.num_hidden_layers
    assert_equal(found, logits_and_gradients(model, "eager", input_ids=input_ids))


@pytest.mark.parametrize("side", ["left", "right", "inside", "none"])
@pytest.mark.parametrize("name", ["qwen2 gqa", "gpt_neox"])
def test_padding(name, side, calls):
    """Only the tokens that are there are computed."""
    model, input_ids, mask = (
        random_model(MODELS[name]),
        token_ids(3, 12),
        torch.ones(3, 12, dtype=torch.int64),
    )
    mask[1, {"left": slice(0, 5), "right": slice(7, 12), "inside": slice(4, 9), "none": slice(0)}[side]] = 0
    inputs = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "keep": mask.bool(),
    }
    found = logits_and_gradients(model, "miniplm", **inputs)
    assert calls[0] == ([0, 12, 24, 36] if side == "none" else [0, 12, 19, 31])
    assert_equal(found, logits_and_gradients(model, "sdpa", **inputs))


def test_a_row_of_nothing_but_padding():
    model, input_ids, mask = (
        random_model(MODELS["qwen2 gqa"]),
        token_ids(2, 6),
        torch.tensor([[1] * 6, [0] * 6]),
    )
    logits, gradients = logits_and_gradients(model, "miniplm", input_ids=input_ids, attention_mask=mask)
    assert logits.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients.values())
    torch.testing.assert_close(logits[:1], logits_and_gradients(model, "miniplm", input_ids=input_ids[:1])[0])


def separately(model, input_ids):
    """Logits and gradients of the documents LENGTHS, one by one."""
    model.set_attn_implementation("eager")
    model.zero_grad()
    logits = torch.cat(
        [model(document[None], use_cache=False).logits[0] for document in input_ids[0].split(LENGTHS)]
    )[None]
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens", "collator"])
@pytest.mark.parametrize("name", ["qwen2 gqa", "llama mqa", "gpt_neox"])
def test_packed(name, how, calls):
    model, input_ids = random_model(MODELS[name]), token_ids(1, 19)
    expected = separately(model, input_ids)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    if how == "position_ids":
        inputs = {"input_ids": input_ids, "position_ids": positions}
    elif how == "cu_seq_lens":
        inputs = {
            "input_ids": input_ids,
            "position_ids": positions,
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds.clone(),
        }
    else:
        inputs = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")(
            [{"input_ids": document.tolist()} for document in input_ids[0].split(LENGTHS)]
        )
        inputs.pop("labels")
    found = logits_and_gradients(model, "miniplm", **inputs)
    assert set(map(tuple, calls)) == {(0, 5, 6, 15, 19)}
    assert_equal(found, expected)


def test_packed_rows():
    """Several rows, each with documents of its own."""
    model, input_ids = random_model(MODELS["qwen2 gqa"]), token_ids(2, 10)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]])
    inputs = {"input_ids": input_ids, "position_ids": positions}
    assert_equal(
        logits_and_gradients(model, "miniplm", **inputs), logits_and_gradients(model, "eager", **inputs)
    )


@pytest.mark.parametrize("name", ["qwen2 gqa", "gpt_neox"])
def test_generate(name, calls):
    """Prompts of unequal length: the first pass is ours, the steps with the cache are those of sdpa."""
    model, input_ids, mask = random_model(MODELS[name]), token_ids(2, 8), torch.ones(2, 8, dtype=torch.int64)
    mask[1, :3] = 0
    settings = dict(
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    results = {}
    for implementation in ("miniplm", "eager"):
        model.set_attn_implementation(implementation)
        results[implementation] = model.generate(input_ids, **settings)
    assert torch.equal(results["miniplm"].sequences, results["eager"].sequences)
    torch.testing.assert_close(
        torch.stack(results["miniplm"].logits), torch.stack(results["eager"].logits), rtol=1e-4, atol=1e-4
    )
    assert calls == [[0, 8, 13]] * model.config.num_hidden_layers


def test_gradient_checkpointing():
    model, input_ids, mask = (
        random_model(MODELS["qwen2 gqa"]),
        token_ids(2, 9),
        torch.ones(2, 9, dtype=torch.int64),
    )
    mask[1, 6:] = 0
    inputs = {"input_ids": input_ids, "attention_mask": mask, "keep": mask.bool()}
    expected = logits_and_gradients(model, "miniplm", **inputs)
    model.gradient_checkpointing_enable()
    model.train()
    assert_equal(logits_and_gradients(model, "miniplm", **inputs), expected)


def test_a_window_longer_than_the_text():
    model = random_model(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=9))
    found = logits_and_gradients(model, "miniplm", input_ids=token_ids(2, 9))
    assert_equal(found, logits_and_gradients(model, "eager", input_ids=token_ids(2, 9)))


WINDOW = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8)


@pytest.mark.skipif(
    not hasattr(DynamicCache, "is_croppable"), reason="prompt lookup past a window needs a newer transformers"
)
@pytest.mark.parametrize("implementation", ["miniplm", "miniplm_or_sdpa"])
def test_several_tokens_meet_a_cache_and_a_window(implementation, calls):
    """Prompt lookup, and the next turn of a chat; the cache grows past the window."""
    model, input_ids = random_model(WINDOW), token_ids(1, 6)
    settings = dict(attention_mask=torch.ones_like(input_ids), do_sample=False, pad_token_id=0)
    results = {}
    for name in (implementation, "eager"):
        model.set_attn_implementation(name)
        looked_up = model.generate(input_ids, max_new_tokens=20, prompt_lookup_num_tokens=3, **settings)
        turn = model(input_ids, use_cache=True)
        turn = model(token_ids(1, 11), past_key_values=turn.past_key_values)
        results[name] = looked_up, turn.logits
    assert torch.equal(results[implementation][0], results["eager"][0])
    torch.testing.assert_close(results[implementation][1], results["eager"][1], rtol=1e-4, atol=1e-4)
    assert calls == [[0, 6]] * 2 * model.config.num_hidden_layers


def test_a_mask_that_no_layer_uses(calls):
    """Qwen2-MoE makes a mask of its window, and has no layer with one."""
    config = Qwen2MoeConfig(
        **SIZES,
        num_key_value_heads=2,
        sliding_window=4,
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    model = random_model(config)
    found = logits_and_gradients(model, "miniplm", input_ids=token_ids(2, 19))
    assert calls == [[0, 19, 38]] * model.config.num_hidden_layers
    assert_equal(found, logits_and_gradients(model, "eager", input_ids=token_ids(2, 19)))

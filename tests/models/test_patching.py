"""miniplm.huggingface.patch: transformers' models on MiniPLM's ops, and back."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from random_models import (
    ADAPTED,
    DECODED,
    assert_equal_steps,
    documents,
    random_model,
    text_batch,
    training_step,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
)

from miniplm.huggingface import patch, unpatch
from miniplm.models import patching

PATCHED = [
    "qwen2 gqa",
    "qwen2 mha tied",
    "llama biased tied",
    "llama llama3",
    "llama yarn factor",
    "qwen3 gqa",
    "qwen3 biased tied yarn",
]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", PATCHED)
def test_equal_loss_and_gradients(name, padded):
    model, inputs = random_model(DECODED[name]), text_batch(padded)
    expected = training_step(model, **inputs)
    assert patch(model) is model
    found = training_step(model, **inputs)
    assert_equal_steps(found, expected)
    assert found[0].logits is None and expected[0].logits is not None
    summed = training_step(
        model, **inputs, num_items_in_batch=torch.tensor(50)
    )  # as Trainer asks for it under gradient accumulation
    targets = (inputs["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(summed[0].loss, expected[0].loss * targets / 50, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["llama llama3", "qwen3 biased tied yarn"])
def test_every_op_is_taken(name, monkeypatch):
    """And nothing of it after unpatch."""
    calls = dict.fromkeys(("rms_norm", "swiglu", "apply_rotary", "linear_cross_entropy"), 0)

    def counted(op, function):
        def call(*args, **kwargs):
            calls[op] += 1
            return function(*args, **kwargs)

        return call

    for op in calls:
        monkeypatch.setattr(patching, op, counted(op, getattr(patching, op)))
    model = patch(random_model(DECODED[name]))
    model.train()
    model(**text_batch())
    norms = 3 * (4 if name.startswith("qwen3") else 2) + 1
    assert calls == {"rms_norm": norms, "swiglu": 3, "apply_rotary": 3, "linear_cross_entropy": 1}
    assert model.config._attn_implementation == "miniplm"
    unpatch(model)
    model(**text_batch())
    assert sum(calls.values()) == norms + 7


@pytest.mark.parametrize("name", ["qwen2 gqa", "llama biased tied", "qwen3 gqa"])
@torch.no_grad()
def test_evaluation_is_as_before(name):
    """Logits, loss with logits, and tuples."""
    model, inputs = random_model(DECODED[name]), text_batch()
    expected, expected_tuple = model(**inputs), model(**inputs, return_dict=False)
    patch(model)
    found, found_tuple = model(**inputs), model(**inputs, return_dict=False)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
    assert len(found_tuple) == len(expected_tuple)
    torch.testing.assert_close(found_tuple[1], expected_tuple[1], atol=1e-4, rtol=0)
    model.train()
    assert type(model(**inputs, return_dict=False)) is tuple


@pytest.mark.parametrize("name", ["qwen2 gqa", "llama llama3", "qwen3 gqa"])
def test_unpatch_restores(name):
    model, inputs = random_model(DECODED[name]), text_batch()
    before = {path: (type(module), set(vars(module))) for path, module in model.named_modules()}
    parameters, keys, attention = (
        list(model.parameters()),
        list(model.state_dict()),
        model.config._attn_implementation,
    )
    expected = training_step(model, **inputs)
    signature = inspect.signature(model.forward)
    patch(model)
    assert list(inspect.signature(model.forward).parameters) == list(signature.parameters)
    assert list(model.state_dict()) == keys and all(
        one is two for one, two in zip(model.parameters(), parameters, strict=True)
    )
    assert unpatch(model) is model
    assert {path: (type(module), set(vars(module))) for path, module in model.named_modules()} == before
    assert model.config._attn_implementation == attention
    assert all(one is two for one, two in zip(model.parameters(), parameters, strict=True))
    again = training_step(model, **inputs)
    assert torch.equal(again[0].loss, expected[0].loss) and all(
        torch.equal(again[1][key], expected[1][key]) for key in expected[1]
    )


def test_refusals():
    with pytest.raises(ValueError, match="cannot be patched: it has sliding windows"):
        patch(AutoModelForCausalLM.from_config(ADAPTED["qwen2 sliding window"]))
    with pytest.raises(ValueError, match="cannot be patched: its type is 'gpt2'"):
        patch(AutoModelForCausalLM.from_config(ADAPTED["gpt2"]))
    model = random_model(DECODED["qwen2 gqa"])
    with pytest.raises(ValueError, match="not patched"):
        unpatch(model)
    patch(model)
    with pytest.raises(ValueError, match="patched already"):
        patch(model)
    unpatch(model)
    model.model.norm.forward = lambda x: x
    with pytest.raises(ValueError, match="forward of Qwen2RMSNorm has been replaced already"):
        patch(model)
    with pytest.raises(ValueError, match="Linear holds no model of transformers"):
        patch(torch.nn.Linear(2, 2))


def test_a_loss_of_ones_own_is_kept():
    model = patch(random_model(DECODED["qwen2 gqa"])).train()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum() * 0 + vocab_size
    assert model(**text_batch()).loss == 97


def test_shifted_labels_and_ignored_ids():
    model, inputs = random_model(DECODED["llama llama3"]), text_batch()
    labels = inputs.pop("labels")
    for options in (
        {"labels": labels, "shift_labels": labels.roll(1)},
        {"labels": labels, "ignore_index": 5},
    ):
        if "ignore_index" in options:
            options["labels"] = torch.where(labels == -100, 5, labels)
        found = training_step(patch(model), **inputs, **options)
        assert found[0].logits is None
        assert_equal_steps(found, training_step(unpatch(model), **inputs, **options))


HEADS = {  # what makes more of lm_head than hidden @ weight.T
    "a bias": lambda head: setattr(head, "bias", torch.nn.Parameter(torch.linspace(-1, 1, 97))),
    "a hook": lambda head: head.register_forward_hook(lambda module, args, logits: 2 * logits),
    "a hook before": lambda head: head.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "a backward hook": lambda head: head.register_full_backward_hook(
        lambda module, gradients, _: tuple(2 * gradient for gradient in gradients)
    ),
    "another forward": lambda head: setattr(head, "forward", lambda x: 2 * x @ head.weight.T),
    "another weight": lambda head: torch.nn.utils.parametrizations.weight_norm(head),
}


@pytest.mark.parametrize("change", HEADS)
def test_a_head_that_is_more_than_a_product(change):
    model, inputs = random_model(DECODED["qwen2 gqa"]), text_batch()
    plain = training_step(model, **inputs)
    HEADS[change](model.lm_head)
    expected = training_step(model, **inputs)
    assert change == "another weight" or any(
        not torch.equal(gradient, plain[1][name])
        for name, gradient in expected[1].items()
        if name in plain[1]
    )
    found = training_step(patch(model), **inputs)
    assert_equal_steps(found, expected)
    assert found[0].logits is not None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_another_attention_on_a_patched_model(attention):
    """What our own refusals recommend; it stays after unpatch."""
    model, inputs = random_model(DECODED["qwen3 gqa"]), text_batch(padded=True)
    model.set_attn_implementation(attention)
    expected = training_step(model, **inputs)
    model.set_attn_implementation("sdpa")
    patch(model).set_attn_implementation(attention)
    assert_equal_steps(training_step(model, **inputs), expected)
    assert unpatch(model).config._attn_implementation == attention


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_and_loaded])
def test_a_copy_is_patched_for_itself(copied):
    model, inputs = patch(random_model(DECODED["qwen3 gqa"])), text_batch()
    expected, other = training_step(model, **inputs), copied(model)
    assert_equal_steps(training_step(other, **inputs), expected)
    with torch.no_grad():
        other.eval().model.norm.weight.zero_()
        assert other(**inputs).logits.abs().max() == 0 and model(**inputs).loss > 0
    assert unpatch(other).config._attn_implementation == "sdpa"
    assert type(other.model.norm) is not type(model.model.norm)


def test_the_class_keeps_its_name(tmp_path):
    """Trainers and saved configs go by it."""
    model = patch(random_model(DECODED["llama mqa"]))
    assert type(model).__name__ == "LlamaForCausalLM" and isinstance(model, LlamaForCausalLM)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).architectures == ["LlamaForCausalLM"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is LlamaForCausalLM
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in model.state_dict().items())


def test_under_autocast():
    """bfloat16 where transformers has it: as close to float32 as transformers is."""
    model, inputs = random_model(DECODED["qwen3 gqa"]), text_batch()
    exact = training_step(model, **inputs)[0].loss.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = training_step(model, **inputs)[0].loss.detach()
        ours = training_step(patch(model), **inputs)[0].loss.detach()
    assert ours.dtype == torch.float32 and (ours - exact).abs() <= 2 * (plain - exact).abs() + 0.01 * exact


def test_packed_texts():
    """One row of several texts, told by positions that restart."""
    model = random_model(DECODED["qwen3 gqa"])
    ids, bounds = documents()
    positions = torch.cat([torch.arange(length) for length in bounds.diff()])
    labels = torch.where(positions == 0, -100, ids)
    inputs = {
        "input_ids": ids[None],
        "position_ids": positions[None],
        "labels": labels[None],
        "use_cache": False,
    }
    assert_equal_steps(training_step(patch(model), **inputs), training_step(unpatch(model), **inputs))


@pytest.mark.parametrize("name", ["llama llama3", "qwen3 gqa"])
def test_generation(name):
    model, prompt = random_model(DECODED[name]), documents([7])[0][None]
    generate = lambda: model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=8,
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
    )
    expected = generate()
    patch(model)
    assert torch.equal(generate(), expected) and expected.shape[1] > 8

"""miniplm.huggingface.patch: transformers' models on MiniPLM's ops, and back."""

import copy
import inspect

import pytest
import torch
from random_models import ADAPTED, DECODED, documents, random_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from miniplm.models import patching as huggingface
from miniplm.models.patching import patch, unpatch

PATCHED = [
    "qwen2 gqa",
    "qwen2 mha tied",
    "llama biased tied",
    "llama llama3",
    "llama yarn factor",
    "qwen3 gqa",
    "qwen3 biased tied yarn",
]


def batch(padded=False, seed=0):
    """Two texts of 19 tokens; padded: the second has 12, right-padded."""
    input_ids = documents([38], seed=seed)[0].view(2, 19)
    labels, mask = input_ids.clone(), torch.ones_like(input_ids)
    labels[0, :3] = -100
    if padded:
        input_ids[1, 12:], labels[1, 12:], mask[1, 12:] = 0, -100, 0
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def step(model, **inputs):
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


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", PATCHED)
def test_equal_loss_and_gradients(name, padded):
    model, inputs = random_model(DECODED[name]), batch(padded)
    expected = step(model, **inputs)
    assert patch(model) is model
    found = step(model, **inputs)
    assert_equal_steps(found, expected)
    assert found[0].logits is None and expected[0].logits is not None
    summed = step(
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
        monkeypatch.setattr(huggingface, op, counted(op, getattr(huggingface, op)))
    model = patch(random_model(DECODED[name]))
    model.train()
    model(**batch())
    norms = 3 * (4 if name.startswith("qwen3") else 2) + 1
    assert calls == {"rms_norm": norms, "swiglu": 3, "apply_rotary": 3, "linear_cross_entropy": 1}
    assert model.config._attn_implementation == "miniplm"
    unpatch(model)
    model(**batch())
    assert sum(calls.values()) == norms + 7


@pytest.mark.parametrize("name", ["qwen2 gqa", "llama biased tied", "qwen3 gqa"])
@torch.no_grad()
def test_evaluation_is_as_before(name):
    """Logits, loss with logits, and tuples."""
    model, inputs = random_model(DECODED[name]), batch()
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
    model, inputs = random_model(DECODED[name]), batch()
    before = {
        path: (module.forward.__func__, set(vars(module)))
        for path, module in model.named_modules()
        if hasattr(module.forward, "__func__")
    }
    parameters, keys, attention = (
        list(model.parameters()),
        list(model.state_dict()),
        model.config._attn_implementation,
    )
    expected = step(model, **inputs)
    signature = inspect.signature(model.forward)
    patch(model)
    assert list(inspect.signature(model.forward).parameters) == list(signature.parameters)
    assert list(model.state_dict()) == keys and all(
        one is two for one, two in zip(model.parameters(), parameters, strict=True)
    )
    assert unpatch(model) is model
    assert {
        path: (module.forward.__func__, set(vars(module)))
        for path, module in model.named_modules()
        if hasattr(module.forward, "__func__")
    } == before
    assert model.config._attn_implementation == attention
    assert all(one is two for one, two in zip(model.parameters(), parameters, strict=True))
    again = step(model, **inputs)
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
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(ValueError, match="Qwen2ForCausalLM has been wrapped since"):
        unpatch(model)
    model.forward = ours
    unpatch(model)
    model.model.norm.forward = lambda x: x
    with pytest.raises(ValueError, match="forward of Qwen2RMSNorm has been replaced already"):
        patch(model)


def test_a_loss_of_ones_own_is_kept():
    model = patch(random_model(DECODED["qwen2 gqa"])).train()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum() * 0 + vocab_size
    assert model(**batch()).loss == 97


def test_shifted_labels_and_ignored_ids():
    model, inputs = random_model(DECODED["llama llama3"]), batch()
    labels = inputs.pop("labels")
    for options in (
        {"labels": labels, "shift_labels": labels.roll(1)},
        {"labels": labels, "ignore_index": 5},
    ):
        if "ignore_index" in options:
            options["labels"] = torch.where(labels == -100, 5, labels)
        expected = step(unpatch(model) if hasattr(model, huggingface.STATE) else model, **inputs, **options)
        assert_equal_steps(step(patch(model), **inputs, **options), expected)


def test_a_copy_is_patched_for_itself():
    model = patch(random_model(DECODED["qwen3 gqa"]))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.zero_()
        assert other(**batch()).logits.abs().max() == 0 and model(**batch()).logits.abs().max() > 0
    unpatch(other)
    assert "forward" in vars(model.model.norm) and "forward" not in vars(other.model.norm)


def test_under_autocast():
    """bfloat16 where transformers has it: as close to float32 as transformers is."""
    model, inputs = random_model(DECODED["qwen3 gqa"]), batch()
    exact = step(model, **inputs)[0].loss.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = step(model, **inputs)[0].loss.detach()
        ours = step(patch(model), **inputs)[0].loss.detach()
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
    assert_equal_steps(step(patch(model), **inputs), step(unpatch(model), **inputs))


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


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        ids = documents([16], seed=i)[0]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_runs_ten_steps(checkpointing, tmp_path):
    pytest.importorskip("accelerate")
    losses = []
    for patched in (False, True):
        model = random_model(DECODED["qwen2 mha tied"])
        arguments = TrainingArguments(
            tmp_path / str(patched),
            max_steps=10,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
            eval_strategy="steps",
            eval_steps=5,
            gradient_checkpointing=checkpointing,
        )
        trainer = Trainer(
            patch(model) if patched else model,
            arguments,
            train_dataset=Rows(),
            eval_dataset=torch.utils.data.Subset(Rows(), range(4)),
        )
        assert trainer.train().global_step == 10
        losses.append(
            [line[key] for line in trainer.state.log_history for key in ("loss", "eval_loss") if key in line]
        )
        if patched:
            assert unpatch(model).forward.__func__ is type(model).forward
    assert len(losses[0]) == 12 and losses[0][0] > losses[0][-1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)

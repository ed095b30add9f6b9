"""Patched models in what people wrap them: Trainer, accelerate, PEFT, torch.compile, torch.export."""

import pytest
import torch
from random_models import (
    DECODED,
    assert_equal_steps,
    documents,
    random_model,
    text_batch,
    training_step,
)
from transformers import Qwen2ForCausalLM, Trainer, TrainingArguments

from miniplm.huggingface import patch, unpatch


def step_with(call, model, **inputs):
    """A training step of a model through what wraps it."""
    model.zero_grad()
    model.train()
    output = call(**inputs)
    output.loss.backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


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
            assert type(unpatch(model)) is Qwen2ForCausalLM
    assert len(losses[0]) == 12 and losses[0][0] > losses[0][-1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


# --- accelerate ---


@pytest.fixture
def bf16_accelerator():
    """accelerate keeps one state for a process."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("unwrapped_first", [False, True])
def test_unpatch_after_accelerates_mixed_precision(unwrapped_first, bf16_accelerator):
    model, inputs = random_model(DECODED["qwen2 gqa"]), text_batch()
    expected = training_step(model, **inputs)
    prepared = bf16_accelerator.prepare(patch(model))
    output = training_step(prepared, **inputs)[0]
    assert output.logits is None and output.loss != expected[0].loss
    if unwrapped_first:
        model = bf16_accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert training_step(model, **inputs)[0].logits is None
        unpatch(model)
    else:
        unpatch(prepared)
        assert prepared(**inputs).logits is not None
        model = bf16_accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert type(model) is Qwen2ForCausalLM
    again = training_step(model, **inputs)
    assert again[0].logits is not None
    assert_equal_steps(again, expected)
    assert training_step(patch(model), **inputs)[0].logits is None
    assert "forward" not in vars(model)


def test_a_model_that_accelerate_has_dispatched(tmp_path):
    """Layers and head wait on the disk, and hooks bring them: before and after patch, and back."""
    accelerate = pytest.importorskip("accelerate")
    model, inputs = random_model(DECODED["qwen2 gqa"]), text_batch()
    expected = model(**inputs).logits.detach()
    parts = ["embed_tokens", "norm", "rotary_emb", "layers.0"]
    devices = {f"model.{part}": "cpu" for part in parts}
    devices |= {"model.layers.1": "disk", "model.layers.2": "disk", "lm_head": "disk"}
    accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path)
    patch(model)
    norm = model.model.layers[1].input_layernorm
    assert norm._old_forward.__func__ is type(norm).forward is not type(norm).__mro__[1].forward
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=0)
    model.train()
    assert model(**inputs).logits is not None  # the head's weight is not there without its hook
    unpatch(model)
    assert norm._old_forward.__func__ is type(norm).forward
    torch.testing.assert_close(model.eval()(**inputs).logits, expected, atol=1e-5, rtol=0)


def test_hooks_of_accelerate_come_and_go():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = random_model(DECODED["qwen3 gqa"]), text_batch()
    expected = training_step(model, **inputs)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert_equal_steps(training_step(patch(model), **inputs), expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    found = training_step(model, **inputs)
    assert_equal_steps(found, expected)
    assert found[0].logits is None
    assert_equal_steps(training_step(unpatch(model), **inputs), expected)


# --- PEFT ---


@pytest.mark.parametrize("patched", ["before", "after"])
def test_adapters_of_peft(patched):
    peft = pytest.importorskip("peft")

    def adapted(model):
        torch.manual_seed(0)
        settings = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, settings)

    inputs = text_batch()
    expected = training_step(adapted(random_model(DECODED["qwen2 gqa"])), **inputs)
    model = random_model(DECODED["qwen2 gqa"])
    model = adapted(patch(model)) if patched == "before" else patch(adapted(model))
    found = training_step(model, **inputs)
    assert found[0].logits is None
    found[1].pop("unused", None)
    for name, gradient in found[1].items():
        if gradient is not None:
            assert (gradient - expected[1][name]).norm() <= 2e-4 * expected[1][name].norm() + 1e-9, name
    torch.testing.assert_close(found[0].loss, expected[0].loss, rtol=1e-5, atol=0)
    assert training_step(unpatch(model), **inputs)[0].logits is not None
    with pytest.raises(ValueError, match="not patched"):
        unpatch(model)
    assert type(model.merge_and_unload()) is Qwen2ForCausalLM


# --- torch.compile, torch.export ---


def packed_texts():
    ids, bounds = documents()
    positions = torch.cat([torch.arange(length) for length in bounds.diff()])
    labels = torch.where(positions == 0, -100, ids)
    return {"input_ids": ids[None], "position_ids": positions[None], "labels": labels[None]}


INPUTS = {
    "no mask": lambda: {name: x for name, x in text_batch().items() if name != "attention_mask"},
    "padding": lambda: text_batch(padded=True),
    "packed": packed_texts,
}


def one_layer(name):
    return type(DECODED[name])(**{**DECODED[name].to_dict(), "num_hidden_layers": 1, "layer_types": None})


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, inputs", [("qwen2 mha tied", "packed"), ("llama llama3", "no mask"), ("qwen3 gqa", "padding")]
)
def test_training_compiles_as_one_graph(name, inputs):
    torch._dynamo.reset()
    model, inputs = random_model(one_layer(name)), INPUTS[inputs]() | {"use_cache": False}
    expected = training_step(model, **inputs)
    compiled = torch.compile(patch(model), fullgraph=True, backend="aot_eager")
    found = step_with(compiled, model, **inputs)
    assert found[0].logits is None
    assert_equal_steps(found, expected)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export(strict):
    """The program takes another padding than it was traced with."""
    model = random_model(one_layer("llama llama3"))
    traced, others = text_batch(), text_batch(padded=True)
    for inputs in (traced, others):
        inputs.pop("labels")
        inputs["use_cache"] = False
    kept = others["attention_mask"].bool()
    expected = model(**others).logits[kept]
    program = torch.export.export(patch(model), (), traced, strict=strict)
    torch.testing.assert_close(program.module()(**others).logits[kept], expected, atol=1e-4, rtol=0)

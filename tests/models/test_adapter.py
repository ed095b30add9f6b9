"""models/adapter.py: any causal LM of transformers as a LanguageModel, or a refusal that says why."""

import pytest
import torch
from random_models import ADAPTED, DECODED, SIZES, documents, logits, random_model, saved, transformers_logits
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import Gemma2Config, PhiConfig

from miniplm.models.loading import TransformersLM, load_model
from miniplm.runtime.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """A folder with a tiny Qwen2 (tied: 97 x 32 embedding) as transformers writes it."""
    return saved(random_model(DECODED["qwen2 mha tied"]), tmp_path / "model")


def rewrite(folder, change):
    """Apply change(tensors) to the weights in a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ADAPTED)
@torch.inference_mode()
def test_adapter_equals_transformers(name, tmp_path):
    theirs = random_model(ADAPTED[name])
    ours = load_model(saved(theirs, tmp_path / "model"))
    assert type(ours) is TransformersLM and not ours.training
    batch = documents()
    expected = transformers_logits(theirs, *batch)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(ours, *batch), expected, atol=1e-4, rtol=0)
    assert ours(torch.zeros(0, dtype=torch.long), torch.tensor([0, 0], dtype=torch.int32)).shape == (
        0,
        ours.head_weight.shape[1],
    )
    assert ours.num_parameters() == theirs.num_parameters()
    ours.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(load_model(tmp_path / "again"), *batch), expected, atol=1e-4, rtol=0)


def test_adapter_gradients_equal_transformers(tmp_path):
    theirs = random_model(ADAPTED["gpt_neox"])
    ours = load_model(saved(theirs, tmp_path))
    input_ids, cu_seqlens = documents()
    F.cross_entropy(logits(ours, input_ids, cu_seqlens), input_ids.roll(-1)).backward()
    F.cross_entropy(transformers_logits(theirs, input_ids, cu_seqlens), input_ids.roll(-1)).backward()
    for (key, parameter), expected in zip(ours.wrapped.named_parameters(), theirs.parameters(), strict=True):
        assert (parameter.grad - expected.grad).norm() <= 1e-4 * expected.grad.norm() + 1e-9, key


def test_adapter_pads_at_most_a_quarter(tmp_path):
    model = load_model(saved(random_model(ADAPTED["gpt2"]), tmp_path))
    computed = []
    model.wrapped.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    lengths = [1, 200, 3, 150, 0, 149, 2, 2, 90, 64, 31]
    model(*documents(lengths))
    assert sum(lengths) <= sum(computed) <= sum(lengths) / 0.75
    assert len(computed) < len(lengths)


@pytest.mark.parametrize(
    ("name", "context"), [("gpt2", 1024), ("llama dynamic rope", 64), ("llama longrope", 48)]
)
@torch.inference_mode()
def test_adapter_refuses_documents_past_the_context(name, context, tmp_path):
    model = load_model(saved(random_model(ADAPTED[name]), tmp_path))
    assert model(*documents([3, context])).isfinite().all()
    with pytest.raises(
        UserError,
        match=f"a document of {context + 1} tokens does not fit into the model's context of {context}",
    ):
        model(*documents([3, context + 1]))


def test_adapter_refuses_models_without_a_plain_head(tmp_path):
    with pytest.raises(UserError, match=r"logits are not hidden × head \(the head has a bias\)"):
        load_model(saved(random_model(PhiConfig(**SIZES, pad_token_id=0)), tmp_path / "phi"))
    with pytest.raises(UserError, match=r"logits are not hidden × head \(they are soft-capped\)"):
        load_model(
            saved(
                random_model(Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=16)), tmp_path / "gemma2"
            )
        )
    bent = random_model(ADAPTED["gpt2"])
    bent.lm_head.register_forward_hook(lambda module, args, output: output.tanh())
    with pytest.raises(
        UserError,
        match=r"bent \(gpt2\) cannot be used: its logits are not hidden × head \(they differ by more than a "
        r"factor\)",
    ):
        TransformersLM(bent, "bent")


def test_adapter_refuses_models_that_look_ahead():
    model = random_model(ADAPTED["gpt_neox"])

    def look_ahead(module, args, output):
        output.last_hidden_state = output.last_hidden_state + 0.1 * output.last_hidden_state.mean(
            1, keepdim=True
        )
        return output

    model.base_model.register_forward_hook(look_ahead)
    with pytest.raises(UserError, match="depend on later tokens or on padding"):
        TransformersLM(model, "seer")

"""models/decoder.py in training: compiled, with joined products, checkpointed, under autocast."""

import pytest
import torch
import torch._dynamo.testing
from random_models import (
    DECODED,
    LENGTHS,
    documents,
)

from miniplm.models import decoder
from miniplm.models.decoder import Decoder


@torch.no_grad()
def test_decoder_compiles_as_one_graph():
    torch.manual_seed(0)
    model = Decoder(DECODED["llama llama3"])
    input_ids, cu_seqlens = documents()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(input_ids, cu_seqlens, max(LENGTHS)), model(input_ids, cu_seqlens), atol=1e-5, rtol=0
    )


def run_with_gradients(model, batch):
    """(hidden states, gradients by name) for the sum of squares."""
    hidden = model(*batch)
    hidden.square().sum().backward()
    return hidden.detach(), {
        name: parameter.grad for name, parameter in model.named_parameters() if name != "lm_head.weight"
    }


@pytest.mark.parametrize("name", ["qwen2 gqa", "llama biased tied", "qwen3 gqa"])
@pytest.mark.parametrize("lengths", [[9], LENGTHS])
def test_joined_products_equal_single_ones(name, lengths, monkeypatch):
    """Fewer tokens than features (32), and more: results, gradients, and how many products it takes."""
    from torch.utils.flop_counter import FlopCounterMode

    model, batch = load_random(name), documents(lengths)
    with FlopCounterMode(display=False) as counter:
        found, gradients = run_with_gradients(model, batch)
    flops = counter.get_total_flops()
    model.zero_grad()
    monkeypatch.setattr(
        decoder, "fused_linear", lambda x, *layers: torch.cat([layer(x) for layer in layers], -1)
    )
    with FlopCounterMode(display=False) as counter:
        expected, expected_gradients = run_with_gradients(model, batch)
    assert flops == counter.get_total_flops() > 0
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for key, gradient in gradients.items():
        assert (gradient - expected_gradients[key]).norm() <= 1e-5 * expected_gradients[key].norm(), key


def load_random(name):
    torch.manual_seed(0)
    model = Decoder(DECODED[name])
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


def test_a_layer_is_four_products():
    """q, k, v are one, and gate and up: four products forward, and two for each of them backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
            return function(*args, **(kwargs or {}))

    for name in ("qwen3 gqa", "llama biased tied"):
        model = Decoder(DECODED[name])
        hidden = model.model.embed_tokens(documents()[0]).detach().requires_grad_()
        cu_seqlens = documents()[1]
        with Products() as products:
            out, _ = model.model.layers[0](
                hidden, None, torch.arange(len(hidden)), model.inv_freq, cu_seqlens, None
            )
            assert products.count == 4
            out.sum().backward()
            assert products.count == 12


@pytest.mark.parametrize("name", ["qwen2 gqa", "qwen3 biased tied yarn"])
def test_activation_checkpointing(name):
    """The same bits, and of each layer only its inputs are kept."""

    def saved_bytes(model):
        kept = {}

        def keep(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            return model(*documents()), sum(kept.values())

    model = load_random(name)
    plain, plain_bytes = saved_bytes(model)
    plain.square().sum().backward()
    expected = {
        key: parameter.grad.clone()
        for key, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    model.activation_checkpointing = True
    found, found_bytes = saved_bytes(model)
    found.square().sum().backward()
    assert torch.equal(found, plain)
    assert all(
        torch.equal(parameter.grad, expected[key])
        for key, parameter in model.named_parameters()
        if key in expected
    )
    assert found_bytes < plain_bytes / 3


@pytest.mark.parametrize(
    "name, checkpointing", [("llama llama3", False), ("qwen3 biased tied yarn", False), ("qwen2 gqa", True)]
)
def test_a_training_step_compiles_as_one_graph(name, checkpointing):
    """Body and loss, forward and backward; documents of other lengths and a longer max_seqlen need no other
    graph."""
    from miniplm.kernels import linear_cross_entropy

    torch._dynamo.reset()
    model = load_random(name)
    model.activation_checkpointing = checkpointing
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(input_ids, cu_seqlens, targets):
        return linear_cross_entropy(model(input_ids, cu_seqlens), model.head_weight, targets)

    compiled = torch.compile(loss, fullgraph=True, dynamic=False, backend=counter)
    for lengths in (LENGTHS, sorted(LENGTHS)):
        input_ids, cu_seqlens = documents(lengths)
        gradients = []
        for function in (loss, compiled):
            model.zero_grad()
            value = function(input_ids, cu_seqlens, input_ids.roll(-1))
            value.backward()
            gradients.append([value.detach(), *(parameter.grad for parameter in model.parameters())])
        for one, two in zip(*gradients, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def test_nothing_waits_for_the_device():
    """With tensors that have no values, so that none can be read."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = Decoder(DECODED["qwen3 gqa"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden = model(*documents())
        hidden.sum().backward()
        with pytest.raises(Exception, match=r"item|data-dependent|local_scalar"):
            hidden.sum().item()
    assert hidden.shape == (sum(LENGTHS), 32)


def test_residual_stream_under_autocast_is_float32(monkeypatch):
    seen = []
    add_rms_norm = decoder.add_rms_norm
    monkeypatch.setattr(
        decoder,
        "add_rms_norm",
        lambda x, residual, *rest: seen.append((x.dtype, residual.dtype)) or add_rms_norm(x, residual, *rest),
    )
    model = Decoder(DECODED["qwen2 gqa"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(*documents()).dtype == torch.bfloat16
    assert seen == [(torch.bfloat16, torch.float32)] * 6

"""One decoder layer, forward alone and forward with backward, against transformers' own Qwen2 layer (same
weights, same documents).

    miniplm, miniplm-compile   miniplm.models.decoder.Layer on packed documents
    eager, compile             Qwen2DecoderLayer on [B, 1,024] with SDPA attention

The weights are in the dtype of the run; the backward pass gives the gradients of the input and of all
parameters. FLOPs: the matrix products, and of attention the pairs that are causal; percentages are of the
bare GEMM's rate. Output and gradient of the input are compared with float64 over the first two documents.
"""

import torch
from harness import Case, relative_error, run

LENGTH = 1024


def contender(function, module, compiled: bool, gradients: bool, x, grad):
    """One pass of a layer: forward alone, or with the gradients of x and of all parameters for this grad."""

    def prepare():
        called = function
        if compiled:
            torch._dynamo.reset()
            called = torch.compile(function, dynamic=False, fullgraph=True)
        inputs = [x.detach().requires_grad_(), *module.parameters()]

        def call():
            with torch.set_grad_enabled(gradients):
                out = called(inputs[0])
                return (out.detach(), *torch.autograd.grad(out, inputs, grad)) if gradients else (out,)

        return call

    return prepare


def qwen2_config(shape):
    from transformers import Qwen2Config

    config = Qwen2Config(
        hidden_size=shape["d"],
        intermediate_size=shape["f"],
        num_hidden_layers=1,
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        vocab_size=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    config._attn_implementation = "sdpa"
    return config


def cases(shape, device, dtype):
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

    from miniplm.models.decoder import Decoder

    d, length = shape["d"], min(LENGTH, shape["T"] // 3)
    documents = shape["T"] // length
    config = qwen2_config(shape)
    model = Decoder(config).to(device, dtype)
    layer, theirs = model.model.layers[0], Qwen2DecoderLayer(config, 0).to(device, dtype)
    theirs.load_state_dict(layer.state_dict())
    x, grad = (torch.randn(documents * length, d, device=device, dtype=dtype) for _ in range(2))
    cu_seqlens = torch.arange(0, len(x) + 1, length, device=device, dtype=torch.int32)
    positions = torch.arange(len(x), device=device) % length
    rotary = Qwen2RotaryEmbedding(config).to(device)
    tables = rotary(x, positions[None, :length])

    def ours(x):
        hidden, residual = layer(x, None, positions, model.inv_freq, cu_seqlens, length)
        return hidden + residual  # as transformers' layer ends; in the decoder the next norm does it

    def plain(x, module=theirs, tables=tables):
        return module(x.view(-1, length, d), position_embeddings=tables).view(-1, d)

    exact_layer = Qwen2DecoderLayer(config, 0).to(device, torch.float64)
    exact_layer.load_state_dict(theirs.state_dict())
    start = x[: 2 * length].double().requires_grad_()
    output = plain(
        start, exact_layer, [table.double() for table in rotary(x.float(), positions[None, :length])]
    )
    truth = {
        "output": output.detach(),
        "input gradient": torch.autograd.grad(output, start, grad[: 2 * length].double())[0],
    }
    del exact_layer, output

    def errors(results):
        return {
            key: relative_error(found[: 2 * length], exact)
            for found, (key, exact) in zip(results, truth.items(), strict=False)
        }

    matrices = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim == 2)
    flops = 2 * len(x) * (matrices + d * (length + 1))
    for name, gradients in (("forward", False), ("both", True)):
        contenders = {
            key: contender(function, module, compiled, gradients, x, grad)
            for key, function, module, compiled in (
                ("miniplm", ours, layer, False),
                ("miniplm-compile", ours, layer, True),
                ("eager", plain, theirs, False),
                ("compile", plain, theirs, True),
            )
        }
        yield Case(name, contenders, flops=flops * (3 if gradients else 1), errors=errors)


if __name__ == "__main__":
    WIDTHS = ((512, 1408, 8), (768, 2112, 12), (1024, 2816, 16), (1536, 4224, 16), (2048, 5504, 16))
    SHAPES = [{"T": 32_768, "d": d, "f": f, "heads": heads} for d, f, heads in WIDTHS]
    run(
        "layer",
        __doc__,
        cases,
        SHAPES,
        quick=SHAPES[1:2],
        toy=[{"T": 96, "d": 32, "f": 48, "heads": 2}],
        baseline="eager",
        by="d",
    )

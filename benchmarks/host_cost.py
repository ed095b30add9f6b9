"""What each op costs the host in Python, PyTorch's dispatcher and Triton's launcher: microseconds forward and
backward, with a stand-in for NVIDIA's driver that takes every launch and returns at once. No GPU is needed.

    python benchmarks/host_cost.py [--json FILE] [--repeats N]

Where an op's time on a GPU is shorter than this, its queue runs dry and the host sets the pace. Kernels do
not run. The tensors are tiny and in the host's memory, and what PyTorch itself computes (two of the products
of linear_cross_entropy, the linear layers) is computed in earnest: some tens of microseconds where launching
would take ten. The losses take one chunk of logits; a further chunk costs about as much once more.

A record: op, forward_us and backward_us (processor time, the least of N calls, since other work on the
machine only adds; null without a backward pass; the losses make their gradients in the forward pass),
forward_launches and backward_launches of Triton's kernels. `decoder layer` is one of miniplm.models.decoder,
its ops included. Needs gcc, on Linux.
"""

import argparse
import json
import sys
import time
from itertools import pairwise

import stub_driver

T, V, D, HEADS = 16, 64, 16, 1  # of the tensors


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the report here")
    parser.add_argument("--repeats", metavar="N", type=int, default=200, help="timed calls of each op")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.child:
        sys.exit(stub_driver.run([sys.executable, *sys.argv, "--child"]).returncode)
    stub = stub_driver.activate()
    import harness

    report = {
        "op": "host_cost",
        "environment": harness.environment(),
        "repeats": options.repeats,
        "records": [measure(stub, options.repeats, *case) for case in ops()],
    }
    if options.json:
        harness.write_json(options.json, report)
    print(json.dumps(report["environment"]))
    print(table(report["records"]))


def ops():
    """(name, a function, its inputs of which some want gradients) for each op and a decoder layer."""
    import torch
    from miniplm.kernels import dispatch, tuning
    from transformers import Qwen2Config

    from miniplm import kernels
    from miniplm.models.decoder import Decoder

    # Tensors of the host take Triton's kernels, in the configuration that an H100 has.
    dispatch.implementation = lambda name, reference, tensor: dispatch.TRITON[name]
    tuning.target = lambda device: tuning.Target("cuda", 90, 132)

    def new(*sizes, dtype=torch.bfloat16):
        return torch.randn(sizes).to(dtype).requires_grad_()

    x, stream, weight, head = new(T, D), new(T, D, dtype=torch.float32), new(D), new(V, D)
    q, k, v = (new(T, HEADS, D) for _ in range(3))
    positions, inv_freq = torch.arange(T) % (T // 2), torch.rand(D // 2)
    cu_seqlens, targets = torch.tensor([0, T // 2, T], dtype=torch.int32), torch.randint(V, (T,))
    teacher_x, teacher_head = x.detach(), head.detach()
    yield "rms_norm", kernels.rms_norm, (x, weight)
    yield "add_rms_norm", kernels.add_rms_norm, (x, stream, weight)
    yield "apply_rotary", kernels.apply_rotary, (q, k, positions, inv_freq)
    yield "swiglu", kernels.swiglu, (new(T, 2 * D),)
    yield "flash_attention", kernels.flash_attention, (q, k, v, cu_seqlens, T // 2)
    yield "quantize_rows", kernels.quantize_rows, (x.detach(),)
    yield "linear_log_prob", kernels.linear_log_prob, (teacher_x, teacher_head, targets)
    heads = (teacher_x, teacher_head) * 2
    yield "difference_score", kernels.difference_score, (*heads, targets, cu_seqlens)
    yield "linear_cross_entropy", kernels.linear_cross_entropy, (x, head, targets)
    distilled = (x, head, teacher_x, teacher_head, targets)
    yield (
        "linear_distillation_loss",
        lambda *inputs: kernels.linear_distillation_loss(*inputs).loss,
        distilled,
    )
    config = Qwen2Config(
        hidden_size=HEADS * D,
        intermediate_size=4 * D,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=8,
    )
    model = Decoder(config).bfloat16()
    layer, wide = model.model.layers[0], new(T, HEADS * D)

    def decoder_layer(x, *_):
        return layer(x, None, positions, model.inv_freq, cu_seqlens, T // 2)

    yield "decoder layer", decoder_layer, (wide, *layer.parameters())


def measure(stub, repeats: int, name: str, function, inputs: tuple) -> dict:
    """The record of an op."""
    import torch

    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    times, launches = ([], []), [0, 0]

    def call():
        counts = [stub_driver.counter(stub, "launches")]
        moments = [time.process_time()]
        results = function(*inputs)
        moments.append(time.process_time())
        counts.append(stub_driver.counter(stub, "launches"))
        if wanted:
            results = [x for x in (results if isinstance(results, tuple) else (results,)) if x.requires_grad]
            grads = [torch.ones_like(x) for x in results]
            began = time.process_time()
            torch.autograd.grad(results, wanted, grads)
            moments.append(moments[-1] + time.process_time() - began)
            counts.append(stub_driver.counter(stub, "launches"))
        for index, (start, end) in enumerate(pairwise(moments)):
            times[index].append(1e6 * (end - start))
            launches[index] = counts[index + 1] - counts[index]

    for _ in range(3):  # kernels are compiled
        call()
    times[0].clear(), times[1].clear()
    for _ in range(repeats):
        call()
    return {
        "op": name,
        "forward_us": min(times[0]),
        "backward_us": min(times[1]) if wanted else None,
        "forward_launches": launches[0],
        "backward_launches": launches[1] if wanted else None,
    }


def table(records: list[dict]) -> str:
    heads = ("forward µs", "launches", "backward µs", "launches")
    lines = [f"{'op':<26}" + "".join(f"{head:>13}" for head in heads)]
    for record in records:
        cells = [record[f"{side}_{what}"] for side in ("forward", "backward") for what in ("us", "launches")]
        shown = ["-" if cell is None else f"{cell:.0f}" for cell in cells]
        lines.append(f"{record['op']:<26}" + "".join(f"{cell:>13}" for cell in shown))
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Linear layers in float8 for scoring: weights and inputs in e4m3, each row with a scale of its own, products
in torch's scaled matmul.

A row's scale is its largest magnitude over 448, the largest number of e4m3 (Micikevicius et al. 2022, arXiv
2209.05433). Embeddings, norms and the head stay as they are. The products add up in the matrix units' own,
shorter float32 ("fast accumulation"): with these scales torch's kernels for the exact sum can take twice as
long (github.com/pytorch/pytorch/issues/147971), and e4m3's rounding is far coarser.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..kernels import quantize_rows
from ..runtime.errors import UserError
from .base import LanguageModel

Model = TypeVar("Model", bound=LanguageModel)


class Float8Linear(nn.Module):
    """x [..., in] → [..., out] in x's dtype, as the nn.Linear that it is made from, without gradients."""

    weight: Tensor  # [out, in] float8_e4m3fn
    scale: Tensor  # [1, out] float32
    bias: Tensor | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = quantize_rows(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())
        self.bias, self.in_features, self.out_features = linear.bias, linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.scale, self.bias)


def fused_linear(x: Tensor, layers: Sequence[Float8Linear]) -> Tensor:
    """[..., Σ out]: the results of layers for the same x, joined, in one product."""
    weight = torch.cat([layer.weight.view(torch.uint8) for layer in layers]).view(torch.float8_e4m3fn)
    scale = torch.cat([layer.scale for layer in layers], 1)
    return product(x, weight, scale, joined([layer.bias for layer in layers]))


def joined(biases: Sequence[Tensor | None]) -> Tensor | None:
    """[Σ out] of the biases [out] of layers, None where no layer has one."""
    present = [bias for bias in biases if bias is not None]
    return torch.cat(present) if present else None


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] in float8 times weight [out, in] float8, scaled by [1, out], plus bias [out]: [..., out] in
    x's dtype."""
    rows, row_scale = quantize_rows(x.reshape(-1, x.shape[-1]))
    result = torch._scaled_mm(
        rows, weight.T, scale_a=row_scale, scale_b=scale, bias=bias, out_dtype=x.dtype, use_fast_accum=True
    )
    return result.unflatten(0, x.shape[:-1])


def to_float8(model: Model) -> Model:
    """Replace the linear layers of a model in bfloat16 (on the CPU also float32), in place; sizes that are no
    multiples of 16 stay.

    Raises:
        UserError: this device or torch has no such products.
    """
    head = model.head_weight
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if (
                type(layer) is nn.Linear
                and layer.weight is not head
                and layer.in_features % 16 == 0
                and layer.out_features % 16 == 0
            ):
                setattr(module, name, Float8Linear(layer))
    for layer in model.modules():
        if isinstance(layer, Float8Linear):  # one small product shows what the device can do
            try:
                layer(torch.zeros(16, layer.in_features, dtype=head.dtype, device=layer.weight.device))
            except (RuntimeError, NotImplementedError, ValueError) as error:
                raise UserError(
                    "precision fp8 does not run here: it needs bfloat16 and an NVIDIA GPU of compute "
                    "capability 8.9 or higher, or PyTorch 2.13 on a CPU; leave --precision out"
                ) from error
            break
    return model

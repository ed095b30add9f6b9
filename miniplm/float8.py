"""Linear layers in float8 for scoring: weights and inputs in e4m3, each row with a scale of its own, products in torch's scaled matmul.

A row's scale is its largest magnitude over 448, the largest number of e4m3 (Micikevicius et al. 2022, arXiv 2209.05433). Embeddings, norms
and the head stay as they are.
"""

import torch
from torch import Tensor, nn

from .artifacts import UserError

DTYPE, LARGEST = torch.float8_e4m3fn, 448.0


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x [R, C] divided by the scales, in float8; the scales [R, 1] float32)."""
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x / scale).to(DTYPE), scale


class Float8Linear(nn.Module):
    """x [..., in] → [..., out] in x's dtype, as the nn.Linear that it is made from, without gradients."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = quantize(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())  # [1, out]
        self.bias, self.in_features, self.out_features = linear.bias, linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.product(*quantize(x.reshape(-1, self.in_features)), x.dtype).unflatten(0, x.shape[:-1])

    def product(self, rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """[R, out] from quantised rows: what several layers with the same input share."""
        result = torch._scaled_mm(rows, self.weight.T, scale_a=scale, scale_b=self.scale, out_dtype=dtype)
        return result if self.bias is None else result + self.bias


def to_float8(model: nn.Module) -> nn.Module:
    """Replace the linear layers of a model in bfloat16 (on the CPU also float32), in place; sizes that are no multiples of 16 stay.

    Raises:
        UserError: this device or torch has no such products.
    """
    head = getattr(model, "lm_head", None) or (model.wrapped.get_output_embeddings() if hasattr(model, "wrapped") else None)
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear and layer is not head and layer.in_features % 16 == 0 and layer.out_features % 16 == 0:
                setattr(module, name, Float8Linear(layer))
    for layer in model.modules():
        if isinstance(layer, Float8Linear):  # one small product shows what the device can do
            try:
                layer(torch.zeros(16, layer.in_features, dtype=model.head_weight.dtype, device=layer.weight.device))
            except (RuntimeError, NotImplementedError, ValueError) as error:
                raise UserError(f"precision fp8 does not run here ({' '.join(str(error).split())[:150]}): it needs bfloat16 and an NVIDIA GPU of "
                                "compute capability 8.9 or higher; leave --precision out") from error
            break
    return model

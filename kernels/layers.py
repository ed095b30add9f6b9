"""Layers for `kernelize` of the Hub's `kernels` library.

There a layer lends its forward to one in somebody's model, which keeps its own weights: so none here has
state, a constructor or other methods, and annotations say what the model's layer must have.
"""

import torch
from torch import Tensor

from .ops_elementwise import rms_norm, swiglu


class RMSNorm(torch.nn.Module):
    """rms_norm, for the layers that transformers names "RMSNorm": those of Llama, Qwen2, Qwen3, …"""

    can_torch_compile: bool = True

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., d] beside weight [d]. Returns [..., d]; dtypes as in rms_norm."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class SiluAndMul(torch.nn.Module):
    """swiglu, for layers that take gate and up side by side in one tensor."""

    can_torch_compile: bool = True

    def forward(self, x: Tensor) -> Tensor:
        """x [..., 2f], the gate first. Returns [..., f] of its dtype."""
        return swiglu(x)

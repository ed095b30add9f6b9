"""The ops of MiniPLM. They stand on torch alone (and on Triton where there is a GPU) and know nothing of the rest of the package."""

from .ops import (
    DifferenceScore,
    DistillationLoss,
    add_rms_norm,
    apply_rotary,
    difference_score,
    flash_attention,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_log_prob,
    rms_norm,
    swiglu,
)

__all__ = [
    "DifferenceScore",
    "DistillationLoss",
    "add_rms_norm",
    "apply_rotary",
    "difference_score",
    "flash_attention",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "linear_log_prob",
    "rms_norm",
    "swiglu",
]

"""The ops of MiniPLM. They stand on torch alone (and on Triton where there is a GPU) and know nothing of the
rest of the package.

Every op takes float32, float16 or bfloat16 tensors (float64 too, on the reference path), keeps its statistics
in float32, and returns the dtype of its inputs unless stated. Under autocast, floating-point inputs are cast
to autocast's dtype first. Inputs may be strided; none is changed. A wrong shape, dtype or device raises
ValueError. A target outside the vocabulary raises ValueError on the CPU; on a GPU it gives NaN, because a
check would make the host wait. Tensors on the meta device, and fake ones, give results without values, which
costs nothing, forward and backward; torch.utils.flop_counter counts the ops' matrix products.

Document b of a packed batch is the tokens cu_seqlens[b]:cu_seqlens[b + 1], cu_seqlens [B + 1] int32.
"""

if __name__ == "kernels":
    # Not imported as miniplm.kernels: the repository's root is on sys.path (python -m … run there), and
    # transformers, which looks for the PyPI package `kernels`, has found this folder. Hand it the real one,
    # or say that there is none.
    import importlib.machinery
    import importlib.util
    import os
    import sys

    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found = importlib.machinery.PathFinder.find_spec(
        __name__, [path for path in sys.path if os.path.abspath(path) != root]
    )
    if found is None or found.loader is None:  # nothing, or a mere folder of that name
        __version__ = "0"  # too old for anyone's use
    else:
        sys.modules[__name__] = importlib.util.module_from_spec(found)
        found.loader.exec_module(sys.modules[__name__])
else:
    from importlib import import_module
    from importlib.util import find_spec

    # Each registers its launchers; without Triton every op runs on its reference. Before the ops: two files
    # bear the name of one.
    if find_spec("triton"):
        for name in (
            "attention",
            "attention_backward",
            "cross_entropy",
            "distillation",
            "log_prob",
            "quantize",
            "rms_norm",
            "rotary",
            "swiglu",
        ):
            import_module(f".{name}", __name__)

    from . import layers as layers  # no op, so not in __all__
    from .ops_attention import flash_attention
    from .ops_elementwise import add_rms_norm, apply_rotary, quantize_rows, rms_norm, swiglu
    from .ops_head import (
        DifferenceScore,
        DistillationLoss,
        difference_score,
        linear_cross_entropy,
        linear_distillation_loss,
        linear_log_prob,
    )

    import_module(".flops", __name__)  # of ops that are registered by now

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
        "quantize_rows",
        "rms_norm",
        "swiglu",
    ]

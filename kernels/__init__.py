"""The ops of MiniPLM. They stand on torch alone (and on Triton where there is a GPU) and know nothing of the
rest of the package."""

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
    if found is None:
        __version__ = "0"  # too old for anyone's use
    else:
        sys.modules[__name__] = importlib.util.module_from_spec(found)
        found.loader.exec_module(sys.modules[__name__])
else:
    from importlib import import_module
    from importlib.util import find_spec

    # Each registers its launchers; without Triton every op runs on its reference. Before the ops: two files
    # bear the name of one.
    for name in (
        (
            "attention",
            "attention_backward",
            "cross_entropy",
            "distillation",
            "log_prob",
            "quantize",
            "rms_norm",
            "rotary",
            "swiglu",
        )
        if find_spec("triton")
        else ()
    ):
        import_module(f".{name}", __name__)

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
        quantize_rows,
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
        "quantize_rows",
        "rms_norm",
        "swiglu",
    ]

"""The one place that registers ops with torch.library and picks the implementation that runs.

Every op has one schema `<NAMESPACE>::<name>`, a fake for tracing and an autograd formula; its kernel asks
`implementation`, at each call, which function to run. `MINIPLM_KERNELS` decides:

    auto        the default: CUDA tensors take Triton where the op has it, all others the reference
    reference   the reference everywhere
    triton      Triton everywhere, an error where it cannot run; on the CPU it needs TRITON_INTERPRET=1

Triton computes in float32, so float64 tensors take the reference too under auto.

A Triton file adds its launcher, which takes the arguments of the reference function of the same name, with
one call:

    @dispatch.triton("swiglu", lambda make: [(make(4096, 2112), make(4096, 2112))])
    def swiglu(gate, up): ...
"""

import contextlib
import os
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, Optional, TypeVar

import torch

from .checks import autocast_dtype

Function = TypeVar("Function", bound=Callable[..., Any])
Examples = Callable[..., Iterable[tuple]]  # of make(*shape, dtype=...), see triton()

# "miniplm", or the unique name under which the Hub's `kernels` library imports this package (hub.py), so that
# copies of it stand side by side.
NAMESPACE = __name__.partition(".")[0]
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
OPS = getattr(torch.ops, NAMESPACE)
TRITON: dict[str, Callable[..., Any]] = {}  # op name → launcher
EXAMPLES: dict[str, Examples] = {}  # op name → its examples

Context = Any  # the FunctionCtx of a derivative: it takes attributes of any name


def triton(name: str, examples: Examples) -> Callable[[Function], Function]:
    """Decorator: the function is the Triton implementation of the op `name`.

    Args:
        examples: what benchmarks/compile_report.py launches, without memory or a GPU, to compile every kernel
            in every variant that matters. A function of make(*shape, dtype=torch.bfloat16), which gives a
            tensor without storage, that gives argument tuples for the launcher; the launcher may not look at
            any value of a tensor.
    """

    def add(launcher: Function) -> Function:
        TRITON[name], EXAMPLES[name] = launcher, examples
        return launcher

    return add


def implementation(name: str, reference: Callable[..., Any], tensor: torch.Tensor) -> Callable[..., Any]:
    """The function that the op `name` runs on `tensor` and its like.

    ValueError for a MINIPLM_KERNELS that is none of the three; RuntimeError where it is triton and Triton
    cannot run.
    """
    choice, device = os.environ.get("MINIPLM_KERNELS", "auto"), tensor.device
    launcher = TRITON.get(name)
    if choice == "reference":
        return reference
    if choice == "auto":
        takes_triton = device.type == "cuda" and tensor.dtype != torch.float64
        return launcher if launcher and takes_triton else reference
    if choice != "triton":
        raise ValueError(f"MINIPLM_KERNELS is {choice!r}; it must be auto, triton or reference")
    if launcher is None:
        raise RuntimeError(
            f"MINIPLM_KERNELS=triton, but {name} has no Triton kernel here: use MINIPLM_KERNELS=auto"
        )
    if tensor.dtype == torch.float64:
        raise RuntimeError(
            f"MINIPLM_KERNELS=triton, but {name} got float64, which no kernel computes in: use "
            f"MINIPLM_KERNELS=auto"
        )
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "MINIPLM_KERNELS=triton needs TRITON_INTERPRET=1 for tensors on the CPU: set it, or use "
            "MINIPLM_KERNELS=auto"
        )
    return launcher


def register(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Optional[Callable[..., Any]] = None,
    setup_context: Optional[Callable[..., None]] = None,
) -> Callable[..., Any]:
    """Register one op with torch.library and return it.

    Args:
        schema: "name(Tensor x, ...) -> ...", the first argument a tensor; no argument is mutated and no
            result aliases one.
        reference: the plain PyTorch implementation; takes the arguments of the schema by position.
        fake: empty results of the right shapes, dtypes and strides.
        backward, setup_context: as in torch.library.register_autograd; without them, a backward pass through
            the op is an error.
    """
    name = schema.partition("(")[0]

    def kernel(*args: Any) -> Any:
        device = args[0].device
        run = implementation(name, reference, args[0])
        with contextlib.ExitStack() as stack:
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))  # Triton launches on the current device
            if autocast_dtype(args[0]):
                # The caller has cast already; the matrix products inside must stay as they are.
                stack.enter_context(torch.autocast(device.type, enabled=False))
            return run(*args)

    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward or _no_formula(name), setup_context=setup_context, lib=LIBRARY
    )
    return getattr(OPS, name).default


def _no_formula(name: str) -> Callable[..., Any]:
    def backward(ctx: Context, *grads: Any) -> NoReturn:
        raise NotImplementedError(f"{NAMESPACE}::{name} has no derivative")

    return backward

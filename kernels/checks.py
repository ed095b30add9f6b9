"""What the ops of all families share: checks of their arguments, autocast, and empty results for tracing."""

from collections.abc import Sequence
from types import EllipsisType
from typing import Optional, Union

import torch
from torch import Tensor

from .reference import accumulate_dtype

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(
    argument: str,
    tensor: Tensor,
    shape: Sequence[Union[int, EllipsisType, None]],
    dtypes: Sequence[torch.dtype],
    like: Optional[Tensor] = None,
) -> None:
    """ValueError, which names the argument, unless the tensor is as wanted.

    Args:
        shape: the sizes; None is any size, a leading ... any number of sizes.
        dtypes: it must have one of them.
        like: it must be on the device of this tensor.
    """
    sizes, wanted = tuple(tensor.shape), tuple(shape)
    if wanted[:1] == (...,):
        leading = len(sizes) - len(wanted) + 1
        wanted = (*sizes[:leading], *wanted[1:])
    if len(sizes) != len(wanted) or any(
        want is not None and size != want for size, want in zip(sizes, wanted, strict=True)
    ):
        described = ", ".join("any" if want is None else str(want) for want in wanted)
        raise ValueError(f"{argument} has shape {list(sizes)}; it must be [{described}]")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{argument} is {tensor.dtype}; it must be {' or '.join(map(str, dtypes))}")
    if like is not None and tensor.device != like.device:
        raise ValueError(
            f"{argument} is on {tensor.device}; it must be on {like.device}, where the other arguments are"
        )


def autocast_dtype(tensor: Tensor) -> Optional[torch.dtype]:
    """The dtype of autocast on the tensor's device; None where it is off, and on the meta device, which
    PyTorch refuses to be asked of. (torch.compile cannot trace is_autocast_available before torch 2.11.)"""
    device = tensor.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on."""
    dtype = autocast_dtype(tensors[0])
    return tensors if dtype is None else tuple(tensor.to(dtype) for tensor in tensors)


def contiguous_like(x: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
    """An empty contiguous tensor of x's shape, of `dtype`, or x's."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def empty_statistic(like: Tensor, *sizes: int) -> Tensor:
    """An empty tensor of these sizes, in the dtype that statistics of `like` have."""
    return like.new_empty(sizes, dtype=accumulate_dtype(like))

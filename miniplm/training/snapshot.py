"""A run's state as a checkpoint holds it, copied to the machine's memory: it can be written while the run
goes on."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.base import LanguageModel
from ..runtime.distributed import Ranks
from .parallel import only_slices, whole
from .state import TrainState

OPTIMIZER_STATE = ("exp_avg", "exp_avg_sq")  # AdamW's names


class Snapshot(NamedTuple):
    """A copy that no later step changes."""

    state: TrainState
    weights: dict[str, Tensor]  # the model's state dict; on other ranks than 0 nothing
    moments: dict[str, Tensor]  # optimizer_tensors; likewise
    copied: torch.cuda.Event | None = None  # when the tensors are there

    def wait(self) -> None:
        """Wait until the tensors are there, not for what the device does afterwards."""
        if self.copied:
            self.copied.synchronize()


def take_snapshot(
    model: LanguageModel, optimizer: torch.optim.Optimizer, state: TrainState, ranks: Ranks
) -> Snapshot:
    """Copy the state of a run. The host does not wait for a GPU: the copies are in its queue, before whatever
    changes the originals. All ranks take part."""
    if ranks.world > 1:
        only_slices(model)
    weights = _on_host(model.state_dict(keep_vars=True), ranks)
    moments = _on_host(optimizer_tensors(model, optimizer, state), ranks)
    copied = None
    if model.head_weight.device.type == "cuda":
        copied = torch.cuda.Event()
        copied.record()
    return Snapshot(state.model_copy(deep=True), weights, moments, copied)


def _on_host(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Copies of the tensors, whole, on rank 0; on the other ranks nothing. One at a time is gathered. Those
    that are one tensor stay one."""
    copies: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in copies:
            one = whole(tensor.detach())
            copies[id(tensor)] = _copy(one) if ranks.is_first else one.new_empty(0)
    return {name: copies[id(tensor)] for name, tensor in tensors.items()} if ranks.is_first else {}


def _copy(tensor: Tensor) -> Tensor:
    on_gpu = tensor.device.type == "cuda"
    host = torch.empty_like(tensor, device="cpu", pin_memory=on_gpu)
    return host.copy_(tensor, non_blocking=on_gpu)


def optimizer_tensors(
    model: LanguageModel, optimizer: torch.optim.Optimizer, state: TrainState
) -> dict[str, Tensor]:
    """AdamW's state by its names in a checkpoint; before the first step, when there is none, zeros."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key in OPTIMIZER_STATE:
            has_state = state.optimizer_steps > 0
            tensors[f"{key}.{name}"] = (
                optimizer.state[parameter][key] if has_state else torch.zeros_like(parameter)
            )
    return tensors

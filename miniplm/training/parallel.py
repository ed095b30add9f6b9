"""A model spread over the ranks of a run: FSDP2, layer by layer.

Each rank holds a slice of every parameter, of its gradient and of AdamW's state, all float32. A layer is
gathered where it is computed, its matrices in the compute dtype; what is outside the layers, and all norms,
are gathered in float32 once per step: the residual stream starts in it, norm weights lose by rounding, and
the loss takes the head's weight after the forward pass. Gradients are summed in float32, once per step.
A teacher lies in slices of its own dtype, and is gathered likewise.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models.base import LanguageModel
from ..models.decoder import Decoder, RMSNorm
from ..runtime.distributed import Ranks
from ..runtime.errors import UserError
from ..runtime.progress import note

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule


def check_replicas(replicas: int, world: int) -> None:
    """UserError unless so many copies of a model can be spread over the ranks."""
    if world % replicas:
        raise UserError(
            f"parallel.replicate {replicas} does not divide the number of ranks, {world}: give one that does"
        )


def spread(
    model: LanguageModel,
    ranks: Ranks,
    replicas: int,
    dtype: torch.dtype,
    teacher: LanguageModel | None = None,
) -> None:
    """Spread a model that each rank has whole, on its device, and its teacher. A process alone keeps both as
    they are.

    Args:
        replicas: copies of the model; each lies in slices on world / replicas ranks. As many as ranks: each
            has the whole model, and the gradients are summed.
        dtype: in which the layers' matrices are computed with.
        teacher: frozen. It stays whole where each rank has a copy of the model, or where it is no Decoder.
    """
    if ranks.world == 1:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = _mesh(model.head_weight.device.type, ranks.world, replicas)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    if isinstance(model, Decoder):
        layers = model.model.layers
        norms: list[nn.Module] = [module for module in layers.modules() if isinstance(module, RMSNorm)]
        low = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        fully_shard(norms, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=exact if dtype == torch.float32 else low)
    fully_shard(model, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
    for part in _parts(model):
        # A sum: the loss is divided by the targets of all ranks. Gloo has no other product of both.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    if teacher is not None and replicas < ranks.world:
        _spread_teacher(teacher, mesh)


def _spread_teacher(teacher: LanguageModel, mesh: "DeviceMesh") -> None:
    """On the model's mesh, so that the ranks gather both in one order."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not isinstance(teacher, Decoder):
        note(f"each rank holds the whole teacher: layers of {teacher.config.model_type} are not spread")
        return
    own = MixedPrecisionPolicy(cast_forward_inputs=False)
    for layer in teacher.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=own)
    fully_shard(teacher, mesh=mesh, mp_policy=own, reshard_after_forward=False)


def _mesh(device: str, world: int, replicas: int) -> "DeviceMesh":
    from torch.distributed.device_mesh import init_device_mesh

    if replicas == 1:
        return init_device_mesh(device, (world,))
    return init_device_mesh(device, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))


def _parts(model: nn.Module) -> Iterable["FSDPModule"]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def sum_gradients_after(model: LanguageModel, is_last: bool) -> None:
    """Before a backward pass of a spread model: whether the gradients, which add up on each rank, are summed
    over the ranks after it, and the slices are all that stays."""
    root: Any = model
    root.set_is_last_backward(is_last)
    root.set_requires_gradient_sync(is_last)
    root.set_reshard_after_backward(is_last)


def only_slices(model: LanguageModel) -> None:
    """Let go of what a forward pass without a backward pass has gathered."""
    for part in _parts(model):
        part.reshard()


def end_teacher_step(teacher: LanguageModel) -> None:
    """After a step of a spread model: let go of the teacher's head, which stays from pass to pass, and of
    what FSDP keeps of each pass for a backward pass that does not come."""
    only_slices(teacher)
    root: Any = teacher
    if _parts(teacher) and hasattr(root, "reset_iter_state"):  # not every torch has it
        root.reset_iter_state()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that lies in slices on all ranks, as one; any other as it is. All ranks take part."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sliced_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's slice of a tensor that every rank has whole, where the parameter lies in slices."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)

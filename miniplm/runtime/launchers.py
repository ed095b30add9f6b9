"""Which of several processes that share work without talking to one another this one is."""

import os
from collections.abc import Mapping

import torch

from .devices import choose_device
from .distributed import Place, device_of_rank, place_of
from .errors import UserError

PAIRS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
STEP = "SLURM_STEP_ID"
ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP")


def place_among_shards(
    rank: int | None, world: int | None, environment: Mapping[str, str] = os.environ
) -> Place:
    """The place that is given; else torchrun's; else that in a step, an array, or an array of steps of SLURM;
    else that of a process alone. A batch script of SLURM has the variables of a step's first task, but is in
    none: what it starts without srun is alone.

    Raises:
        UserError: the environment gives half of a place, or one that makes no sense.
    """
    if rank is not None and world is not None:
        return Place(
            rank, world, _number(environment, "LOCAL_RANK", rank % max(1, torch.cuda.device_count()))
        )
    if any(name in environment for name in PAIRS[0]):
        _both(environment, PAIRS[0])
        return place_of(environment, *PAIRS[0], "LOCAL_RANK")
    step = Place()
    if STEP in environment and _number(environment, "SLURM_NTASKS", 1) != 1:
        _both(environment, PAIRS[1])
        step = place_of(environment, *PAIRS[1], "SLURM_LOCALID")
    task, tasks = _place_in_array(environment)
    return Place(task * step.world + step.rank, tasks * step.world, step.local)


def _place_in_array(environment: Mapping[str, str]) -> tuple[int, int]:
    """(the number of this task of a SLURM array, from 0; how many there are)."""
    if not any(name in environment for name in ARRAY[:2]):
        return 0, 1
    _both(environment, ARRAY[:2])
    task, count, lowest, step = (
        _number(environment, name, default) for name, default in zip(ARRAY, (0, 1, 0, 1), strict=True)
    )
    number, rest = divmod(task - lowest, max(step, 1))
    if rest or not 0 <= number < count:
        raise UserError(
            f"{ARRAY[0]} {task} is none of {count} tasks from {lowest} in steps of {step}: give a range "
            f"(--array=0-7), or --rank and --world"
        )
    return number, count


def _both(environment: Mapping[str, str], names: tuple[str, ...]) -> None:
    if missing := [name for name in names if name not in environment]:
        there = next(name for name in names if name in environment)
        raise UserError(f"{there} is set, but {missing[0]} is not: set both, or unset both")


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, str(default))
    if not value.isdecimal() or len(value) > 7:
        raise UserError(f"{name} must be a whole number, got {value}")
    return int(value)


def device_among_shards(name: str, place: Place) -> torch.device:
    """The device of this name; of several GPUs, the one of the process's number on its machine.

    A GPU that is named by its number, and the only one that torch sees, is as given: each process may have
    been given its own.
    """
    device = choose_device(name)
    if device.type != "cuda" or device.index is not None or torch.cuda.device_count() == 1:
        return device
    return device_of_rank(device, place)

"""Which of several processes this is, as flags, torchrun and SLURM say."""

import pytest

from miniplm.runtime.distributed import Place
from miniplm.runtime.errors import UserError
from miniplm.runtime.launchers import place_among_shards


def array(task, count, lowest=None, step=None, **more):
    values = {"TASK_ID": task, "TASK_COUNT": count, "TASK_MIN": lowest, "TASK_STEP": step}
    set_ones = {f"SLURM_ARRAY_{name}": str(value) for name, value in values.items() if value is not None}
    return set_ones | more


def step(rank, tasks, local=0):
    return batch(rank, tasks, local) | {"SLURM_STEP_ID": "0"}


def batch(rank, tasks, local=0):
    return {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(tasks), "SLURM_LOCALID": str(local)}


PLACES = [
    ({}, Place(0, 1, 0)),
    ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Place(5, 8, 1)),
    ({"RANK": "5", "WORLD_SIZE": "8", **step(1, 2)}, Place(5, 8, 0)),
    (step(0, 1), Place(0, 1, 0)),
    (batch(0, 8), Place(0, 1, 0)),  # a batch script without srun
    ({"SLURM_NTASKS": "8"}, Place(0, 1, 0)),  # a shell of salloc
    (array(2, 4, **batch(0, 8)), Place(2, 4, 0)),
    (step(2, 3, 2), Place(2, 3, 2)),
    (array(2, 4), Place(2, 4, 0)),
    (array(3, 4, lowest=1, step=1), Place(2, 4, 0)),
    (array(9, 3, lowest=5, step=2), Place(2, 3, 0)),
    (array(2, 2, lowest=1, **step(1, 3, 1)), Place(4, 6, 1)),
]


@pytest.mark.parametrize(("environment", "place"), PLACES)
def test_place(environment, place):
    assert place_among_shards(None, None, environment) == place


def test_what_is_given_wins():
    assert place_among_shards(1, 3, {"RANK": "0", "WORLD_SIZE": "2"}) == Place(1, 3, 0)
    assert place_among_shards(1, 3, {"LOCAL_RANK": "7", **step(0, 2)}) == Place(1, 3, 7)


NONSENSE = [
    ({"RANK": "1"}, "RANK is set, but WORLD_SIZE is not"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but RANK is not"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 is not below WORLD_SIZE 2"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK 0 is not below WORLD_SIZE 0"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "must be whole numbers"),
    ({"SLURM_STEP_ID": "1", "SLURM_NTASKS": "4"}, "SLURM_NTASKS is set, but SLURM_PROCID is not"),
    ({"SLURM_STEP_ID": "1", "SLURM_NTASKS": "many"}, "SLURM_NTASKS must be a whole number, got many"),
    (step(4, 4), "SLURM_PROCID 4 is not below SLURM_NTASKS 4"),
    (array(1, None), "SLURM_ARRAY_TASK_ID is set, but SLURM_ARRAY_TASK_COUNT is not"),
    (array(5, 2, lowest=2), r"SLURM_ARRAY_TASK_ID 5 is none of 2 tasks from 2 in steps of 1: .*--rank"),
    (array(6, 3, lowest=5, step=2), "SLURM_ARRAY_TASK_ID 6 is none of 3 tasks from 5 in steps of 2"),
    (array(1, 3, lowest=2), "SLURM_ARRAY_TASK_ID 1 is none of 3 tasks"),
]


@pytest.mark.parametrize(("environment", "words"), NONSENSE)
def test_nonsense_is_one_line(environment, words):
    with pytest.raises(UserError, match=words) as caught:
        place_among_shards(None, None, environment)
    assert "\n" not in str(caught.value)

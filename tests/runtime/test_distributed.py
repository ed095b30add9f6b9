"""The place of a process among the ranks, and a process alone."""

import pytest
import torch

from miniplm.runtime.distributed import ALONE, Place, device_of_rank, place_of, ranks_of_run
from miniplm.runtime.errors import UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def test_the_place_that_an_environment_gives():
    assert place_of({}, *NAMES) == place_of({"RANK": "1"}, *NAMES) == Place(0, 1, 0)
    assert place_of({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, *NAMES) == Place(5, 8, 1)
    assert place_of({"RANK": "5", "WORLD_SIZE": "8"}, *NAMES) == Place(5, 8, 0)


@pytest.mark.parametrize("rank, world", [("2", "2"), ("-1", "2"), ("0", "0"), ("x", "2"), ("0", "")])
def test_a_place_that_cannot_be_is_a_users_error(rank, world):
    with pytest.raises(UserError, match="RANK"):
        place_of({"RANK": rank, "WORLD_SIZE": world}, *NAMES)


def test_ranks_without_an_address_are_a_users_error(monkeypatch):
    for name, value in ("RANK", "0"), ("WORLD_SIZE", "2"):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR is not set: start the ranks with torchrun"):
        with ranks_of_run(torch.device("cpu"), 10):
            pytest.fail("a rank without an address")


def test_a_process_alone_decides_alone(capsys):
    tensor = torch.ones(2)
    assert (ALONE.sum(3), ALONE.largest(3), ALONE.smallest(3), ALONE.of_first(3)) == (3, 3, 3, 3)
    assert ALONE.any(True) and not ALONE.any(False)
    assert ALONE.add_up(tensor) is tensor and tensor.tolist() == [1, 1]
    with pytest.raises(KeyError), ALONE.naming_lost(), ALONE.together(), ALONE.first_speaks():
        print("heard")
        raise KeyError
    assert capsys.readouterr().out == "heard\n"
    assert not torch.distributed.is_initialized()


def test_ranks_on_one_gpu_are_refused():
    cuda = torch.device("cuda", 0)
    assert device_of_rank(cuda, Place()) == cuda
    assert device_of_rank(torch.device("cpu"), Place(1, 2, 1)) == torch.device("cpu")
    with pytest.raises(UserError, match="give --device cuda"):
        device_of_rank(cuda, Place(1, 2, 1))
    with pytest.raises(UserError, match="rank 99 has no GPU"):
        device_of_rank(torch.device("cuda"), Place(99, 100, 99))

"""A model spread over two ranks on this machine, in slices."""

import pytest
import torch
from ranks import forked, local_share, run_ranks
from training_runs import make_teachers

from miniplm.models.loading import load_model
from miniplm.runtime.distributed import ranks_of_run
from miniplm.training.parallel import end_teacher_step, spread


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    return forked(tmp_path_factory.mktemp("elsewhere"))


def compare_teachers(rank, folders, dtype):
    """A spread teacher has the bits of a whole one, in several passes and steps; a step ends in slices."""
    ids = torch.arange(40 + 8 * rank) % 480  # the ranks' batches differ
    batch = ids, torch.tensor([0, 11, len(ids)], dtype=torch.int32), 40
    with ranks_of_run(torch.device("cpu"), 60) as ranks, torch.no_grad():
        for folder, expected_share in folders.items():
            student, whole, teacher = (load_model(folder, dtype).requires_grad_(False) for _ in range(3))
            spread(student, ranks, 1, dtype, teacher=teacher)
            for _ in range(2):
                assert local_share(teacher) == pytest.approx(expected_share, abs=0.01)
                for _ in range(2):
                    hidden = teacher(*batch)
                    assert hidden.dtype == dtype and torch.equal(hidden, whole(*batch))
                    assert torch.equal(teacher.head_weight, whole.head_weight)
                end_teacher_step(teacher)
                if hasattr(teacher, "reset_iter_state"):  # else FSDP's record of the passes grows
                    assert not teacher._get_fsdp_state()._comm_ctx.post_forward_order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_spread_teacher_computes_the_bits_of_a_whole_one(dtype, tiny_model, context, tmp_path):
    teachers = make_teachers(tiny_model, tmp_path / "teachers")
    folders = {teachers[name]: 1 if name == "adapted" else 1 / 2 for name in teachers}
    ranks = run_ranks(context, tmp_path, 2, compare_teachers, folders, dtype)
    assert "each rank holds the whole teacher: layers of gpt2 are not spread" in ranks[0].said()

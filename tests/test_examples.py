"""examples/: the scripts run, and their losses agree."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"
BOUND = 1e-5  # of losses up to 8.4: ten roundings of float32
BROKEN = """
import runpy, miniplm.kernels as kernels
right = kernels.{op}
kernels.{op} = lambda *args, **options: 1.01 * right(*args, **options)
runpy.run_path({script!r}, run_name="__main__")
"""
OPS = {  # script → an op that makes its second losses
    "own_training_loop.py": "linear_cross_entropy",
    "patch_trainer.py": "linear_cross_entropy",
    "patch_trl.py": "flash_attention",
}


def largest_difference(*arguments: str, folder: Path) -> float:
    """What a script prints of its two runs, on the CPU."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder / "cache")}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert not re.search(r"Warning|Traceback|[Dd]eprecated", result.stdout + result.stderr), result.stderr
    assert "DIFFERENT" not in result.stdout
    return float(re.search(r"^largest difference (\S+)$", result.stdout, re.M)[1])


@pytest.mark.slow
@pytest.mark.parametrize("script", OPS)
def test_scripts(script, tmp_path):
    assert largest_difference(str(FOLDER / script), folder=tmp_path) <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("script", OPS)
def test_scripts_show_a_broken_op(script, tmp_path):
    code = BROKEN.format(op=OPS[script], script=str(FOLDER / script))
    assert largest_difference("-c", code, folder=tmp_path) > 100 * BOUND


def test_all_are_listed():
    listed = set(re.findall(r"\]\(([^./)][^)]*)\)", (FOLDER / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in FOLDER.iterdir() if path.name not in ("README.md", "smollm2-run")}

"""score in the workers of a local cluster of Ray, where ray is installed."""

import os
import signal
import threading
import time

import pytest
from outputs import contents
from scoring_runs import SMALL

from miniplm.cli import main
from miniplm.config import ScoreConfig, from_arguments
from miniplm.runtime.errors import UserError
from miniplm.stages.score import score


def test_flag_alone_and_what_does_not_go_with_it():
    given = ["--data=d", "--output=o", "--teacher=t"]
    assert from_arguments(ScoreConfig, [*given, "--ray"], "score").ray == "auto"
    assert from_arguments(ScoreConfig, [*given, "--ray", "ray://a:1"], "score").ray == "ray://a:1"
    with pytest.raises(ValueError, match="leave out rank, world and profile"):
        from_arguments(ScoreConfig, [*given, "--ray", "--rank=0", "--world=2"], "score")


def test_without_ray_it_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert main(["score", "--data=d", f"--output={tmp_path / 's'}", "--teacher=t", "--ray"]) == 2
    assert "ray is not installed: pip install 'miniplm[ray]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        object_store_memory=80_000_000,
    )
    yield ray
    ray.shutdown()


@pytest.fixture
def options(tiny_corpus, teacher, reference, tmp_path):
    models = dict(teacher=str(teacher), reference=str(reference))
    return dict(data=tiny_corpus, output=str(tmp_path / "s"), ray="auto", **models, **SMALL)


def workers() -> list[int]:
    """The processes of this machine that are workers of the pool."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                if b"ray::_Worker" in file.read():
                    found.append(int(name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_the_bytes_of_one_process_though_a_worker_is_killed(cluster, options, scores, tmp_path, capsys):
    folder, killed = tmp_path / "s", []

    def kill_one() -> None:
        deadline = time.monotonic() + 120
        while not list(folder.glob("scores-*.parquet")) and time.monotonic() < deadline:
            time.sleep(0.002)
        for process in workers():
            os.kill(process, signal.SIGKILL)
            killed.append(process)

    thread = threading.Thread(target=kill_one)
    thread.start()
    score(ScoreConfig(**options))
    thread.join()
    assert killed and "a worker of Ray was lost" in capsys.readouterr().err
    assert contents(folder) == contents(scores)
    score(ScoreConfig(**{**options, "ray": None}))
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.slow
def test_a_users_error_in_a_worker_is_one_line(cluster, options, tmp_path):
    with pytest.raises(UserError, match=r"the softmax covers only 3:") as caught:
        score(ScoreConfig(**options, vocab_size=3))
    assert "\n" not in str(caught.value) and not (tmp_path / "s").exists()
    with pytest.raises(UserError, match="the cluster of Ray has no GPU"):
        score(ScoreConfig(**{**options, "device": "cuda"}))

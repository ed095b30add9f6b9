"""wall_time.json: what is added up, and what a kill loses."""

import os
import signal
import time

import pytest

from miniplm.runtime import wall_time as module
from miniplm.runtime.files import write_json
from miniplm.runtime.wall_time import timed, wall_time


def test_processes_add_up(tmp_path):
    assert wall_time(tmp_path) is None
    with timed(tmp_path):
        time.sleep(0.05)
    first = wall_time(tmp_path)
    assert 0.05 <= first < 5
    with pytest.raises(KeyError), timed(tmp_path):
        time.sleep(0.05)
        raise KeyError
    assert first + 0.049 <= wall_time(tmp_path) < first + 5  # it is written in whole milliseconds
    assert [path.name for path in tmp_path.iterdir()] == ["wall_time.json"]


def test_a_kill_loses_an_interval_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "INTERVAL", 0.02)
    child = os.fork()
    if child == 0:
        with timed(tmp_path):
            time.sleep(60)
    deadline = time.monotonic() + 30
    while (wall_time(tmp_path) or 0) < 0.05 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    before = wall_time(tmp_path)
    assert before >= 0.05
    with timed(tmp_path):
        pass
    assert wall_time(tmp_path) >= before


@pytest.mark.parametrize(
    "content", [[], {}, {"seconds": None}, {"seconds": "1"}, {"seconds": True}, {"seconds": -1}, 1]
)
def test_what_is_no_time_is_not_known(tmp_path, content):
    write_json(tmp_path / "wall_time.json", content)
    assert wall_time(tmp_path) is None
    (tmp_path / "wall_time.json").write_text("{")
    assert wall_time(tmp_path) is None
    (tmp_path / "wall_time.json").write_text('{"seconds": Infinity}')
    assert wall_time(tmp_path) is None
    with timed(tmp_path):  # begun anew
        pass
    assert wall_time(tmp_path) >= 0


def test_a_folder_that_takes_no_more_is_not_its_business(tmp_path):
    with timed(tmp_path / "nowhere"):
        pass

"""benchmarks/scheduling.py: the simulation against schedules by hand and by closed form."""

import json
import math
import sys

import numpy as np
import pytest


@pytest.fixture
def scheduling(module):
    return module("scheduling")


def at_times(times):
    """Failures that fail rank 0 at these times."""

    class Given:
        def __init__(self, cluster, seed):
            self.times = list(times)

        def between(self, begin, end, rank):
            if rank == 0 and self.times and begin <= self.times[0] < end:
                return self.times.pop(0)
            return None

    return Given


@pytest.mark.parametrize("policy", ["static", "dynamic"])
@pytest.mark.parametrize(("files", "ranks"), [(1, 1), (7, 3), (9, 3), (2, 5), (100, 7)])
def test_equal_ranks_end_after_their_share(scheduling, policy, files, ranks):
    cluster = scheduling.Cluster(np.ones(ranks), start=4.0)
    found = scheduling.POLICIES[policy](files, 10.0, cluster, 0)
    assert found == (4 + 10 * math.ceil(files / ranks), 10.0 * files, 0.0)


def test_a_slow_rank_holds_up_static_ranks_alone(scheduling):
    cluster = scheduling.Cluster(np.array([0.5, 1.0, 1.0]))
    assert scheduling.static(12, 10.0, cluster, 0) == (80.0, 160.0, 0.0)
    # The fast ranks take 5 files each while the slow one takes 2 and a half: it ends its third at 60.
    assert scheduling.dynamic(12, 10.0, cluster, 0) == (60.0, 150.0, 0.0)


def test_a_failure_loses_the_file_in_progress(scheduling, monkeypatch):
    cluster = scheduling.Cluster(np.ones(2), restart=3.0)
    for policy in ("static", "dynamic"):  # again from 8 to 18, then another until 28
        monkeypatch.setattr(scheduling, "Failures", at_times([5.0]))
        assert scheduling.POLICIES[policy](4, 10.0, cluster, 0) == (28.0, 40.0, 5.0)
    cluster = scheduling.Cluster(np.ones(2), restart=100.0)
    monkeypatch.setattr(scheduling, "Failures", at_times([5.0, 107.0]))
    assert scheduling.static(2, 10.0, cluster, 0) == (217.0, 20.0, 7.0)
    monkeypatch.setattr(scheduling, "Failures", at_times([5.0]))
    assert scheduling.dynamic(2, 10.0, cluster, 0) == (20.0, 20.0, 5.0)  # the other rank takes it at 10


@pytest.mark.parametrize("seed", range(3))
def test_every_file_is_done_once_within_the_bound_of_list_scheduling(scheduling, seed):
    """Graham, 1966: nobody is idle before the last file is taken, so it ends within one file of the ideal."""
    speeds = np.random.default_rng(seed).uniform(0.3, 1.5, 11)
    found = scheduling.dynamic(200, 10.0, scheduling.Cluster(speeds), seed)
    ideal = 200 * 10 / speeds.sum()
    assert ideal <= found.seconds <= ideal + 10 / speeds.min()
    cluster = scheduling.Cluster(np.ones(11), mtbf=100.0, restart=5.0)
    for policy in scheduling.POLICIES.values():
        found = policy(200, 10.0, cluster, seed)
        assert found.useful == pytest.approx(2000) and found.redone > 0
        assert found.useful + found.redone <= 11 * found.seconds


def test_failures_come_at_their_rate(scheduling):
    failures = scheduling.Failures(scheduling.Cluster(np.ones(1), mtbf=50.0), seed=1)
    count = sum(failures.between(time, time + 1.0, 0) is not None for time in range(100_000))
    assert abs(count - 2_000) < 4 * 2_000**0.5


def test_command(scheduling, tmp_path, monkeypatch, capsys):
    arguments = ["--files", "60", "--ranks", "1", "8", "--seeds", "3", "--stragglers", "0.5"]
    monkeypatch.setattr(sys, "argv", ["scheduling.py", *arguments, "--json", str(tmp_path / "out.json")])
    scheduling.main()
    report = json.loads((tmp_path / "out.json").read_text())
    assert len(report["records"]) == 5 * 2 * 2
    assert scheduling.pays_on(report["records"], "stragglers", 0.05) == [8]
    shown = capsys.readouterr().out
    assert "equal: dynamic scheduling saves more than 5% of the hours on no number of ranks" in shown
    assert "stragglers: dynamic scheduling saves more than 5% of the hours on 8 ranks" in shown

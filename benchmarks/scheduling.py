"""Score files over ranks, simulated: static ranks against dynamic scheduling, with stragglers and failures.

    static     rank k takes the files k, k + N, …; a rank that fails comes back and goes on with its own
    dynamic    whoever is free takes the next file, as actors of Ray do; a file whose rank fails is taken
               again by the next that is free

Nothing is scored and nothing timed: these are the consequences of the assumptions, which are options. A file
takes --file-seconds on a rank of speed 1; the file in progress is lost with its rank; the ranks of an
allocation are held until the last one ends. Figures are medians over --seeds simulations.

    late       how much later the last file is done than if no rank ever waited, failed or had to start
    idle       the share of the held rank-hours that no file of the result comes from
    redone     the share of the work that was done in vain

    python benchmarks/scheduling.py [--files 5960] [--file-seconds 143] [--ranks 1 2 4 … 1000] [--json FILE]
"""

import argparse
import heapq
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from report import write_json

HOUR = 3600.0


class Cluster(NamedTuple):
    """Ranks of one job."""

    speeds: np.ndarray  # float64 [ranks]; 1 is that of --file-seconds
    mtbf: float = np.inf  # seconds between the failures of a rank, exponentially distributed
    start: float = 0.0  # seconds before the first file
    restart: float = 0.0  # seconds from a failure until the rank, or one in its place, works again


class Outcome(NamedTuple):
    seconds: float  # until the last file is done
    useful: float  # rank-seconds in which files were scored, once each
    redone: float  # rank-seconds that failures made vain


class Failures:
    """When the ranks fail. A rank's times are its own, so every policy meets the same."""

    def __init__(self, cluster: Cluster, seed: int):
        self.cluster = cluster
        self.draws = [np.random.default_rng([seed, rank]) for rank in range(len(cluster.speeds))]
        self.next = [self._after(cluster.start, rank) for rank in range(len(cluster.speeds))]

    def _after(self, now: float, rank: int) -> float:
        mtbf = self.cluster.mtbf
        return now + self.draws[rank].exponential(mtbf) if np.isfinite(mtbf) else np.inf

    def between(self, begin: float, end: float, rank: int) -> float | None:
        """When the rank, at work from begin to end, fails, if it does. Failures of an idle one change
        nothing."""
        while (time := self.next[rank]) < end:
            self.next[rank] = self._after(time + self.cluster.restart, rank)
            if time >= begin:
                return time
        return None


def static(files: int, file_seconds: float, cluster: Cluster, seed: int) -> Outcome:
    """Rank k of N takes the files k, k + N, … in turn."""
    failures, ranks = Failures(cluster, seed), len(cluster.speeds)
    last = useful = redone = 0.0
    for rank, seconds in enumerate((file_seconds / cluster.speeds).tolist()):
        now = cluster.start
        for _ in range(rank, files, ranks):
            while (failed := failures.between(now, now + seconds, rank)) is not None:
                redone += failed - now
                now = failed + cluster.restart
            now += seconds
            useful += seconds
            last = max(last, now)
    return Outcome(last, useful, redone)


def dynamic(files: int, file_seconds: float, cluster: Cluster, seed: int) -> Outcome:
    """Whoever is free takes a file that was lost, else the next one."""
    failures, times = Failures(cluster, seed), (file_seconds / cluster.speeds).tolist()
    free = [(cluster.start, rank) for rank in range(len(times))]  # a heap, as is the next
    busy: list[tuple[float, int, bool]] = []  # (when its file ends or is lost, rank, whether it is lost)
    lost: deque[float] = deque()
    waiting = files
    last = useful = redone = 0.0
    while waiting or lost or busy:
        if (waiting or lost) and free and not (busy and busy[0][0] < free[0][0]):
            now, rank = heapq.heappop(free)
            if lost:
                now = max(now, lost.popleft())
            else:
                waiting -= 1
            failed = failures.between(now, now + times[rank], rank)
            if failed is None:
                useful += times[rank]
                last = max(last, now + times[rank])
            else:
                redone += failed - now
            heapq.heappush(busy, (failed or now + times[rank], rank, failed is not None))
        else:
            now, rank, is_lost = heapq.heappop(busy)
            if is_lost:
                lost.append(now)
            heapq.heappush(free, (now + cluster.restart * is_lost, rank))
    return Outcome(last, useful, redone)


POLICIES = {"static": static, "dynamic": dynamic}


def draw_speeds(ranks: int, spread: float, stragglers: float, slow: float, seed: int) -> np.ndarray:
    """float64 [ranks]: normal around 1; with the chance `stragglers` a rank has the share `slow` of it."""
    rng = np.random.default_rng([seed, ranks])
    speeds = np.clip(1 + spread * rng.standard_normal(ranks), 0.2, None)
    return speeds * np.where(rng.random(ranks) < stragglers, slow, 1.0)


def figures(options: argparse.Namespace, policy: str, ranks: int, facts: dict[str, float]) -> dict:
    """What a policy comes to on so many ranks of a kind."""
    dynamically = policy == "dynamic"
    start, restart = (
        (options.ray_start, options.ray_restart) if dynamically else (options.start, options.restart)
    )
    found = []
    for seed in range(options.seeds):
        speeds = draw_speeds(ranks, facts["spread"], facts["stragglers"], options.slow, seed)
        cluster = Cluster(speeds, facts["mtbf"], start, restart)
        seconds, useful, redone = POLICIES[policy](options.files, options.file_seconds, cluster, seed)
        ideal = options.files * options.file_seconds / speeds.sum()
        found.append(
            (seconds, seconds / ideal - 1, 1 - useful / (ranks * seconds), redone / (useful + redone))
        )
    seconds, late, idle, redone = np.median(found, axis=0).tolist()
    return {"hours": seconds / HOUR, "late": late, "idle": idle, "redone": redone}


def simulate(options: argparse.Namespace) -> list[dict]:
    """A record for each kind of ranks, number of them and policy."""
    alike = {"spread": 0.0, "stragglers": 0.0, "mtbf": np.inf}
    unlike = alike | {"spread": options.spread}
    kinds = {
        "equal": alike,
        "unequal": unlike,
        "stragglers": unlike | {"stragglers": options.stragglers},
        "failures": unlike | {"mtbf": options.mtbf * HOUR},
        "preempted": unlike | {"mtbf": options.preempted * HOUR},
    }
    return [
        {"kind": kind, "ranks": ranks, "policy": policy} | figures(options, policy, ranks, facts)
        for kind, facts in kinds.items()
        for ranks in options.ranks
        for policy in POLICIES
    ]


def pays_on(records: Sequence[dict], kind: str, share: float) -> list[int]:
    """The numbers of ranks on which the dynamic policy saves more than this share of the hours."""
    hours = {
        (record["ranks"], record["policy"]): record["hours"] for record in records if record["kind"] == kind
    }
    numbers = sorted({ranks for ranks, _ in hours})
    return [ranks for ranks in numbers if hours[ranks, "dynamic"] < (1 - share) * hours[ranks, "static"]]


def table(records: Sequence[dict], share: float) -> str:
    heads = "".join(f"{head:>9}" for head in ("hours", "late", "idle", "redone"))
    lines = [f"{'':<18}{'static':>36}{'dynamic':>36}", f"{'ranks':>18}{heads}{heads}"]
    for one, other in zip(records[::2], records[1::2], strict=True):
        line = f"{one['kind']:<12}{one['ranks']:>6,}"
        for record in (one, other):
            line += f"{record['hours']:>9.2f}"
            line += "".join(f"{record[key]:>9.2%}" for key in ("late", "idle", "redone"))
        lines.append(line)
    for kind in dict.fromkeys(record["kind"] for record in records):
        numbers = ", ".join(f"{ranks:,}" for ranks in pays_on(records, kind, share)) or "no number of"
        lines.append(
            f"{kind}: dynamic scheduling saves more than {share:.0%} of the hours on {numbers} ranks"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    number = parser.add_argument
    number("--files", type=int, default=5_960, help="of scores; 100B tokens have so many")
    number("--file-seconds", type=float, default=143.0, help="of one file on one rank; docs/scaling.md")
    number("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 256, 1_000])
    number("--spread", type=float, default=0.02, help="standard deviation of the ranks' speeds")
    number("--stragglers", type=float, default=0.01, help="chance that a rank is one")
    number("--slow", type=float, default=0.5, help="a straggler's share of its speed")
    number("--mtbf", type=float, default=50_000.0, help="hours between failures of a rank")
    number("--preempted", type=float, default=24.0, help="hours between its preemptions")
    number("--start", type=float, default=60.0, help="seconds before the first file")
    number("--restart", type=float, default=600.0, help="seconds until a failed rank is queued in again")
    number("--ray-start", type=float, default=180.0, help="the same with a Ray cluster to start")
    number("--ray-restart", type=float, default=120.0, help="seconds until an actor is replaced")
    number("--worth", type=float, default=0.05, help="the share of the hours that is worth another tool")
    number("--seeds", type=int, default=20)
    number("--json", help="write the records to this file")
    options = parser.parse_args()
    records = simulate(options)
    print(table(records, options.worth))
    if options.json:
        write_json(options.json, {"settings": vars(options), "records": records})


if __name__ == "__main__":
    main()

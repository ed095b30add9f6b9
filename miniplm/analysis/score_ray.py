"""score on a cluster of Ray: a pool of workers, each of which takes the next file that is not scored."""

import contextlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import ScoreConfig
from ..runtime.distributed import Place
from ..runtime.errors import RunError, UserError
from ..runtime.progress import note
from .score_plan import ScorePlan, make_plan
from .score_shards import Scorer

TRIES = 3  # of a file, before a lost worker ends the run


class _Worker:
    """What a process of the pool does. The models are loaded by the first call."""

    def __init__(self, config: ScoreConfig):
        self._config = config
        self._made: Scorer | None = None

    def _scorer(self) -> Scorer:
        self._made = self._made or Scorer(make_plan(self._config, Place()))
        return self._made

    def facts(self) -> dict[str, Any]:
        """What the other side needs to know of the loaded models."""
        scorer = self._scorer()
        plan = {"dtype": scorer.plan.dtype, "identity": scorer.plan.identity, "reason": scorer.plan.reason}
        return {
            "plan": plan,
            "vocab_size": scorer.vocab_size,
            "agreement": scorer.agreement,
            "flops": scorer.flops(),
        }

    def score(self, number: int) -> list[str]:
        return self._scorer().score([number], lambda _: None)[number]


@contextlib.contextmanager
def joined(address: str | None) -> Iterator[Any]:
    """The module ray, connected while the block runs: to the cluster at the address; with "auto" to one that
    runs here, or to a new one on this machine. None without an address.

    Raises:
        UserError: ray is not installed, or there is no such cluster.
    """
    if not address:
        yield None
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as it will be: without it, it warns
    try:
        import ray
    except ImportError:
        raise UserError("ray is not installed: pip install 'miniplm[ray]', or leave out --ray") from None
    if ray.is_initialized():  # by who calls: it stays so
        yield ray
        return
    where = None if address == "auto" else address
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        ray.init(address=where, include_dashboard=False, **quiet)
    except (ConnectionError, ValueError, RuntimeError):
        raise UserError(
            f"there is no cluster of Ray at {address}: start one (ray start --head), or give --ray alone"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


class RayScorer:
    """Scores files of a plan in the workers of a cluster, as `Scorer` does in this process."""

    def __init__(self, ray: Any, plan: ScorePlan):
        self._ray, config = ray, plan.config
        on_gpu = plan.device.type == "cuda"
        paths: dict[str, Any] = {
            name: _absolute(getattr(config, name)) for name in ("data", "output", "teacher", "reference")
        }
        self._config = replace(config, ray=None, device=plan.device.type, **paths)
        self._needs = {"num_cpus": 1, "num_gpus": 1} if on_gpu else {"num_cpus": 1}
        self._workers = max(1, int(ray.cluster_resources().get("GPU" if on_gpu else "CPU", 1)))
        self._first: Any = self._start()
        try:
            facts = self._answer(self._first.facts.remote())
        except ray.exceptions.RayActorError:
            raise RunError(
                "a worker of Ray was lost before it had loaded the models: look into the logs of Ray (out of "
                "memory?), then run the same command again"
            ) from None
        self.plan = replace(plan, **facts["plan"])
        self.vocab_size, self.agreement, self._flops = facts["vocab_size"], facts["agreement"], facts["flops"]

    def flops(self) -> dict[str, int]:
        return self._flops

    def score(self, numbers: Sequence[int], advance: Callable[[int], None]) -> dict[int, list[str]]:
        """As score_shards. What a lost worker had begun is given to another.

        Raises:
            RunError: workers were lost over the same file again and again.
        """
        lost = self._ray.exceptions.RayActorError
        positions = self.plan.corpus.num_tokens - 1
        waiting, tries, written = deque(numbers), Counter[int](), {}
        idle = [self._first, *(self._start() for _ in range(min(self._workers, len(numbers)) - 1))]
        under_way: dict[Any, tuple[Any, int]] = {}
        while waiting or under_way:
            while waiting and idle:
                worker, number = idle.pop(0), waiting.popleft()
                under_way[worker.score.remote(number)] = worker, number
            (ready, *_), _ = self._ray.wait(list(under_way), num_returns=1)
            worker, number = under_way.pop(ready)
            try:
                written[number] = self._answer(ready)
            except lost:
                tries[number] += 1
                if tries[number] == TRIES:
                    raise RunError(
                        f"{TRIES} workers were lost over score file {number}: look into the logs of Ray (out "
                        f"of memory?), then run the same command again"
                    ) from None
                note(f"a worker of Ray was lost: another one scores file {number}")
                waiting.appendleft(number)
                worker = self._start()
            else:
                advance(int(positions[self.plan.shards[number]].sum()))
            idle.append(worker)
        return written

    def _start(self) -> Any:
        return self._ray.remote(**self._needs)(_Worker).remote(self._config)

    def _answer(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # its text has a traceback in it
            raise error.cause if isinstance(error.cause, RunError | UserError) else error from None


def ray_device(ray: Any, device: str) -> torch.device:
    """GPUs where the cluster has them, unless the device's name says otherwise."""
    on_gpu = bool(ray.cluster_resources().get("GPU"))
    if device.startswith("cuda") and not on_gpu:
        raise UserError(f"device {device}: the cluster of Ray has no GPU, give --device cpu or leave it out")
    return torch.device("cuda" if on_gpu and device != "cpu" else "cpu")


def _absolute(name: str | None) -> str | None:
    """Workers may run in another folder."""
    return str(Path(name).absolute()) if name and (os.sep in name or Path(name).exists()) else name

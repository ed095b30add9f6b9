"""What the tests of several ranks share: processes that are the ranks of a run, on this machine."""

import contextlib
import multiprocessing
import os
import socket
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

PRELOADED = [
    "miniplm.stages.train",
    "datasets",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.auto.tokenization_auto",
]
DEADLINE = 240  # seconds, on a machine that does much else


class Rank:
    """A process that is one of the ranks; `said()` is what it has written."""

    def __init__(self, process, log: Path):
        self.process, self.log = process, log

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def forked(elsewhere):
    """A context whose processes have the modules loaded and have not computed anything; started in a folder
    where no folder `kernels` hides the package that transformers looks for."""
    context, here = multiprocessing.get_context("forkserver"), os.getcwd()
    context.set_forkserver_preload(PRELOADED)
    os.chdir(elsewhere)
    forkserver.ensure_running()
    os.chdir(here)
    return context


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def started(context, folder: Path, world: int, function, *arguments, **environment: str):
    """The ranks that each call function(rank, *arguments); none is left behind."""
    folder.mkdir(parents=True, exist_ok=True)
    port, ranks = free_port(), []
    for rank in range(world):
        log = folder / f"rank-{rank}-of-{world}.txt"
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            **environment,
        }
        process = context.Process(
            target=_rank, args=(variables, log, function, rank, *arguments), daemon=True
        )
        process.start()
        ranks.append(Rank(process, log))
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.join()


def exit_codes(ranks: list[Rank], seconds: float = DEADLINE) -> list[int | None]:
    """How the ranks ended; None of one that has not within so many seconds."""
    deadline = time.monotonic() + seconds
    for rank in ranks:
        rank.process.join(max(0.0, deadline - time.monotonic()))
    return [rank.process.exitcode for rank in ranks]


def run_ranks(context, folder: Path, world: int, function, *arguments, **environment: str) -> list[Rank]:
    """Ranks that have all ended well."""
    with started(context, folder, world, function, *arguments, **environment) as ranks:
        codes = exit_codes(ranks)
        assert codes == [0] * world, "\n".join(rank.said() for rank in ranks)
    return ranks


def wait_until(condition, ranks: list[Rank] = (), seconds: float = DEADLINE) -> None:
    """Until condition() is true; what the ranks said where they end before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "\n".join(rank.said() for rank in ranks)
        assert all(rank.process.is_alive() for rank in ranks), "\n".join(rank.said() for rank in ranks)
        time.sleep(0.01)


def local_share(model) -> float:
    """Of a model's parameters, what lies on this rank."""
    local = [getattr(parameter, "to_local", lambda p=parameter: p)() for parameter in model.parameters()]
    return sum(part.numel() for part in local) / model.num_parameters()


def _rank(variables: dict[str, str], log: Path, function, *arguments) -> None:
    """In the process: as the command line ends, in the text of the error and an exit code."""
    os.environ.update(variables)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    from miniplm.cli import _explain

    try:
        function(*arguments)
    except Exception as error:
        code, text = _explain(error)
        if code != 2 and "unexpected" in text:
            raise
        print(text, file=sys.stderr, flush=True)
        sys.exit(code)
    finally:
        sys.stdout.flush()

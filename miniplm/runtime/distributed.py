"""The processes of a run, its ranks: which of them this one is, and what they decide together.

torchrun starts them; it sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. One process is the
same code with a world of 1: there is no process group, and every function gives back what it is given.

What is decided travels between the machines' memories (gloo), so that nothing here waits for a GPU. A rank
that is gone is found by its heartbeat, a number in the store of the process group that each rank raises every
second.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import RunError, UserError
from .interrupts import Interrupted

HEARTBEAT = 1.0  # seconds
SILENCE = 6.0  # seconds without a heartbeat after which a rank counts as gone
ANSWER = 10.0  # seconds that the store has for its answer
FAILED = 1000  # beside the exit codes of interrupts, 128 + n
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


class RankLost(RunError):
    """A rank died, or hangs."""


class RankFailed(RunError):
    """Another rank met an error, and says which."""


class Place(NamedTuple):
    """Which of how many processes this is; `local`: which of those on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0


def place_of(environment: Mapping[str, str], rank: str, world: str, local: str) -> Place:
    """The place that the variables of these names give; that of a process alone where they are not set.

    Raises:
        UserError: they are not numbers, or the rank is none of the world.
    """
    if rank not in environment or world not in environment:
        return Place()
    values = [environment[rank], environment[world], environment.get(local, "0")]
    if not all(value.isdecimal() and len(value) < 8 for value in values):
        raise UserError(f"{rank}, {world} and {local} must be whole numbers, got {', '.join(values)}")
    place = Place(*map(int, values))
    if place.rank >= place.world:
        raise UserError(
            f"{rank} {place.rank} is not below {world} {place.world}: unset both, or set them right"
        )
    return place


class Ranks:
    """This process among those of a run. Without arguments it is alone."""

    def __init__(self, place: Place | None = None, heartbeat: "_Heartbeat | None" = None, group: Any = None):
        self.place = place or Place()
        self.rank, self.world, _ = self.place
        self.is_first = self.rank == 0
        self._heartbeat, self._group = heartbeat, group

    def sum(self, value: int) -> int:
        """The sum of a whole number over all ranks."""
        return sum(self._all(value))

    def largest(self, value: int) -> int:
        """The largest of a whole number over all ranks."""
        return max(self._all(value))

    def smallest(self, value: int) -> int:
        """The smallest of a whole number over all ranks."""
        return min(self._all(value))

    def any(self, flag: bool) -> bool:
        """Whether it is so on one rank at least."""
        return any(self._all(int(flag)))

    def of_first(self, value: int) -> int:
        """The whole number that rank 0 gives."""
        return self._all(value)[0]

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place, on its device, which the host does not wait for."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def _all(self, value: int) -> list[int]:
        """The number of each rank: int64."""
        if self._heartbeat is None:
            return [value]
        self._heartbeat.calls += 1
        values = torch.zeros(self.world, dtype=torch.int64)
        values[self.rank] = value
        torch.distributed.all_reduce(values, group=self._group)
        return values.tolist()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All come to the end of the block, or none goes on. Within it no rank waits for another.

        Raises:
            RankFailed: the block failed on another rank.
        """
        try:
            yield
        except BaseException:
            with contextlib.suppress(RuntimeError):  # others are gone too: this one's error is to be told
                self._all(1)
            raise
        if 1 in (flags := self._all(0)):
            raise self._failed(flags.index(1))

    def stop_together(self, raise_if_stopped: Callable[[], None]) -> Callable[[], None]:
        """The same function for all ranks at once: a signal to one interrupts all, at the same call; what
        fails on one ends all, the others with RankFailed."""
        if self.world == 1:
            return raise_if_stopped

        def raise_if_any_is_stopped() -> None:
            code, failure = 0, None
            try:
                raise_if_stopped()
            except Interrupted as stopped:
                code = int(stopped.code or 0)
            except Exception as error:
                code, failure = FAILED, error
            codes = self._all(code)
            if failure:
                raise failure
            if FAILED in codes:
                raise self._failed(codes.index(FAILED))
            if code := max(codes):
                raise Interrupted(code)

        return raise_if_any_is_stopped

    def _failed(self, rank: int) -> RankFailed:
        return RankFailed(f"rank {rank} of {self.world} could not go on, and says why: so all stop")

    @contextlib.contextmanager
    def first_speaks(self) -> Iterator[None]:
        """What the others print within the block goes nowhere; what ends the block does not."""
        if self.is_first:
            yield
            return
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            yield

    @contextlib.contextmanager
    def naming_lost(self) -> Iterator[None]:
        """Where a collective of the block fails since a rank is gone, say which.

        Raises:
            RankLost: instead of what torch says.
        """
        try:
            yield
        except (RunError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            if self._heartbeat is None or not (lost := self._heartbeat.lost()):
                raise
            names = ", ".join(map(str, lost))
            raise RankLost(
                f"rank {names} of {self.world} no longer answers: it died (its own output says why), or "
                f"hangs; run the same command again, it continues from the last checkpoint"
            ) from error


ALONE = Ranks()


class _Heartbeat:
    """Tells the other ranks that this one lives, in a thread, and how many decisions it has come to."""

    def __init__(self, place: Place, store: Any):
        self.place, self.store, self.calls = place, store, 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def _beat(self) -> None:
        beats = 0
        while not self.done.is_set():
            try:
                self.store.set(f"heartbeat/{self.place.rank}", f"{beats} {self.calls}")
            except RuntimeError:  # the store is gone, and rank 0 with it: the next collective tells
                return
            beats += 1
            self.done.wait(HEARTBEAT)

    def stop(self) -> None:
        self.done.set()
        self.thread.join(ANSWER)

    def lost(self) -> list[int]:
        """The ranks without a heartbeat; where all have one, those that are behind. [] if none is."""
        answers: list[list[list[int]]] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                for pause in (SILENCE, 0.0):
                    answers.append([self._of(rank) for rank in range(self.place.world)])
                    time.sleep(pause)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(SILENCE + ANSWER)
        if len(answers) < 2:
            return [0]  # which keeps the store, or is on the machine that does
        before, after = answers
        others = [rank for rank in range(self.place.world) if rank != self.place.rank]
        if silent := [rank for rank in others if before[rank][0] == after[rank][0]]:
            return silent
        fewest = min(calls for _, calls in after)
        return [rank for rank in others if after[rank][1] == fewest < self.calls]

    def _of(self, rank: int) -> list[int]:
        """[beats, decisions] of a rank."""
        key = f"heartbeat/{rank}"
        return (
            [int(number) for number in self.store.get(key).split()] if self.store.check([key]) else [-1, -1]
        )


@contextlib.contextmanager
def ranks_of_run(device: torch.device, timeout: float) -> Iterator[Ranks]:
    """The ranks of a run that torchrun has started, joined while the block lasts.

    Args:
        device: the type of device that they compute on.
        timeout: seconds after which a rank that does not come to a decision counts as lost.
    Raises:
        UserError: the environment is not that of torchrun.
        RankLost: not all came.
    """
    place = launched()
    if place.world == 1:
        yield Ranks()
        return
    if missing := [name for name in ADDRESS if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE is {place.world}, but {missing[0]} is not set: start the ranks with torchrun"
        )
    import torch.distributed as dist

    # Collectives of the GPUs have more time than the decisions, which then name who is lost.
    on_gpu = device.type == "cuda"
    backend, all_have = ("cpu:gloo,cuda:nccl", 2 * timeout) if on_gpu else ("gloo", timeout)
    if on_gpu:
        torch.cuda.set_device(device_of_rank(device, place))
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=all_have)))
        if attempt := _attempt(place):
            store = dist.PrefixStore(attempt, store)
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.world, timeout=timedelta(seconds=all_have)
        )
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        raise RankLost(
            f"not all {place.world} ranks came within {timeout:,.0f} seconds: look at what the others say"
        ) from error
    default: Any = dist.distributed_c10d._get_default_store()
    heartbeat = _Heartbeat(place, default.clone())  # a connection of its own: the other may be waiting
    ranks = Ranks(place, heartbeat, group)
    try:
        yield ranks
    except BaseException as error:  # no goodbye to ranks that may be gone
        if isinstance(error, RankLost) and ranks.is_first:
            time.sleep(2 * HEARTBEAT)  # others may still ask the store that it keeps
        heartbeat.stop()
        raise
    with contextlib.suppress(RuntimeError):  # the work is done: whoever is lost now is not missed
        ranks.any(False)  # none leaves, and takes the store along, before all are done
        heartbeat.stop()
        ranks.any(False)
    dist.destroy_process_group()


def _attempt(place: Place) -> str:
    """What keeps the keys of this start of the ranks apart from those of the starts before: where torchrun on
    one machine starts them anew, they find the same store, with the addresses of those that are gone.

    On several machines it makes a new store, and counts the starts on each machine by itself.
    """
    is_all = os.environ.get("LOCAL_WORLD_SIZE") == str(place.world)
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "") if is_all else ""


def launched() -> Place:
    """The place that torchrun has given to this process. UserError where it makes no sense."""
    return place_of(os.environ, "RANK", "WORLD_SIZE", "LOCAL_RANK")


def device_of_rank(device: torch.device, place: Place) -> torch.device:
    """The GPU of a rank, by its number on its machine; the device itself for a process alone and on the CPU.

    Raises:
        UserError: a GPU is named that all would share, or there are fewer than ranks.
    """
    if place.world == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise UserError(f"device {device}: each rank takes the GPU of its number, give --device cuda")
    if place.local >= (there := torch.cuda.device_count()):
        raise UserError(
            f"rank {place.rank} has no GPU: torch sees {there} here, start as many ranks a machine"
        )
    return torch.device("cuda", place.local)

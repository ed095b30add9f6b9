"""Work that goes on beside the main thread, one job at a time."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from .errors import reason
from .progress import note


class Background:
    """Runs one job at a time in a thread of its own. The end of a `with` block waits for the job.

    A job's failure is raised by the next call, in the caller's thread; where another error ends the block, it
    is told beside that.

    Args:
        what: the job, in messages.
    """

    def __init__(self, what: str):
        self.what = what
        self._thread = ThreadPoolExecutor(1, "background")
        self._job: Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Run the job, after the one before has ended."""
        self.wait()
        self._job = self._thread.submit(job)

    def raise_if_failed(self) -> None:
        """Raise what ended the job, if it has failed by now; do not wait for it."""
        if self._job and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the end of the job, and raise what it has failed with."""
        job, self._job = self._job, None
        if job:
            job.result()

    def __enter__(self) -> "Background":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if error is None:
            self.wait()
        elif self._job and (failure := self._job.exception()):
            note(f"{self.what} failed too: {reason(failure)}")

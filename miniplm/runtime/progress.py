"""A progress bar on a terminal, plain lines in a log."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

from .text import printable

LOG_INTERVAL = 30.0  # seconds between plain lines


def note(text: str) -> None:
    """A line on stderr, above the bar if there is one."""
    tqdm.write(printable(text), file=sys.stderr)


class Progress:
    """Counts `unit`s up to `total`: a tqdm bar on a terminal, else a line on stderr every 30 s and one at the
    end, also on a terminal where TQDM_DISABLE is set.

    Use as a context manager; `update(n)` counts n more, `note(text)` shows the latest figures beside the bar.
    `done` is what an earlier run had finished (it does not count for the rate).
    """

    def __init__(self, label: str, total: int | None, unit: str = "tokens", done: int = 0) -> None:
        self.label, self.total, self.unit, self.done, self.first = label, total, unit, done, done
        self.text, self.start = "", time.monotonic()
        self.logged = self.start
        self.bar: tqdm | None = None
        if sys.stderr.isatty():
            bar = tqdm(
                total=total, initial=done, desc=label, unit=f" {unit}", unit_scale=True, dynamic_ncols=True
            )
            self.bar = None if bar.disable else bar

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        elif kind is None and self.done > self.first:
            self._line()

    def update(self, n: int) -> None:
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        elif time.monotonic() - self.logged > LOG_INTERVAL:
            self.logged = time.monotonic()
            self._line()

    def note(self, text: str) -> None:
        self.text = text
        if self.bar is not None:
            self.bar.set_postfix_str(text)

    def _line(self) -> None:
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = (self.done - self.first) / seconds
        line = (
            f"{self.label}: {self.done:,}"
            + (f" of {self.total:,}" if self.total is not None else "")
            + f" {self.unit}, {rate:,.0f}/s"
        )
        if self.total is not None and rate > 0 and self.done < self.total:
            line += f", {tqdm.format_interval((self.total - self.done) / rate)} left"
        print(line + (f", {self.text}" if self.text else ""), file=sys.stderr, flush=True)

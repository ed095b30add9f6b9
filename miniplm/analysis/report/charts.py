"""Charts as geometry: paths in a square of SIZE × SIZE, which the page stretches, and where the ticks are in
percent. The words stand in HTML beside it, so that they keep their size on a phone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

SIZE = 1000  # of the view box
LEVELS = 7  # shades of a density
MAX_POINTS = 400  # of a line

Tick = tuple[float, str]  # (percent, label)


@dataclass(frozen=True)
class Axis:
    """The numbers from `low` to `high` on one side of a chart."""

    label: str
    low: float
    high: float

    def at(self, value: float) -> float:
        """0 … SIZE."""
        return (value - self.low) / (self.high - self.low) * SIZE

    @property
    def ticks(self) -> list[Tick]:
        """About four round numbers."""
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next((m for m in (1, 2, 5) if (self.high - self.low) / (step * m) <= 5), 10)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(self.at(n * step) / SIZE * 100, f"{n * step:,.{digits}f}") for n in range(first, last + 1)]


@dataclass(frozen=True)
class Layer:
    """A path of a chart, and the classes of the style sheet that draw it."""

    style: str
    path: str


@dataclass(frozen=True)
class Chart:
    """title: in words what it shows; marker: (percent, label) of an upright line, if there is one; grid:
    whether the y axis has lines; legend: (style, words)."""

    title: str
    x: Axis
    y: Axis
    layers: Sequence[Layer]
    marker: Tick | None = None
    grid: bool = True
    legend: Sequence[tuple[str, str]] = field(default=())


def bars(heights: np.ndarray, base: np.ndarray, y: Axis) -> str:
    """Columns of these heights on top of `base`, side by side over the whole width."""
    width, parts = SIZE / len(heights), []
    for number, (height, bottom) in enumerate(zip(heights.tolist(), base.tolist(), strict=True)):
        if height:
            top = SIZE - y.at(bottom + height)
            parts.append(f"M{number * width:.1f} {top:.1f}h{width:.1f}v{y.at(height):.1f}h-{width:.1f}z")
    return "".join(parts)


def line(points: Sequence[tuple[float, float | None]], x: Axis, y: Axis) -> str:
    """Through these points; it breaks where one is None. Many are averaged in groups."""
    size = math.ceil(len(points) / MAX_POINTS) or 1
    path, pen = [], "M"
    for start in range(0, len(points), size):
        some = [(at, value) for at, value in points[start : start + size] if value is not None]
        if not some:
            pen = "M"
            continue
        at, value = (sum(part) / len(some) for part in zip(*some, strict=True))
        path.append(f"{pen}{x.at(at):.1f} {SIZE - y.at(value):.1f}")
        pen = "L"
    # a point alone is a line of no length, which round ends make a dot
    return "".join(path) + ("h0" if len(path) == 1 else "")


def density(counts: np.ndarray) -> list[Layer]:
    """A picture of counts [columns, rows]: a path for each shade, by the logarithm."""
    columns, rows = counts.shape
    scale = math.log1p(int(counts.max())) or 1.0
    shades = np.ceil(np.log1p(counts) / scale * LEVELS).astype(int)
    paths: dict[int, list[str]] = {}
    width, height = SIZE / columns, SIZE / rows
    for row in range(rows):
        start = 0
        while start < columns:
            shade, stop = int(shades[start, row]), start + 1
            while stop < columns and shades[stop, row] == shade:
                stop += 1
            if shade:
                across = (stop - start) * width
                top = SIZE - (row + 1) * height
                paths.setdefault(shade, []).append(
                    f"M{start * width:.1f} {top:.1f}h{across:.1f}v{height:.1f}h-{across:.1f}z"
                )
            start = stop
    return [Layer(f"d{shade}", "".join(parts)) for shade, parts in sorted(paths.items())]


def bounds(low: float, high: float) -> tuple[float, float]:
    """An interval that is not empty."""
    return (low, high) if high > low else (low - 0.5, low + 0.5)

"""Labels beside lines and points instead of a legend, placed so that they do not hide each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.names import short_labels
from analysis.plotting import mark

# Labels stand beside the lines where there are no more lines than this and no label is longer.
DIRECT_LINES = 6
DIRECT_LENGTH = 22

LINE_SIZE = 6.8  # points of the page
POINT_SIZE = 6.2

Box = tuple[float, float, float, float]  # left, bottom, right, top


def labelled_directly(labels: Sequence[str]) -> bool:
    """Whether lines are few and their labels short enough to stand beside them."""
    return len(labels) <= DIRECT_LINES and max(map(len, short_labels(labels).values())) <= DIRECT_LENGTH


def label_lines(
    figure: Figure, axis: Axes, ends: dict[str, tuple[float, float]], labels: Sequence[str]
) -> None:
    """Write each line's label left of its first point (x, y), apart from each other; widens the x axis.

    `labels` are all of the figure, `ends` those of this panel. Call when all limits are set.
    """
    if not ends:
        return
    short = short_labels(labels)
    figure.draw_without_rendering()  # the layout decides how large the axes are
    box = axis.get_window_extent()
    points = 72.0 / figure.dpi
    width, height = box.width * points, box.height * points  # of the axes, in points
    room = (0.6 * LINE_SIZE * max(len(short[label]) for label in ends) + 15) / width  # a share of the axes
    high = axis.get_xlim()[1]
    first = min(x for x, _ in ends.values())
    axis.set_xlim(high - (high - first) / (1 - room), high)
    heights = {
        label: float(axis.transAxes.inverted().transform(axis.transData.transform(end))[1])
        for label, end in ends.items()
    }
    edge = room - 7 / width
    for label, y in spread(heights, 1.15 * LINE_SIZE / height).items():
        colour = mark(label, labels).colour
        x_end, y_end = axis.transAxes.inverted().transform(axis.transData.transform(ends[label]))
        axis.plot(
            [edge + 1.5 / width, x_end],
            [y, y_end],
            transform=axis.transAxes,
            color=colour,
            linewidth=0.4,
            zorder=1.1,
        )
        axis.text(
            edge,
            y,
            short[label],
            transform=axis.transAxes,
            color=colour,
            fontsize=LINE_SIZE,
            ha="right",
            va="center",
        )


def label_points(
    figure: Figure,
    axis: Axes,
    points: dict[str, tuple[float, float]],
    labels: Sequence[str],
    levels: Iterable[float] = (),
) -> None:
    """Write each point's label beside it, where it covers least: points, other labels, lines at `levels`.

    `labels` are all of the figure. Call when all limits are set.
    """
    short = short_labels(labels)
    figure.draw_without_rendering()
    unit = figure.dpi / 72.0  # pixels of a point of the page
    box = axis.get_window_extent()
    frame = (box.x0, box.y0, box.x1, box.y1)
    places = {label: axis.transData.transform(point) for label, point in points.items()}
    taken = [(x - 3 * unit, y - 3 * unit, x + 3 * unit, y + 3 * unit) for x, y in places.values()]
    lines = [axis.transData.transform((1.0, level))[1] for level in levels]
    taken += [(frame[0], y - unit, frame[2], y + unit) for y in lines]
    for label in sorted(points, key=lambda label: places[label][1]):
        x, y = places[label]
        width, height = (0.6 * len(short[label]) + 0.5) * POINT_SIZE * unit, 1.05 * POINT_SIZE * unit
        # right of the point, left of it, above, below; the preferred first
        corners = [
            (x + 4.5 * unit, y - height / 2),
            (x - 4.5 * unit - width, y - height / 2),
            (x - width / 2, y + 3 * unit),
            (x - width / 2, y - 3 * unit - height),
            (x + 2 * unit, y + 2.5 * unit),
            (x + 2 * unit, y - 2.5 * unit - height),
        ]
        boxes = [(left, bottom, left + width, bottom + height) for left, bottom in corners]
        best = min(boxes, key=lambda box: _covered(box, taken, frame))
        taken.append(best)
        axis.annotate(
            short[label],
            points[label],
            xytext=((best[0] - x) / unit, (best[1] + 0.2 * height - y) / unit),
            textcoords="offset points",
            color=mark(label, labels).colour,
            fontsize=POINT_SIZE,
            annotation_clip=False,
            in_layout=False,
        )


def _covered(box: Box, taken: Sequence[Box], frame: Box) -> float:
    """Area of a box over other boxes or outside the frame."""
    inside = _common_area(box, frame)
    return (box[2] - box[0]) * (box[3] - box[1]) - inside + sum(_common_area(box, other) for other in taken)


def _common_area(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def spread(heights: dict[str, float], gap: float, low: float = 0.03, high: float = 0.97) -> dict[str, float]:
    """Heights at least `gap` apart in the same order, as near to the given ones as least squares gets."""
    names = sorted(heights, key=lambda name: heights[name])
    # Pool adjacent violators on heights less their place in the stack.
    pools: list[tuple[float, int]] = []
    for place, name in enumerate(names):
        pools.append((heights[name] - place * gap, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
    starts = [start for start, number in pools for _ in range(number)]
    top = high - (len(names) - 1) * gap
    return {
        name: min(max(start, low), max(top, low)) + place * gap
        for place, (name, start) in enumerate(zip(names, starts, strict=True))
    }

"""Final corrections of a figure before it is saved: legends that cover curves, legend entries without data, overlapping tick labels.

Overlaps depend on the data. So we measure overlaps after computing the layout. A figure that needs no correction is not changed.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis, YAxis
from matplotlib.collections import PathCollection
from matplotlib.container import BarContainer, Container, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FixedLocator
from matplotlib.transforms import Bbox, BboxBase, ScaledTranslation

KEY = "key"
"""The `gid` of an artist that has no data and only explains a line style in the legend. Such legend entries are kept."""
_LOCATIONS = (
    "upper right",
    "upper left",
    "lower left",
    "lower right",
    "center right",
    "center left",
    "lower center",
    "upper center",
)
_FRACTIONS = {"upper": 1.0, "lower": 0.0, "center": 0.5, "right": 1.0, "left": 0.0}
"""Position along the height or the width of the axes, as a fraction."""
_MAX_COVERED = 0.01
"""Largest share of a curve's length that a legend may cover."""
_POINT_SPACING = 2.0
"""Distance between the points along a curve, in pixels."""
_LEGEND_PAD_INCHES = 0.04
_MAX_COLUMNS = 2
_MIN_LABEL_GAP = 2.0
"""Smallest gap between the tick labels of an x axis, in pixels."""
_NOTHING = ("None", "none", "", " ", None)
"""Values with which matplotlib draws no line or no marker."""


def tidy(figure: Figure) -> None:
    """Correct the scales, legends and tick labels of a complete figure in place."""
    for axes in figure.axes:
        _correct_scales(axes)
        for line in axes.lines:
            _mark_isolated_points(line)
    figure.draw_without_rendering()
    if sum(_correct_legend(axes) for axes in figure.axes):  # `any` would stop after the first correction
        lay_out(figure)
    visible = [axes for axes in figure.axes if axes.get_visible()]
    if sum(_remove_overlapping_labels(axis) for axes in visible for axis in (axes.xaxis, axes.yaxis)):
        lay_out(figure)  # the layout depends on the labels


def lay_out(figure: Figure) -> None:
    """Compute the layout without drawing. This takes a third of the time of `draw_without_rendering`."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)


def drawn_points(line: Line2D) -> Float[np.ndarray, "P 2"]:
    """Return points along a drawn line in pixel coordinates, a few pixels apart.

    The line is interrupted at points that are not finite. If only marks are drawn, the points are the marks.
    """
    vertices = line.get_transform().transform(_vertices(line))
    finite = vertices[np.isfinite(vertices).all(axis=1)]
    if line.get_linestyle() in _NOTHING:
        return finite
    segments = [
        np.linspace(start, end, 2 + int(min(np.hypot(*(end - start)), 4000.0) / _POINT_SPACING))
        for start, end in itertools.pairwise(vertices)
        if np.isfinite((start, end)).all()
    ]
    return np.concatenate([*segments, finite])


def name_outside(figure: Figure, panels: Sequence[Axes], *, loc: str, ncols: int, fontsize: int) -> None:
    """Add one legend for all panels, outside of the panels. The legend has an entry for each label with visible data."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for artist, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in entries and has_data(artist):
                entries[label] = artist
    if entries:
        options: dict[str, Any] = {"loc": loc, "ncols": min(ncols, len(entries)), "fontsize": fontsize}
        figure.legend(list(entries.values()), list(entries), **options)


def has_data(artist: Artist | Container | None) -> bool:
    """Return whether any part of an artist can be seen in its axes. An artist with the `gid` `KEY` always counts as visible."""
    if isinstance(artist, ErrorbarContainer):
        return artist.lines[0] is None or has_data(artist.lines[0])
    if isinstance(artist, BarContainer):
        return any(np.isfinite(bar.get_width() * bar.get_height()) for bar in artist.patches)
    if isinstance(artist, PathCollection):
        return bool(np.isfinite(np.ma.filled(artist.get_offsets(), np.nan)).all(axis=1).any())
    if not isinstance(artist, Line2D) or artist.get_gid() == KEY or artist.axes is None:
        return True
    frame = artist.axes.get_window_extent()
    return bool(_is_inside(drawn_points(artist), frame.padded(1.0)).any())


def _correct_scales(axes: Axes) -> None:
    """Replace a logarithmic scale by a linear one if no number is positive, because then nothing would be visible."""
    if axes.get_yscale() == "log" and axes.has_data() and not np.isfinite(axes.dataLim.minposy):
        axes.set_yscale("linear")
    if axes.get_xscale() == "log" and axes.has_data() and not np.isfinite(axes.dataLim.minposx):
        axes.set_xscale("linear")


def _vertices(line: Line2D) -> Float[np.ndarray, "P 2"]:
    return np.asarray(line.get_xydata(), dtype=float).reshape(-1, 2)


def _mark_isolated_points(line: Line2D) -> None:
    """Mark the points of a line that have no finite neighbour. Without a mark they would be invisible."""
    if line.get_marker() not in _NOTHING:
        return
    is_finite = np.isfinite(_vertices(line)).all(axis=1)
    is_segment = is_finite[1:] & is_finite[:-1]
    is_isolated = is_finite & ~(np.append(is_segment, False) | np.append(False, is_segment))
    if is_isolated.any():
        line.set_marker(".")
        line.set_markersize(6)
        line.set_markevery(np.flatnonzero(is_isolated).tolist())


def _correct_legend(axes: Axes) -> bool:
    """Redraw a legend if it covers a curve or if some entries have no visible data; return whether the legend was changed.

    If no entry has visible data, the legend is removed.
    """
    legend = axes.get_legend()
    if legend is None or not axes.get_visible():
        return False
    handles = dict(zip([text.get_text() for text in legend.get_texts()], legend.legend_handles, strict=True))
    artists: dict[str, list[Artist | Container]] = {}
    for artist, label in zip(*axes.get_legend_handles_labels(), strict=True):
        artists.setdefault(label, []).append(artist)
    shown = {
        label: handle
        for label, handle in handles.items()
        if handle is not None and any(has_data(artist) for artist in artists.get(label, [handle]))
    }
    if not shown:
        legend.remove()
        return True
    curves = list(_visible_points(axes))
    if len(shown) == len(handles) and _covered_share(legend.get_window_extent(), curves) <= _MAX_COVERED:
        return False
    _move_legend(axes, legend, shown, curves)
    return True


def _move_legend(axes: Axes, legend: Legend, handles: dict[str, Artist], curves: list[np.ndarray]) -> None:
    """Redraw a legend at the location where it covers the curves least.

    If the legend covers too much at every location, draw it below the axes.
    """
    frame, size = axes.get_window_extent(), legend.get_window_extent()
    options: dict[str, Any] = {
        "handles": list(handles.values()),
        "labels": list(handles),
        "fontsize": legend.get_texts()[0].get_fontsize(),
        "title": legend.get_title().get_text() or None,
        "title_fontsize": legend.get_title().get_fontsize(),
    }
    ncols: int = legend._ncols  # type: ignore[attr-defined]  # matplotlib has no public way to ask
    height = size.height * math.ceil(len(handles) / ncols) / max(1, math.ceil(len(legend.get_texts()) / ncols))
    covered = {
        location: _covered_share(_legend_box(location, frame, size.width, height), curves) for location in _LOCATIONS
    }
    best = min(covered, key=lambda location: covered[location])
    if covered[best] <= _MAX_COVERED and size.width < frame.width and height < frame.height:
        axes.legend(loc=best, ncols=ncols, **options)  # type: ignore[call-overload]
        return
    labels = axes.xaxis.get_tightbbox()
    drop = (frame.y0 - labels.y0 if labels is not None else 0.0) / axes.figure.dpi + _LEGEND_PAD_INCHES
    axes.legend(
        loc="upper center",
        ncols=_MAX_COLUMNS if 2 * size.width / ncols < 1.3 * frame.width else 1,
        bbox_to_anchor=(0.5, 0.0),
        bbox_transform=axes.transAxes + ScaledTranslation(0, -drop, axes.figure.dpi_scale_trans),
        borderaxespad=0.0,
        **options,
    )


def _legend_box(location: str, frame: BboxBase, width: float, height: float) -> Bbox:
    """Return the box that a legend of a given size fills at a location inside the axes."""
    vertical, horizontal = location.split()
    pad = 0.01 * frame.height
    x = frame.x0 + pad + _FRACTIONS[horizontal] * (frame.width - width - 2 * pad)
    y = frame.y0 + pad + _FRACTIONS[vertical] * (frame.height - height - 2 * pad)
    return Bbox.from_bounds(x, y, width, height)


def _visible_points(axes: Axes) -> Iterator[np.ndarray]:
    """Yield the points, in pixels, of each curve and each group of marks inside these axes, and the corners of each text.

    Points of other axes that overlap these axes, such as twin axes, are included.
    """
    frame = axes.get_window_extent()
    for other in axes.figure.axes:
        if not other.get_visible() or not other.get_window_extent().overlaps(frame):
            continue
        for line in other.lines:
            if line.get_visible() and not _is_reference(line):
                points = drawn_points(line)
                yield points[_is_inside(points, frame)]
        for collection in other.collections:
            if isinstance(collection, PathCollection) and collection.get_visible():
                points = collection.get_offset_transform().transform(np.ma.filled(collection.get_offsets(), np.nan))
                yield points[_is_inside(points, frame)]
        for text in other.texts:
            # We call the method of `Text`, because the method of an annotation would include its arrow.
            box = Text.get_window_extent(text)
            yield box.corners()


def _is_reference(line: Line2D) -> bool:
    """Return whether a line spans the axes from edge to edge, such as the line of `axhline`. A legend may cover a part of such a line."""
    return len(_vertices(line)) == 2 and line.axes is not None and line.get_transform() != line.axes.transData


def _covered_share(box: BboxBase, curves: list[np.ndarray]) -> float:
    """Compute for each curve the share of its points that lie in a box, and return the largest share."""
    return max((float(_is_inside(points, box).mean()) for points in curves if len(points)), default=0.0)


def _is_inside(points: Float[np.ndarray, "P 2"], box: BboxBase) -> Bool[np.ndarray, " P"]:
    with np.errstate(invalid="ignore"):
        return np.asarray(np.logical_and(points >= box.min, points <= box.max).all(axis=1))


def _remove_overlapping_labels(axis: XAxis | YAxis) -> bool:
    """Remove tick labels that overlap other labels, minor labels first; return whether any label was removed."""
    low, high = sorted(axis.get_view_interval())
    is_horizontal = axis.axis_name == "x"
    gap = _MIN_LABEL_GAP if is_horizontal else 0.0
    intervals: list[tuple[float, float]] = []
    removed: dict[bool, set[float]] = {False: set(), True: set()}
    for is_minor in (False, True):
        for tick in _ticks(axis, is_minor):
            location = float(tick.get_loc())
            if not (low <= location <= high and tick.label1.get_visible() and tick.label1.get_text()):
                continue
            box = tick.label1.get_window_extent()
            start, end = (box.x0, box.x1) if is_horizontal else (box.y0, box.y1)
            if any(start < other_end + gap and other_start < end + gap for other_start, other_end in intervals):
                removed[is_minor].add(location)
            else:
                intervals.append((start, end))
    for is_minor, locations in removed.items():
        if locations:
            _fix_ticks(axis, is_minor, locations)
    return any(removed.values())


def _ticks(axis: Axis, is_minor: bool) -> list[Any]:
    return axis.get_minor_ticks() if is_minor else axis.get_major_ticks()


def _fix_ticks(axis: Axis, is_minor: bool, removed: set[float]) -> None:
    """Fix the ticks of an axis at their present locations, without labels at the removed locations."""
    labels = {float(tick.get_loc()): tick.label1.get_text() for tick in _ticks(axis, is_minor)}
    formatter = FixedFormatter(["" if location in removed else label for location, label in labels.items()])
    formatter.set_offset_string((axis.get_minor_formatter() if is_minor else axis.get_major_formatter()).get_offset())
    (axis.set_minor_locator if is_minor else axis.set_major_locator)(FixedLocator(list(labels)))
    (axis.set_minor_formatter if is_minor else axis.set_major_formatter)(formatter)

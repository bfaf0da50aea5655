"""Last touches before a figure is saved: legends clear of the data, no entry without a mark, no tick label over another.

What overlaps depends on the data, so it is looked at after the layout is known. A figure without faults stays as it is.
"""

import itertools
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
"""The `gid` of an artist without data that explains a line style; its legend entry stays."""
_PLACES = (
    "upper right",
    "upper left",
    "lower left",
    "lower right",
    "center right",
    "center left",
    "lower center",
    "upper center",
)
_CORNERS = {"upper": 1.0, "lower": 0.0, "center": 0.5, "right": 1.0, "left": 0.0}
_MAX_COVERED = 0.01
"""Share of a curve's length that a legend may cover."""
_PIXELS_APART = 2.0
_PAD_INCHES = 0.04
_MAX_COLUMNS = 2
_MIN_GAP = 2.0
"""Pixels between tick labels."""


def tidy(figure: Figure) -> None:
    """Mend the legends and tick labels of a complete figure in place."""
    for axes in figure.axes:
        _mend_scale(axes)
        for line in axes.lines:
            _mark_lone_points(line)
    figure.draw_without_rendering()
    if sum(_mend_legends(axes) for axes in figure.axes):
        figure.draw_without_rendering()
    if sum(_thin_labels(axis) for axes in figure.axes if axes.get_visible() for axis in (axes.xaxis, axes.yaxis)):
        figure.draw_without_rendering()  # the layout depends on the labels


def drawn_points(line: Line2D) -> Float[np.ndarray, "P 2"]:
    """Return points along a line as it is drawn, a few pixels apart, in pixels; points that are not finite interrupt it."""
    places = line.get_transform().transform(_places(line))
    alone = places[np.isfinite(places).all(axis=1)]  # marks
    if line.get_linestyle() in ("None", "none", "", " "):
        return alone
    parts = [
        np.linspace(start, end, 2 + int(min(np.hypot(*(end - start)), 4000.0) / _PIXELS_APART))
        for start, end in itertools.pairwise(places)
        if np.isfinite((start, end)).all()
    ]
    return np.concatenate([*parts, alone])


def name_outside(figure: Figure, panels: Sequence[Axes], *, loc: str, ncols: int, fontsize: int) -> None:
    """Add one legend beside the panels, an entry for each label that has something to show in any of them."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for artist, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in entries and has_data(artist):
                entries[label] = artist
    if entries:
        columns = min(ncols, len(entries))
        options: dict[str, Any] = {"loc": loc, "ncols": columns, "fontsize": fontsize}
        figure.legend(list(entries.values()), list(entries), **options)


def has_data(artist: Artist | Container | None) -> bool:
    """Whether there is anything of an artist to see in its axes; a key counts."""
    if isinstance(artist, ErrorbarContainer):
        return artist.lines[0] is None or has_data(artist.lines[0])
    if isinstance(artist, BarContainer):
        return any(np.isfinite(bar.get_width() * bar.get_height()) for bar in artist.patches)
    if isinstance(artist, PathCollection):
        return bool(np.isfinite(np.ma.filled(artist.get_offsets(), np.nan)).all(axis=1).any())
    if not isinstance(artist, Line2D) or artist.get_gid() == KEY or artist.axes is None:
        return True
    frame = artist.axes.get_window_extent()
    return bool(_inside(drawn_points(artist), frame.padded(1.0)).any())


def _mend_scale(axes: Axes) -> None:
    """Take a logarithmic scale away where nothing is positive, which matplotlib cannot draw."""
    if axes.get_yscale() == "log" and axes.has_data() and not np.isfinite(axes.dataLim.minposy):
        axes.set_yscale("linear")
    if axes.get_xscale() == "log" and axes.has_data() and not np.isfinite(axes.dataLim.minposx):
        axes.set_xscale("linear")


def _places(line: Line2D) -> Float[np.ndarray, "P 2"]:
    return np.asarray(line.get_xydata(), dtype=float).reshape(-1, 2)


def _mark_lone_points(line: Line2D) -> None:
    """Give a dot to the points of a line that have no finite neighbour: a line through one point cannot be seen."""
    if line.get_marker() not in ("None", "none", "", " ", None):
        return
    finite = np.isfinite(_places(line)).all(axis=1)
    joined = finite[1:] & finite[:-1]
    is_lone = finite & ~(np.append(joined, False) | np.append(False, joined))
    if is_lone.any():
        line.set_marker(".")
        line.set_markersize(6)
        line.set_markevery(np.flatnonzero(is_lone).tolist())


def _mend_legends(axes: Axes) -> bool:
    """Redraw a legend with entries without a mark or over a curve; return whether it was."""
    legend = axes.get_legend()
    if legend is None or not axes.get_visible():
        return False
    handles = dict(zip([text.get_text() for text in legend.get_texts()], legend.legend_handles, strict=True))
    artists: dict[str, list[Artist | Container]] = {}
    for artist, label in zip(*axes.get_legend_handles_labels(), strict=True):
        artists.setdefault(label, []).append(artist)
    kept = {
        label: handle
        for label, handle in handles.items()
        if handle is not None and any(has_data(artist) for artist in artists.get(label, [handle]))
    }
    is_whole = len(kept) == len(handles)
    if not kept:
        legend.remove()
        return True
    curves = list(_curves(axes))
    if is_whole and _covered(legend.get_window_extent(), curves) <= _MAX_COVERED:
        return False
    _place(axes, legend, kept, curves)
    return True


def _place(axes: Axes, legend: Legend, handles: dict[str, Artist], curves: list[np.ndarray]) -> None:
    """Put a legend where it covers the least, or below the axes if it covers a curve everywhere."""
    frame, size = axes.get_window_extent(), legend.get_window_extent()
    options: dict[str, Any] = {
        "handles": list(handles.values()),
        "labels": list(handles),
        "fontsize": legend.get_texts()[0].get_fontsize(),
        "title": legend.get_title().get_text() or None,
        "title_fontsize": legend.get_title().get_fontsize(),
    }
    height = size.height * len(handles) / max(1, len(legend.get_texts()))
    boxes = {place: _box(place, frame, size.width, height) for place in _PLACES}
    covered = {place: _covered(box, curves) for place, box in boxes.items()}
    best = min(covered, key=lambda place: covered[place])
    if covered[best] <= _MAX_COVERED and size.width < frame.width and height < frame.height:
        axes.legend(loc=best, **options)  # type: ignore[call-overload]
        return
    below = axes.xaxis.get_tightbbox()
    drop = (frame.y0 - below.y0 if below is not None else 0.0) / axes.figure.dpi + _PAD_INCHES
    axes.legend(
        loc="upper center",
        ncols=_MAX_COLUMNS if 2 * size.width < 1.3 * frame.width else 1,
        bbox_to_anchor=(0.5, 0.0),
        bbox_transform=axes.transAxes + ScaledTranslation(0, -drop, axes.figure.dpi_scale_trans),
        borderaxespad=0.0,
        **options,
    )


def _box(place: str, frame: BboxBase, width: float, height: float) -> Bbox:
    """The box of a legend of this size at a place inside the axes."""
    vertical, horizontal = place.split()
    pad = 0.01 * frame.height
    x = frame.x0 + pad + (_CORNERS[horizontal]) * (frame.width - width - 2 * pad)
    y = frame.y0 + pad + _CORNERS[vertical] * (frame.height - height - 2 * pad)
    return Bbox.from_bounds(x, y, width, height)


def _curves(axes: Axes) -> Iterator[np.ndarray]:
    """The visible points of everything drawn in these axes or in a twin of them, and of their texts."""
    frame = axes.get_window_extent()
    for other in axes.figure.axes:
        if not other.get_visible() or not other.get_window_extent().overlaps(frame):
            continue
        for line in other.lines:
            points = drawn_points(line)
            points = points[_inside(points, frame)] if line.get_visible() else points[:0]
            if len(points) and not _is_reference(line):
                yield points
        for collection in other.collections:
            if isinstance(collection, PathCollection) and collection.get_visible():
                points = collection.get_offset_transform().transform(np.ma.filled(collection.get_offsets(), np.nan))
                yield points[_inside(points, frame)]
        for text in other.texts:
            box = Text.get_window_extent(text)  # without an arrow
            yield np.array([[x, y] for x in (box.x0, box.x1) for y in (box.y0, box.y1)])


def _is_reference(line: Line2D) -> bool:
    """Whether it is a straight line from edge to edge, of which a legend may hide a part."""
    return len(_places(line)) == 2 and line.axes is not None and line.get_transform() != line.axes.transData


def _covered(box: BboxBase, curves: list[np.ndarray]) -> float:
    """The largest share of a curve's points that lies in a box."""
    return max((float(_inside(points, box).mean()) for points in curves if len(points)), default=0.0)


def _inside(points: Float[np.ndarray, "P 2"], box: BboxBase) -> Bool[np.ndarray, " P"]:
    with np.errstate(invalid="ignore"):
        return np.asarray(np.logical_and(points >= box.min, points <= box.max).all(axis=1))


def _thin_labels(axis: XAxis | YAxis) -> int:
    """Blank tick labels that overlap others, minor ones first; return how many."""
    low, high = sorted(axis.get_view_interval())
    which = 0 if axis.axis_name == "x" else 1
    boxes: list[tuple[float, float]] = []
    dropped: dict[bool, set[float]] = {False: set(), True: set()}
    for is_minor in (False, True):
        for tick in axis.get_minor_ticks() if is_minor else axis.get_major_ticks():
            place = float(tick.get_loc())
            if not (low <= place <= high and tick.label1.get_visible() and tick.label1.get_text()):
                continue
            box = tick.label1.get_window_extent()
            ends = (box.x0, box.x1) if which == 0 else (box.y0, box.y1)
            gap = _MIN_GAP if which == 0 else 0.0
            if any(ends[0] < other[1] + gap and other[0] < ends[1] + gap for other in boxes):
                dropped[is_minor].add(place)
            else:
                boxes.append(ends)
    for is_minor, places in dropped.items():
        if places:
            _blank(axis, is_minor, places)
    return sum(map(len, dropped.values()))


def _blank(axis: Axis, is_minor: bool, dropped: set[float]) -> None:
    """Fix an axis's ticks as they are, those at some places without a label."""
    ticks = axis.get_minor_ticks() if is_minor else axis.get_major_ticks()
    formatter = axis.get_minor_formatter() if is_minor else axis.get_major_formatter()
    places = [float(tick.get_loc()) for tick in ticks]
    fixed = FixedFormatter(
        ["" if place in dropped else tick.label1.get_text() for tick, place in zip(ticks, places, strict=True)]
    )
    fixed.set_offset_string(formatter.get_offset())
    (axis.set_minor_locator if is_minor else axis.set_major_locator)(FixedLocator(places))
    (axis.set_minor_formatter if is_minor else axis.set_major_formatter)(fixed)

"""Find faults that any figure can have, from the positions of its parts in pixels after the layout. Each fault is a sentence.

- A curve has finite data, but no part of it is inside the axes.
- A legend has an entry for something that is not visible.
- Tick labels overlap, or a text extends beyond the figure.
- A legend covers data.
"""

import itertools

import numpy as np
from matplotlib.collections import PathCollection
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.lines import Line2D
from matplotlib.text import Text

MAX_COVERED = 0.05
"""Largest share of a curve that a legend may cover."""


def faults(figure, *, tidied=True):
    """Return every fault of a figure as it would be saved, or as it was drawn if not `tidied`."""
    from icl.plotting.tidying import tidy

    if tidied:
        tidy(figure)
    figure.draw_without_rendering()
    return [
        f"{axes.get_title() or axes.get_ylabel() or 'axes'}: {fault}"
        for axes in figure.axes
        if axes.get_visible()
        for check in (_lost_curves, _empty_entries, _label_clashes, _text_clashes, _covered_curves)
        for fault in check(axes)
    ] + [*_figure_entries(figure), *_texts_outside(figure)]


def _along(line):
    """Return many points along a line, in pixels."""
    xy = np.array(line.get_xydata(), dtype=float)
    if not len(xy):
        return xy.reshape(0, 2)
    xy = line.get_transform().transform(xy)
    pieces = [xy]
    if line.get_linestyle() not in ("None", "none", "", " "):
        pieces += [np.linspace(a, b, 200) for a, b in itertools.pairwise(xy) if np.isfinite([a, b]).all()]
    points = np.concatenate(pieces)
    return points[np.isfinite(points).all(axis=1)]


def _within(points, box, room=0.0):
    return (
        (points[:, 0] >= box.x0 - room)
        & (points[:, 0] <= box.x1 + room)
        & (points[:, 1] >= box.y0 - room)
        & (points[:, 1] <= box.y1 + room)
    )


def _has_segment(line):
    finite = np.isfinite(np.array(line.get_xydata(), dtype=float).reshape(-1, 2)).all(axis=1)
    return bool((finite[1:] & finite[:-1]).any())


def _is_seen(artist):
    if isinstance(artist, ErrorbarContainer):
        return artist.lines[0] is None or _is_seen(artist.lines[0])
    if isinstance(artist, BarContainer):
        return any(np.isfinite(bar.get_width() * bar.get_height()) for bar in artist.patches)
    if not isinstance(artist, Line2D) or artist.axes is None:
        return True
    points = _along(artist)
    has_marks = artist.get_marker() not in ("None", "none", "", " ", None)
    if not has_marks and not _has_segment(artist):
        return False
    return artist.get_visible() and len(points) > 0 and bool(_within(points, artist.axes.bbox, 1.0).any())


def _lost_curves(axes):
    bars = [container for container in axes.containers if isinstance(container, ErrorbarContainer)]
    caps = {
        id(cap) for container in bars for cap in container.lines[1]
    }  # an error bar may extend beyond a logarithmic axis
    for line in axes.lines:
        if id(line) in caps:
            continue
        is_said = str(line.get_label()).endswith(
            (", above the axis limits)", ", below the axis limits)")
        )  # the label says where the curve lies
        if line.get_visible() and len(_along(line)) and not _is_seen(line) and not is_said:
            yield f"the curve {line.get_label()!r} is outside the axes"


def _is_key(artist):
    """Return whether a legend entry only explains a line style, and so needs no data."""
    return isinstance(artist, Line2D) and artist.get_gid() == "key"


def _entries(axes):
    return dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))


def _empty_entries(axes):
    legend = axes.get_legend()
    artists = {}
    for artist, label in zip(*axes.get_legend_handles_labels(), strict=True):
        artists.setdefault(label, []).append(artist)
    for text in legend.get_texts() if legend else ():
        own = artists.get(text.get_text(), [])
        is_said = text.get_text().endswith((", above the axis limits)", ", below the axis limits)"))
        if own and not is_said and not any(_is_seen(artist) or _is_key(artist) for artist in own):
            yield f"the legend's entry {text.get_text()!r} has nothing to show"
    if legend and not legend.get_texts():
        yield "the legend is empty"


def _figure_entries(figure):
    artists = {}
    for axes in figure.axes:
        for artist, label in zip(*axes.get_legend_handles_labels(), strict=True):
            artists.setdefault(label, []).append(artist)
    for legend in figure.legends:
        for text in legend.get_texts():
            own = artists.get(text.get_text(), [])
            if own and not any(_is_seen(artist) or _is_key(artist) for artist in own):
                yield f"the figure's legend entry {text.get_text()!r} has nothing to show"


def _label_clashes(axes):
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        labels = [
            tick.label1
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
            if low <= tick.get_loc() <= high and tick.label1.get_visible() and tick.label1.get_text()
        ]
        for one, other in itertools.combinations(labels, 2):
            a, b = one.get_window_extent(), other.get_window_extent()
            if min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5 * min(
                a.height, b.height
            ):
                yield f"the {axis.axis_name} tick labels {one.get_text()!r} and {other.get_text()!r} overlap"
            elif axis.axis_name == "x" and min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and abs(a.y0 - b.y0) < 6:
                yield f"the x tick labels {one.get_text()!r} and {other.get_text()!r} overlap"


def _text_clashes(axes):
    shown = [
        (text.get_text(), Text.get_window_extent(text)) for text in axes.texts if text.get_visible() and text.get_text()
    ]
    for (one, a), (other, b) in itertools.combinations(shown, 2):
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.3 * min(a.height, b.height):
            yield f"the texts {one!r} and {other!r} overlap"


def _covered_curves(axes):
    legend = axes.get_legend()
    if legend is None:
        return
    box = legend.get_window_extent()
    for line in axes.lines:
        points = _along(line)
        shown = points[_within(points, axes.bbox)]
        is_edge_to_edge = len(line.get_xdata()) == 2 and line.get_transform() != axes.transData
        if len(shown) and not is_edge_to_edge and _within(shown, box).mean() > MAX_COVERED:
            yield f"the legend covers {_within(shown, box).mean():.0%} of the curve {line.get_label()!r}"
    for collection in axes.collections:
        if isinstance(collection, PathCollection) and collection.get_visible():
            points = collection.get_offset_transform().transform(np.ma.filled(collection.get_offsets(), np.nan))
            shown = points[_within(points, axes.bbox)]
            if len(shown) and _within(shown, box).mean() > MAX_COVERED:
                yield f"the legend covers {_within(shown, box).mean():.0%} of the points"


def _texts_outside(figure):
    frame = figure.bbox
    titles = [axes.title for axes in figure.axes if axes.get_visible()]
    for text in [*titles, figure._suptitle, *(t for axes in figure.axes if axes.get_visible() for t in axes.texts)]:
        if text is not None and text.get_text() and text.get_visible():
            box = text.get_window_extent()
            if not (
                box.x0 >= frame.x0 - 1 and box.x1 <= frame.x1 + 1 and box.y0 >= frame.y0 - 1 and box.y1 <= frame.y1 + 1
            ):
                yield f"the text {text.get_text()!r} leaves the figure"
    for one, other in itertools.combinations(titles, 2):
        if one.get_text() and other.get_text() and one.get_window_extent().overlaps(other.get_window_extent()):
            yield f"the titles {one.get_text()!r} and {other.get_text()!r} overlap"

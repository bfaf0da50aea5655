"""Cusps, vertices and forms of a trajectory, each held against other smoothing widths.

A developmental form (Hoogland et al. 2024, section 3.2) is a time t0 and a point f of component space such that in every
plane of two components the curve has a cusp at t0, at f's projection, or a vertex whose osculating circle has its centre
there. Candidates: all planes of the first three components have a cusp or a vertex within one kernel width of each other.
The planes give each coordinate of f twice; `mismatch` is the largest difference, over the circles' mean radius (at least
a twentieth of the trajectory's extent). A candidate is in doubt unless kernels two thirds and one and a half times as wide
show it, too; its standard error is half the range of the times they give. Whoever looks for forms finds some,
in random walks as well, whose components are smooth curves with vertices and cusps. So those of walks with the run's own
steps (`principal_components.flipped_walks`) are counted, too, and while a run has no more than the richest of 19 walks,
all of its kind are in doubt.
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from icl.analysis.essential_dynamics.plane_curves import (
    Candidate,
    Kind,
    Smooth,
    candidates,
    fine_grid,
    log_time,
    smooth,
)

PLANES = ((0, 1), (0, 2), (1, 2))
_FACTORS = (2 / 3, 3 / 2)
_MAX_MISMATCH = 0.25


class Curves(NamedTuple):
    """Curves of one time axis under three kernels."""

    middle: Smooth
    others: tuple[Smooth, ...]

    def select(self, columns: slice) -> "Curves":
        """Some of the components."""
        return Curves(_select(self.middle, columns), tuple(_select(one, columns) for one in self.others))


class Judged(NamedTuple):
    """A cusp or a vertex, and what speaks against it."""

    kind: Kind
    plane: tuple[int, int]
    time: float
    stderr: float
    """Half the range of times over smoothing widths; NaN if only one shows it."""
    point: tuple[float, float]
    radius: float
    width: float
    """Of the kernel there."""
    reasons: str


class Form(NamedTuple):
    """A form candidate."""

    time: float
    stderr: float
    """Half the range of times over the planes."""
    point: Float[np.ndarray, "3"]
    mismatch: float
    reasons: str


class Shapes(NamedTuple):
    """The smooth curve of one run and what was seen in it."""

    curve: Smooth
    places: Float[np.ndarray, " S"]
    """The checkpoints' log times."""
    candidates: list[Judged]
    forms: list[Form]
    in_walks: dict[str, list[int]]
    """How many cusps, vertices and forms each walk has that are not in doubt."""


def find_shapes(
    steps: Int[np.ndarray, " S"],
    scores: Float[np.ndarray, "S C"],
    walks: Float[np.ndarray, "w S c"],
    *,
    bandwidth: float,
) -> Shapes:
    """The smooth curve through the scores of one run, its cusps, vertices and forms, and those of walks beside it."""
    times, count, num_axes = log_time(steps), scores.shape[1], min(3, walks.shape[2])
    together = np.concatenate([scores, *walks[:, :, :num_axes]], axis=1)
    curves = smooth_by_all(times, together, bandwidth=bandwidth)
    starts = range(count, together.shape[1], num_axes) if num_axes else ()
    candidates, forms = _look(curves.select(slice(count)), scores)
    in_walks: dict[str, list[int]] = {kind: [] for kind in ("cusp", "vertex", "form")}
    for start in starts:
        columns = slice(start, start + num_axes)
        for kind, number in _count(*_look(curves.select(columns), together[:, columns])).items():
            in_walks[kind].append(number)
    few = {kind for kind, number in _count(candidates, forms).items() if number <= max(in_walks[kind], default=-1)}
    doubt = "random walks of the run's own steps show as many"
    return Shapes(
        curves.select(slice(count)).middle,
        times,
        [one._replace(reasons=one.reasons or doubt) if one.kind in few else one for one in candidates],
        [one._replace(reasons=one.reasons or doubt) if "form" in few else one for one in forms],
        in_walks,
    )


def planes(num_components: int) -> list[tuple[int, int]]:
    """Those of the first three components that exist."""
    return [plane for plane in PLANES if max(plane) < num_components]


def smooth_by_all(times: Float[np.ndarray, " S"], values: Float[np.ndarray, "S C"], *, bandwidth: float) -> Curves:
    """Smooth under the stated kernel and those to compare with; many curves cost little more than one."""
    grid = fine_grid(times, bandwidth=bandwidth)
    middle = smooth(times, values, grid, bandwidth=bandwidth)
    return Curves(middle, tuple(smooth(times, values, grid, bandwidth=bandwidth, factor=one) for one in _FACTORS))


def judged_candidates(curves: Curves) -> list[Judged]:
    """The candidates of a curve in every plane of its first three components, compared with those of other kernels."""
    found = []
    for plane in planes(curves.middle.noise.shape[1]):
        elsewhere = [candidates(other, plane) for other in curves.others]
        found += [_judge(one, plane, curves.middle, elsewhere) for one in candidates(curves.middle, plane)]
    return found


def find_forms(judged: Sequence[Judged], *, extent: float) -> list[Form]:
    """The times at which all three planes have a candidate; each serves one form at most, the tightest first.

    Args:
        judged: Of `judged_candidates`.
        extent: The size of the trajectory.
    """
    by_plane = [[one for one in judged if one.plane == plane] for plane in PLANES]
    groups = sorted((group for group in product(*by_plane) if _spread(group) <= group[0].width), key=_spread)
    forms, taken = [], set[Judged]()
    for group in groups:
        if taken.isdisjoint(group):
            taken |= set(group)
            forms.append(_form(group, extent))
    return sorted(forms, key=lambda form: form.time)


def _look(curves: Curves, scores: Float[np.ndarray, "S C"]) -> tuple[list[Judged], list[Form]]:
    candidates = judged_candidates(curves)
    return candidates, find_forms(candidates, extent=float(np.ptp(scores, axis=0).max()))


def _count(candidates: Sequence[Judged], forms: Sequence[Form]) -> dict[str, int]:
    """What is not in doubt, by kind."""
    kinds = [one.kind for one in candidates if not one.reasons]
    return {"cusp": kinds.count("cusp"), "vertex": kinds.count("vertex"), "form": sum(not one.reasons for one in forms)}


def _select(curve: Smooth, columns: slice) -> Smooth:
    return curve._replace(derivatives=curve.derivatives[:, :, columns], noise=curve.noise[:, columns])


def _judge(one: Candidate, plane: tuple[int, int], curve: Smooth, elsewhere: Sequence[Sequence[Candidate]]) -> Judged:
    width = float(np.interp(one.time, curve.times, curve.widths))
    times, missing = [one.time], []
    for factor, others in zip(_FACTORS, elsewhere, strict=True):
        near = [other.time for other in others if other.kind == one.kind and abs(other.time - one.time) <= width]
        if near:
            times.append(min(near, key=lambda time: abs(time - one.time)))
        else:
            missing.append(f"{factor:.2g}")
    stderr = (max(times) - min(times)) / 2 if len(times) > 1 else math.nan
    reasons = f"not seen by a kernel {' or '.join(missing)} times as wide" if missing else ""
    return Judged(one.kind, plane, one.time, stderr, one.point, one.radius, width, reasons)


def _form(group: Sequence[Judged], extent: float) -> Form:
    pairs = [[one.point[one.plane.index(axis)] for one in group if axis in one.plane] for axis in range(3)]
    radii = [one.radius for one in group if one.kind == "vertex"]
    scale = max(float(np.mean(radii)) if radii else 0.0, extent / 20)
    mismatch = max(abs(first - second) for first, second in pairs) / scale
    reasons = [
        f"its {one.kind} in PC{one.plane[0] + 1}-PC{one.plane[1] + 1} is in doubt" for one in group if one.reasons
    ]
    if mismatch > _MAX_MISMATCH:
        reasons.append(f"the planes place it {mismatch:.2g} radii apart")
    time = float(np.mean([one.time for one in group]))
    return Form(time, _spread(group) / 2, np.array([np.mean(pair) for pair in pairs]), mismatch, "; ".join(reasons))


def _spread(group: Sequence[Judged]) -> float:
    times = [one.time for one in group]
    return max(times) - min(times)

"""Find cusps, vertices and forms of a trajectory, and check whether other smoothing widths and random walks show them too.

A developmental form (Hoogland et al. 2024, section 3.2) is a time t0 and a point f of component space. In every plane
spanned by two components, the curve has a cusp or a vertex at t0. The cusp, or the centre of the vertex's osculating
circle, lies at the projection of f. We use the three planes spanned by two of the first three components. We report a
form if each of these planes has a cusp or a vertex, and if the three times lie within one kernel width of each other.
Each component is in two of the three planes, so each coordinate of f has two values. `mismatch` is the largest
difference between the two values of a coordinate, divided by the mean radius of the osculating circles. If this mean
radius is smaller than 1/20 of the trajectory's extent, we divide by 1/20 of the extent instead. The extent is the
largest range of the scores in one component. A form is `suspect` if its mismatch exceeds `_MAX_MISMATCH`, or if one of
its cusps or vertices is `suspect`.

A cusp or vertex is `suspect` if it disappears when the kernel is 2/3 or 3/2 times as wide. The standard error of its
time is half the range of the times with the three kernels. Random walks also have cusps, vertices and forms, because
their components are smooth curves. So we count the cusps, vertices and forms of 19 random walks that are made from the
run's own steps (`principal_components.flipped_walks`). If one of these walks has at least as many cusps as the run, all
cusps of the run are `suspect`. The same rule holds for vertices and for forms. Cusps, vertices and forms that are
`suspect` for another reason are not counted.
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
    """A curve that is smoothed three times: with the chosen kernel, with a narrower kernel and with a wider kernel."""

    main: Smooth
    others: tuple[Smooth, ...]

    def select(self, columns: slice) -> "Curves":
        """Return the curves of the selected components."""
        main, *others = (
            curve._replace(derivatives=curve.derivatives[:, :, columns], noise=curve.noise[:, columns])
            for curve in (self.main, *self.others)
        )
        return Curves(main, tuple(others))


class JudgedCandidate(NamedTuple):
    """A cusp or a vertex, and reasons to doubt it."""

    kind: Kind
    plane: tuple[int, int]
    time: float
    stderr: float
    """Uncertainty of the time: half the range of the times with different kernel widths; NaN if the shape appears with only one width."""
    point: tuple[float, float]
    radius: float
    width: float
    """Kernel width at the time of the cusp or vertex."""
    reasons: str


class Form(NamedTuple):
    """A form, and reasons to doubt it."""

    time: float
    stderr: float
    """Uncertainty of the time: half the range of the times at which the form appears in the different planes."""
    point: Float[np.ndarray, "3"]
    mismatch: float
    reasons: str


class Shapes(NamedTuple):
    """The smooth curve of one run, with its cusps, vertices and forms."""

    curve: Smooth
    times: Float[np.ndarray, " S"]
    """Log times of the checkpoints."""
    candidates: list[JudgedCandidate]
    forms: list[Form]
    in_walks: dict[str, list[int]]
    """Numbers of cusps, vertices and forms in each walk. Shapes that are `suspect` are not counted."""


def find_shapes(
    steps: Int[np.ndarray, " S"],
    scores: Float[np.ndarray, "S C"],
    walks: Float[np.ndarray, "w S c"],
    *,
    bandwidth: float,
) -> Shapes:
    """Smooth the scores of one run, find its cusps, vertices and forms, and count the same shapes in random walks."""
    times, count, num_axes = log_time(steps), scores.shape[1], min(3, walks.shape[2])
    # Smoothing many curves at once costs little more than smoothing one.
    together = np.concatenate([scores, *walks[:, :, :num_axes]], axis=1)
    curves = smooth_by_all(times, together, bandwidth=bandwidth)
    candidates, forms = _find_all(curves.select(slice(count)), scores)
    in_walks: dict[str, list[int]] = {kind: [] for kind in ("cusp", "vertex", "form")}
    for start in range(count, together.shape[1], num_axes) if num_axes else ():
        columns = slice(start, start + num_axes)
        for kind, number in _num_certain(*_find_all(curves.select(columns), together[:, columns])).items():
            in_walks[kind].append(number)
    numbers = _num_certain(candidates, forms)
    doubtful_kinds = {kind for kind, number in numbers.items() if number <= max(in_walks[kind], default=-1)}
    doubt = "random walks made from the run's own steps show as many"
    for index, candidate in enumerate(candidates):
        if candidate.kind in doubtful_kinds:
            candidates[index] = candidate._replace(reasons=candidate.reasons or doubt)
    if "form" in doubtful_kinds:
        forms = [form._replace(reasons=form.reasons or doubt) for form in forms]
    return Shapes(curves.select(slice(count)).main, times, candidates, forms, in_walks)


def planes(num_components: int) -> list[tuple[int, int]]:
    """Return the planes spanned by two of the first three components. Components that do not exist are left out."""
    return [plane for plane in PLANES if max(plane) < num_components]


def smooth_by_all(times: Float[np.ndarray, " S"], values: Float[np.ndarray, "S C"], *, bandwidth: float) -> Curves:
    """Smooth observations with the chosen kernel, and with a narrower and a wider one."""
    grid = fine_grid(times, bandwidth=bandwidth)
    main, *others = (smooth(times, values, grid, bandwidth=bandwidth, factor=factor) for factor in (1.0, *_FACTORS))
    return Curves(main, tuple(others))


def judged_candidates(curves: Curves) -> list[JudgedCandidate]:
    """Return the candidates in every plane spanned by two of the first three components, each checked with the other kernels."""
    judged = []
    for plane in planes(curves.main.noise.shape[1]):
        elsewhere = [candidates(other, plane) for other in curves.others]
        judged += [_judge(candidate, plane, curves.main, elsewhere) for candidate in candidates(curves.main, plane)]
    return judged


def find_forms(judged: Sequence[JudgedCandidate], *, extent: float) -> list[Form]:
    """Find the times at which all three planes have a candidate. Each candidate belongs to at most one form.

    Candidates that are closest in time are combined first.

    Args:
        judged: Candidates from `judged_candidates`.
        extent: Extent of the trajectory: the largest range of the scores in one component.
    """
    by_plane = [[candidate for candidate in judged if candidate.plane == plane] for plane in PLANES]
    groups = sorted((group for group in product(*by_plane) if _spread(group) <= group[0].width), key=_spread)
    forms, taken = [], set[JudgedCandidate]()
    for group in groups:
        if taken.isdisjoint(group):
            taken |= set(group)
            forms.append(_form(group, extent))
    return sorted(forms, key=lambda form: form.time)


def _find_all(curves: Curves, scores: Float[np.ndarray, "S C"]) -> tuple[list[JudgedCandidate], list[Form]]:
    candidates = judged_candidates(curves)
    return candidates, find_forms(candidates, extent=float(np.ptp(scores, axis=0).max()))


def _num_certain(candidates: Sequence[JudgedCandidate], forms: Sequence[Form]) -> dict[str, int]:
    """Return the numbers of cusps, vertices and forms that are not `suspect`."""
    kinds = [candidate.kind for candidate in candidates if not candidate.reasons]
    num_forms = sum(not form.reasons for form in forms)
    return {"cusp": kinds.count("cusp"), "vertex": kinds.count("vertex"), "form": num_forms}


def _judge(
    candidate: Candidate, plane: tuple[int, int], curve: Smooth, elsewhere: Sequence[Sequence[Candidate]]
) -> JudgedCandidate:
    """Compare a candidate with the candidates that the other kernels show."""
    kind, time, point, radius = candidate
    width = float(np.interp(time, curve.times, curve.widths))
    times, missing = [time], []
    for factor, others in zip(_FACTORS, elsewhere, strict=True):
        near = [other.time for other in others if other.kind == kind and abs(other.time - time) <= width]
        if near:
            times.append(min(near, key=lambda other: abs(other - time)))
        else:
            missing.append(f"{factor:.2g}")
    stderr = (max(times) - min(times)) / 2 if len(times) > 1 else math.nan
    reasons = f"it disappears with a kernel {' or '.join(missing)} times as wide" if missing else ""
    return JudgedCandidate(kind, plane, time, stderr, point, radius, width, reasons)


def _form(group: Sequence[JudgedCandidate], extent: float) -> Form:
    """Combine one candidate of each plane into a form."""
    pairs = [[each.point[each.plane.index(axis)] for each in group if axis in each.plane] for axis in range(3)]
    radii = [each.radius for each in group if each.kind == "vertex"]
    scale = max(float(np.mean(radii)) if radii else 0.0, extent / 20)
    mismatch = max(abs(first - second) for first, second in pairs) / scale
    reasons = [
        f"its {each.kind} in PC{each.plane[0] + 1}-PC{each.plane[1] + 1} is suspect" for each in group if each.reasons
    ]
    if mismatch > _MAX_MISMATCH:
        reasons.append(f"its positions in different planes differ by {mismatch:.2g} times the mean radius")
    time = float(np.mean([each.time for each in group]))
    return Form(time, _spread(group) / 2, np.array([np.mean(pair) for pair in pairs]), mismatch, "; ".join(reasons))


def _spread(group: Sequence[JudgedCandidate]) -> float:
    times = [candidate.time for candidate in group]
    return max(times) - min(times)

"""Essential dynamics: principal components and forms of a run's trajectory, compared with random walks.

The states at all saved steps (`icl.analysis.essential_dynamics.trajectories`) are the points of one PCA
(`icl.analysis.essential_dynamics.principal_components`), with equal weights. Several runs share one PCA. The states of
ridge and dMMSE are projected onto the principal components, but do not enter the fit (Carroll et al. 2025, section
4.2). The scores of each run, which are its coordinates in the components, are smoothed in log time. We project each
trajectory onto planes of two components. There we compute the trajectory's curvature, evolute, cusps and vertices
(`icl.analysis.essential_dynamics.plane_curves`). From cusps and vertices we find forms
(`icl.analysis.essential_dynamics.forms`; Hoogland et al. 2024, section 3.2). We differ from Hoogland et al. in the time
scale of the smoothing, the derivatives, the definition of a cusp, and the verdicts. The modules `plane_curves` and
`forms` describe these differences.

Rows of the table, by `quantity`:

- `score`: the coordinate of a state in one component. `smooth_score`: the smoothed score, with its standard error.
  `arc_length`: the length of the smooth curve up to this step, in all components of the table. `radius`, `centre_1`,
  `centre_2`: the radius and the centre of the osculating circle in each plane.
- `cusp`, `vertex`, `form`: the step at which the shape occurs. `form_score`: the coordinate of a form in one component.
  `null_count`: the mean number of cusps, vertices or forms in random walks.
- `reference_score`: the coordinate of a reference (ridge or dMMSE) in one component. `reference_captured`: the share of the
  reference's squared distance from the mean that lies within the components.
- `noise_share`, for gradients: the expected squared estimation error of the gradients, divided by the variance of the states. This is an
  upper bound on the share of noise, because all steps use the same prompts, and part of the noise cancels in differences.
- `explained_share`: the share of the variance that component k explains. `null_walk`, `null_brownian`, `null_equal` and
  `null_flips` are the same share in four kinds of random walks (`icl.analysis.essential_dynamics.principal_components`).
  `null_flips` is a mean over walks, with the standard deviation over walks as its error. `null_flips_95` is the 95 % quantile,
  over these walks, of the sum of the first k shares. A share is `suspect` if the sum of the run's first k shares is not above
  this quantile, or if noise may be more than half of the variance.
- `displacement_ratio`: the squared distance from the first to the last state, divided by the sum of the squared step lengths.
  `null_displacement_95` is the 95 % quantile of this ratio in random walks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icl.analysis.essential_dynamics.forms import Form, JudgedCandidate, Shapes, find_shapes, planes
from icl.analysis.essential_dynamics.plane_curves import MIN_POINTS, arc_length, osculating_circles
from icl.analysis.essential_dynamics.principal_components import ComparedPCA, fit_components, is_too_short
from icl.analysis.essential_dynamics.trajectories import (
    SEES_PROMPTS,
    State,
    StateSettings,
    Trajectory,
    read_trajectory,
    references,
    require_comparable,
)
from icl.analysis.run import Result, as_table, named_runs, setting
from icl.config.validation import require_count, require_number

_ALL = "all"
_TOO_FEW = "there are too few saved steps to compare with random walks; save more checkpoints"
_STATE_TEXTS: dict[State, str] = {
    "outputs": "predictions for",
    "tokens": "all outputs at all tokens for",
    "weights": "weights",
    "gradients": "gradients of the loss on",
    "first_moment": "Adam's running mean of the gradient",
    "second_moment": "Adam's running mean of the squared gradient",
}
TableRow = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings(StateSettings):
    """Options of `icl analyse RUN --what essential-dynamics`."""

    jointly_with: str | None = setting(
        None, "other runs to include in the same PCA, separated by commas, or a pattern such as 'runs/ladder/*'"
    )
    num_components: int = setting(4, "number of principal components in the table")
    bandwidth: float = setting(0.15, "minimum width of the smoothing kernel, in ln(step + 1)")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("num_components", self.num_components, 1)
        require_number("bandwidth", self.bandwidth, "positive")


def analyse(path: Path, settings: Settings) -> Result:
    """Compute the essential dynamics of a run, or of several runs jointly.

    Raises:
        CheckpointError: If a run has no usable checkpoint, all runs together have fewer than three checkpoints, or all
            states are equal.
        ConfigError: If the runs cannot be compared.
    """
    state = StateSettings(state=settings.state, distribution=settings.distribution, num_prompts=settings.num_prompts)
    runs = named_runs(path, settings.jointly_with)
    trajectories = [read_trajectory(folder, state, run=name) for name, folder in runs.items()]
    require_comparable(trajectories, state)
    points = references([trajectory.config for trajectory in trajectories], state)
    fit = fit_components(trajectories, points, num_components=settings.num_components)
    rows = _score_rows(trajectories, fit) + _reference_rows(list(points), fit) + _share_rows(trajectories, fit)
    shapes, stop = {}, 0
    for trajectory in trajectories:
        start, stop = stop, stop + len(trajectory.steps)
        if len(trajectory.steps) >= MIN_POINTS:
            scores, walks = fit.components.scores[start:stop], fit.walks.scores[:, start:stop]
            found = find_shapes(np.array(trajectory.steps), scores, walks, bandwidth=settings.bandwidth)
            shapes[trajectory.run] = found
            rows += _curve_rows(trajectory, found) + _shape_rows(trajectory, found)
    return Result(as_table([], settings, whole_run=rows), _summary(trajectories, settings, fit, shapes))


def _score_rows(trajectories: Sequence[Trajectory], fit: ComparedPCA) -> list[TableRow]:
    checkpoints = [(trajectory, index) for trajectory in trajectories for index in range(len(trajectory.steps))]
    return [
        _checkpoint(trajectory, index) | _row(trajectory.run, "score", _pc(component), value)
        for (trajectory, index), scores in zip(checkpoints, fit.components.scores, strict=True)
        for component, value in enumerate(scores)
    ]


def _reference_rows(names: Sequence[str], fit: ComparedPCA) -> list[TableRow]:
    rows = []
    for name, scores, captured in zip(names, fit.components.projected, fit.components.captured, strict=True):
        rows += [_row(name, "reference_score", _pc(component), value) for component, value in enumerate(scores)]
        rows.append(_row(name, "reference_captured", _ALL, captured))
    return rows


def _share_rows(trajectories: Sequence[Trajectory], fit: ComparedPCA) -> list[TableRow]:
    rows, noise = [], _noise_share(trajectories, fit)
    if noise:
        rows.append(_row(_ALL, "noise_share", _ALL, noise, reason=_noise_doubt(noise)))
    for component, (is_reached, high) in enumerate(zip(fit.is_reached, fit.high_shares, strict=True)):
        item, flips = _pc(component), fit.walks.shares[:, component]
        doubt = "random walks made from the run's own steps explain as much" if is_reached else ""
        doubt = _TOO_FEW if fit.is_too_short else doubt
        reason = "; ".join(filter(None, (doubt, _noise_doubt(noise))))
        rows.append(_row(_ALL, "explained_share", item, fit.components.shares[component], reason=reason))
        rows += [_row(_ALL, name, item, null[component]) for name, null in fit.nulls.items()]
        rows.append(_row(_ALL, "null_flips", item, flips.mean(), flips.std(ddof=1)))
        rows.append(_row(_ALL, "null_flips_95", item, high))
    for trajectory, ratio, limit in zip(trajectories, fit.displacement, fit.displacement_limits, strict=True):
        reason = _displacement_doubt(trajectory, ratio, limit)
        rows.append(_row(trajectory.run, "displacement_ratio", _ALL, ratio, reason=reason))
        rows.append(_row(trajectory.run, "null_displacement_95", _ALL, limit))
    return rows


def _curve_rows(trajectory: Trajectory, shapes: Shapes) -> list[TableRow]:
    """Return the smooth curve and its osculating circles at every checkpoint."""
    curve, run = shapes.curve, trajectory.run
    errors = curve.noise * np.sqrt(curve.gains[:, 0, 0, None])
    lengths = arc_length(curve.derivatives[:, 0])
    circles = {_plane(plane): osculating_circles(curve, plane) for plane in planes(curve.noise.shape[1])}
    rows = []
    for index, at in enumerate(np.searchsorted(curve.times, shapes.times)):
        values = enumerate(zip(curve.derivatives[at, 0], errors[at], strict=True))
        own = [_row(run, "smooth_score", _pc(component), value, error) for component, (value, error) in values]
        own.append(_row(run, "arc_length", _ALL, lengths[at]))
        for plane, (signed_curvature, stderr, centre) in circles.items():
            curvature, error = abs(signed_curvature[at]), stderr[at]
            reason = "" if curvature > 2 * error else "the curvature is within two standard errors of zero"
            radius, radius_error = (1 / curvature, error / curvature**2) if curvature > 0 else (math.inf, math.nan)
            own.append(_row(run, "radius", plane, radius, radius_error, reason))
            own += [_row(run, f"centre_{axis + 1}", plane, centre[at, axis], reason=reason) for axis in (0, 1)]
        rows += [_checkpoint(trajectory, index) | row for row in own]
    return rows


def _shape_rows(trajectory: Trajectory, shapes: Shapes) -> list[TableRow]:
    """Return cusps, vertices and forms, each at the checkpoint that is closest in log time."""
    rows, run = [], trajectory.run
    found: list[JudgedCandidate | Form] = [*shapes.candidates, *shapes.forms]
    for shape in found:
        checkpoint = _checkpoint(trajectory, int(np.abs(shapes.times - shape.time).argmin()))
        kind, item = ("form", _ALL) if isinstance(shape, Form) else (shape.kind, _plane(shape.plane))
        step, error = math.expm1(shape.time), math.exp(shape.time) * shape.stderr
        rows.append(checkpoint | _row(run, kind, item, step, error, shape.reasons))
        if isinstance(shape, Form):
            for component, value in enumerate(shape.point):
                rows.append(checkpoint | _row(run, "form_score", _pc(component), value, reason=shape.reasons))
    for kind, counts in shapes.in_walks.items():
        if counts:
            rows.append(_row(run, "null_count", kind, float(np.mean(counts)), float(np.std(counts, ddof=1))))
    return rows


def _summary(
    trajectories: Sequence[Trajectory], settings: Settings, fit: ComparedPCA, shapes: dict[str, Shapes]
) -> list[str]:
    state = _STATE_TEXTS[settings.state]
    if settings.state in SEES_PROMPTS:
        state += f" {settings.num_prompts:,} prompts ({settings.distribution})"
    runs = ", ".join(trajectory.run for trajectory in trajectories)
    lines = [f"{len(fit.components.scores):,} checkpoints of {runs}; state: {state}."]
    for trajectory, ratio, limit in zip(trajectories, fit.displacement, fit.displacement_limits, strict=True):
        reason = _displacement_doubt(trajectory, ratio, limit)
        doubt = f"   suspect: {reason}" if reason else ""
        comparison = f"{ratio:.3g} (random walk: 1 on average, 95 % below {limit:.2g})"
        lines.append(f"Squared displacement / sum of squared steps of {trajectory.run}: {comparison}{doubt}")
    lines += [_shape_line(trajectory, shapes.get(trajectory.run)) for trajectory in trajectories]
    noise = _noise_share(trajectories, fit)
    if noise:
        doubt = f"   suspect: {_noise_doubt(noise)}" if _noise_doubt(noise) else ""
        lines.append(f"Share of estimation noise in the variance: at most {noise:.1%}{doubt}")
    doubtful = ", ".join(_pc(component) for component in np.flatnonzero(fit.is_reached).tolist())
    if fit.is_too_short:
        lines.append(f"Suspect: {doubtful}. {_TOO_FEW.capitalize()}.")
    elif doubtful:
        lines.append(f"Suspect: {doubtful}. Random walks explain as much with the same number of components.")
    return lines + _share_lines(fit)


def _share_lines(fit: ComparedPCA) -> list[str]:
    lines = [
        "Share of the variance, then the share in random walks with: "
        "equal steps | steps as long as the run's | the run's steps with random signs"
    ]
    for component, share in enumerate(fit.components.shares):
        flips, nulls = fit.walks.shares[:, component], fit.nulls
        null = f"{nulls['null_equal'][component]:10.1%} | {nulls['null_walk'][component]:6.1%}"
        lines.append(f"  {_pc(component)} {share:8.1%} {null} | {flips.mean():6.1%} ± {flips.std(ddof=1):.1%}")
    return lines


def _shape_line(trajectory: Trajectory, shapes: Shapes | None) -> str:
    if shapes is None:
        num_steps = len(trajectory.steps)
        return (
            f"{trajectory.run}: no curves, because it has {num_steps} saved steps and at least {MIN_POINTS} are needed."
        )
    parts = []
    for kind, plural in (("cusp", "cusps"), ("vertex", "vertices"), ("form", "forms")):
        of_kind: Sequence[JudgedCandidate | Form] = (
            shapes.forms if kind == "form" else [each for each in shapes.candidates if each.kind == kind]
        )
        steps = [f"{math.expm1(each.time):,.0f}" for each in of_kind if not each.reasons]
        at = f" (steps {', '.join(steps)})" if steps else ""
        num_doubtful, in_walks = len(of_kind) - len(steps), shapes.in_walks[kind]
        doubt = f" and {num_doubtful} suspect" if num_doubtful else ""
        walks = f" (in random walks of its steps: {min(in_walks)} to {max(in_walks)})" if in_walks else ""
        parts.append(f"{len(steps)} {plural}{at}{doubt}{walks}")
    return f"{trajectory.run}: " + "; ".join(parts) + "."


def _noise_share(trajectories: Sequence[Trajectory], fit: ComparedPCA) -> float:
    """Return the share of estimation noise in the variance; 0 for states that are exact."""
    return sum(sum(trajectory.noise) for trajectory in trajectories) / fit.variance


def _displacement_doubt(trajectory: Trajectory, ratio: float, limit: float) -> str:
    """Return the reason to doubt that a run goes farther than random walks; empty if there is none."""
    if is_too_short(len(trajectory.steps) - 1):
        return _TOO_FEW
    return "" if ratio > limit else "random walks made from the run's own steps go as far"


def _noise_doubt(share: float) -> str:
    return f"estimation noise may be up to {share:.0%} of the variance; use more prompts" if share > 0.5 else ""


def _checkpoint(trajectory: Trajectory, index: int) -> TableRow:
    return {"step": trajectory.steps[index], "checkpoint_hash": trajectory.digests[index]}


def _row(run: str, quantity: str, item: str, value: float, stderr: float = math.nan, reason: str = "") -> TableRow:
    return {
        "run": run,
        "quantity": quantity,
        "item": item,
        "value": float(value) if math.isfinite(value) else math.nan,
        "stderr": float(stderr) if math.isfinite(stderr) else math.nan,
        "verdict": "suspect" if reason else "ok",
        "reasons": reason,
    }


def _pc(component: int) -> str:
    return f"PC{component + 1}"


def _plane(plane: tuple[int, int]) -> str:
    return f"{_pc(plane[0])}-{_pc(plane[1])}"

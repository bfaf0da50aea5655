"""Essential dynamics: the principal components of a run's trajectory, beside what a random walk gives, and its forms.

States (`icl.analysis.essential_dynamics.trajectories`) at every saved step are the points of one PCA (`icl.analysis.essential_dynamics.principal_components`),
each counting once; several runs share one, and ridge and dMMSE are projected in without a part in the fit (Carroll et al.
2025, section 4.2). The scores of each run are smoothed in log time and looked at in planes (`icl.analysis.essential_dynamics.plane_curves`):
curvature, evolute, cusps, vertices, forms (`icl.analysis.essential_dynamics.forms`; Hoogland et al. 2024, section 3.2). Where we differ from the
latter, those pages say: the time scale of the smoothing, derivatives, the definition of a cusp, verdicts.

Rows of the table, by `quantity`:
- `score`, `smooth_score` (its error: of the curve, given the scatter about it), `arc_length` (of the smooth curve in all
  components of the table), `radius`, `centre_1` and `centre_2` of the osculating circle in each plane;
- `cusp`, `vertex`, `form` (their value is a step), `form_score`, and `null_count`, how many of each random walks have;
- `reference_score`, and `reference_captured`, the share of a reference's squared distance from the mean within the components;
- `noise_share`, for gradients: the expected square of their estimation noise over the variance, an upper bound as all steps
  see the same prompts;
- `explained_share` beside `null_walk`, `null_flips` (mean, with the deviation as error; `null_flips_95` for the first k
  together), `null_brownian` and `null_equal`; `displacement_ratio` beside `null_displacement_95`. A share is `suspect` if
  one in twenty walks with the run's own steps reaches what the first k components together explain, or if noise may be
  more than half of the variance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from icl.analysis.essential_dynamics import principal_components as pca
from icl.analysis.essential_dynamics.forms import Form, Judged, Shapes, find_shapes, planes
from icl.analysis.essential_dynamics.plane_curves import MIN_POINTS, arc_length, osculating_circles
from icl.analysis.essential_dynamics.trajectories import (
    SEES_PROMPTS,
    State,
    StateSettings,
    Trajectory,
    centred_products,
    read_trajectory,
    references,
    require_comparable,
)
from icl.analysis.run import Result, as_table
from icl.checkpoints import CheckpointError, checkpoint_files
from icl.runs import run_of
from icl.validation import ConfigError

_RANK = 1e-10
"""Components with less of the variance are rounding."""
_ALL = "all"
_WHAT: dict[State, str] = {
    "outputs": "predictions for",
    "tokens": "whole outputs for",
    "weights": "weights",
    "gradients": "the loss's gradient on",
    "first_moment": "Adam's running mean of the gradient",
    "second_moment": "Adam's running mean of the squared gradient",
}
TableRow = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings(StateSettings):
    """What `icl analyse RUN --what essential-dynamics` can be told."""

    jointly_with: str | None = field(
        default=None, metadata={"help": "further runs for one PCA of all, separated by commas: RUN2,RUN3"}
    )
    num_components: int = field(default=4, metadata={"help": "principal components in the table"})
    bandwidth: float = field(default=0.15, metadata={"help": "least width of the smoothing kernel in ln(step + 1)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_components < 1:
            raise ConfigError(f"`num_components` must be at least 1, got {self.num_components}.")
        if not 0 < self.bandwidth < math.inf:
            raise ConfigError(f"`bandwidth` must be positive, got {self.bandwidth}.")


class Fit(NamedTuple):
    """The PCA of all runs, and the walks it is held against."""

    components: pca.Components
    nulls: dict[str, Float[np.ndarray, " C"]]
    walks: pca.Walks
    displacement: Float[np.ndarray, " r"]
    variance: float
    """The sum over states of the squared distance to their mean."""


def analyse(path: Path, settings: Settings) -> Result:
    """The essential dynamics of a run, or of several jointly.

    Raises:
        CheckpointError: If a run has no usable checkpoint, there are fewer than three in all, or the states do not differ.
        ConfigError: If runs cannot be compared.
    """
    state = StateSettings(state=settings.state, distribution=settings.distribution, num_prompts=settings.num_prompts)
    trajectories = [read_trajectory(one, state, run=name) for name, one in _runs(path, settings.jointly_with).items()]
    require_comparable(trajectories, state)
    points = references([one.config for one in trajectories], state)
    fit = fit_components(trajectories, points, num_components=settings.num_components)
    rows = _score_rows(trajectories, fit) + _reference_rows(list(points), fit) + _share_rows(trajectories, fit)
    shapes = {}
    stop = np.cumsum([len(one.steps) for one in trajectories]).tolist()
    for one, end in zip(trajectories, stop, strict=True):
        if len(one.steps) >= MIN_POINTS:
            own = slice(end - len(one.steps), end)
            scores, walks = fit.components.scores[own], fit.walks.scores[:, own]
            shapes[one.run] = find_shapes(np.array(one.steps), scores, walks, bandwidth=settings.bandwidth)
            rows += _curve_rows(one, shapes[one.run]) + _shape_rows(one, shapes[one.run])
    return Result(as_table([], settings, whole_run=rows), _summary(trajectories, settings, fit, shapes))


def fit_components(
    trajectories: Sequence[Trajectory], points: dict[str, Float[np.ndarray, " F"]], *, num_components: int
) -> Fit:
    """The PCA of all states by the cheaper route, and its null models.

    Raises:
        CheckpointError: If there are fewer than three states, or they are not finite or do not differ.
    """
    rows = [row for one in trajectories for row in one.rows]
    begins = np.concatenate([np.arange(len(one.steps)) == 0 for one in trajectories])
    if len(rows) < 3:
        raise CheckpointError(
            f"Essential dynamics need at least three saved steps, got {len(rows)}; train with --checkpoints.num_log 60."
        )
    others = np.array(list(points.values())).reshape(len(points), len(rows[0]))
    products = centred_products(rows, others)
    if not np.isfinite(products.rows).all() or np.trace(products.rows) <= 0:
        raise CheckpointError("The states of these checkpoints are not finite, or all the same: did training diverge?")
    count = min(num_components, len(rows) - 1, len(rows[0]))
    if len(rows[0]) > len(rows):
        found = pca.from_products(products, begins, num_components=count)
    else:
        found = pca.from_rows(rows, others, begins, num_components=count)
    found = _without_rounding(found)
    gram, count = products.rows, len(found.shares)
    durations = np.concatenate([np.diff(one.steps, prepend=0) for one in trajectories]).astype(float)
    nulls = {
        "null_walk": pca.walk_shares(gram, begins, num_components=count),
        "null_brownian": pca.walk_shares(gram, begins, num_components=count, durations=durations),
        "null_equal": pca.walk_shares(gram, begins, num_components=count, durations=np.ones(len(rows))),
    }
    walks = pca.flipped_walks(gram, begins, num_components=count)
    return Fit(found, nulls, walks, pca.displacement_ratios(gram, begins), float(np.trace(gram)))


def _runs(path: Path, others: str | None) -> dict[str, Path]:
    """The runs by name: of their folders, or the whole path where two are named alike."""
    paths = [path, *(Path(word.strip()) for word in (others or "").split(",") if word.strip())]
    if len({one.resolve() for one in paths}) < len(paths):
        raise ConfigError("`jointly_with` names a run twice, or the run itself.")
    for one in paths:
        checkpoint_files(one)  # refuses a run that is not there, before work on the others
    names = [run_of(one).path.resolve().name for one in paths]
    return {name if names.count(name) == 1 else str(one): one for name, one in zip(names, paths, strict=True)}


def _without_rounding(found: pca.Components) -> pca.Components:
    count = int((found.shares > _RANK).sum())
    return found._replace(
        scores=found.scores[:, :count], shares=found.shares[:count], projected=found.projected[:, :count]
    )


def _by_run(trajectories: Sequence[Trajectory], scores: Float[np.ndarray, "S C"]) -> list[Float[np.ndarray, "s C"]]:
    return np.split(scores, np.cumsum([len(one.steps) for one in trajectories])[:-1])


def _score_rows(trajectories: Sequence[Trajectory], fit: Fit) -> list[TableRow]:
    return [
        _at(one, place) | _row(one.run, "score", _pc(component), value)
        for one, scores in zip(trajectories, _by_run(trajectories, fit.components.scores), strict=True)
        for place, own in enumerate(scores)
        for component, value in enumerate(own)
    ]


def _reference_rows(names: Sequence[str], fit: Fit) -> list[TableRow]:
    rows = []
    for name, scores, captured in zip(names, fit.components.projected, fit.components.captured, strict=True):
        rows += [_row(name, "reference_score", _pc(component), value) for component, value in enumerate(scores)]
        rows.append(_row(name, "reference_captured", _ALL, captured))
    return rows


def _share_rows(trajectories: Sequence[Trajectory], fit: Fit) -> list[TableRow]:
    rows, noise = [], _noise_share(trajectories, fit)
    if noise:
        rows.append(_row(_ALL, "noise_share", _ALL, noise, reason=_noise_doubt(noise)))
    for component, (is_reached, high) in enumerate(zip(_is_reached(fit), _high_shares(fit), strict=True)):
        item, flips = _pc(component), fit.walks.shares[:, component]
        doubt = "walks of the run's own steps with random signs explain as much" if is_reached else ""
        reason = "; ".join(filter(None, (doubt, _noise_doubt(noise))))
        rows.append(_row(_ALL, "explained_share", item, fit.components.shares[component], reason=reason))
        rows += [_row(_ALL, name, item, null[component]) for name, null in fit.nulls.items()]
        rows.append(_row(_ALL, "null_flips", item, flips.mean(), flips.std(ddof=1)))
        rows.append(_row(_ALL, "null_flips_95", item, high))
    for one, ratio, limit in zip(trajectories, fit.displacement, _displacement_limits(fit), strict=True):
        reason = "" if ratio > limit else "random signs of the steps lead as far"
        rows.append(_row(one.run, "displacement_ratio", _ALL, ratio, reason=reason))
        rows.append(_row(one.run, "null_displacement_95", _ALL, limit))
    return rows


def _curve_rows(one: Trajectory, shapes: Shapes) -> list[TableRow]:
    """The smooth curve and its circles at every checkpoint."""
    curve = shapes.curve
    errors = curve.noise * np.sqrt(curve.gains[:, 0, 0, None])
    lengths = arc_length(curve.derivatives[:, 0])
    circles = {plane: osculating_circles(curve, plane) for plane in planes(curve.noise.shape[1])}
    rows = []
    for place, at in enumerate(np.searchsorted(curve.times, shapes.places)):
        here = _at(one, place)
        for component, value in enumerate(curve.derivatives[at, 0]):
            rows.append(here | _row(one.run, "smooth_score", _pc(component), value, errors[at, component]))
        rows.append(here | _row(one.run, "arc_length", _ALL, lengths[at]))
        for plane, found in circles.items():
            bend, error = abs(found.curvature[at]), found.stderr[at]
            reason = "" if bend > 2 * error else "the curvature is within two standard errors of zero"
            radius, spread = (1 / bend, error / bend**2) if bend > 0 else (math.inf, math.nan)
            rows.append(here | _row(one.run, "radius", _plane(plane), radius, spread, reason))
            for axis in (0, 1):
                centre = found.centre[at, axis]
                rows.append(here | _row(one.run, f"centre_{axis + 1}", _plane(plane), centre, reason=reason))
    return rows


def _shape_rows(one: Trajectory, shapes: Shapes) -> list[TableRow]:
    """Cusps, vertices and forms; each at the checkpoint nearest in log time."""
    rows = []
    for found in shapes.candidates:
        here = _at(one, int(np.abs(shapes.places - found.time).argmin()))
        step, error = _step(found.time, found.stderr)
        rows.append(here | _row(one.run, found.kind, _plane(found.plane), step, error, found.reasons))
    for form in shapes.forms:
        here = _at(one, int(np.abs(shapes.places - form.time).argmin()))
        step, error = _step(form.time, form.stderr)
        rows.append(here | _row(one.run, "form", _ALL, step, error, form.reasons))
        rows += [
            here | _row(one.run, "form_score", _pc(component), value, reason=form.reasons)
            for component, value in enumerate(form.point)
        ]
    for kind, counts in shapes.in_walks.items():
        if counts:
            rows.append(_row(one.run, "null_count", kind, float(np.mean(counts)), float(np.std(counts, ddof=1))))
    return rows


def _summary(trajectories: Sequence[Trajectory], settings: Settings, fit: Fit, shapes: dict[str, Shapes]) -> list[str]:
    what = _WHAT[settings.state]
    if settings.state in SEES_PROMPTS:
        what += f" {settings.num_prompts:,} prompts ({settings.distribution})"
    count = sum(len(one.steps) for one in trajectories)
    lines = [f"{count:,} checkpoints of {', '.join(one.run for one in trajectories)}; {what}."]
    for one, ratio, limit in zip(trajectories, fit.displacement, _displacement_limits(fit), strict=True):
        doubt = "" if ratio > limit else "   suspect: no farther than a random walk"
        lines.append(
            f"Squared displacement / squared steps of {one.run}: {ratio:.3g} (walk: 1, 95 % < {limit:.2g}){doubt}"
        )
    lines += [line for one in trajectories for line in _shape_lines(one, shapes.get(one.run))]
    noise = _noise_share(trajectories, fit)
    if noise:
        doubt = f"   suspect: {_noise_doubt(noise)}" if _noise_doubt(noise) else ""
        lines.append(f"Share of estimation noise in the variance: at most {noise:.1%}{doubt}")
    doubtful = [_pc(component) for component in np.flatnonzero(_is_reached(fit)).tolist()]
    if doubtful:
        lines.append(f"Suspect: {', '.join(doubtful)}; with those before, random signs of the steps explain as much.")
    return lines + _share_lines(fit)


def _share_lines(fit: Fit) -> list[str]:
    lines = [
        "Share of the variance, here and in random walks of equal steps | of the steps' lengths | of the steps, any sign"
    ]
    for component, share in enumerate(fit.components.shares):
        flips, nulls = fit.walks.shares[:, component], fit.nulls
        null = f"{nulls['null_equal'][component]:10.1%} | {nulls['null_walk'][component]:6.1%}"
        lines.append(f"  {_pc(component)} {share:8.1%} {null} | {flips.mean():6.1%} ± {flips.std(ddof=1):.1%}")
    return lines


def _shape_lines(one: Trajectory, shapes: Shapes | None) -> list[str]:
    if shapes is None:
        return [f"{one.run}: no curves, as {MIN_POINTS} saved steps are needed and it has {len(one.steps)}."]
    told = []
    for kind, plural in (("cusp", "cusps"), ("vertex", "vertices"), ("form", "forms")):
        found: Sequence[Judged | Form] = (
            shapes.forms if kind == "form" else [one for one in shapes.candidates if one.kind == kind]
        )
        steps = [f"{math.expm1(one.time):,.0f}" for one in found if not one.reasons]
        at = f" (steps {', '.join(steps)})" if steps else ""
        doubtful, in_walks = len(found) - len(steps), shapes.in_walks[kind]
        doubt = f" and {doubtful} in doubt" if doubtful else ""
        walks = f" (random walks of its steps: {min(in_walks)} to {max(in_walks)})" if in_walks else ""
        told.append(f"{len(steps)} {plural}{at}{doubt}{walks}")
    return [f"{one.run}: " + "; ".join(told) + "."]


def _noise_share(trajectories: Sequence[Trajectory], fit: Fit) -> float:
    """Of the variance; 0 for states that are exact."""
    return sum(sum(one.noise) for one in trajectories) / fit.variance


def _noise_doubt(share: float) -> str:
    return f"estimation noise may be up to {share:.0%} of the variance; use more prompts" if share > 0.5 else ""


def _is_reached(fit: Fit) -> Bool[np.ndarray, " C"]:
    """For every k, whether one in twenty walks of the run's own steps explains as much by its first k components."""
    return np.cumsum(fit.components.shares) <= _high_shares(fit)


def _high_shares(fit: Fit) -> Float[np.ndarray, " C"]:
    return np.quantile(np.cumsum(fit.walks.shares, axis=1), 0.95, axis=0)


def _displacement_limits(fit: Fit) -> Float[np.ndarray, " r"]:
    return np.quantile(fit.walks.displacement, 0.95, axis=0)


def _at(one: Trajectory, place: int) -> TableRow:
    return {"step": one.steps[place], "checkpoint_hash": one.digests[place]}


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


def _step(time: float, stderr: float) -> tuple[float, float]:
    """A log time and its error as a step."""
    return math.expm1(time), math.exp(time) * stderr

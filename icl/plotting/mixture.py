"""The figures of mixtures of dMMSE and ridge: weights, log odds and residuals of one run, and transitions over a ladder of M.

`icl.analysis.mixture` defines the two mixtures. In `fixed`, the weight of dMMSE is the same for all prompts. In `bayes`, the weight for
each prompt follows from the prior odds of dMMSE by Bayes' rule.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.colours import BLACK, BLUE, GREEN, ORANGE, PURPLE, VERMILION, ordered_colours
from icl.plotting.style import draw_band, finish_step_axes, label_plainly, new_figure, select, write_in_middle
from icl.plotting.tidying import KEY

_SETS = {"pretrain": ("training tasks", BLUE, "-"), "true": ("new tasks", ORANGE, "--")}
_MIXTURES = {"fixed": ("fixed weight", GREEN), "bayes": ("prior odds", PURPLE)}
_PARAMETERS = {"weight": "weight of dMMSE, p", "log_odds": "prior log odds of dMMSE, ln(π / (1 − π))"}
_SUSPECT_SHARE, _INVALID_SHARE = 0.1, 1.0
"""Residual shares above which a mixture is suspect or invalid, as in `icl.analysis.mixture.judging`."""
_MAX_LOG_ODDS = 21.5
"""Largest log odds in a figure: slightly more than the limit of the search in `icl.analysis.mixture.fits`."""
_FIRST_STEP = 100
"""First step of a figure of several seeds. At earlier steps, models do not yet use the examples."""
_CURVE = "theory (Wurgaft et al. 2025)"


def plot(table: pd.DataFrame, *, title: str) -> Figure:
    """Draw the table of `icl.analysis.mixture`: four panels for one run, eight for several runs.

    Args:
        table: The run's `results/mixture.csv`.
        title: Title of the figure.
    """
    table = table.assign(position=table["position"].astype(str), num_tasks=table["num_tasks"].astype(float))
    runs = table.loc[table["run"] != "all", "run"].unique()
    return _plot_run(table, title) if len(runs) == 1 else _plot_ladder(table, title)


def _plot_run(table: pd.DataFrame, title: str) -> Figure:
    title = f"{title}   (bands and bars: 2 standard errors; open marks: verdict is not ok)"
    figure, (weights, odds, shares, positions) = new_figure(2, num_rows=2, width=5.2, height=3.7, title=title)
    for axes, quantity in ((weights, "weight"), (odds, "log_odds")):
        for name, (label, colour, line) in _SETS.items():
            rows = _means(table, quantity, distribution=name)
            _draw_points(axes, rows, color=colour, linestyle=line, label=label)
            _mark_transitions(
                axes, select(table, quantity="transition_step", distribution=name, mixture=_of(quantity)), colour
            )
    _draw_curves(weights, table)
    _finish_parameter(weights, "weight", "Fixed weight (thin black: theory)")
    _finish_parameter(odds, "log_odds", "Prior odds of the Bayes mixture")
    for name, (label, _, line) in _SETS.items():
        for mixture, (text, colour) in _MIXTURES.items():
            rows = _means(table, "residual_share", distribution=name, mixture=mixture)
            _draw_points(shares, rows, color=colour, linestyle=line, label=f"{text}, {label}", floor=rows["value"] / 5)
    for level, text in ((_SUSPECT_SHARE, "suspect above"), (_INVALID_SHARE, "invalid above")):
        shares.axhline(level, color=BLACK, linewidth=0.8, linestyle=":")
        shares.annotate(text, (0.01, level), xycoords=("axes fraction", "data"), fontsize=7.5, va="bottom")
    _set_log(shares)
    shares.legend(fontsize=7.5)
    finish_step_axes(shares, "What the mixtures do not explain", "residual / squared distance of dMMSE and ridge")
    _draw_positions(positions, table)
    return figure


def _plot_ladder(table: pd.DataFrame, title: str) -> Figure:
    ladder = sorted(table["num_tasks"].dropna().unique())
    has_seeds = bool(table.groupby("num_tasks")["run"].nunique().max() > 1)
    how = "bands: 2 standard errors; open marks: verdict is not ok"
    if has_seeds:
        how = "thin: seeds, thick: their mean; without steps that no mixture explains, and without log odds at a limit of the search"
        table = table[table["step"].isna() | (table["step"] >= _FIRST_STEP)]
    title = f"{title}   (colour: M; {how})"
    figure, panels = new_figure(4, num_rows=2, width=4.3, height=3.6, title=title)
    colours = dict(zip(ladder, ordered_colours(len(ladder)), strict=True))
    for row, (name, (label, *_)) in enumerate(_SETS.items()):
        weights, residuals, odds, transitions = panels[4 * row : 4 * row + 4]
        rows = select(table, distribution=name)
        for m, colour in colours.items():
            own = select(rows, num_tasks=m)
            for axes, quantity in ((weights, "weight"), (odds, "log_odds")):
                _draw_seeds(axes, _means(own, quantity), color=colour, label=f"{m:g}")
            for axes, quantity, line in ((weights, "curve_weight", ":"), (residuals, "curve_residual", "-")):
                curve = _explained(own, select(own, quantity=quantity), has_seeds)
                mean = _over_all_seeds(curve).groupby("step")["value"].mean()
                axes.plot(mean.index.astype(float), mean, color=colour, linestyle=line, linewidth=1.4)
        _finish_parameter(weights, "weight", f"Fixed weight, {label} (dotted: theory)", legend="M")
        _finish_parameter(odds, "log_odds", f"Prior odds, {label}", legend="M")
        residuals.axhline(0, color=BLACK, linewidth=0.7)
        finish_step_axes(residuals, f"Fixed weight minus theory ({_curve_text(rows)})", "difference of the weights")
        _draw_transitions(transitions, rows, label)
        for axes in (weights, residuals, odds) if has_seeds else ():
            axes.set_xlim(left=0.8 * _FIRST_STEP)
    return figure


def _means(table: pd.DataFrame, quantity: str, **values: Any) -> pd.DataFrame:
    return select(table, quantity=quantity, position="mean", **values).sort_values("step", kind="stable")


def _explained(own: pd.DataFrame, curve: pd.DataFrame, has_seeds: bool) -> pd.DataFrame:
    """Return the rows of a theory curve, ordered by step. With several seeds, return only the steps to which the curve was fitted."""
    curve = curve.sort_values("step")
    fitted = select(own, quantity="curve_residual")[["run", "step"]]
    return curve.merge(fitted, on=["run", "step"]) if has_seeds else curve


def _over_all_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows at steps with the largest number of seeds. A mean over fewer seeds would make a curve jump."""
    num_seeds = rows.groupby("step")["run"].transform("size")
    return rows[num_seeds == num_seeds.max()]


def _draw_seeds(axes: Axes, rows: pd.DataFrame, *, color: Any, label: str) -> None:
    """Draw the weights or log odds of one run or of several seeds.

    For one run, marks show the verdicts. For several seeds, invalid numbers and log odds at a limit of the search are left out.
    """
    if rows["run"].nunique() < 2:
        _draw_points(axes, rows, color=color, linewidth=1.1, label=label)
        return
    rows = rows[(rows["verdict"] != "invalid") & rows["stderr"].notna()]  # at a limit there is no standard error
    for _, curve in rows.groupby("run"):
        axes.plot(curve["step"].astype(float), curve["value"], color=color, linewidth=0.6, alpha=0.6)
    mean = _over_all_seeds(rows).groupby("step")["value"].mean()
    marker = "o" if len(mean) == 1 else None
    axes.plot(mean.index.astype(float), mean, color=color, linewidth=2.0, marker=marker, markersize=4, label=label)


def _of(quantity: str) -> str:
    """Return the name of the mixture whose parameter is this quantity."""
    return "fixed" if quantity == "weight" else "bayes"


def _draw_points(
    axes: Axes, rows: pd.DataFrame, *, color: Any, floor: pd.Series | float = -np.inf, **style: Any
) -> None:
    """Draw a line with a band of two standard errors. Marks are filled if the verdict is ok, otherwise open."""
    if rows.empty:
        return
    draw_band(
        axes, rows["step"], rows["value"], rows["stderr"].fillna(0), floor=floor, alpha=0.15, color=color, **style
    )
    is_ok = rows["verdict"] == "ok"
    for points, face in ((rows[is_ok], color), (rows[~is_ok], "white")):
        axes.plot(points["step"].astype(float), points["value"], "o", markersize=3.2, color=color, markerfacecolor=face)


def _mark_transitions(axes: Axes, rows: pd.DataFrame, colour: str) -> None:
    """Draw a vertical line at each transition with the verdict ok, and shade the interval between the saved steps around it."""
    for _, row in rows[rows["value"].notna() & (rows["verdict"] == "ok")].iterrows():
        axes.axvspan(row["lower"], row["upper"], color=colour, alpha=0.08, linewidth=0)
        axes.axvline(row["value"], color=colour, linewidth=0.9)


def _draw_curves(axes: Axes, table: pd.DataFrame) -> None:
    for name, (_, _, line) in _SETS.items():
        curve = select(table, quantity="curve_weight", distribution=name).sort_values("step")
        axes.plot(curve["step"].astype(float), curve["value"], color=BLACK, linewidth=0.9, linestyle=line)


def _finish_parameter(axes: Axes, quantity: str, title: str, *, legend: str = "") -> None:
    axes.axhline(0.5 if quantity == "weight" else 0, color=BLACK, linewidth=0.6, linestyle="--")
    if quantity == "weight":
        axes.set_ylim(-0.05, 1.05)
    else:
        _limit_odds(axes)
    finish_step_axes(axes, title, _PARAMETERS[quantity])
    axes.legend(fontsize=7.5, title=legend or None, title_fontsize=8, ncols=2 if legend else 1)


def _limit_odds(axes: Axes) -> None:
    """Limit the y axis to the range that was searched, because the bands of large standard errors extend beyond this range."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -_MAX_LOG_ODDS), min(high, _MAX_LOG_ODDS))


def _set_log(axes: Axes) -> None:
    """Use a logarithmic y axis that includes the thresholds of the verdicts."""
    axes.set_yscale("log", nonpositive="clip")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 1e-6), max(high, 3 * _INVALID_SHARE))
    label_plainly(axes)


def _draw_positions(axes: Axes, table: pd.DataFrame) -> None:
    """Draw the log odds at each position at the last step. If the model is exactly a mixture, all positions agree."""
    last = int(table["step"].max())  # a column of steps with missing values is read from a file as floats
    rows = select(table, step=last, quantity="log_odds")
    for name, (label, colour, _) in _SETS.items():
        own = rows[(rows["distribution"] == name) & (rows["position"] != "mean")]
        x = own["position"].astype(float) + (0.12 if name == "true" else -0.12)
        is_ok = own["verdict"] == "ok"
        for points, face in ((is_ok, colour), (~is_ok, "white")):
            axes.errorbar(
                x[points], own.loc[points, "value"], 2 * own.loc[points, "stderr"].fillna(0), fmt="o", markersize=4,
                capsize=2, color=colour, markerfacecolor=face,
            )  # fmt: skip
        axes.plot([], [], "o", color=colour, label=label, gid=KEY)
        mean = select(rows, distribution=name, position="mean")["value"].item()
        axes.axhline(mean, color=colour, linewidth=0.9, linestyle=_SETS[name][2])
    axes.set(xlabel="position (number of examples + 1)", ylabel=_PARAMETERS["log_odds"])
    _limit_odds(axes)
    axes.set_title(f"Prior odds by position at step {last:,} (lines: all positions)", fontsize=10)
    axes.legend(fontsize=7.5)


def _curve_text(rows: pd.DataFrame) -> str:
    r2 = select(rows, quantity="curve_r2").iloc[0]
    return f"{r2['verdict']}, R² = {r2['value']:.2f}" if np.isfinite(r2["value"]) else r2["verdict"]


def _draw_transitions(axes: Axes, rows: pd.DataFrame, label: str) -> None:
    """Draw the last transition to dMMSE of each run against M, and the step at which the theory curve crosses 1/2."""
    found = rows[(rows["quantity"] == "transition_step") & (rows["finding"] == "to dMMSE")]
    for mixture, (text, colour) in _MIXTURES.items():
        own = select(found, mixture=mixture).sort_values("value").groupby(["num_tasks", "run"], as_index=False).last()
        growth = select(rows, run="all", quantity="growth_exponent", mixture=mixture)
        exponent = (
            f": M^({growth['value'].item():.2f} ± {growth['stderr'].item():.2f})"
            if growth["value"].notna().any()
            else ""
        )
        is_ok = own["verdict"] == "ok"
        for points, face in ((own[is_ok], colour), (own[~is_ok], "white")):
            x, bars = points["num_tasks"].astype(float), 2 * points["stderr"]
            axes.errorbar(x, points["value"] + 1, bars, fmt="o", capsize=2.5, color=colour, markerfacecolor=face)
        axes.plot([], [], "o", color=colour, label=text + exponent, gid=KEY)
    curve = select(rows, quantity="curve_step")
    curve = curve[np.isfinite(curve["value"]) & (curve["value"] < 1e9)]
    levels = np.exp(
        np.log1p(curve["value"]).groupby(curve["num_tasks"]).mean()
    )  # mean over seeds: each seed has its own `loss_advantage`, and so its own curve
    axes.plot(levels.index.astype(float), levels, color=VERMILION, linestyle=":", label=_CURVE)
    axes.set_title(f"Transition to dMMSE, {label} (open: not ok)", fontsize=10)
    axes.set(
        xscale="log", yscale="log", xlabel="M (number of training tasks)", ylabel="step + 1 of the last transition"
    )
    if found["value"].notna().any():
        axes.legend(fontsize=7.5)
        label_plainly(axes)
        label_plainly(axes, "x")
    else:
        write_in_middle(axes, "no run has a transition to dMMSE")

"""Figures of LLC estimates: the curve over training with its verdicts, the chains' traces, and the calibration.

A verdict has one mark wherever it is drawn: `ok` a filled dot, `suspect` a hollow triangle, `invalid` a cross.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.style import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, new_figure
from icl.runs import RunFolder
from icl.sampling.records import Record

VERDICTS: dict[str, dict[str, Any]] = {
    "ok": {"color": BLUE, "marker": "o"},
    "suspect": {"color": ORANGE, "marker": "^", "markerfacecolor": "white"},
    "invalid": {"color": VERMILION, "marker": "x"},
}
_CHAINS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, BLACK)
_MAX_TRACES = 6


def plot_llc(table: pd.DataFrame, trivial_loss: float, *, title: str, stages: Sequence[float] = ()) -> Figure:
    """Loss above and LLC below against step, on a logarithmic (left) and a linear axis (right).

    Args:
        table: Rows of `llc.csv` of one kind of settings.
        trivial_loss: Of predicting zero.
        title: Above the panels; the settings stand below it.
        stages: Steps at which stages end.
    """
    figure, axes = new_figure(2, num_rows=2, width=5.2, height=3.3)
    table = table.sort_values("step")
    for column, scale in enumerate(("symlog", "linear")):
        _draw_losses(axes[column], table, trivial_loss)
        _draw_estimates(axes[column + 2], table)
        for panel in (axes[column], axes[column + 2]):
            for step in stages:
                panel.axvline(step, color=BLACK, linewidth=0.8, alpha=0.4)
            panel.set_xscale(scale, **({"linthresh": 1} if scale == "symlog" else {}))
            if scale == "symlog":
                panel.set_xlim(left=0)
        axes[column + 2].set_xlabel("step (updates)")
        axes[column].sharex(axes[column + 2])
    axes[0].set_ylabel("loss (squared error per target)")
    axes[2].set_ylabel("LLC (bars: 2 standard errors)")
    axes[1].legend(fontsize=8)
    axes[3].legend(fontsize=8)
    figure.suptitle(f"{title}\n{_settings(table.iloc[0])}", fontsize=10)
    return figure


def plot_traces(records: Sequence[Record], *, title: str) -> Figure:
    """The minibatch losses of every chain at up to six steps, burn-in shaded, with E[L], L(w0) and predicting zero."""
    places = sorted({round(i) for i in np.linspace(0, len(records) - 1, min(_MAX_TRACES, len(records)))})
    chosen = [records[place] for place in places]
    num_columns = min(3, len(chosen))
    figure, axes = new_figure(num_columns, num_rows=-(-len(chosen) // num_columns), width=4.6, height=3.2)
    for panel, record in zip(axes, chosen, strict=False):
        _draw_trace(panel, record.row, record.traces, record.stride)
        step = record.row["step"]
        name = "" if step is None else f"step {step:,}: "
        panel.set_title(f"{name}{_estimate(record.row)}", fontsize=9, color=VERDICTS[record.row["verdict"]]["color"])
    for panel in axes[len(chosen) :]:
        panel.set_visible(False)
    axes[0].set_ylabel("minibatch loss")
    axes[0].legend(fontsize=7)
    figure.suptitle(f"{title}: traces", fontsize=10)
    return figure


def plot_calibration(table: pd.DataFrame, traces: Mapping[int, Record], *, title: str) -> Figure:
    """Estimate and verdict over the searched settings at the last checkpoint, and traces of chosen and failed corners.

    Args:
        table: The table of `icl.sampling.calibration`.
        traces: Estimates by corner, the chosen one first.
        title: Above the panels.
    """
    shown = list(traces.items())[:4]
    figure, axes = new_figure(max(2, len(shown)), num_rows=2, width=4.6, height=3.6)
    num_columns = len(axes) // 2
    last = table[table["step"] == table["step"].max()]
    _draw_grid(axes[0], last)
    _draw_rates(axes[1], last)
    for panel in axes[2:num_columns]:
        panel.set_visible(False)
    for panel, (corner, record) in zip(axes[num_columns:], shown, strict=False):
        _draw_trace(panel, record.row, record.traces, record.stride)
        row = last[last["corner"] == corner].iloc[0]
        panel.set_title(
            f"{'chosen' if row['chosen'] else 'failed'}: nβ {row['nbeta']:.3g}, γ {row['localization']:.3g}, ε {row['lr']:.2g}\n"
            f"{_estimate(record.row)}",
            fontsize=8,
            color=VERDICTS[record.row["verdict"]]["color"],
        )
    for panel in axes[num_columns + len(shown) :]:
        panel.set_visible(False)
    axes[num_columns].set_ylabel("minibatch loss")
    axes[num_columns].legend(fontsize=7)
    figure.suptitle(title, fontsize=11)
    return figure


def read_stages(folder: RunFolder) -> list[float]:
    """The steps at which stages end, from the run's `results/stages.csv`; none if there is no such table."""
    try:
        table = pd.read_csv(folder.results / "stages.csv")
    except (OSError, ValueError):
        return []
    for name in ("end", "end_step", "boundary"):
        if name in table:
            return sorted({float(step) for step in table[name].dropna()})
    return []


def _draw_losses(axes: Axes, table: pd.DataFrame, trivial_loss: float) -> None:
    axes.axhline(trivial_loss, color=BLACK, linestyle=":", linewidth=1.2, label="predicting zero")
    axes.plot(table["step"], table["mean_loss"], color=VERMILION, marker=".", label="E[L], mean over the chains")
    axes.plot(table["step"], table["init_loss"], color=BLUE, marker=".", label="L(w0), the checkpoint")
    _limit(axes, pd.concat([table["init_loss"], table["mean_loss"].clip(upper=1.5 * trivial_loss)]))


def _draw_estimates(axes: Axes, table: pd.DataFrame) -> None:
    good = table[(table["verdict"] != "invalid") & np.isfinite(table["llc"].astype(float))]
    base = good if len(good) else table
    if len(good) > 1:
        axes.plot(good["step"], good["llc"], color=BLACK, linewidth=0.8, alpha=0.5)
    _limit(axes, pd.concat([base["llc"] - 2 * base["stderr"].fillna(0), base["llc"] + 2 * base["stderr"].fillna(0)]))
    low, high = axes.get_ylim()
    for verdict, style in VERDICTS.items():
        rows = table[table["verdict"] == verdict]
        if len(rows):
            inside = rows["llc"].astype(float).fillna(high).clip(low, high)
            error = (2 * rows["stderr"].astype(float)).where(inside == rows["llc"], 0).fillna(0)
            axes.errorbar(
                rows["step"], inside, error, **style, linestyle="none", markersize=6, capsize=2, label=verdict
            )


def _draw_trace(axes: Axes, row: Mapping[str, Any], traces: np.ndarray, stride: int) -> None:
    moves = stride * np.arange(traces.shape[1])
    for chain, losses in enumerate(traces):
        axes.plot(moves, losses, color=_CHAINS[chain % len(_CHAINS)], linewidth=0.6, alpha=0.7)
    if row["num_burnin_steps"]:
        axes.axvspan(0, row["num_burnin_steps"], color=BLACK, alpha=0.08, linewidth=0)
    axes.axhline(row["init_loss"], color=BLUE, linewidth=1.6, label="L(w0)")
    axes.axhline(row["mean_loss"], color=VERMILION, linewidth=1.6, label="E[L]")
    levels = [traces[np.isfinite(traces)], np.array([row["init_loss"]])]
    if row["trivial_loss"] is not None:
        axes.axhline(row["trivial_loss"], color=BLACK, linestyle=":", linewidth=1.2, label="predicting zero")
        levels = [levels[0].clip(max=3 * row["trivial_loss"]), levels[1], np.array([row["trivial_loss"]])]
    _limit(axes, pd.Series(np.concatenate(levels)))
    axes.set_xlabel("move (burn-in shaded)")


def _draw_grid(axes: Axes, last: pd.DataFrame) -> None:
    """Estimates against nbeta, a line for each ratio localization / nbeta."""
    survey = last[last["stage"] == "nbeta, localization"]
    for colour, (ratio, rows) in zip(_CHAINS, survey.groupby("ratio"), strict=False):
        axes.plot(rows["nbeta"], rows["llc"], color=colour, linewidth=1.0, label=f"γ/nβ = {ratio:.3g}")
        _draw_verdicts(axes, rows, "nbeta")
    _ring(axes, last, "nbeta")
    axes.set(xscale="log", yscale="symlog", xlabel="nβ", ylabel="LLC (bars: 2 standard errors)")
    axes.set_title("Over nβ, at one step size for each", fontsize=10)
    axes.legend(fontsize=8)


def _draw_rates(axes: Axes, last: pd.DataFrame) -> None:
    """Estimates against the step size, at every pair whose step sizes were searched."""
    rates = last[last["lr_searched"]]
    for colour, (pair, rows) in zip(_CHAINS, rates.groupby(["nbeta", "localization"]), strict=False):
        rows = rows.sort_values("lr")
        axes.plot(rows["lr"], rows["llc"], color=colour, linewidth=1.0, label=f"nβ {pair[0]:.3g}, γ {pair[1]:.3g}")
        _draw_verdicts(axes, rows, "lr")
    _ring(axes, last, "lr")
    axes.set(xscale="log", yscale="symlog", xlabel="step size ε")
    axes.set_title("Over ε", fontsize=10)
    if len(rates):
        axes.legend(fontsize=8)


def _draw_verdicts(axes: Axes, rows: pd.DataFrame, x: str) -> None:
    for verdict, style in VERDICTS.items():
        one = rows[rows["verdict"] == verdict]
        axes.errorbar(one[x], one["llc"], 2 * one["stderr"], **style, linestyle="none", markersize=6, capsize=2)


def _ring(axes: Axes, last: pd.DataFrame, x: str) -> None:
    chosen = last[last["chosen"]]
    axes.plot(
        chosen[x], chosen["llc"], marker="o", markersize=15, markerfacecolor="none", color=GREEN, linestyle="none",
        markeredgewidth=2, label="chosen",
    )  # fmt: skip


def _limit(axes: Axes, values: pd.Series) -> None:
    """Limits that hold these values and some room, whatever else is drawn."""
    finite = values[np.isfinite(values.astype(float))].astype(float)
    if len(finite):
        low, high = finite.min(), finite.max()
        room = 0.07 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)


def _estimate(row: Mapping[str, Any]) -> str:
    return f"LLC {row['llc']:.3g} ± {row['stderr']:.2g}, {row['verdict']}"


def _settings(row: pd.Series) -> str:
    return (
        f"nβ = {row['nbeta']:.4g}, γ = {row['localization']:.4g}, ε = {row['lr']:.3g}, {row['num_chains']} chains × "
        f"({row['num_burnin_steps']} + {row['num_draws']}), batch {row['batch_size']}, n = {row['num_samples']:,}"
    )

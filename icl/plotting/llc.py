"""Figures of LLC estimates: the curve over training with its verdicts, the chains' traces, and the calibration.

A verdict has one mark wherever it is drawn: `ok` a filled dot, `suspect` a hollow triangle, `invalid` a cross.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.style import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, new_figure, scale_steps
from icl.plotting.tidying import KEY
from icl.reading import ContentError
from icl.runs import RunFolder
from icl.sampling.records import RENAMED_COLUMNS, Record
from icl.table_files import read_table

VERDICTS: dict[str, dict[str, Any]] = {
    "ok": {"color": BLUE, "marker": "o"},
    "suspect": {"color": ORANGE, "marker": "^", "markerfacecolor": "white"},
    "invalid": {"color": VERMILION, "marker": "x"},
}
CHAIN_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, BLACK)
_MAX_TRACES = 6


def plot_llc(
    table: pd.DataFrame,
    trivial_loss: float,
    *,
    title: str,
    stages: Sequence[float] = (),
) -> Figure:
    """Loss above and LLC below against step, on a logarithmic (left) and a linear axis (right); one step has the left alone.

    Where chains settle below their checkpoint's loss (`icl.sampling.drop_at_mean`), what they settle by is added, too: the LLC
    about that place.

    Args:
        table: Rows of `llc.csv` of one kind of settings.
        trivial_loss: Of predicting zero.
        title: Above the panels; the settings stand below it.
        stages: Steps at the boundaries between stages.
    """
    table = table.sort_values("step")
    is_one = table["step"].nunique() == 1
    figure, axes = new_figure(1, num_rows=2, width=6.8, height=2.9) if is_one else new_figure(2, num_rows=2, height=3.3)
    losses, estimates = axes[: len(axes) // 2], axes[len(axes) // 2 :]
    for above, below in zip(losses, estimates, strict=True):
        _draw_losses(above, table, trivial_loss)
        _draw_estimates(below, table)
        for panel in (above, below):
            for number, step in enumerate(stages):
                label = "boundary between stages" if number == 0 and panel is above else None
                panel.axvline(step, color=BLACK, linewidth=0.8, alpha=0.4, label=label)
            if above is losses[0]:
                scale_steps(panel)
        below.set_xlabel("step (updates)")
        above.sharex(below)
    losses[0].set_ylabel("loss (squared error per target)")
    estimates[0].set_ylabel("LLC (bars: 2 standard errors)")
    losses[-1].legend(fontsize=8)
    estimates[-1].legend(fontsize=8)
    if len(table) == 1:
        row = table.iloc[0].to_dict()
        estimates[0].set_title(describe_estimate(row), fontsize=10, color=VERDICTS[row["verdict"]]["color"])
    figure.suptitle(f"{title}\n{describe_settings(table.iloc[0])}", fontsize=10)
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
        panel.set_title(
            f"{name}{describe_estimate(record.row)}", fontsize=9, color=VERDICTS[record.row["verdict"]]["color"]
        )
    for panel in axes[len(chosen) :]:
        panel.set_visible(False)
    axes[0].set_ylabel("minibatch loss")
    axes[0].legend(fontsize=7)
    figure.suptitle(f"{title}: traces", fontsize=10)
    return figure


def plot_calibration(table: pd.DataFrame, traces: Mapping[int, Record], *, title: str) -> Figure:
    """Estimates, verdicts and escape over the searched settings at the last checkpoint, and traces of some corners.

    Args:
        table: The table of `icl.sampling.calibration`.
        traces: Estimates by corner, the chosen one first, then failed ones; without them, the upper panels alone.
        title: Above the panels.
    """
    figure, axes = new_figure(3, num_rows=2 if traces else 1, width=4.8, height=3.6)
    last = table[table["step"] == table["step"].max()]
    survey = last[last["stage"] == "nbeta, localization"]
    _draw_corners(axes[0], survey, "nbeta", "ratio", "γ/nβ = {:.3g}")
    _draw_corners(axes[1], last[last["lr_searched"]], "lr", "nbeta", "nβ = {:.3g}")
    _draw_escape(axes[2], survey)
    for panel, x in ((axes[0], "nbeta"), (axes[1], "lr")):
        _ring(panel, last, x)
        low, high = panel.get_ylim()
        panel.set_ylim(low, high + 0.25 * (high - low))  # for the legend
        panel.legend(fontsize=7, loc="upper left", ncols=2)
    axes[0].set(xlabel="nβ", ylabel="LLC (bars: 2 standard errors)", title="Plateau in nβ, at one ratio γ/nβ")
    axes[1].set(xlabel="step size ε", title="Plateau in ε")
    for panel, (corner, record) in zip(axes[3:], list(traces.items())[:3], strict=False):
        _draw_trace(panel, record.row, record.traces, record.stride)
        row = last[last["corner"] == corner].iloc[0]
        panel.set_title(
            f"{'chosen' if row['chosen'] else 'failed'}: nβ {row['nbeta']:.3g}, γ {row['localization']:.3g}, ε {row['lr']:.2g}\n"
            f"{describe_estimate(record.row)}",
            fontsize=8,
            color=VERDICTS[record.row["verdict"]]["color"],
        )
    for panel in axes[3 + len(traces) :]:
        panel.set_visible(False)
    if traces:
        axes[3].set_ylabel("minibatch loss")
        axes[3].legend(fontsize=7)
    figure.suptitle(title, fontsize=11)
    return figure


def read_stages(folder: RunFolder) -> list[float]:
    """The steps at which stages end and others begin: `end` in the run's `results/stages.csv`, but for the last stage's."""
    try:
        table = read_table(folder.results / "stages.csv")
    except (OSError, ContentError):
        return []
    return sorted({float(step) for step in table["end"].dropna()})[:-1] if "end" in table else []


def _draw_losses(axes: Axes, table: pd.DataFrame, trivial_loss: float) -> None:
    line = axes.axhline(trivial_loss, color=BLACK, linestyle=":", linewidth=1.2, label="predicting zero")
    axes.plot(table["step"], table["mean_loss"], color=VERMILION, marker=".", label="E[L], mean over the chains")
    axes.plot(table["step"], table["init_loss"], color=BLUE, marker=".", label="L(w0), the checkpoint")
    set_limits(axes, pd.concat([table["init_loss"], table["mean_loss"].clip(upper=1.5 * trivial_loss)]))
    low, high = axes.get_ylim()
    if not low <= trivial_loss <= high:
        line.set_gid(KEY)  # out of sight, and its label says where
        line.set_label(f"predicting zero: {trivial_loss:.3g}, {'above' if trivial_loss > high else 'below'}")


def _draw_estimates(axes: Axes, table: pd.DataFrame) -> None:
    good = table[(table["verdict"] != "invalid") & np.isfinite(table["llc"].astype(float))]
    base = good if len(good) else table
    if len(good) > 1:
        axes.plot(good["step"], good["llc"], color=BLACK, linewidth=0.8, alpha=0.5)
    beside = _beside_their_minimum(table)
    total, both = (
        beside["llc"] + beside["drop_at_mean"],
        2 * np.hypot(beside["stderr"].fillna(0), beside["drop_at_mean_stderr"]),
    )
    error = 2 * base["stderr"].fillna(0)
    set_limits(axes, pd.concat([base["llc"] - error, base["llc"] + error, total - both, total + both]))
    if len(beside):
        style: dict[str, Any] = {"color": PURPLE, "marker": "D", "markersize": 3.5, "linewidth": 0.8, "linestyle": ":"}
        axes.errorbar(beside["step"], total, both, **style, capsize=2, label="about where the chains settle")
    low, high = axes.get_ylim()
    edges = (low + 0.03 * (high - low), high - 0.03 * (high - low))
    for verdict, style in VERDICTS.items():
        rows = table[table["verdict"] == verdict]
        if len(rows):
            inside = rows["llc"].astype(float).fillna(edges[1]).clip(*edges)
            error = (2 * rows["stderr"].astype(float)).where(inside == rows["llc"], 0).fillna(0)
            axes.errorbar(
                rows["step"], inside, error, **style, linestyle="none", markersize=6, capsize=2, label=verdict
            )


def _beside_their_minimum(table: pd.DataFrame) -> pd.DataFrame:
    """The rows whose chains settle below the checkpoint's loss, by which the LLC is too low, and did not escape."""
    table = table.rename(columns=RENAMED_COLUMNS)
    if "drop_at_mean_stderr" not in table:  # not measured
        return table.iloc[:0].assign(drop_at_mean=0.0, drop_at_mean_stderr=0.0)
    rise, height = table["mean_loss"] - table["init_loss"], table["trivial_loss"] - table["init_loss"]
    return table[
        (table["drop_at_mean"] > 3 * table["drop_at_mean_stderr"]) & table["llc"].notna() & ~(rise > height / 2)
    ]


def _draw_trace(axes: Axes, row: Mapping[str, Any], traces: np.ndarray, stride: int) -> None:
    moves = stride * np.arange(traces.shape[1])
    for chain, losses in enumerate(traces):
        axes.plot(moves, losses, color=CHAIN_COLOURS[chain % len(CHAIN_COLOURS)], linewidth=0.6, alpha=0.7)
    if row["num_burnin_steps"]:
        axes.axvspan(0, row["num_burnin_steps"], color=BLACK, alpha=0.08, linewidth=0)
    axes.axhline(row["init_loss"], color=BLUE, linewidth=1.6, label="L(w0)")
    axes.axhline(row["mean_loss"], color=VERMILION, linewidth=1.6, label="E[L]")
    levels = [traces[np.isfinite(traces)], np.array([row["init_loss"]])]
    if row["trivial_loss"] is not None:
        axes.axhline(row["trivial_loss"], color=BLACK, linestyle=":", linewidth=1.2, label="predicting zero")
        levels = [levels[0].clip(max=3 * row["trivial_loss"]), levels[1], np.array([row["trivial_loss"]])]
    set_limits(axes, pd.Series(np.concatenate(levels)))
    axes.set_xlabel("move (burn-in shaded)")


def _draw_corners(axes: Axes, rows: pd.DataFrame, x: str, family: str, label: str) -> None:
    """Estimates against a setting, a line for each value of another; marks beyond the limits stand at the edges."""
    sure = rows[rows["verdict"] != "invalid"]
    sure = rows if sure.empty else sure
    set_limits(axes, pd.concat([sure["llc"] - sure["stderr"], sure["llc"] + sure["stderr"], pd.Series([0.0])]))
    low, high = axes.get_ylim()
    for colour, (value, group) in zip(CHAIN_COLOURS, rows.groupby(family), strict=False):
        group = group.sort_values(x)
        axes.plot(group[x], group["llc"], color=colour, linewidth=1.0, label=label.format(value))
        for verdict, style in VERDICTS.items():
            one = group[group["verdict"] == verdict]
            shown = one["llc"].astype(float).fillna(high).clip(low, high)
            error = (2 * one["stderr"].astype(float)).where(shown == one["llc"], 0).fillna(0)
            axes.errorbar(one[x], shown, error, **style, linestyle="none", markersize=6, capsize=2)
    _ticks(axes, rows[x])


def _draw_escape(axes: Axes, survey: pd.DataFrame) -> None:
    """How far the sampled loss rose towards that of predicting zero, with the verdicts' thresholds."""
    share = (survey["mean_loss"] - survey["init_loss"]) / (survey["trivial_loss"] - survey["init_loss"])
    for colour, (_, group) in zip(CHAIN_COLOURS, survey.groupby("ratio"), strict=False):
        axes.plot(group["nbeta"], share[group.index], color=colour, marker=".")
    for level, word in ((0.5, "escaped"), (0.1, "escaping")):
        axes.axhline(level, color=BLACK, linestyle=":", linewidth=1)
        axes.annotate(word, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axes.set(xlabel="nβ", ylabel="(E[L] − L(w0)) / (zero's loss − L(w0))", title="Escape from the basin")
    axes.set_ylim(bottom=0, top=max(0.6, 1.05 * float(np.nanmax(share.clip(upper=1.5).fillna(0)))))
    _ticks(axes, survey["nbeta"])


def _ticks(axes: Axes, values: pd.Series) -> None:
    """A logarithmic axis with a tick at each value."""
    axes.set_xscale("log")
    axes.set_xticks(
        sorted(set(values)), [f"{value:.2g}" if value < 1 else f"{value:g}" for value in sorted(set(values))]
    )
    axes.minorticks_off()


def _ring(axes: Axes, last: pd.DataFrame, x: str) -> None:
    chosen = last[last["chosen"]]
    axes.plot(
        chosen[x], chosen["llc"], marker="o", markersize=15, markerfacecolor="none", color=GREEN, linestyle="none",
        markeredgewidth=2, label="chosen",
    )  # fmt: skip


def set_limits(axes: Axes, values: pd.Series) -> None:
    """Limits that hold these values and some room, whatever else is drawn."""
    finite = values[np.isfinite(values.astype(float))].astype(float)
    if len(finite):
        low, high = finite.min(), finite.max()
        room = 0.07 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)


def describe_estimate(row: Mapping[str, Any]) -> str:
    """An estimate with its standard error and verdict, for a title."""
    return f"LLC {row['llc']:.3g} ± {row['stderr']:.2g}, {row['verdict']}"


def describe_settings(row: pd.Series) -> str:
    """The sampler's settings in a line, for a title."""
    return (
        f"nβ = {row['nbeta']:.4g}, γ = {row['localization']:.4g}, ε = {row['lr']:.3g}, {row['num_chains']} chains × "
        f"({row['num_burnin_steps']} + {row['num_draws']}), batch {row['batch_size']}, n = {row['num_samples']:,}"
    )

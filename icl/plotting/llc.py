"""Figures of LLC estimates: the curve over training with its verdicts, and the calibration.

A verdict has the same mark in every figure: a filled dot for `ok`, an open triangle for `suspect`, a cross for `invalid`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.files.reading import ContentError
from icl.files.tables import read_table
from icl.plotting.colours import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION
from icl.plotting.style import new_figure, scale_steps, select, set_limits
from icl.plotting.tidying import KEY
from icl.runs.folder import RunFolder
from icl.sampling.records import RENAMED_COLUMNS, WITH_BUG, Record, trivial_predictor

VERDICTS: dict[str, dict[str, Any]] = {
    "ok": {"color": BLUE, "marker": "o"},
    "suspect": {"color": ORANGE, "marker": "^", "markerfacecolor": "white"},
    "invalid": {"color": VERMILION, "marker": "x"},
}
CHAIN_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, BLACK)
ESCAPE_LABEL = "(E[L] − L(w0)) / (zero's loss − L(w0))"
_LOSS_LABELS = {
    "nll": "negative log-likelihood, nats per target",
    "cross_entropy": "cross-entropy, nats per token",
    "": "squared error per target",
}
"""Axis labels of the loss. The keys are the possible endings of the loss's name."""


def plot_llc(table: pd.DataFrame, trivial_loss: float, *, title: str, stages: Sequence[float] = ()) -> Figure:
    """Plot loss (top) and LLC (bottom) against the step, on a logarithmic (left) and a linear axis (right).

    With a single step, there is no right column. If the loss at the mean of the draws lies below the checkpoint's loss
    (`icl.sampling.at_checkpoint`), the estimate of the LLC is too low by about nbeta times the difference. If this bias
    is significant, a diamond shows the estimate plus the size of the bias.

    Args:
        table: Rows of `llc.csv` that share their sampler settings.
        trivial_loss: Loss of a trivial predictor. It predicts zero, or for a language run the uniform distribution.
        title: Title of the figure; the settings are added to it.
        stages: Steps at the boundaries between stages.
    """
    table = table.sort_values("step")
    if table["step"].nunique() == 1:
        figure, axes = new_figure(1, num_rows=2, width=6.8, height=2.9)
    else:
        figure, axes = new_figure(2, num_rows=2, height=3.3)
    losses, estimates = axes[: len(axes) // 2], axes[len(axes) // 2 :]
    for top, bottom in zip(losses, estimates, strict=True):
        _draw_losses(top, table, trivial_loss)
        _draw_estimates(bottom, table)
        for panel in (top, bottom):
            for index, step in enumerate(stages):
                label = "boundary between stages" if index == 0 and panel is top else None
                panel.axvline(step, color=BLACK, linewidth=0.8, alpha=0.4, label=label)
            if top is losses[0]:
                scale_steps(panel)
        bottom.set_xlabel("step (updates)")
        top.sharex(bottom)
    name = str(table["loss_name"].iloc[0]) if "loss_name" in table else ""
    losses[0].set_ylabel(f"loss ({next(text for end, text in _LOSS_LABELS.items() if name.endswith(end))})")
    estimates[0].set_ylabel("LLC (bars: 2 standard errors)")
    losses[-1].legend(fontsize=8)
    estimates[-1].legend(fontsize=8)
    if len(table) == 1:
        title_estimate(estimates[0], table.iloc[0].to_dict(), fontsize=10)
    figure.suptitle(f"{title}\n{describe_settings(table.iloc[0])}", fontsize=10)
    return figure


def plot_calibration(table: pd.DataFrame, traces: Mapping[int, Record], *, title: str) -> Figure:
    """Plot estimates, verdicts, escape from the basin and a few traces, for all settings tried at the last checkpoint.

    Args:
        table: The table of `icl.sampling.calibration`.
        traces: Estimates whose traces are drawn: first the estimate with the chosen settings, then estimates with settings that failed. The
            keys are values of the column `corner`, the index of the settings. If `traces` is empty, the figure has no panels for traces.
        title: Title of the figure.
    """
    figure, axes = new_figure(3, num_rows=2 if traces else 1, width=4.8, height=3.6, title=title)
    last = select(table, step=table["step"].max())
    survey = select(last, stage="nbeta, localization")
    _draw_settings(axes[0], survey, "nbeta", "ratio", "γ/nβ = {:.3g}")
    _draw_settings(axes[1], last[last["lr_searched"]], "lr", "nbeta", "nβ = {:.3g}")
    _draw_escape(axes[2], survey)
    for panel, x in ((axes[0], "nbeta"), (axes[1], "lr")):
        _mark_chosen(panel, last[last["chosen"]], x)
        panel.legend(fontsize=7, loc="upper left", ncols=2)
    axes[0].set(xlabel="nβ", ylabel="LLC (bars: 2 standard errors)", title="LLC against nβ, for each γ/nβ")
    axes[1].set(xlabel="step size ε", title="LLC against the step size ε")
    for panel, (corner, record) in zip(axes[3:], list(traces.items())[:3], strict=False):
        _draw_trace(panel, record)
        row = select(last, corner=corner).iloc[0]
        state = "chosen" if row["chosen"] else "failed"
        prefix = f"{state}: nβ {row['nbeta']:.3g}, γ {row['localization']:.3g}, ε {row['lr']:.2g}\n"
        title_estimate(panel, record.row, prefix, fontsize=8)
    for panel in axes[3 + len(traces) :]:
        panel.set_visible(False)
    if traces:
        axes[3].set_ylabel("minibatch loss")
        axes[3].legend(fontsize=7)
    return figure


def read_stages(folder: RunFolder) -> list[float]:
    """Return the steps at which stages end, from the run's `results/stages.csv`, without the end of the last stage.

    If the table is missing or damaged, return an empty list.
    """
    try:
        table = read_table(folder.results / "stages.csv")
    except (OSError, ContentError):
        return []
    return sorted({float(step) for step in table["end"].dropna()})[:-1] if "end" in table else []


def draw_by_verdict(
    axes: Axes, x: pd.Series, rows: pd.DataFrame, *, limits: tuple[float, float] | None = None, named: bool = True
) -> None:
    """Draw LLCs with bars of two standard errors. The mark shows the verdict.

    Args:
        axes: Axes to draw in.
        x: Horizontal positions of the rows.
        rows: Rows with `llc`, `stderr` and `verdict`.
        limits: Range of LLCs that is shown. An LLC outside this range is drawn at the nearer limit, without a bar. NaN is drawn at the
            upper limit. With None, every LLC is drawn at its own value.
        named: Whether the legend names the verdicts, and says whether LLCs lie outside the limits.
    """
    for verdict, style in VERDICTS.items():
        chosen = select(rows, verdict=verdict)
        values, errors = chosen["llc"].astype(float), 2 * chosen["stderr"].astype(float)
        outside = ""
        if limits is not None:
            inside = values.fillna(limits[1]).clip(*limits)
            moved = values[inside != values]
            reason = "no estimate" if moved.isna().all() else "outside the limits"
            outside = f" (at the edge: {reason})" if len(moved) else ""
            values, errors = inside, errors.where(inside == values, 0).fillna(0)
        if len(chosen):
            label = f"{verdict}{outside}" if named else None
            options: dict[str, Any] = style | {"linestyle": "none", "markersize": 6, "capsize": 2, "label": label}
            axes.errorbar(x[chosen.index], values, errors, **options)


def draw_loss_levels(axes: Axes, row: Mapping[str, Any] | pd.Series) -> None:
    """Draw horizontal lines at L(w0), at E[L] and, if it is known, at the loss of a trivial predictor."""
    axes.axhline(row["init_loss"], color=BLUE, linewidth=1.6, label="L(w0)")
    axes.axhline(row["mean_loss"], color=VERMILION, linewidth=1.6, label="E[L]")
    if row["trivial_loss"] is not None:
        label = f"predicting {trivial_predictor(row.get('loss_name'))}"
        axes.axhline(row["trivial_loss"], color=BLACK, linestyle=":", linewidth=1.2, label=label)


def escaped_share(rows: pd.DataFrame) -> pd.Series:
    """Return (E[L] - L(w0)) / (L(trivial) - L(w0)): 0 at the checkpoint's loss, 1 at the loss of a trivial predictor."""
    return (rows["mean_loss"] - rows["init_loss"]) / (rows["trivial_loss"] - rows["init_loss"])


def title_estimate(axes: Axes, row: Mapping[str, Any], prefix: str = "", *, fontsize: int) -> None:
    """Write an estimate with its standard error and verdict above the axes, in the colour of the verdict."""
    text = f"{prefix}LLC {row['llc']:.3g} ± {row['stderr']:.2g}, {row['verdict']}"
    axes.set_title(text, fontsize=fontsize, color=VERDICTS[row["verdict"]]["color"])


def step_prefix(row: Mapping[str, Any]) -> str:
    """Return "step N: " for the title of an estimate, or an empty string if the estimate has no step."""
    return "" if row["step"] is None else f"step {row['step']:,}: "


def describe_settings(row: Mapping[str, Any] | pd.Series) -> str:
    """Return the settings of the sampler in one line, for a title."""
    return (
        f"nβ = {row['nbeta']:.4g}, γ = {row['localization']:.4g}, ε = {row['lr']:.3g}, {row['num_chains']} chains × "
        f"({row['num_burnin_steps']} + {row['num_draws']}), batch {row['batch_size']}, n = {row['num_samples']:,}"
    )


def _draw_losses(axes: Axes, table: pd.DataFrame, trivial_loss: float) -> None:
    trivial = f"predicting {trivial_predictor(table['loss_name'].iloc[0] if 'loss_name' in table else None)}"
    line = axes.axhline(trivial_loss, color=BLACK, linestyle=":", linewidth=1.2, label=trivial)
    axes.plot(table["step"], table["mean_loss"], color=VERMILION, marker=".", label="E[L], mean over the chains")
    axes.plot(table["step"], table["init_loss"], color=BLUE, marker=".", label="L(w0), the checkpoint")
    set_limits(axes, pd.concat([table["init_loss"], table["mean_loss"].clip(upper=1.5 * trivial_loss)]))
    low, high = axes.get_ylim()
    if not low <= trivial_loss <= high:
        line.set_gid(KEY)  # keep the legend entry, which gives the value of the invisible line
        line.set_label(f"{trivial} ({trivial_loss:.3g}, {'above' if trivial_loss > high else 'below'} the axis limits)")


def _draw_estimates(axes: Axes, table: pd.DataFrame) -> None:
    valid = table[(table["verdict"] != "invalid") & np.isfinite(table["llc"].astype(float))]
    if len(valid) > 1:
        axes.plot(valid["step"], valid["llc"], color=BLACK, linewidth=0.8, alpha=0.5)
    dropped = underestimated(table)
    corrected = dropped["llc"] + dropped["drop_at_mean"]
    corrected_error = 2 * np.hypot(dropped["stderr"].fillna(0), dropped["drop_at_mean_stderr"])
    # Invalid estimates can be huge, so they do not set the limits if there are valid estimates.
    shown = valid if len(valid) else table
    error = 2 * shown["stderr"].fillna(0)
    extremes = (shown["llc"] - error, shown["llc"] + error, corrected - corrected_error, corrected + corrected_error)
    set_limits(axes, pd.concat(extremes))
    if len(dropped):
        axes.errorbar(
            dropped["step"], corrected, corrected_error, color=PURPLE, marker="D", markersize=3.5, linewidth=0.8,
            linestyle=":", capsize=2, label="LLC + drop at the mean of the draws",
        )  # fmt: skip
    low, high = axes.get_ylim()
    if WITH_BUG in table and table[WITH_BUG].notna().any():
        low, high = min(low, table[WITH_BUG].min()), max(high, table[WITH_BUG].max() * 1.03)
        axes.set_ylim(low, high)
        label = "with the initial loss of the published code"
        axes.plot(table["step"], table[WITH_BUG], color="0.5", marker="+", linestyle="--", linewidth=0.8, label=label)
    margin = 0.03 * (high - low)
    draw_by_verdict(axes, table["step"], table, limits=(low + margin, high - margin))


def underestimated(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows whose loss at the mean of the draws lies significantly below the checkpoint's loss. Escaped chains are left out."""
    table = table.rename(columns=RENAMED_COLUMNS)
    if "drop_at_mean_stderr" not in table:  # not measured
        return table.iloc[:0].assign(drop_at_mean=0.0, drop_at_mean_stderr=0.0)
    is_significant = table["drop_at_mean"] > 3 * table["drop_at_mean_stderr"]
    # `escaped_share` is not used, because its sign is wrong for a checkpoint that is worse than a trivial predictor.
    rise, height = table["mean_loss"] - table["init_loss"], table["trivial_loss"] - table["init_loss"]
    return table[is_significant & table["llc"].notna() & ~(rise > height / 2)]


def _draw_trace(axes: Axes, record: Record) -> None:
    row, traces = record.row, record.traces
    moves = record.stride * np.arange(traces.shape[1])
    for chain, losses in enumerate(traces):
        axes.plot(moves, losses, color=CHAIN_COLOURS[chain % len(CHAIN_COLOURS)], linewidth=0.6, alpha=0.7)
    if row["num_burnin_steps"]:
        axes.axvspan(0, row["num_burnin_steps"], color=BLACK, alpha=0.08, linewidth=0)
    draw_loss_levels(axes, row)
    finite, levels = traces[np.isfinite(traces)], [row["init_loss"]]
    if row["trivial_loss"] is not None:
        finite = finite.clip(max=3 * row["trivial_loss"])
        levels.append(row["trivial_loss"])
    set_limits(axes, pd.Series(np.append(finite, levels)))
    axes.set_xlabel("move (burn-in shaded)")


def _draw_settings(axes: Axes, rows: pd.DataFrame, x: str, family: str, label: str) -> None:
    """Draw LLCs against the setting `x`, with a line for each value of the setting `family`.

    Marks beyond the axis limits are drawn at the edges.
    """
    valid = rows[rows["verdict"] != "invalid"]
    shown = rows if valid.empty else valid
    error = 2 * shown["stderr"]
    set_limits(axes, pd.concat([shown["llc"] - error, shown["llc"] + error, pd.Series([0.0])]))
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.25 * (high - low))  # room for the legend
    low, high = axes.get_ylim()
    limits = (low, high - 0.03 * (high - low))
    for colour, (value, group) in zip(CHAIN_COLOURS, rows.groupby(family), strict=False):
        group = group.sort_values(x)
        axes.plot(group[x], group["llc"], color=colour, linewidth=1.0, label=label.format(value))
        draw_by_verdict(axes, group[x], group, limits=limits, named=False)
    _tick_each(axes, rows[x])


def _draw_escape(axes: Axes, survey: pd.DataFrame) -> None:
    """Draw `escaped_share` and the thresholds of the verdicts. The share is 0 at the checkpoint's loss and 1 at the loss of a trivial predictor."""
    share = escaped_share(survey)
    for colour, (_, group) in zip(CHAIN_COLOURS, survey.groupby("ratio"), strict=False):
        axes.plot(group["nbeta"], share[group.index], color=colour, marker=".")
    for level, word in ((0.5, "escaped"), (0.1, "escaping")):
        axes.axhline(level, color=BLACK, linestyle=":", linewidth=1)
        axes.annotate(word, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    is_language = "loss_name" in survey and survey["loss_name"].astype(str).str.endswith("cross_entropy").all()
    label = ESCAPE_LABEL.replace("zero's", "uniform's") if is_language else ESCAPE_LABEL
    axes.set(xlabel="nβ", ylabel=label, title="Escape from the basin")
    highest, lowest = share.clip(upper=1.5).fillna(0).max(), share.clip(lower=-0.5).fillna(0).min()
    axes.set_ylim(bottom=min(0.0, 1.05 * lowest), top=max(0.6, 1.05 * highest))
    _tick_each(axes, survey["nbeta"])


def _tick_each(axes: Axes, values: pd.Series) -> None:
    """Make the x axis logarithmic, with a tick at each value."""
    ticks = sorted(set(values))
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{value:.2g}" if value < 1 else f"{value:g}" for value in ticks])
    axes.minorticks_off()


def _mark_chosen(axes: Axes, chosen: pd.DataFrame, x: str) -> None:
    axes.plot(
        chosen[x], chosen["llc"], marker="o", markersize=15, markerfacecolor="none", color=GREEN, linestyle="none",
        markeredgewidth=2, label="chosen",
    )  # fmt: skip

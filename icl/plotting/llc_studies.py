"""Figures that test LLC estimates: known answers, a comparison of two samplers, LLCs at each position, and chains."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.colours import BLACK, BLUE, GREEN, ORANGE, PURPLE, VERMILION, ordered_colours
from icl.plotting.llc import (
    ESCAPE_LABEL,
    VERDICTS,
    draw_loss_levels,
    escaped_share,
    plot_llc,
    title_estimate,
    underestimated,
)
from icl.plotting.style import new_figure, select

SAMPLERS: tuple[tuple[str, bool, dict[str, Any]], ...] = (
    ("published sampler", True, {"color": VERMILION, "marker": "s", "markersize": 5}),
    ("sampler that stays in the basin", False, {"color": BLUE, "marker": "o", "markersize": 5}),
)
"""Name of each sampler, whether it is the published sampler, and the style of its marks."""
_MAX_LABELS = 8
"""Largest number of steps that the legend of `plot_positions` names."""
_SAME_RATIO = 0.1
"""Largest relative difference between two products of localization and squared norm that count as equal."""


def plot_known_answers(table: pd.DataFrame, *, title: str) -> Figure:
    """Plot LLC estimates divided by the known answer.

    If the exact value at the nbeta of the estimate is known (column `finite`), this value is the answer. Otherwise the
    answer is the learning coefficient, which is the limit for infinite nbeta (column `asymptotic`).
    """
    figure, (axes,) = new_figure(1, width=7.8, height=4.6)
    truth = table["finite"].fillna(table["asymptotic"])
    heights = np.arange(len(table))
    axes.axvline(1, color=BLACK, linewidth=0.8)
    allowed = table["allowed"] / truth
    axes.barh(heights, 2 * allowed, left=1 - allowed, height=0.6, color=GREEN, alpha=0.2, label="allowed error")
    errors = 2 * table["stderr"] / truth
    axes.errorbar(table["llc"] / truth, heights, xerr=errors, fmt="o", color=BLUE, capsize=2, label="estimate")
    is_known = table["finite"].notna()
    axes.plot(
        (table["asymptotic"] / truth)[is_known], heights[is_known], linestyle="", marker="|", markersize=11, color=ORANGE,
        markeredgewidth=2, label="learning coefficient (nβ → ∞)",
    )  # fmt: skip
    axes.set_yticks(heights, [f"{row.problem}, nβ = {row.nbeta:g}" for row in table.itertuples()], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="estimate / exact value (bars: 2 standard errors)")
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=11)
    return figure


def plot_what_is_measured(llc: pd.DataFrame, *, title: str, until: float = np.inf) -> Figure:
    """Plot in three panels what the LLC estimates of two samplers measure.

    The sampled loss is the mean loss along the chains. The panels show the LLC against the checkpoint's loss, the sampled loss against the
    step, and the rise of the sampled loss towards the loss of predicting zero.

    Args:
        llc: Rows of `llc.csv` for one run.
        title: Title of the figure.
        until: Last step for the correlation between the LLC and the checkpoint's loss.
    """
    figure, (against, sampled, escape) = new_figure(3, width=4.8, height=4.0, title=title)
    for name, is_published, style in SAMPLERS:
        rows = rows_of_sampler(llc, is_published)
        if len(rows):
            _draw_sampler((against, sampled, escape), rows, name, style, until)
    checkpoints = _checkpoints(llc)
    zero = checkpoints["trivial_loss"].iloc[0]
    sampled.plot(
        checkpoints["step"] + 1, checkpoints["init_loss"], color=BLACK, marker=".", label="L(w0), the checkpoint"
    )
    sampled.axhline(zero, color=BLACK, linestyle=":", linewidth=1.2, label="predicting zero")
    escape.axhline(1, color=BLACK, linestyle=":", linewidth=1.2)
    escape.axhline(0.5, color=VERMILION, linestyle="--", linewidth=0.8)
    escape.annotate("invalid above", (0.02, 0.5), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    against.invert_xaxis()
    against.set(
        xlabel="loss of the checkpoint (training goes to the right)", ylabel="LLC estimate (bars: 2 standard errors)"
    )
    sampled.set(xscale="log", xlabel="step + 1 (updates)", ylabel="loss (squared error per target)")
    escape.set(xscale="log", xlabel="step + 1 (updates)", ylabel=ESCAPE_LABEL)
    for axes, name in (
        (against, "LLC against the loss of the checkpoint"),
        (sampled, "Loss along the chains"),
        (escape, "Rise of the loss towards that of predicting zero"),
    ):
        axes.set_title(name, fontsize=10)
        axes.legend(fontsize=7)
    escape.set_xlim(sampled.get_xlim())
    return figure


def _checkpoints(llc: pd.DataFrame) -> pd.DataFrame:
    """Return a row with the checkpoint's loss for each step.

    Two samplers with different batch sizes measure this loss on different prompts. We take the value of the sampler that
    stays in the basin, because the E[L] of this sampler is close to the checkpoint's loss.
    """
    rows = rows_of_sampler(llc, is_published=False)
    return (rows if len(rows) else llc).drop_duplicates("step").sort_values("step")


def _draw_sampler(
    panels: tuple[Axes, Axes, Axes], rows: pd.DataFrame, name: str, style: dict[str, Any], until: float
) -> None:
    against, sampled, escape = panels
    early = rows[np.isfinite(rows["llc"].astype(float)) & (rows["step"] <= until)]
    correlation = np.corrcoef(early["llc"], -early["init_loss"])[0, 1] if len(early) > 2 else np.nan
    steps = f" up to step {until:,}" if np.isfinite(until) else ""
    label = f"{name}\n(correlation with −loss{steps}: {correlation:.4f})"
    errors = 2 * rows["stderr"]
    against.errorbar(
        rows["init_loss"], rows["llc"], errors, linestyle="-", linewidth=0.8, capsize=2, label=label, **style
    )
    sampled.plot(rows["step"] + 1, rows["mean_loss"], **style, label=f"E[L], {name}")
    # Early checkpoints almost predict zero. For them, the share is a ratio of two small numbers, so it is not drawn.
    has_learned = rows["init_loss"] <= 0.95 * rows["trivial_loss"]
    escape.plot((rows["step"] + 1)[has_learned], escaped_share(rows)[has_learned], **style, label=name)


def plot_over_stages(
    llc: pd.DataFrame, norms: pd.DataFrame, published: pd.DataFrame, *, title: str, stages: Mapping[str, float]
) -> Figure:
    """Plot the LLCs of two samplers, the sampled losses and the norm of the weights over a whole run, on a linear axis.

    Args:
        llc: Rows of `llc.csv` for one run. Bars show 95 % intervals. If an estimate is invalid or has no interval, its
            bar shows two standard errors.
        norms: Rows of `checkpoints.csv` for the same run.
        published: The table `published.csv`. The LLCs in this table are drawn in the panel of the published sampler.
        title: Title of the figure.
        stages: Step at which each stage ends. The keys are the names of the stages.
    """
    figure, axes = new_figure(2, num_rows=2, width=5.6, height=3.4, title=title)
    in_basin, by_published, losses, weights = axes
    for panel, (name, is_published, style) in zip((by_published, in_basin), SAMPLERS, strict=True):
        rows = rows_of_sampler(llc, is_published)
        _draw_intervals(panel, rows)
        panel.set_title(f"LLC, {name}", fontsize=10)
        losses.plot(rows["step"], rows["mean_loss"], **style, linewidth=0.8, label=f"E[L], {name}")
    released = select(published, quantity="LLC (published sampler)")
    middle, half = (released["low"] + released["high"]) / 2, (released["high"] - released["low"]) / 2
    mark: dict[str, Any] = {"fmt": "D", "color": BLACK, "markersize": 4, "capsize": 2}
    by_published.errorbar(released["step"], middle, half, **mark, label="released numbers")
    checkpoints = _checkpoints(llc)
    losses.plot(
        checkpoints["step"], checkpoints["init_loss"], color=BLACK, linewidth=1.2, label="L(w0), the checkpoint"
    )
    losses.axhline(
        checkpoints["trivial_loss"].iloc[0], color=BLACK, linestyle=":", linewidth=1.2, label="predicting zero"
    )
    losses.set_ylabel("squared error per target")
    losses.set_title("Loss of the checkpoint and along the chains", fontsize=10)
    weights.plot(norms["step"], norms["weight_norm"], color=PURPLE)
    weights.set_ylabel("Euclidean norm")
    weights.set_title("Norm of all weights", fontsize=10)
    _finish_steps(axes, stages)
    for panel in (in_basin, by_published, losses):
        panel.legend(fontsize=7.5)
    return figure


def _finish_steps(panels: Sequence[Axes], stages: Mapping[str, float]) -> None:
    """Label the x axes, and draw a vertical line where each stage ends. The last panel names the stages."""
    text: dict[str, Any] = {"rotation": "vertical", "ha": "right", "va": "bottom", "fontsize": 8, "color": "0.35"}
    for panel in panels:
        panel.set_xlabel("step (updates)")
        for step in stages.values():
            panel.axvline(step, color=BLACK, linewidth=0.8, alpha=0.4)
    for name, step in stages.items():
        panels[-1].annotate(name, (step, 0.02), xycoords=("data", "axes fraction"), **text)


def _draw_intervals(axes: Axes, rows: pd.DataFrame) -> None:
    """Draw estimates with 95 % intervals and marks for their verdicts.

    If the drop at the mean of the draws is significant and the estimate is not invalid, a diamond shows the LLC plus
    `drop_at_mean`.
    """
    axes.plot(rows["step"], rows["llc"], color=BLACK, linewidth=0.8, alpha=0.5)
    # The interval of an invalid estimate means nothing, and can be too wide for the panel.
    has_no_interval = (rows["verdict"] == "invalid") | rows["interval_low"].isna()
    low = (rows["llc"] - rows["interval_low"]).mask(has_no_interval, 2 * rows["stderr"])
    high = (rows["interval_high"] - rows["llc"]).mask(has_no_interval, 2 * rows["stderr"])
    for verdict, style in VERDICTS.items():
        own = rows["verdict"] == verdict
        if own.any():
            bars = np.stack([low[own], high[own]])
            axes.errorbar(rows["step"][own], rows["llc"][own], bars, linestyle="", capsize=2, label=verdict, **style)
    dropped = underestimated(rows[rows["verdict"] != "invalid"])
    if len(dropped):
        axes.plot(
            dropped["step"], dropped["llc"] + dropped["drop_at_mean"], linestyle="", marker="D", color=GREEN,
            markersize=3, label="LLC + drop of the loss at the mean draw",
        )  # fmt: skip
    exception = "; 2 s.e. if invalid" if has_no_interval.any() else ""
    axes.set_ylabel(f"LLC (bars: 95 % intervals{exception})")


def plot_localization(
    llc: pd.DataFrame, norms: pd.DataFrame, *, reference_step: int, title: str, stages: Mapping[str, float]
) -> Figure:
    """Plot LLCs with a fixed localization, and LLCs whose localization falls as the weights grow, for several runs.

    If the weights have grown by a factor c, the falling localization is divided by c². Chains can then move c times as far. The product
    of this localization and the squared norm of the weights is the same at each step.

    Args:
        llc: Rows of `llc.csv`, without those of the published sampler.
        norms: Rows of `checkpoints.csv` for the same runs.
        reference_step: Step at which both localizations are equal. A row has a falling localization if its product of localization and
            squared norm differs by at most a tenth from the product at this step.
        title: Title of the figure.
        stages: Step at which each stage ends. The keys are the names of the stages.
    """
    figure, (estimates, localizations) = new_figure(2, width=5.6, height=4.0, title=title)
    rows = llc[~llc["mode"].fillna("").str.startswith("published")].merge(norms[["run", "step", "weight_norm"]])
    rows = rows.assign(product=rows["localization"] * rows["weight_norm"] ** 2).sort_values("step")
    for (run, own), line in zip(rows.groupby("run"), ("-", "--", ":", "-."), strict=False):
        fixed = rows_of_sampler(own, is_published=False)
        later = own[own["step"] >= reference_step]
        product = fixed.loc[fixed["step"] == reference_step, "product"].iloc[0]
        falling = later[(later["product"] / product - 1).abs() <= _SAME_RATIO]
        for chosen, colour, name in ((fixed, BLUE, "fixed"), (falling, PURPLE, "falls as the weights grow")):
            label = f"localization {name}, {str(run).rpartition('/')[2].replace('=', ' ')}"
            shape: dict[str, Any] = {"color": colour, "linestyle": line, "linewidth": 1.2}
            estimates.errorbar(chosen["step"], chosen["llc"], 2 * chosen["stderr"], **shape, capsize=2, label=label)
            localizations.plot(chosen["step"], chosen["localization"], **shape, marker=".", label=label)
            for verdict, style in VERDICTS.items():
                marked = select(chosen, verdict=verdict)
                marks = {key: value for key, value in style.items() if key != "color"}
                estimates.plot(marked["step"], marked["llc"], linestyle="", color=colour, markersize=5, **marks)
    _finish_steps((estimates, localizations), stages)
    estimates.set_ylabel("LLC (bars: 2 standard errors)")
    estimates.set_title("LLC (dot: ok, triangle: suspect, cross: invalid)", fontsize=10)
    estimates.legend(fontsize=7.5)
    localizations.set(ylabel="localization γ", yscale="log")
    localizations.set_title("Localization", fontsize=10)
    return figure


def plot_positions(positions: pd.DataFrame, llc: pd.DataFrame, *, title: str) -> Figure:
    """Plot the LLC of the loss at each position, with a panel for each set of sampler settings and a line for each step.

    A set of settings that was used at only one step is a control and has no panel, unless no set was used at several steps. The legend
    names at most eight of the steps.
    """
    num_steps = llc.sort_values("nbeta").groupby("settings", sort=False)["step"].nunique()
    hashes = list(num_steps[(num_steps > 1) | (num_steps.max() == 1)].index)
    figure, panels = new_figure(len(hashes), width=5.0, height=3.9, title=title)
    for axes, settings in zip(panels, hashes, strict=True):
        rows = select(positions, settings=settings)
        steps = sorted(rows["step"].unique())
        named = {steps[i] for i in np.linspace(0, len(steps) - 1, min(len(steps), _MAX_LABELS)).round().astype(int)}
        for step, colour in zip(steps, ordered_colours(len(steps)), strict=True):
            curve = select(rows, step=step).sort_values("position")
            verdict = select(llc, settings=settings, step=step)["verdict"].iloc[0]
            axes.errorbar(
                curve["position"], curve["llc"], 2 * curve["stderr"], color=colour, marker=VERDICTS[verdict]["marker"],
                markersize=4, markerfacecolor="white" if verdict != "ok" else colour, linewidth=1.1, elinewidth=0.6,
                label=f"{step:,}" if step in named else "_not in the legend",
            )  # fmt: skip
        estimate = select(llc, settings=settings).iloc[0]
        axes.set_title(
            f"nβ = {estimate['nbeta']:.4g}, γ = {estimate['localization']:.4g}, ε = {estimate['lr']:.2g}", fontsize=10
        )
        axes.set(xlabel="position k (k − 1 examples seen)", ylabel="LLC of the loss at k (bars: 2 standard errors)")
    panels[0].legend(fontsize=7, ncols=2, title="step", title_fontsize=8)
    return figure


def plot_chains(traces: pd.DataFrame, llc: pd.DataFrame, *, title: str) -> Figure:
    """Plot minibatch losses along the chains with E[L] and L(w0).

    Each row of panels shows one set of sampler settings, and the panels of a row show different steps.
    """
    llc = llc[llc["settings"].isin(traces["settings"])]
    hashes = list(llc.sort_values(["nbeta", "settings"])["settings"].unique())
    num_columns = max(select(traces, settings=settings)["step"].nunique() for settings in hashes)
    figure, axes = new_figure(num_columns, num_rows=len(hashes), width=4.4, height=2.9, title=title)
    for number, settings in enumerate(hashes):
        rows, panels = select(traces, settings=settings), axes[number * num_columns : (number + 1) * num_columns]
        for panel, step in zip(panels, sorted(rows["step"].unique()), strict=False):
            estimate = select(llc, settings=settings, step=step).iloc[0]
            _draw_chains(panel, select(rows, step=step), estimate)
            prefix = f"nβ {estimate['nbeta']:.4g}, γ {estimate['localization']:.4g}; step {step:,}\n"
            title_estimate(panel, estimate.to_dict(), prefix, fontsize=9)
    axes[0].legend(fontsize=7)
    for panel in axes[::num_columns]:
        panel.set_ylabel("minibatch loss")
    return figure


def _draw_chains(axes: Axes, traces: pd.DataFrame, estimate: pd.Series) -> None:
    for colour, (_, chain) in zip((ORANGE, GREEN), traces.groupby("chain"), strict=False):
        axes.plot(chain["move"], chain["loss"], color=colour, linewidth=0.7, alpha=0.8)
    if estimate["num_burnin_steps"]:
        axes.axvspan(0, estimate["num_burnin_steps"], color=BLACK, alpha=0.07, linewidth=0, label="burn-in")
    draw_loss_levels(axes, estimate)
    axes.set_xlabel("move")


def plot_run(llc: pd.DataFrame, *, title: str) -> Figure:
    """Draw the figure of `icl.plotting.llc.plot_llc` for one run and one set of sampler settings in a shipped table.

    Estimates for rescaled weights are left out.
    """
    rows = select(llc, rescale=1)
    return plot_llc(rows, float(rows["trivial_loss"].iloc[0]), title=title)


def rows_of_sampler(llc: pd.DataFrame, is_published: bool) -> pd.DataFrame:
    """Return the estimates of the published sampler (`is_published`) or of the other sampler, ordered by step.

    If this sampler was used with several sets of settings, only the estimates with the most frequent set are returned. The
    other sets are controls at single steps.
    """
    rows = llc[llc["mode"].fillna("").str.startswith("published") == is_published].sort_values("step")
    return rows[rows["settings"].isin(rows["settings"].mode()[:1])]

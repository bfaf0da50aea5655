"""Figures of what an LLC estimate is worth: known answers, what the samplers measure, its dependence on position and settings, traces."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.llc import VERDICTS, plot_llc
from icl.plotting.style import BLACK, BLUE, GREEN, ORANGE, VERMILION, new_figure, ordered_colours

_SAMPLERS = ((True, VERMILION, "s", "published sampler"), (False, BLUE, "o", "sampler that stays in the basin"))


def plot_known_answers(table: pd.DataFrame, *, title: str) -> Figure:
    """Estimates over the truth at their nbeta, and the asymptotic learning coefficient, of losses whose answer is known."""
    figure, (axes,) = new_figure(1, width=7.8, height=4.6)
    names = [f"{row.problem}, nβ = {row.nbeta:g}" for row in table.itertuples()]
    truth = table["finite"].fillna(table["asymptotic"])
    places = np.arange(len(table))
    axes.axvline(1, color=BLACK, linewidth=0.8)
    allowed = table["allowed"] / truth
    axes.barh(places, 2 * allowed, left=1 - allowed, height=0.6, color=GREEN, alpha=0.2, label="may miss by")
    axes.errorbar(
        table["llc"] / truth, places, xerr=2 * table["stderr"] / truth, fmt="o", color=BLUE, capsize=2, label="estimate"
    )
    is_known = table["finite"].notna()
    axes.plot(
        (table["asymptotic"] / truth)[is_known], places[is_known], linestyle="", marker="|", markersize=11, color=ORANGE,
        markeredgewidth=2, label="learning coefficient (nβ → ∞)",
    )  # fmt: skip
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="estimate / truth (bars: 2 standard errors)")
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=11)
    return figure


def plot_what_is_measured(llc: pd.DataFrame, *, title: str) -> Figure:
    """LLC against the checkpoint's loss, the sampled loss against it, and how far chains went towards predicting zero."""
    figure, (against, sampled, escape) = new_figure(3, width=4.8, height=4.0)
    for is_published, colour, marker, name in _SAMPLERS:
        rows = llc[llc["mode"].fillna("").str.startswith("published") == is_published].sort_values("step")
        if rows.empty:
            continue
        told = rows[np.isfinite(rows["llc"].astype(float))]
        correlation = np.corrcoef(told["llc"], -told["init_loss"])[0, 1] if len(told) > 2 else np.nan
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5}
        against.errorbar(
            rows["init_loss"], rows["llc"], 2 * rows["stderr"], linestyle="-", linewidth=0.8, capsize=2,
            label=f"{name}\n(correlation with −loss: {correlation:.4f})", **style,
        )  # fmt: skip
        sampled.plot(rows["step"] + 1, rows["mean_loss"], **style, label=f"E[L], {name}")
        share = (rows["mean_loss"] - rows["init_loss"]) / (rows["trivial_loss"] - rows["init_loss"])
        near = rows["init_loss"] > 0.95 * rows["trivial_loss"]  # nothing to lose yet
        escape.plot((rows["step"] + 1)[~near], share[~near], **style, label=name)
    own = llc.drop_duplicates("step").sort_values("step")
    sampled.plot(own["step"] + 1, own["init_loss"], color=BLACK, marker=".", label="L(w0), the checkpoint")
    sampled.axhline(own["trivial_loss"].iloc[0], color=BLACK, linestyle=":", linewidth=1.2, label="predicting zero")
    escape.axhline(1, color=BLACK, linestyle=":", linewidth=1.2)
    escape.axhline(0.5, color=VERMILION, linestyle="--", linewidth=0.8)
    escape.annotate("invalid above", (1, 0.5), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    against.invert_xaxis()
    against.set(
        xlabel="loss of the checkpoint (training goes to the right)", ylabel="LLC estimate (bars: 2 standard errors)"
    )
    sampled.set(xscale="log", xlabel="step + 1 (updates)", ylabel="loss (squared error per target)")
    escape.set(xscale="log", xlabel="step + 1 (updates)", ylabel="(E[L] − L(w0)) / (zero's loss − L(w0))")
    for axes, name in (
        (against, "Is it the loss upside down?"),
        (sampled, "Where the chains are"),
        (escape, "Share of the way to predicting zero"),
    ):
        axes.set_title(name, fontsize=10)
        axes.legend(fontsize=7)
    escape.set_ylim(bottom=0)
    escape.set_xlim(sampled.get_xlim())
    figure.suptitle(title, fontsize=11)
    return figure


def plot_positions(positions: pd.DataFrame, llc: pd.DataFrame, *, title: str) -> Figure:
    """The estimate at each position of the prompt, over training, for every settings; the settings' name is above."""
    hashes = list(llc.sort_values("nbeta")["settings"].unique())
    figure, panels = new_figure(len(hashes), width=5.0, height=3.9)
    for axes, settings in zip(panels, hashes, strict=True):
        own = positions[positions["settings"] == settings]
        steps = sorted(own["step"].unique())
        for step, colour in zip(steps, ordered_colours(len(steps)), strict=True):
            curve = own[own["step"] == step].sort_values("position")
            verdict = llc[(llc["settings"] == settings) & (llc["step"] == step)]["verdict"].iloc[0]
            axes.errorbar(
                curve["position"], curve["llc"], 2 * curve["stderr"], color=colour, marker=VERDICTS[verdict]["marker"],
                markersize=4, markerfacecolor="white" if verdict != "ok" else colour, linewidth=1.1, elinewidth=0.6, label=f"{step:,}",
            )  # fmt: skip
        one = llc[llc["settings"] == settings].iloc[0]
        axes.set_title(f"nβ = {one['nbeta']:.4g}, γ = {one['localization']:.4g}, ε = {one['lr']:.2g}", fontsize=10)
        axes.set(xlabel="position k (k − 1 examples seen)", ylabel="LLC of the loss at k (bars: 2 standard errors)")
    panels[0].legend(fontsize=7, ncols=2, title="step", title_fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def plot_chains(traces: pd.DataFrame, llc: pd.DataFrame, *, title: str) -> Figure:
    """Minibatch losses along the chains, a row for every settings and a column for each step, with E[L] and L(w0)."""
    keys = list(llc.sort_values(["nbeta", "settings"])["settings"].unique())
    columns = max(traces[traces["settings"] == key]["step"].nunique() for key in keys)
    figure, axes = new_figure(columns, num_rows=len(keys), width=4.4, height=2.9)
    for row, settings in enumerate(keys):
        own = traces[traces["settings"] == settings]
        for panel, step in zip(axes[row * columns : (row + 1) * columns], sorted(own["step"].unique()), strict=False):
            about = llc[(llc["settings"] == settings) & (llc["step"] == step)].iloc[0]
            _draw_chains(panel, own[own["step"] == step], about)
            panel.set_title(
                f"nβ {about['nbeta']:.4g}, γ {about['localization']:.4g}; step {step:,}: "
                f"{about['llc']:.3g} ± {about['stderr']:.2g}, {about['verdict']}",
                fontsize=9, color=VERDICTS[about["verdict"]]["color"],
            )  # fmt: skip
    axes[0].legend(fontsize=7)
    for panel in axes[::columns]:
        panel.set_ylabel("minibatch loss")
    figure.suptitle(title, fontsize=11)
    return figure


def plot_run(llc: pd.DataFrame, *, title: str) -> Figure:
    """`icl.plotting.llc.plot_llc` from the shipped table of one run and one settings."""
    rows = llc[llc["rescale"] == 1]
    return plot_llc(rows, float(rows["trivial_loss"].iloc[0]), title=title)


def _draw_chains(axes: Axes, own: pd.DataFrame, about: pd.Series) -> None:
    for colour, (_, chain) in zip((ORANGE, GREEN), own.groupby("chain"), strict=False):
        axes.plot(chain["move"], chain["loss"], color=colour, linewidth=0.7, alpha=0.8)
    if about["num_burnin_steps"]:
        axes.axvspan(0, about["num_burnin_steps"], color=BLACK, alpha=0.07, linewidth=0, label="burn-in")
    levels: tuple[tuple[float, dict[str, Any]], ...] = (
        (about["init_loss"], {"color": BLUE, "linewidth": 1.6, "label": "L(w0)"}),
        (about["mean_loss"], {"color": VERMILION, "linewidth": 1.6, "label": "E[L]"}),
        (about["trivial_loss"], {"color": BLACK, "linestyle": ":", "linewidth": 1.2, "label": "predicting zero"}),
    )
    for value, style in levels:
        axes.axhline(value, **style)
    axes.set_xlabel("move")

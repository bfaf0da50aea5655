"""Figures of what runs do out of distribution: every shift at the last step, over training, and inputs and tasks of any size."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.evaluation import headlines
from icl.plotting.figures import Stages, mark_stages
from icl.plotting.style import BLUE, GREEN, ORANGE, PREDICTORS, PURPLE, label_plainly, new_figure, ordered_colours

_MARKS = (("o", BLUE), ("s", ORANGE), ("D", GREEN), ("v", PURPLE))
_FAMILIES = (("input_scale", "Inputs scaled by g (variance g²)"), ("task_scale", "Tasks scaled by g"))


def plot_shifts(evaluation: pd.DataFrame, baselines: pd.DataFrame, *, title: str) -> Figure:
    """The loss on every distribution against ridge's on the same prompts, at each run's last step.

    Args:
        evaluation: Rows of `evaluation.csv` of a few runs.
        baselines: The same of `baselines.csv`.
        title: Above the panel.
    """
    figure, (axes,) = new_figure(1, width=7.6, height=6.2)
    names: list[str] = []
    for number, (run, own) in enumerate(evaluation.groupby("run", sort=False)):
        ratio = _ratios(own, baselines[baselines["run"] == run])
        names += [name for name in ratio.index if name not in names]
        marker, colour = _MARKS[number % len(_MARKS)]
        places = [names.index(name) + 0.16 * (number - 0.5) for name in ratio.index]
        axes.errorbar(
            ratio["value"],
            places,
            xerr=2 * ratio["stderr"],
            fmt=marker,
            color=colour,
            markersize=5,
            capsize=2,
            label=str(run),
        )
    axes.axvline(1, **PREDICTORS["ridge"] | {"linewidth": 1.2, "label": "ridge"})
    axes.set_yticks(range(len(names)), [_label(name) for name in names], fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set(
        xscale="log", xlabel="loss / ridge's loss on the same prompts (bars: 2 standard errors of the model's loss)"
    )
    label_plainly(axes, "x")
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=11)
    return figure


def plot_shifts_over_training(
    evaluation: pd.DataFrame, baselines: pd.DataFrame, *, title: str, stages: Stages | None = None
) -> Figure:
    """The loss against ridge's over training: inputs and tasks scaled by g, and the other shifts."""
    figure, panels = new_figure(3, width=4.9, height=4.0)
    ratios = pd.concat(
        _ratios(own, baselines).assign(step=step).reset_index() for step, own in evaluation.groupby("step")
    )
    ratios = ratios.groupby("distribution").filter(lambda own: own["step"].nunique() > 1)
    families = [ratios[ratios["distribution"].str.startswith(f"{family}_")] for family, _ in _FAMILIES]
    others = ratios.drop(pd.concat(families).index) if ratios.index.is_unique else ratios[
        ~ratios["distribution"].str.contains("_scale_")
    ]  # fmt: skip
    for axes, rows, name in zip(
        panels, [*families, others], [*(name for _, name in _FAMILIES), "Other shifts"], strict=True
    ):
        _draw_over_training(axes, rows)
        mark_stages(axes, stages or {}, named=axes is panels[0])
        axes.axhline(1, **PREDICTORS["ridge"] | {"linewidth": 1.2, "label": "ridge"})
        axes.set(xscale="log", yscale="log", xlabel="step + 1 (updates)")
        low, high = axes.get_ylim()  # the legend stands below the line of ridge, or above all curves
        axes.set_ylim(*((low, 4 * high) if axes is panels[-1] else (low * (low / high) ** 0.45, high)))
        label_plainly(axes)
        axes.set_title(name, fontsize=10)
        axes.legend(fontsize=7, ncols=2, loc="upper left" if axes is panels[-1] else "lower left")
    panels[0].set_ylabel("loss / ridge's loss (1: ridge)")
    figure.suptitle(title, fontsize=11)
    return figure


def _ratios(own: pd.DataFrame, baselines: pd.DataFrame) -> pd.DataFrame:
    """Loss / ridge's loss with its error, by distribution, at the last step among the rows."""
    last = own[own["step"] == own["step"].max()]
    losses = headlines(last[last["quantity"] == "loss"]).set_index("distribution")
    ridge = headlines(baselines[baselines["quantity"] == "ridge"]).set_index("distribution")["value"]
    scaled = losses[["value", "stderr"]].div(ridge.reindex(losses.index), axis=0)
    scaled.index.name = "distribution"
    return scaled


def _draw_over_training(axes: Axes, rows: pd.DataFrame) -> None:
    names = list(dict.fromkeys(rows["distribution"]))
    for name, colour in zip(names, ordered_colours(len(names)), strict=True):
        own = rows[rows["distribution"] == name].sort_values("step")
        low, high = own["value"] - 2 * own["stderr"], own["value"] + 2 * own["stderr"]
        axes.plot(own["step"] + 1, own["value"], color=colour, linewidth=1.4, label=_short(name))
        axes.fill_between(own["step"] + 1, low.clip(lower=0.05), high, color=colour, alpha=0.15, linewidth=0)


def _label(name: str) -> str:
    """`input_scale_3` is "input scale × 3"."""
    words, _, size = name.rpartition("_")
    named = {"pretrain": "training tasks", "true": "new tasks, w ~ N(0, I)"}
    return f"{words.replace('_', ' ')} × {size}" if words.endswith("scale") else named.get(name, name.replace("_", " "))


def _short(name: str) -> str:
    words, _, size = name.rpartition("_")
    return f"g = {size}" if words.endswith("scale") else _label(name)

"""Figures of the chains of LLC estimates: the excess loss in nats for a single estimate, and at several steps."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl.plotting.colours import BLACK, BLUE
from icl.plotting.llc import CHAIN_COLOURS, describe_settings, step_prefix, title_estimate
from icl.plotting.style import new_figure, set_limits, spread_indices
from icl.plotting.tidying import KEY
from icl.sampling.records import Record, trivial_predictor

_MAX_TRACES = 6


def plot_estimate(record: Record, trivial_loss: float, *, title: str) -> Figure:
    """Plot the excess loss of every chain in nats, its running mean, and the LLC with two standard errors.

    The excess is nbeta times the difference between a minibatch loss and the checkpoint's loss on the same minibatch. Older versions of
    `icl` stored only minibatch losses, so the traces of older estimates include minibatch noise.

    Args:
        record: The estimate.
        trivial_loss: Loss of a trivial predictor. It predicts zero, or for a language run the uniform distribution.
        title: Title of the figure; the settings are added to it.
    """
    row = record.row
    figure, (axes,) = new_figure(1, width=7.4, height=4.4)
    moves, excess = excess_trace(record)
    is_draw = moves >= row["num_burnin_steps"]
    num_draws = np.arange(1, is_draw.sum() + 1)
    noise = "" if record.excess.size else " (with minibatch noise)"
    for chain, (values, colour) in enumerate(zip(excess, itertools.cycle(CHAIN_COLOURS))):
        axes.plot(moves, values, color=colour, linewidth=0.5, alpha=0.45)
        label = f"running mean of a chain{noise}" if chain == 0 else None
        axes.plot(moves[is_draw], values[is_draw].cumsum() / num_draws, color=colour, linewidth=1.8, label=label)
    if row["num_burnin_steps"]:
        axes.axvspan(0, row["num_burnin_steps"], color=BLACK, alpha=0.08, linewidth=0)
    _draw_levels(axes, row, excess)
    zero, (low, high) = row["nbeta"] * (trivial_loss - row["init_loss"]), axes.get_ylim()
    where = "" if low <= zero <= high else f" ({zero:,.0f} nats, {'above' if zero > high else 'below'} the axis limits)"
    axes.axhline(
        zero,
        color=BLACK,
        linestyle=":",
        linewidth=1.2,
        label=f"predicting {trivial_predictor(row.get('loss_name'))}{where}",
        gid=KEY,
    )
    axes.set(
        ylim=(low, high),
        xlabel="move of the chain (burn-in shaded)",
        ylabel="excess loss nβ (L − L(w0)), nats",
    )
    title_estimate(axes, row, step_prefix(row), fontsize=10)
    axes.legend(fontsize=8)
    figure.suptitle(f"{title}\n{describe_settings(row)}", fontsize=10)
    return figure


def plot_traces(records: Sequence[Record], *, title: str) -> Figure:
    """Plot the excess loss of every chain in nats at up to six steps, with the LLC and two standard errors."""
    indices = spread_indices(len(records), _MAX_TRACES)
    num_columns = min(3, len(indices))
    figure, axes = new_figure(num_columns, num_rows=-(-len(indices) // num_columns), width=4.6, height=3.2)
    for panel, record in zip(axes, [records[index] for index in indices], strict=False):
        _draw_excess(panel, record)
        title_estimate(panel, record.row, step_prefix(record.row), fontsize=9)
    for panel in axes[len(indices) :]:
        panel.set_visible(False)
    axes[0].set_ylabel("excess loss nβ (L − L(w0)), nats")
    axes[0].legend(fontsize=7)
    figure.suptitle(f"{title}: traces", fontsize=10)
    return figure


def excess_trace(record: Record) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, "K S"]]:
    """Return the moves at which draws were recorded, and the excess loss of each chain at these moves, in nats.

    Older versions of `icl` stored only minibatch losses. For older estimates, the result includes the moves of the burn-in,
    and the excess loss contains minibatch noise.
    """
    row = record.row
    if not record.excess.size:
        return record.stride * np.arange(record.traces.shape[1]) * 1.0, row["nbeta"] * (
            record.traces - row["init_loss"]
        )
    return row["num_burnin_steps"] + record.stride * np.arange(record.excess.shape[1]) * 1.0, record.excess


def _draw_excess(axes: Axes, record: Record) -> None:
    moves, excess = excess_trace(record)
    for chain, values in enumerate(excess):
        axes.plot(moves, values, color=CHAIN_COLOURS[chain % len(CHAIN_COLOURS)], linewidth=0.6, alpha=0.7)
    _draw_levels(axes, record.row, excess)
    axes.set_xlabel("move")


def _draw_levels(axes: Axes, row: Mapping[str, Any], excess: Float[np.ndarray, "K S"]) -> None:
    """Draw horizontal lines at zero (the checkpoint) and at the LLC with two standard errors, and set the limits of the y axis."""
    llc, error = row["llc"], 2 * row["stderr"]
    axes.axhline(0, color=BLUE, linewidth=1.2, label="checkpoint, L(w0)")
    axes.axhline(llc, color=BLACK, linewidth=1.4, linestyle="--", label="LLC ± 2 standard errors")
    axes.axhspan(llc - error, llc + error, color=BLACK, alpha=0.15, linewidth=0)
    finite = excess[np.isfinite(excess)]
    set_limits(axes, pd.Series(np.append(np.quantile(finite, [0.005, 0.995]) if len(finite) else [], [0.0, llc])))

"""The figure of one LLC estimate: a single step has no curve, so its chains are shown instead, in nats."""

import itertools

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from icl.plotting.llc import CHAIN_COLOURS, VERDICTS, describe_estimate, describe_settings, set_limits
from icl.plotting.style import BLACK, BLUE, new_figure
from icl.plotting.tidying import KEY
from icl.sampling.records import Record


def plot_estimate(record: Record, trivial_loss: float, *, title: str) -> Figure:
    """One estimate: the excess loss of every chain in nats, its mean so far, and the LLC with two standard errors.

    The LLC compares each minibatch's loss with the checkpoint's on the same minibatch, so it lacks the noise that the traces show.
    """
    row = record.row
    figure, (axes,) = new_figure(1, width=7.4, height=4.4)
    excess = row["nbeta"] * (record.traces - row["init_loss"])
    moves = record.stride * np.arange(excess.shape[1])
    is_draw = moves >= row["num_burnin_steps"]
    for chain, (values, colour) in enumerate(zip(excess, itertools.cycle(CHAIN_COLOURS))):
        axes.plot(moves, values, color=colour, linewidth=0.5, alpha=0.45)
        means = values[is_draw].cumsum() / np.arange(1, is_draw.sum() + 1)
        axes.plot(
            moves[is_draw],
            means,
            color=colour,
            linewidth=1.8,
            label="mean of a chain so far (has minibatch noise)" if chain == 0 else None,
        )
    if row["num_burnin_steps"]:
        axes.axvspan(0, row["num_burnin_steps"], color=BLACK, alpha=0.08, linewidth=0)
    axes.axhline(0, color=BLUE, linewidth=1.2, label="the checkpoint, L(w0)")
    axes.axhline(
        row["llc"], color=BLACK, linewidth=1.4, linestyle="--", label="LLC ± 2 standard errors (paired: without it)"
    )
    axes.axhspan(row["llc"] - 2 * row["stderr"], row["llc"] + 2 * row["stderr"], color=BLACK, alpha=0.15, linewidth=0)
    shown = excess[np.isfinite(excess)]
    set_limits(axes, pd.Series(np.append(np.quantile(shown, [0.005, 0.995]) if len(shown) else [], [0.0, row["llc"]])))
    zero, (low, high) = row["nbeta"] * (trivial_loss - row["init_loss"]), axes.get_ylim()
    place = "" if low <= zero <= high else f": {zero:,.0f} nats, {'above' if zero > high else 'below'}"
    axes.axhline(zero, color=BLACK, linestyle=":", linewidth=1.2, label=f"predicting zero{place}", gid=KEY)
    axes.set(
        ylim=(low, high),
        xlabel="move of the chain (burn-in shaded)",
        ylabel="excess loss nβ (L − L(w0)) of a minibatch, nats",
    )
    step = row["step"]
    name = "" if step is None else f"step {step:,}: "
    axes.set_title(f"{name}{describe_estimate(row)}", fontsize=10, color=VERDICTS[row["verdict"]]["color"])
    axes.legend(fontsize=8)
    figure.suptitle(f"{title}\n{describe_settings(pd.Series(row))}", fontsize=10)
    return figure

"""Rules about the checkpoint: is its loss finite, and is it at a minimum? The LLC is defined at minima."""

import math

from icl.sampling.recording import DIVERGED
from icl.sampling.verdict.evidence import Evidence
from icl.sampling.verdict.rule import rule


@rule("invalid", source="fixed outcome")
def checkpoint_not_finite(e: Evidence) -> str | None:
    """Without a loss at the checkpoint there is nothing to compare with."""
    return "the checkpoint's own loss is not finite on any minibatch" if math.isnan(e.init_loss) else None


@rule("invalid", source="LLC + 2 stderr < 0, but an LLC at a minimum is positive (Watanabe 2009)")
def negative(e: Evidence) -> str | None:
    """A significantly negative LLC means that the checkpoint is not at a minimum."""
    if not e.llc + 2 * e.error < 0:
        return None
    return (
        f"the LLC is negative ({e.llc:.3g}): the chains found lower loss than the checkpoint's, which is not a minimum"
    )


@rule("suspect", source="as `negative`, within the error")
def below_zero(e: Evidence) -> str | None:
    """A negative estimate within two standard errors of zero."""
    if not e.llc < 0 <= e.llc + 2 * e.error:
        return None
    return f"the LLC ({e.llc:.3g} ± {e.stderr:.2g}) is below zero, though not significantly"


@rule("suspect", source="definition of the LLC; the share of it is ours")
def not_at_a_minimum(e: Evidence) -> str | None:
    """One step down the checkpoint's gradient must not lower the loss by a fifth of the LLC."""
    if not (e.descent > 3 * e.descent_stderr and e.descent > max(0.2 * abs(e.llc), 0.1)):
        return None
    return f"not at a minimum: one step along the gradient lowers nbeta times the loss by {e.descent:.3g} nats"


@rule("suspect", source="definition of the LLC; the share of it is ours")
def lower_loss_at_mean(e: Evidence) -> str | None:
    """The loss at the mean of the draws must not lie below the checkpoint's by a tenth of the LLC."""
    if not (e.has_significant_drop and e.drop_at_mean > 0.1 and e.drop_share > 0.1):
        return None
    return (
        f"not at a minimum: the chains settle {e.drop_at_mean:.3g} nats below the checkpoint, "
        "so the LLC is underestimated by about that much"
    )


@rule("suspect", source="as `DIVERGED`, downwards")
def diverged_down(e: Evidence) -> str | None:
    """A chain that finds far lower loss has left for another minimum."""
    if not e.num_diverged_down:
        return None
    depth = DIVERGED * e.num_params
    return f"not at a minimum: {e.num_diverged_down} of {e.num_chains} chains fell by more than {depth:g} nats and are masked"


@rule("suspect", source="definition of the LLC; the share of it is ours")
def lower_loss_found(e: Evidence) -> str | None:
    """Without minibatch noise, no draw may have lower loss than the checkpoint."""
    if not -e.lowest > max(0.05 * abs(e.llc), 0.1):
        return None
    return f"not at a minimum: a chain found a point {-e.lowest:.3g} nats below the checkpoint"


@rule("note", source="as `lower_loss_at_mean`; standard errors")
def slightly_lower_loss_at_mean(e: Evidence) -> str | None:
    """A significant drop that is small beside the LLC, but larger than its standard error shows."""
    if not (e.has_significant_drop and e.drop_at_mean > 2 * e.error and (e.drop_at_mean <= 0.1 or e.drop_share <= 0.1)):
        return None
    return (
        f"note: the chains settle {e.drop_at_mean:.3g} nats below the checkpoint, so the LLC is underestimated by about that "
        "much, which its standard error does not include"
    )


@rule("note", source="Student's t: of two chains 236 standard errors are as rare as 3, of three 19, of four 9")
def too_few_chains_for_the_drop(e: Evidence) -> str | None:
    """Two or three chains hardly tell whether the checkpoint is at a minimum."""
    if not 1 < e.num_chains_used < 4:
        return None
    return f"note: {e.num_chains_used} chains can hardly show whether the checkpoint is at a minimum: use four or more"


@rule("note", source="as `lower_loss_at_mean`")
def drop_not_measurable(e: Evidence) -> str | None:
    """A drop that matters must be measurable."""
    if not (e.num_chains_used >= 4 and e.least_significant_drop > max(0.1 * abs(e.llc), 2 * e.error, 0.1)):
        return None
    return (
        f"note: a drop of the loss below the checkpoint's would be visible from {e.least_significant_drop:.2g} nats on only: "
        "raise num_init_batches, or use larger batches"
    )

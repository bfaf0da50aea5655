"""Rules about the checkpoint and its basin: is it at a minimum, and did the chains stay around it?

The LLC is defined at minima. A loss that is convex along rays from w0 has pull >= LLC. If this fails, a chain has left the
convex part of its basin.
"""

import math

from icl.sampling.recording import DIVERGED
from icl.sampling.verdict.evidence import Evidence, rule

_STAY_CLOSER = "raise nbeta or localization"


@rule("invalid", source="fixed outcome")
def checkpoint_not_finite(e: Evidence) -> str | None:
    """The excess of the loss needs a loss at the checkpoint."""
    return (
        "the checkpoint's own loss is not finite on any minibatch: check the data" if math.isnan(e.init_loss) else None
    )


@rule("invalid", source="LLC + 2 stderr < 0, but an LLC at a minimum is positive (Watanabe 2009)")
def negative(e: Evidence) -> str | None:
    """A significantly negative LLC means that the checkpoint is not at a minimum."""
    if not e.llc + 2 * e.error < 0:
        return None
    return f"the LLC is negative ({e.llc:.3g}), so the checkpoint is not at a minimum: train longer, or use a later checkpoint"


@rule("suspect", source="as `negative`, within the error")
def below_zero(e: Evidence) -> str | None:
    """A negative estimate within two standard errors of zero."""
    if not e.llc < 0 <= e.llc + 2 * e.error:
        return None
    return f"the LLC ({e.llc:.3g} ± {e.stderr:.2g}) is below zero, though not significantly: take more draws"


@rule("invalid", source="trust E[L] - L0 << L_trivial - L0 (their released LLCs fail this); the fraction is ours")
def escaped(e: Evidence) -> str | None:
    """Chains that rose more than half of the way to a trivial predictor have left the basin."""
    if e.trivial_loss is None or not e.rise > 0.5 * e.headroom:
        return None
    return (
        f"escaped: the mean sampled loss is {e.mean_loss:.4g}, against {e.init_loss:.4g} at the checkpoint and "
        f"{e.trivial_loss:.4g} for a trivial predictor, so the estimate reflects the loss, not the geometry: {_STAY_CLOSER}"
    )


@rule("suspect", source="as `escaped`; the fraction is ours")
def escaping(e: Evidence) -> str | None:
    """Chains that rose more than a tenth of the way to a trivial predictor may be leaving."""
    if e.trivial_loss is None or not 0.1 * e.headroom < e.rise <= 0.5 * e.headroom:
        return None
    return (
        f"escaping: the loss rose by {e.rise:.3g}, over a tenth of the {e.headroom:.3g} up to a trivial predictor: "
        f"{_STAY_CLOSER}"
    )


@rule("suspect", source="a loss that is convex along rays has pull >= LLC; standard errors")
def rise_exceeds_pull(e: Evidence) -> str | None:
    """The loss must pull the chains back by at least as much as it rose."""
    gap = e.llc - e.pull
    if not (gap > 3 * math.hypot(e.stderr, e.pull_stderr) and gap > 0.1 * e.llc):
        return None
    return (
        f"escaping: the loss pulls the chains back by {e.pull:.3g} nats but rose by {e.llc:.3g}, so they have left the convex "
        f"part of the basin: {_STAY_CLOSER}"
    )


@rule("note", source="fixed outcome")
def escape_not_checked(e: Evidence) -> str | None:
    """Without the loss of a trivial predictor there is no scale for the rise."""
    return "note: escape from the basin was not checked: give `trivial_loss`" if e.trivial_loss is None else None


@rule("suspect", source="definition of the LLC; the share of it is ours")
def not_at_a_minimum(e: Evidence) -> str | None:
    """One step down the checkpoint's gradient must not lower the loss by a fifth of the LLC."""
    if not (e.descent > 3 * e.descent_stderr and e.descent > max(0.2 * abs(e.llc), 0.1)):
        return None
    return (
        f"not at a minimum: one step down the gradient lowers nbeta times the loss by {e.descent:.3g} nats, "
        "so the LLC is underestimated by at least about that much"
    )


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
    return (
        f"not at a minimum: {e.num_diverged_down} of {e.num_chains} chains went more than {DIVERGED * e.num_params:g} nats "
        "below the checkpoint's loss and are masked"
    )


@rule("suspect", source="definition of the LLC; the share of it is ours")
def lower_loss_found(e: Evidence) -> str | None:
    """Without minibatch noise, no draw may have lower loss than the checkpoint."""
    if not -e.lowest > max(0.05 * abs(e.llc), 0.1):
        return None
    return f"not at a minimum: a chain found a point {-e.lowest:.3g} nats below the checkpoint"


@rule("note", source="as `lower_loss_at_mean`; standard errors")
def slightly_lower_loss_at_mean(e: Evidence) -> str | None:
    """A significant drop that is small beside the LLC, but larger than the standard error shows."""
    if not (e.has_significant_drop and e.drop_at_mean > 2 * e.error and (e.drop_at_mean <= 0.1 or e.drop_share <= 0.1)):
        return None
    return (
        f"note: the chains settle {e.drop_at_mean:.3g} nats below the checkpoint, so the LLC is underestimated by about that "
        "much, which its standard error does not include"
    )


@rule("note", source="Student's t: for two chains 236 standard errors are as rare as 3, for three 19, for four 9")
def too_few_chains_for_the_drop(e: Evidence) -> str | None:
    """Two or three chains hardly show whether the checkpoint is at a minimum."""
    if not 1 < e.num_chains_used < 4:
        return None
    return f"note: {e.num_chains_used} chains can hardly show whether the checkpoint is at a minimum: use four or more"


@rule("note", source="as `lower_loss_at_mean`")
def drop_not_measurable(e: Evidence) -> str | None:
    """A drop that would matter must be measurable."""
    if not (e.num_chains_used >= 4 and e.least_significant_drop > max(0.1 * abs(e.llc), 2 * e.error, 0.1)):
        return None
    return (
        f"note: a drop of the loss below the checkpoint's is measurable only above {e.least_significant_drop:.2g} nats: "
        "raise num_init_batches, or use larger batches"
    )

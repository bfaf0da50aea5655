"""Rules about the checkpoint, its basin and the localization.

They ask whether the checkpoint is at a minimum, whether the chains stayed near it, and how the localization limits the chains.

**The basin.** The LLC is defined at minima. Let the pull be the mean of nbeta (w - w0) . grad L over the draws. If the loss is convex along
rays from w0, then pull >= LLC. So if pull < LLC, a chain has left the convex part of its basin.

**The localization.** Let the spread be the mean of localization |w - w0|^2 over the draws. In equilibrium, pull + spread is the number d of
dimensions (`icl.sampling.verdict.chains`). The pull counts the directions that the data determine. The spread counts the directions that
the localization determines.

Let f = nbeta (L - L0). The LLC responds to the localization by -d LLC / d log localization = Cov(f, localization |w - w0|^2) / 2. We call
this number the `sensitivity` (`convergence.sensitivity`). By integration by parts of f (w - w0), the sensitivity is also
(pull - Cov(f, (w - w0) . nbeta grad L)) / 2. For a quadratic with curvatures h_i, let s_i = nbeta h_i / (nbeta h_i + localization) be the
share of the data in direction i, and 1 - s_i the share of the localization. Then the sensitivity is half the sum of s_i (1 - s_i), and the
LLC is half the sum of s_i. Flat directions contribute to neither. So the ratio of the sensitivity to the LLC is the mean of 1 - s_i,
weighted by s_i. The ratio is above 1/2 if the localization outweighs the data in this weighted mean. (If the number of curvatures above h
is proportional to h^-p, the ratio is p at every localization.)
"""

import math

from icl.sampling.convergence import significance_threshold
from icl.sampling.traces import DIVERGED
from icl.sampling.verdict.evidence import Evidence, rule

_STAY_CLOSER = "raise nbeta or localization"
_MORE_DATA = "raise nbeta, or lower localization"


@rule("invalid", source="fixed outcome")
def checkpoint_not_finite(e: Evidence) -> str | None:
    """The excess is defined only if the checkpoint's own loss is finite."""
    return (
        "the checkpoint's own loss is not finite on any minibatch: check its parameters and the data for NaN and infinite values"
        if math.isnan(e.init_loss)
        else None
    )


@rule("invalid", source="LLC + 2 stderr < 0, but an LLC at a minimum is positive (Watanabe 2009)")
def negative(e: Evidence) -> str | None:
    """A significantly negative LLC means that the checkpoint is not at a minimum."""
    if not e.llc + 2 * e.error < 0:
        return None
    return f"the LLC is negative ({e.llc:.3g}), so the checkpoint is not at a minimum: train longer, or use a later checkpoint"


@rule("suspect", source="the LLC is negative, but less than two standard errors below zero")
def below_zero(e: Evidence) -> str | None:
    """A negative estimate within two standard errors of zero may be due to sampling error alone."""
    if not e.llc < 0 <= e.llc + 2 * e.error:
        return None
    return f"the LLC ({e.llc:.3g} ± {e.stderr:.2g}) is below zero, though not significantly: take more draws"


@rule(
    "invalid",
    source="E[L] - L0 must be far below L_trivial - L0 (in the released LLCs of Hoogland 2024 it is not); the fraction is our choice",
)
def escaped(e: Evidence) -> str | None:
    """Chains have left the basin if their loss rose more than half of the way to the loss of a trivial predictor."""
    if e.trivial_loss is None or not e.rise > 0.5 * e.headroom:
        return None
    return (
        f"escaped: the mean sampled loss is {e.mean_loss:.4g}, the checkpoint's loss is {e.init_loss:.4g} and the loss of a trivial "
        f"predictor is {e.trivial_loss:.4g}, so the estimate does not measure the checkpoint's basin: {_STAY_CLOSER}"
    )


@rule("suspect", source="same as `escaped`; the fraction is our choice")
def escaping(e: Evidence) -> str | None:
    """Chains may be leaving the basin if their loss rose more than a tenth of the way to the loss of a trivial predictor."""
    if e.trivial_loss is None or not 0.1 * e.headroom < e.rise <= 0.5 * e.headroom:
        return None
    return (
        f"escaping: the loss rose by {e.rise:.3g}, more than a tenth of the difference ({e.headroom:.3g}) between the loss of a trivial "
        f"predictor and the checkpoint's loss: {_STAY_CLOSER}"
    )


@rule("suspect", source="if the loss is convex along rays, pull >= LLC; the thresholds are our choice")
def rise_exceeds_pull(e: Evidence) -> str | None:
    """The pull must be at least as large as nbeta times the rise of the loss."""
    gap = e.llc - e.pull
    if not (gap > 3 * e.gap_stderr and gap > 0.1 * e.llc):
        return None
    return (
        f"escaping: nbeta times the loss rose by {e.llc:.3g} nats, but the pull of its gradient is only {e.pull:.3g} nats, so the chains "
        f"have left the convex part of the basin: {_STAY_CLOSER}"
    )


@rule("note", source="fixed outcome")
def escape_not_checked(e: Evidence) -> str | None:
    """Without the loss of a trivial predictor, there is no scale with which to compare the rise of the loss."""
    return (
        "note: escape from the basin was not checked, because the loss of a trivial predictor is unknown: pass `trivial_loss`"
        if e.trivial_loss is None
        else None
    )


@rule("suspect", source="definition of the LLC; the threshold is our choice")
def not_at_a_minimum(e: Evidence) -> str | None:
    """One step down the checkpoint's gradient must not lower nbeta times the loss by more than a fifth of the LLC."""
    threshold = significance_threshold(e.descent_freedom) * e.descent_stderr
    if not (e.descent > threshold and e.descent > max(0.2 * abs(e.llc), 0.1, 4 * e.rounding)):
        return None
    return (
        f"not at a minimum: one step down the gradient lowers nbeta times the loss by {e.descent:.3g} nats, "
        "so the LLC is underestimated by at least about that much"
    )


@rule("suspect", source="definition of the LLC; the threshold is our choice")
def lower_loss_at_mean(e: Evidence) -> str | None:
    """The drop must be at most a tenth of LLC + drop.

    The drop is nbeta times the difference between the checkpoint's loss and the loss at the mean of the draws.
    """
    if not (e.has_significant_drop and e.drop_at_mean > 0.1 and e.drop_share > 0.1):
        return None
    return (
        f"not at a minimum: the chains settle {e.drop_at_mean:.3g} nats below the checkpoint, "
        "so the LLC is underestimated by about that much"
    )


@rule("suspect", source="the limit `traces.DIVERGED`, applied to a fall of the loss")
def diverged_down(e: Evidence) -> str | None:
    """A chain that finds a far lower loss has moved to another minimum."""
    if not e.num_diverged_down or e.are_most_masked:
        return None
    return (
        f"not at a minimum: {e.num_diverged_down} of {e.num_chains} chains went more than {DIVERGED * e.num_params:g} nats "
        "below the checkpoint's loss and are masked"
    )


@rule("suspect", source="definition of the LLC; the threshold is our choice")
def lower_loss_found(e: Evidence) -> str | None:
    """Without minibatch noise, no draw may have a clearly lower loss than the checkpoint."""
    if not -e.lowest > max(0.05 * abs(e.llc), 0.1, 4 * e.rounding):
        return None
    return f"not at a minimum: a chain found a point {-e.lowest:.3g} nats below the checkpoint"


@rule("note", source="same as `lower_loss_at_mean`, with a threshold in standard errors")
def slightly_lower_loss_at_mean(e: Evidence) -> str | None:
    """A significant drop that is small compared with the LLC is noted if it exceeds two standard errors of the LLC."""
    if not (e.has_significant_drop and e.drop_at_mean > 2 * e.error and (e.drop_at_mean <= 0.1 or e.drop_share <= 0.1)):
        return None
    return (
        f"note: the chains settle {e.drop_at_mean:.3g} nats below the checkpoint, so the LLC is underestimated by about that "
        "much, which the standard error does not include"
    )


@rule(
    "note",
    source="Student's t: 236 standard errors with two chains (19 with three, 9 with four) are as rare as 3 of a normal distribution",
)
def too_few_chains_for_the_drop(e: Evidence) -> str | None:
    """Two or three chains are too few to test whether the checkpoint is at a minimum."""
    if not 1 < e.num_chains_used < 4:
        return None
    return (
        f"note: {e.num_chains_used} chains are too few to test whether the checkpoint is at a minimum: use four or more"
    )


@rule("note", source="same as `lower_loss_at_mean`")
def drop_not_measurable(e: Evidence) -> str | None:
    """The measurement of the drop at the mean must be precise enough to detect a drop that would change the verdict."""
    if not (e.num_chains_used >= 4 and e.least_significant_drop > max(0.1 * abs(e.llc), 2 * e.error, 0.1)):
        return None
    size = "any number of" if math.isinf(e.least_significant_drop) else f"up to {e.least_significant_drop:.2g}"
    # A single batch has no noise, so only the scatter of the chains limits the measurement.
    repair = "raise num_init_batches, or use larger batches" if math.isnan(e.lowest) else "take more draws or chains"
    return f"note: the chains may settle {size} nats below the checkpoint, which this test would not detect: {repair}"


def _least_pull(e: Evidence) -> float:
    """Return the pull below which the data determine practically no direction."""
    return max(0.5, 1e-3 * e.num_params)


@rule("suspect", source="equipartition; the share of d is our choice")
def not_spread_out(e: Evidence) -> str | None:
    """In equilibrium, pull + spread is the number d of sampled dimensions.

    If the sum is below four fifths of d, the chains are still spreading out in flat directions.
    """
    if not _is_spreading_out(e):
        return None
    return (
        f"the chains are still spreading out in flat directions, which changes the LLC (pull + spread is {e.filled:.0%} of its equilibrium "
        "value d): lengthen the burn-in, or raise lr (95% takes 3 / (lr localization) moves, multiplied by (1 - friction) / (1 + friction) "
        "for `baoab`)"
    )


def _is_spreading_out(e: Evidence) -> bool:
    return e.localization > 0 and e.pull + e.spread + 3 * e.filled_stderr < 0.8 * e.num_params


@rule(
    "suspect",
    source="pull is the effective number of parameters (MacKay 1992); the limits 0.5 and d / 1000 are our choice",
)
def prior_dominated(e: Evidence) -> str | None:
    """The data must determine at least some directions."""
    if not (e.spread > e.num_params / 2 and e.pull < _least_pull(e)):
        return None
    return f"prior-dominated: the data determine only {max(e.pull, 0.0):.3g} of {e.num_params} directions: {_MORE_DATA}"


@rule(
    "suspect",
    source="without localization, exp(-nbeta L) has a finite integral only if the data determine every direction",
)
def improper(e: Evidence) -> str | None:
    """Without localization, chains have no stationary distribution in flat directions."""
    if not (e.localization == 0 and e.pull + 3 * e.pull_stderr < 0.9 * e.num_params):
        return None
    return (
        f"localization is 0, but the data determine only {max(e.pull, 0.0):.3g} of {e.num_params} directions, so the chains have no "
        "stationary distribution: set a positive localization"
    )


@rule(
    "note",
    source="same as `localization_outweighs`; at sensitivity / LLC = 0.3, localization has 0.43 times the weight of the data",
)
def localization_counts(e: Evidence) -> str | None:
    """A localization that is about as strong as the data changes the LLC."""
    ratio = e.sensitivity / max(e.llc, 1e-300)
    if not (e.sensitivity > 3 * e.sensitivity_stderr and 0.3 < ratio <= 2 / 3) or e.spread > 0.5 * e.num_params:
        return None
    return f"note: the LLC would fall by {e.sensitivity:.2g} ± {e.sensitivity_stderr:.1g} if localization were 2.7 times as large"


@rule(
    "suspect", source="integration by parts; at sensitivity / LLC = 2/3, localization has twice the weight of the data"
)
def localization_outweighs(e: Evidence) -> str | None:
    """The data, not the localization, must determine the LLC."""
    if not (e.localization > 0 and e.sensitivity - 2 * e.sensitivity_stderr > 2 / 3 * max(e.llc, 0.0)):
        return None
    return (
        f"prior-dominated: localization, not the data, decides the LLC, which would fall by {e.sensitivity:.3g} if localization were "
        f"2.7 times as large: {_MORE_DATA}"
    )


@rule(
    "suspect",
    source="for a quadratic loss with its minimum at the checkpoint, the sensitivity is not negative; the share of the LLC is our choice",
)
def rises_with_localization(e: Evidence) -> str | None:
    """At a minimum, a stronger localization lowers the LLC.

    This rule also finds saddles where the localization is stronger than nbeta times the downward curvature. There the chains stay near the
    checkpoint, so the loss at the mean of the draws is not lower than at the checkpoint.
    """
    if not (e.sensitivity < -3 * e.sensitivity_stderr and -e.sensitivity > 0.1 * abs(e.llc)):
        return None
    return (
        f"not at a minimum: the LLC would rise by {-e.sensitivity:.3g} if localization were 2.7 times as large, so in some directions the loss "
        "falls away from the checkpoint"
    )


@rule("note", source="same as `prior_dominated`")
def mostly_flat(e: Evidence) -> str | None:
    """If most directions are flat, the LLC depends on the localization."""
    if not (e.spread > 0.5 * e.num_params and e.pull >= _least_pull(e)):
        return None
    fall = f"would fall by {e.sensitivity:.2g} ± {e.sensitivity_stderr:.1g} if localization were 2.7 times as large"
    if math.isnan(e.sensitivity):
        fall = "depends on the localization"
    return f"note: the data determine only {e.pull:.3g} of {e.num_params} directions, so the LLC {fall}"


@rule("note", source="same as `not_spread_out`")
def hardly_spread_out(e: Evidence) -> str | None:
    """In equilibrium, pull + spread is the number d of sampled dimensions. The sum should be at least 95 % of d."""
    full = e.pull + e.spread + 2 * e.filled_stderr >= e.num_params
    if not (e.localization > 0 and e.filled < 0.95 and not full) or _is_spreading_out(e):
        return None
    return (
        f"note: the chains are still spreading out in flat directions (pull + spread is {e.filled:.0%} of its equilibrium value d): "
        "a longer burn-in may change the LLC"
    )

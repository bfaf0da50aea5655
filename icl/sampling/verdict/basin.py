"""Rules about the checkpoint, its basin and the localization.

They ask whether the checkpoint is at a minimum, whether the chains stayed around it, and how the localization limits the chains.

**The basin.** The LLC is defined at minima. A loss that is convex along rays from w0 has pull >= LLC. If this fails, a chain has
left the convex part of its basin.

**The localization.** In equilibrium pull + spread = d (`icl.sampling.verdict.chains`). The pull counts the directions that the data
determine. The spread counts the directions that the localization determines.

Integration by parts of f (w - w0), with f = nbeta (L - L0), shows how the LLC responds to the localization:
-d LLC / d log localization = (pull - Cov(f, (w - w0) . nbeta grad L)) / 2. We call this number the `sensitivity`
(`convergence.sensitivity`). For a quadratic with curvatures h_i, let s_i = nbeta h_i / (nbeta h_i + localization) be the share of the
data in direction i. Then the sensitivity is half the sum of s_i (1 - s_i), and the LLC is half the sum of s_i. Flat directions
contribute to neither. The ratio of sensitivity to LLC is above 1/2 if the localization outweighs the data in most directions that
count. (If the number of curvatures above h is proportional to h^-p, the ratio is p at every localization.)
"""

import math

from icl.sampling.traces import DIVERGED
from icl.sampling.verdict.evidence import Evidence, rule

_STAY_CLOSER = "raise nbeta or localization"
_MORE_DATA = "raise nbeta, or lower localization"


@rule("invalid", source="fixed outcome")
def checkpoint_not_finite(e: Evidence) -> str | None:
    """The excess is defined only if the checkpoint's own loss is finite."""
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
    """A negative estimate within two standard errors of zero may be due to its error alone."""
    if not e.llc < 0 <= e.llc + 2 * e.error:
        return None
    return f"the LLC ({e.llc:.3g} ± {e.stderr:.2g}) is below zero, though not significantly: take more draws"


@rule(
    "invalid", source="E[L] - L0 << L_trivial - L0 (not so in the released LLCs of Hoogland 2024); the fraction is ours"
)
def escaped(e: Evidence) -> str | None:
    """Chains that rose more than half of the way to a trivial predictor have left the basin."""
    if e.trivial_loss is None or not e.rise > 0.5 * e.headroom:
        return None
    return (
        f"escaped: the mean sampled loss is {e.mean_loss:.4g}, while the checkpoint has {e.init_loss:.4g} and a trivial predictor "
        f"{e.trivial_loss:.4g}, so the estimate does not measure the checkpoint's basin: {_STAY_CLOSER}"
    )


@rule("suspect", source="as `escaped`; the fraction is ours")
def escaping(e: Evidence) -> str | None:
    """Chains that rose more than a tenth of the way to a trivial predictor may be leaving."""
    if e.trivial_loss is None or not 0.1 * e.headroom < e.rise <= 0.5 * e.headroom:
        return None
    return (
        f"escaping: the loss rose by {e.rise:.3g}, more than a tenth of the difference ({e.headroom:.3g}) between a trivial predictor "
        f"and the checkpoint: {_STAY_CLOSER}"
    )


@rule("suspect", source="a loss that is convex along rays has pull >= LLC; standard errors")
def rise_exceeds_pull(e: Evidence) -> str | None:
    """The pull must be at least as large as nbeta times the rise of the loss."""
    gap = e.llc - e.pull
    if not (gap > 3 * math.hypot(e.stderr, e.pull_stderr) and gap > 0.1 * e.llc):
        return None
    return (
        f"escaping: nbeta times the loss rose by {e.llc:.3g} nats, but its gradient pulls the chains back by only {e.pull:.3g} nats, "
        f"so they have left the convex part of the basin: {_STAY_CLOSER}"
    )


@rule("note", source="fixed outcome")
def escape_not_checked(e: Evidence) -> str | None:
    """Without the loss of a trivial predictor there is no scale for the rise."""
    return "note: escape from the basin was not checked: give `trivial_loss`" if e.trivial_loss is None else None


@rule("suspect", source="definition of the LLC; the threshold is ours")
def not_at_a_minimum(e: Evidence) -> str | None:
    """One step down the checkpoint's gradient must not lower nbeta times the loss by more than a fifth of the LLC."""
    if not (e.descent > 3 * e.descent_stderr and e.descent > max(0.2 * abs(e.llc), 0.1)):
        return None
    return (
        f"not at a minimum: one step down the gradient lowers nbeta times the loss by {e.descent:.3g} nats, "
        "so the LLC is underestimated by at least about that much"
    )


@rule("suspect", source="definition of the LLC; the threshold is ours")
def lower_loss_at_mean(e: Evidence) -> str | None:
    """The drop of the loss at the mean of the draws must not exceed a tenth of the sum of the LLC and the drop."""
    if not (e.has_significant_drop and e.drop_at_mean > 0.1 and e.drop_share > 0.1):
        return None
    return (
        f"not at a minimum: the chains settle {e.drop_at_mean:.3g} nats below the checkpoint, "
        "so the LLC is underestimated by about that much"
    )


@rule("suspect", source="as `DIVERGED`, downwards")
def diverged_down(e: Evidence) -> str | None:
    """A chain that finds a far lower loss has moved to another minimum."""
    if not e.num_diverged_down:
        return None
    return (
        f"not at a minimum: {e.num_diverged_down} of {e.num_chains} chains went more than {DIVERGED * e.num_params:g} nats "
        "below the checkpoint's loss and are masked"
    )


@rule("suspect", source="definition of the LLC; the threshold is ours")
def lower_loss_found(e: Evidence) -> str | None:
    """Without minibatch noise, no draw may have lower loss than the checkpoint."""
    if not -e.lowest > max(0.05 * abs(e.llc), 0.1):
        return None
    return f"not at a minimum: a chain found a point {-e.lowest:.3g} nats below the checkpoint"


@rule("note", source="as `lower_loss_at_mean`; standard errors")
def slightly_lower_loss_at_mean(e: Evidence) -> str | None:
    """A significant drop that is small compared with the LLC is noted if it exceeds two standard errors of the LLC."""
    if not (e.has_significant_drop and e.drop_at_mean > 2 * e.error and (e.drop_at_mean <= 0.1 or e.drop_share <= 0.1)):
        return None
    return (
        f"note: the chains settle {e.drop_at_mean:.3g} nats below the checkpoint, so the LLC is underestimated by about that "
        "much; the standard error does not include this"
    )


@rule(
    "note",
    source="Student's t: it exceeds 236 standard errors for two chains (19 for three, 9 for four) as rarely as a normal exceeds 3",
)
def too_few_chains_for_the_drop(e: Evidence) -> str | None:
    """Two or three chains hardly show whether the checkpoint is at a minimum."""
    if not 1 < e.num_chains_used < 4:
        return None
    return f"note: {e.num_chains_used} chains can hardly show whether the checkpoint is at a minimum: use four or more"


@rule("note", source="as `lower_loss_at_mean`")
def drop_not_measurable(e: Evidence) -> str | None:
    """The drop at the mean must be measured well enough to detect a drop that would change the verdict."""
    if not (e.num_chains_used >= 4 and e.least_significant_drop > max(0.1 * abs(e.llc), 2 * e.error, 0.1)):
        return None
    return (
        f"note: a drop of the loss below the checkpoint's would be detected only above {e.least_significant_drop:.2g} nats: "
        "raise num_init_batches, or use larger batches"
    )


def _least_pull(e: Evidence) -> float:
    """Return the pull below which the data determine practically no direction."""
    return max(0.5, 1e-3 * e.num_params)


@rule("suspect", source="equipartition; the share of d is ours")
def not_spread_out(e: Evidence) -> str | None:
    """In equilibrium pull + spread = d. The chains must reach at least four fifths of d, else flat directions still spread out."""
    if not (e.localization > 0 and e.pull + e.spread + 3 * e.filled_stderr < 0.8 * e.num_params):
        return None
    return (
        f"the chains fill {e.filled:.0%} of what the localization allows, and the LLC still changes while flat directions fill: "
        "lengthen the burn-in (3 / (lr localization) moves fill 95%)"
    )


@rule(
    "suspect", source="pull is the effective number of parameters (MacKay 1992); the limits 0.5 and d / 1000 are ours"
)
def prior_dominated(e: Evidence) -> str | None:
    """The data must determine at least some directions."""
    if not (e.spread > e.num_params / 2 and e.pull < _least_pull(e)):
        return None
    return f"prior-dominated: the data determine only {e.pull:.3g} of {e.num_params} directions: {_MORE_DATA}"


@rule(
    "suspect", source="without localization, exp(-nbeta L) can be normalised only if the data determine every direction"
)
def improper(e: Evidence) -> str | None:
    """Without localization there is no stationary density for chains in flat directions."""
    if not (e.localization == 0 and e.pull + 3 * e.pull_stderr < 0.9 * e.num_params):
        return None
    return (
        f"localization is 0, but the data determine only {e.pull:.3g} of {e.num_params} directions, so the chains have no "
        "stationary distribution: set a positive localization"
    )


@rule("note", source="as `localization_outweighs`; at a ratio of 1/3, localization has half of the weight of the data")
def localization_counts(e: Evidence) -> str | None:
    """A localization that is about as strong as the data changes the LLC."""
    ratio = e.sensitivity / max(e.llc, 1e-300)
    if not (e.sensitivity > 3 * e.sensitivity_stderr and 0.3 < ratio <= 2 / 3) or e.spread > 0.5 * e.num_params:
        return None
    return f"note: the LLC falls by {e.sensitivity:.2g} ± {e.sensitivity_stderr:.1g} if localization grows 2.7-fold"


@rule("suspect", source="integration by parts; at a ratio of 2/3, localization has twice the weight of the data")
def localization_outweighs(e: Evidence) -> str | None:
    """The data, not the localization, must determine the LLC."""
    if not (e.localization > 0 and e.sensitivity - 2 * e.sensitivity_stderr > 2 / 3 * max(e.llc, 0.0)):
        return None
    return (
        f"prior-dominated: localization, not the data, decides the LLC, which would fall by {e.sensitivity:.3g} if localization "
        f"grew 2.7-fold: {_MORE_DATA}"
    )


@rule("note", source="as `prior_dominated`")
def mostly_flat(e: Evidence) -> str | None:
    """If most directions are flat, the LLC depends on the localization."""
    if not (e.spread > 0.5 * e.num_params and e.pull >= _least_pull(e)):
        return None
    fall = f"falls by {e.sensitivity:.2g} ± {e.sensitivity_stderr:.1g} if localization grows 2.7-fold"
    if math.isnan(e.sensitivity):
        fall = "depends on the localization"
    return f"note: the data determine only {e.pull:.3g} of {e.num_params} directions, so the LLC {fall}"


@rule("note", source="as `not_spread_out`")
def hardly_spread_out(e: Evidence) -> str | None:
    """In equilibrium pull + spread = d. The chains should reach at least 95 % of d."""
    full = e.pull + e.spread + 2 * e.filled_stderr >= e.num_params
    if not (e.localization > 0 and e.filled < 0.95 and not full):
        return None
    return f"note: the chains fill {e.filled:.0%} of what the localization allows: a longer burn-in may change the LLC"

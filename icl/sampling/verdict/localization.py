"""Rules about the localization: does it decide the LLC, and have the chains spread as far as it allows?

pull + spread = d in equilibrium (`icl.sampling.verdict.chains`). The pull counts the directions that the data determine, the
spread those that the localization determines.

Integration by parts of f (w - w0), with f = nbeta (L - L0), shows how the LLC responds to the localization:
-d LLC / d log localization = (pull - Cov(f, (w - w0) . nbeta grad L)) / 2, the `sensitivity` (`convergence.sensitivity`). For a
quadratic, let s_i = nbeta h_i / a_i be the share of the data in direction i. Then the sensitivity is half the sum of
s_i (1 - s_i), and the LLC half the sum of s_i. Flat directions count in neither. Their ratio is above 1/2 if the localization
outweighs the data in most directions that count. (If curvatures fall off as a power, the ratio is that power, at any localization.)
"""

from icl.sampling.verdict.evidence import Evidence, rule

_REMEDY = "raise nbeta, or lower localization"


def _least_pull(e: Evidence) -> float:
    """Return the pull below which the data determine practically no direction."""
    return max(0.5, 1e-3 * e.num_params)


@rule("suspect", source="equipartition; the share of d is ours")
def not_spread_out(e: Evidence) -> str | None:
    """The chains must fill at least four fifths of what the localization allows."""
    if not (e.localization > 0 and e.pull + e.spread + 3 * e.filled_stderr < 0.8 * e.num_params):
        return None
    return (
        f"the chains fill {e.filled:.0%} of what the localization allows, and the LLC changes as flat directions fill: lengthen "
        "the burn-in (3 / (lr localization) moves fill 95%)"
    )


@rule(
    "suspect", source="pull is the effective number of parameters (MacKay 1992); half of one, or a thousandth, is ours"
)
def prior_dominated(e: Evidence) -> str | None:
    """The data must determine at least some directions."""
    if not (e.spread > e.num_params / 2 and e.pull < _least_pull(e)):
        return None
    return f"prior-dominated: the data determine {e.pull:.3g} of {e.num_params} directions: {_REMEDY}"


@rule("suspect", source="integration by parts; for a single curvature, two thirds is twice the data's weight")
def localization_outweighs(e: Evidence) -> str | None:
    """The data, not the localization, must decide the LLC."""
    if not (e.localization > 0 and e.sensitivity - 3 * e.sensitivity_stderr > 2 / 3 * max(e.llc, 0.0)):
        return None
    return (
        f"prior-dominated: localization, not the data, decides the LLC, which would fall by {e.sensitivity:.3g} if localization "
        f"grew 2.7-fold: {_REMEDY}"
    )


@rule("note", source="as `prior_dominated`")
def mostly_flat(e: Evidence) -> str | None:
    """Most directions are flat, so the LLC depends on the localization."""
    if not (e.spread > 0.5 * e.num_params and e.pull >= _least_pull(e)):
        return None
    return (
        f"note: the data determine only {e.pull:.3g} of {e.num_params} directions, so the LLC falls by "
        f"{e.sensitivity:.2g} ± {e.sensitivity_stderr:.1g} if localization grows 2.7-fold"
    )


@rule("note", source="as `not_spread_out`")
def hardly_spread_out(e: Evidence) -> str | None:
    """The chains fill less than 95 % of what the localization allows."""
    full = e.pull + e.spread + 2 * e.filled_stderr >= e.num_params
    if not (e.localization > 0 and e.filled < 0.95 and not full):
        return None
    return f"note: the chains fill {e.filled:.0%} of what the localization allows: a longer burn-in may change the LLC"

"""Rules about the basin: did the chains stay around the checkpoint?

A loss that is convex along rays from w0 has pull >= LLC. If this fails, a chain has passed the rim of its basin.
"""

import math

from icl.sampling.verdict.evidence import Evidence
from icl.sampling.verdict.rule import rule

_RAISE = "raise nbeta or localization"


@rule("invalid", source="trust E[L] - L0 << L_trivial - L0 (their released LLCs fail this); the fraction is ours")
def escaped(e: Evidence) -> str | None:
    """Chains that rose more than half of the way to a trivial predictor have left the basin."""
    if e.trivial_loss is None or not e.rise > 0.5 * e.headroom:
        return None
    return (
        f"escaped: the mean sampled loss is {e.mean_loss:.4g}, against {e.init_loss:.4g} at the checkpoint and "
        f"{e.trivial_loss:.4g} for a trivial predictor; the estimate reflects the loss, not the geometry: {_RAISE}"
    )


@rule("suspect", source="as `escaped`; the fraction is ours")
def escaping(e: Evidence) -> str | None:
    """Chains that rose more than a tenth of the way to a trivial predictor may be leaving."""
    if e.trivial_loss is None or not 0.1 * e.headroom < e.rise <= 0.5 * e.headroom:
        return None
    return f"escaping: the loss rose by {e.rise:.3g}, over a tenth of the {e.headroom:.3g} up to a trivial predictor: {_RAISE}"


@rule("suspect", source="a loss that is convex along rays has pull >= LLC; standard errors")
def beyond_the_rim(e: Evidence) -> str | None:
    """The loss must pull the chains back by at least as much as it rose."""
    gap = e.llc - e.pull
    if not (gap > 3 * math.hypot(e.stderr, e.pull_stderr) and gap > 0.1 * e.llc):
        return None
    return (
        f"escaping: the loss pulls the chains back by {e.pull:.3g} nats but rose by {e.llc:.3g}, so they are past the rim of "
        f"the basin: {_RAISE}"
    )


@rule("note", source="fixed outcome")
def escape_not_checked(e: Evidence) -> str | None:
    """Without the loss of a trivial predictor there is no scale for the rise."""
    return "note: escape from the basin was not checked; give `trivial_loss`" if e.trivial_loss is None else None

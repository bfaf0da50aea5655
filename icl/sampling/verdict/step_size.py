"""Rules about the step size and the minibatch noise: how much do they bias the LLC?

In d dimensions the sampled density exp(-U) has E[(w - w0) . grad U] = d (integration by parts; the equipartition theorem,
and the Langevin-Stein operator of Gorham and Mackey 2015 applied to w - w0). The left side is pull + spread. Too large a step, or
too noisy a gradient, heats the chain beyond d: stationarity of |w - w0|^2 under moves of size lr makes it
d + (lr / 4) E|grad U|^2, with the minibatch's gradient (and, for a preconditioner G, in its metric). The part that the localization
alone contributes, lr / 4 localization^2 |w - w0|^2, is also there in flat directions and is harmless. Half of the rest is
`bias_bound`. It needs no direction to be in equilibrium, and it has little noise.

For quadratics, the bound is one to two times what the step adds to the LLC: with a_i = nbeta h_i + localization the ratio is
1 + localization / a_i (`known.quadratic_llc`). It is a_i / (nbeta h_i) times what the minibatch noise adds.
"""

from icl.sampling.verdict.evidence import Evidence
from icl.sampling.verdict.rule import rule

_REMEDY = "lower lr, or use larger batches"


@rule("suspect", source="an LLC at a minimum is at most d/2 (Watanabe 2009); the tenth is ours")
def above_half_of_d(e: Evidence) -> str | None:
    """No minimum has an LLC above d/2."""
    if not e.llc - 3 * e.stderr > 1.1 * e.num_params / 2:
        return None
    return f"the LLC is above d/2 = {e.num_params / 2:g}, the largest possible at a minimum: {_REMEDY}"


@rule("suspect", source="stationarity (this module); the share of the LLC is ours")
def too_hot(e: Evidence) -> str | None:
    """The bias must be small beside the LLC or beside its standard error."""
    if not (e.bias_bound > 3 * e.bias_bound_stderr and e.bias_bound > max(0.1 * abs(e.llc), 2 * e.error)):
        return None
    return f"too hot: step size and minibatch noise may raise the LLC by up to {e.bias_bound:.3g}: {_REMEDY}"


@rule("suspect", source="Roberts and Rosenthal 1998: 0.574 is best for MALA; SGLD, which accepts all, should do better")
def mala_acceptance(e: Evidence) -> str | None:
    """An exact sampler would accept at least half of the moves."""
    if not e.acceptance < 0.5:
        return None
    return f"MALA would accept only {e.acceptance:.0%} of the moves: lower lr"


@rule("note", source="as `too_hot`; standard errors")
def warm(e: Evidence) -> str | None:
    """A bias that is small beside the LLC, but larger than its standard error shows."""
    if not (e.bias_bound > 3 * e.bias_bound_stderr and 2 * e.error < e.bias_bound <= 0.1 * abs(e.llc)):
        return None
    return f"note: step size and minibatch noise raise the LLC by up to {e.bias_bound:.3g}, which its standard error does not include"

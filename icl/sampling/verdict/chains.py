"""Rules about the chains: whether they stay finite, agree with each other, are long enough, and make small enough steps.

**The bias of the step size.** Let exp(-U) be the sampled density in d dimensions. Integration by parts gives E[(w - w0) . grad U] = d.
(This is the equipartition theorem, and also the Langevin-Stein operator of Gorham and Mackey 2015 applied to w - w0.) The left side is pull
+ spread (defined in `icl.sampling.verdict.basin`). A large step or a noisy gradient makes this sum larger than d. Stationarity of
|w - w0|^2 under SGLD moves of step size lr gives pull + spread = d + (lr / 4) E|grad U|^2, where grad U is the gradient on the minibatch.
With a preconditioner G, |grad U|^2 is replaced by (grad U) . G grad U. The term with lr contains (lr / 4) localization^2 |w - w0|^2, which
comes from the localization alone. This part is also present in flat directions, and is harmless. `bias_bound` is half of the term with lr,
without this part. This bound has little noise, and is valid even if some directions are not in equilibrium.

On quadratics, `baoab` with friction c has no bias from the step size, only from minibatch noise. Its `bias_bound` is half of the amount
that the noise adds to pull + spread in directions of small curvature. This is lr (1 + c) / (8 (1 - c)) times the variance of nbeta grad L
over minibatches (`icl.sampling.kernels`). In a direction of curvature a, the noise adds more: this amount is multiplied by
1 / (1 - lr a / 4). We measure the variance from gradients at the same position on two minibatches.

On other losses, large steps of `baoab` do cause a bias. Let v be the velocity, h = sqrt(lr) and g = grad U. Stationarity of |v|^2,
|w - w0|^2 and (w - w0) . v under the moves of `baoab` gives (our derivation)

    pull + spread = d + (1 + c) / (4 (1 - c)) E[h^2 |g|^2 - 2 h v . g]

The term with E includes the minibatch noise. Half of this term is recorded as `measured_bias`. It has little noise, because h v . g is
nearly the change of U in a move. If `measured_bias` exceeds the bound above by two standard errors, it replaces this bound.

**Lists of minibatches.** Suppose that chains go through the same minibatches again and again, and let s be the noise of the gradient on one
of them. The noise of all minibatches sums to zero over a pass. So between two visits to this minibatch, the noise of the others moves the
chain along s, uphill on this minibatch. At each visit, s is therefore correlated with w - w0, in any order of the minibatches. Without
control variates, this adds nbeta E[s . (w - w0)] to the LLC. In directions in which chains move little in one pass, the noise adds the same
amount to pull + spread, so the bias is the whole of this amount and not half of it (our derivation). So the bound counts the noise twice.

For SGLD on quadratics, the bound is one to two times the bias from the step size. In a direction with a_i = nbeta h_i + localization, the
bound is (1 + localization / a_i) times the bias from the step size (`icl.sampling.known.quadratic_llc`). The part of the bound for
minibatch noise is about a_i / (nbeta h_i) times the bias from this noise.
"""

import math

from icl.sampling.convergence import MANY_CHAINS, needed_ess
from icl.sampling.traces import DIVERGED
from icl.sampling.verdict.evidence import Evidence, rule

_SMALLER_STEPS = "lower lr, or use larger batches"


@rule("invalid", source="fixed outcome")
def data_not_finite(e: Evidence) -> str | None:
    """At most half of the chains may have minibatches on which the loss is not finite even at the checkpoint."""
    return _describe_bad_data(e) if e.num_bad_data > e.num_chains / 2 and not math.isnan(e.init_loss) else None


@rule("suspect", source="fixed outcome")
def some_data_not_finite(e: Evidence) -> str | None:
    """No chain should have a minibatch on which the loss is not finite even at the checkpoint."""
    return _describe_bad_data(e) if 0 < e.num_bad_data <= e.num_chains / 2 else None


def _describe_bad_data(e: Evidence) -> str:
    return (
        f"{e.num_bad_data} of {e.num_chains} chains are masked, because on one of their minibatches the loss or its gradient is "
        "not finite even at the checkpoint: check the data for NaN and infinite values"
    )


@rule("invalid", source="fixed outcome")
def most_chains_masked(e: Evidence) -> str | None:
    """At least half of the chains, and at least one, must remain unmasked."""
    if not e.are_most_masked or e.num_masked == e.num_bad_data:
        return None
    counts = {
        "diverged or became non-finite": e.num_diverged,
        f"went more than {DIVERGED * e.num_params:g} nats below the checkpoint's loss": e.num_diverged_down,
    }
    causes = " and ".join(f"{num} {cause}" for cause, num in counts.items() if num)
    slope = "the checkpoint is not at a minimum, so train longer, or use a later checkpoint"
    repair = "lower lr" if e.num_diverged else slope
    return f"{e.num_masked} of {e.num_chains} chains are masked ({causes}): {repair}"


@rule("suspect", source="fixed outcome")
def some_chains_masked(e: Evidence) -> str | None:
    """If some chains diverge, the other chains are in doubt too, because they have the same step size."""
    if not (e.num_diverged > 0 and e.num_masked <= e.num_chains / 2):
        return None
    return f"{e.num_diverged} of {e.num_chains} chains are masked, because they diverged or became non-finite: lower lr"


@rule("suspect", source="fixed outcome: `init_loss` is the mean over the other batches")
def bad_minibatches(e: Evidence) -> str | None:
    """The checkpoint's own loss must be finite on all minibatches; otherwise the data may be wrong."""
    if not e.num_bad_batches or math.isnan(e.init_loss):
        return None
    minibatches = f"{e.num_bad_batches} minibatch{'es' if e.num_bad_batches > 1 else ''}"
    return f"the checkpoint's own loss is not finite on {minibatches}: check the data for NaN and infinite values"


@rule("suspect", source="rounding errors average out only if they are smaller than the scatter of the draws")
def rounded_losses(e: Evidence) -> str | None:
    """Differences of losses must not be lost in rounding, as they are if a large constant is added to a loss in float32."""
    scatter = e.stderr * math.sqrt(e.ess) if e.ess > 0 else math.nan
    if not e.rounding > scatter:
        return None
    return (
        f"the loss ({e.init_loss:.4g}) is rounded by up to {e.rounding:.2g} nats, more than the scatter of the draws ({scatter:.2g} nats): "
        "subtract a constant from the loss, or compute it in float64"
    )


@rule("suspect", source="fixed outcome: R-hat needs two chains")
def one_chain(e: Evidence) -> str | None:
    """A single chain cannot be compared with another."""
    if e.num_chains_used != 1:
        return None
    return f"only one chain is {'left' if e.num_masked else 'used'}, so its convergence cannot be checked: use four or more chains"


@rule("suspect", source="fixed outcome")
def shared_minibatches(e: Evidence) -> str | None:
    """Chains must not share minibatches, because the standard error does not include noise that they share."""
    if not e.share_batches:
        return None
    return "chains share minibatches, so the standard error does not include their common noise: give each chain its own minibatches"


@rule("suspect", source="Vehtari et al. 2021 ask for 1.01 at an ESS of 400; 1.05 suits an ESS of 200")
def r_hat(e: Evidence) -> str | None:
    """If there are few chains, they must agree with each other.

    Many short chains are allowed to disagree, because their standard error comes from the spread between them. The rule `drift` is stricter
    for such chains.
    """
    if not (1 < e.num_chains_used < MANY_CHAINS and e.rhat > 1.05):
        return None
    return f"the chains disagree (R-hat {e.rhat:.3f}, above 1.05): run them longer"


@rule("suspect", source="simulated coverage of the intervals of estimates that barely pass as `ok` (`tools.coverage`)")
def effective_sample_size(e: Evidence) -> str | None:
    """The effective sample size must be large enough (`convergence.needed_ess`).

    With a lower threshold, some estimates would pass only because their standard error is small by chance.
    """
    needed = needed_ess(e.num_chains_used)
    if not (e.num_chains_used and e.ess < needed):
        return None
    return f"the effective sample size is {e.ess:.0f}, below {needed}: take more draws or chains"


@rule("suspect", source="Geweke 1992, halves compared; the share of the LLC is our choice")
def drift(e: Evidence) -> str | None:
    """The two halves of the draws must have the same mean.

    The test is stricter for many chains with a large R-hat, because all of them may share a transient.
    """
    is_strict = e.num_chains_used >= MANY_CHAINS and e.rhat > 1.05
    drifts = abs(e.drift) > 3 * e.drift_stderr and abs(e.drift) > 0.1 * abs(e.llc)
    if not (drifts or (is_strict and abs(e.drift) > 2 * e.drift_stderr)):
        return None
    return (
        f"the loss still drifts after burn-in (by {e.drift:+.3g} nats from the first to the second half of the draws): "
        "lengthen the burn-in"
    )


@rule("suspect", source="fixed outcome: the test of drift compares two halves of at least four draws")
def too_short_for_drift(e: Evidence) -> str | None:
    """Chains of fewer than eight draws are too short for the test of drift, which is the only test of a transient that all chains share."""
    if not (e.num_chains_used and math.isnan(e.drift) and not math.isnan(e.llc)):
        return None
    return "the chains have fewer than eight draws, so it is unknown whether the loss still drifts: take more draws"


@rule("suspect", source="standard errors")
def not_significant(e: Evidence) -> str | None:
    """The LLC must be at least two standard errors above zero."""
    if not 0 <= e.llc < 2 * e.error:
        return None
    return (
        f"the LLC ({e.llc:.3g} ± {e.stderr:.2g}) is not significantly different from zero: "
        "take more draws or larger batches"
    )


@rule("suspect", source="an LLC at a minimum is at most d/2 (Watanabe 2009); the tolerance of a tenth is our choice")
def above_half_of_d(e: Evidence) -> str | None:
    """No minimum of a smooth loss has an LLC above d/2."""
    if not e.llc - 3 * e.stderr > 1.1 * e.num_params / 2:
        return None
    return f"the LLC is above d/2 = {e.num_params / 2:g}, the largest possible at a minimum of a smooth loss: {_SMALLER_STEPS}"


@rule("suspect", source="stationarity (this module); the share of the LLC is our choice")
def step_size_bias(e: Evidence) -> str | None:
    """The bias from the step size must be small compared with the LLC, whatever the standard error is."""
    if not (e.bias_bound > 3 * e.bias_bound_stderr and e.bias_bound > 0.1 * abs(e.llc)):
        return None
    return f"step size and minibatch noise may raise the LLC by up to {e.bias_bound:.3g}: {_SMALLER_STEPS}"


@rule(
    "suspect",
    source="0.574 is the best acceptance rate for MALA (Roberts and Rosenthal 1998); the threshold is our choice",
)
def mala_acceptance(e: Evidence) -> str | None:
    """A Metropolis test, which the kernels leave out, should accept at least half of the moves."""
    if not e.mala_acceptance < 0.5:
        return None
    return f"a Metropolis test would accept only {e.mala_acceptance:.0%} of the moves: lower lr"


@rule("note", source="fixed outcome")
def target_not_reached(e: Evidence) -> str | None:
    """The chains stop at the largest number of draws even if the standard error is still above its target."""
    if e.target_stderr is None or e.error <= e.target_stderr:
        return None
    return f"note: the standard error {e.stderr:.2g} is above `target_stderr` {e.target_stderr:g}: raise num_draws"


@rule("note", source="same as `step_size_bias`, with a threshold in standard errors")
def slight_step_size_bias(e: Evidence) -> str | None:
    """A bias bound that is small compared with the LLC is noted if it exceeds two standard errors."""
    if not (e.bias_bound > 3 * e.bias_bound_stderr and 2 * e.error < e.bias_bound <= 0.1 * abs(e.llc)):
        return None
    return (
        f"note: step size and minibatch noise may raise the LLC by up to {e.bias_bound:.3g}, which the interval includes "
        "but the standard error does not"
    )

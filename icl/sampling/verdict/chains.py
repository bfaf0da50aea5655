"""Rules about the chains themselves: did they survive, do they agree, are they long enough?"""

import math

from icl.sampling.recording import DIVERGED
from icl.sampling.verdict.evidence import Evidence
from icl.sampling.verdict.rule import rule


@rule("invalid", source="fixed outcome")
def most_chains_masked(e: Evidence) -> str | None:
    """Half of the chains must be left, and at least one."""
    if e.num_chains_used >= 0.5 * e.num_chains and e.num_chains_used > 0:
        return None
    causes = {
        "diverged or became non-finite (lower lr)": e.num_diverged,
        f"fell more than {DIVERGED * e.num_params:g} nats below the checkpoint's loss": e.num_diverged_down,
    }
    told = " and ".join(f"{num} {cause}" for cause, num in causes.items() if num)
    return f"{e.num_masked} of {e.num_chains} chains are masked: {told}"


@rule("suspect", source="fixed outcome")
def some_chains_masked(e: Evidence) -> str | None:
    """A chain that dies at a healthy step size is a warning about the others."""
    if not (e.num_diverged > 0 and e.num_masked <= e.num_chains / 2):
        return None
    return f"{e.num_diverged} of {e.num_chains} chains diverged or became non-finite and are masked: lower lr"


@rule("suspect", source="fixed outcome: the rest is averaged")
def bad_minibatches(e: Evidence) -> str | None:
    """A minibatch on which the checkpoint's own loss is not finite points at the data."""
    if not e.num_bad_batches or math.isnan(e.init_loss):
        return None
    return f"the checkpoint's own loss is not finite on {e.num_bad_batches} minibatches: check the data"


@rule("suspect", source="fixed outcome: R-hat needs two")
def one_chain(e: Evidence) -> str | None:
    """A single chain has nothing to be compared with."""
    return (
        "only one chain is left, so nothing shows whether it has converged: use four or more"
        if e.num_chains_used == 1
        else None
    )


@rule("suspect", source="fixed outcome")
def shared_minibatches(e: Evidence) -> str | None:
    """Noise that chains share is missing from the standard error."""
    return (
        "chains share their minibatches, so the standard error misses their common noise" if e.share_batches else None
    )


@rule("suspect", source="Vehtari et al. 2021 ask for 1.01 at an ESS of 400; 1.05 suits an ESS of 100")
def r_hat(e: Evidence) -> str | None:
    """Chains must agree with each other."""
    if e.num_chains_used <= 1 or e.rhat <= 1.05:
        return None
    return f"R-hat is {e.rhat:.3f}, above 1.05: the chains disagree; run them longer"


@rule("suspect", source="Vehtari et al. 2021: 50 per split chain for a usable standard error")
def effective_sample_size(e: Evidence) -> str | None:
    """The draws must be worth at least 100 independent ones."""
    if not e.num_chains_used or e.ess >= 100:
        return None
    return f"the effective sample size is {e.ess:.0f}, below 100: take more draws or chains"


@rule("suspect", source="Geweke 1992, halves compared; the share of the LLC is ours")
def drift(e: Evidence) -> str | None:
    """The two halves of the draws must have the same mean."""
    if not (abs(e.drift) > 3 * e.drift_stderr and abs(e.drift) > 0.1 * abs(e.llc)):
        return None
    return f"the loss still drifts after burn-in ({e.drift:+.3g} nats between the halves of the draws): lengthen the burn-in"


@rule("suspect", source="standard errors")
def not_significant(e: Evidence) -> str | None:
    """An LLC within two standard errors of zero says nothing."""
    if not 0 <= e.llc < 2 * e.error:
        return None
    return (
        f"the LLC ({e.llc:.3g} ± {e.stderr:.2g}) is not significantly different from zero: "
        "take more draws or larger batches"
    )

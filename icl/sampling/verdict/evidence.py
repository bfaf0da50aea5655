"""The evidence (the numbers on which the verdict is based) and the type of a rule.

The evidence is computed from the traces of the chains. Amounts are in nats, like the LLC: differences of loss are multiplied by nbeta. Only
the losses themselves, `rise` and `headroom` are not multiplied. Means are over the chains that are not masked.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit
from torch import Tensor

from icl.config import ChainsConfig
from icl.sampling import convergence
from icl.sampling.at_checkpoint import AtCheckpoint
from icl.sampling.convergence import significance_threshold
from icl.sampling.traces import Traces

Verdict: TypeAlias = Literal["ok", "suspect", "invalid"]
Level: TypeAlias = Literal["invalid", "suspect", "note"]
WIDE_ESS = 400
"""Effective sample size below which the interval is widened, if there are fewer than `convergence.MANY_CHAINS` chains."""
_COLUMNS = (
    *("rhat", "ess", "drift", "mala_acceptance", "pull", "spread", "bias_bound", "sensitivity", "sensitivity_stderr"),
    *("descent", "drop_at_mean", "drop_at_mean_stderr"),
)
"""Names of the fields of `Evidence` that are columns of `llc.csv`."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The numbers on which the rules are based."""

    llc: float
    """Mean over draws of nbeta (L(w) - L(w0)), where both losses are on the same minibatch."""
    stderr: float
    """Standard error of `llc` from the chains and their autocorrelation (`icl.sampling.convergence`)."""
    num_params: int
    """Number d of sampled dimensions."""
    num_chains: int
    num_chains_used: int
    num_diverged_down: int
    """Number of chains that are masked because they found a far lower loss."""
    num_bad_data: int
    """Number of chains that are masked because of a minibatch on which the loss is not finite even at the checkpoint."""
    init_loss: float
    init_loss_stderr: float
    rounding: float
    """Rounding error of nbeta times the loss: the distance between neighbouring floating-point numbers, in nats."""
    mean_loss: float
    """Mean sampled loss, computed as init_loss + llc / nbeta, so that it refers to the minibatches of `init_loss`."""
    num_bad_batches: int
    """Number of batches on which the checkpoint's own loss is not finite; `init_loss` is the mean over the others."""
    trivial_loss: float | None
    rhat: float
    ess: float
    drift: float
    """Mean of the second half of the draws minus the mean of the first half."""
    drift_stderr: float
    mala_acceptance: float
    """Mean probability that a Metropolis test would accept a move. For SGLD, it is the acceptance probability of MALA."""
    pull: float
    """Mean of nbeta (w - w0) . grad L."""
    pull_stderr: float
    spread: float
    """Mean of localization |w - w0|^2."""
    filled_stderr: float
    """Standard error of pull + spread."""
    gap_stderr: float
    """Standard error of llc - pull."""
    bias_bound: float
    """Upper bound on the bias from step size and minibatch noise."""
    bias_bound_stderr: float
    descent: float
    """Decrease of nbeta times the loss after one step down the checkpoint's gradient."""
    descent_stderr: float
    """Standard error of `descent`; NaN if `descent` was measured on a single batch that is not all the data."""
    descent_freedom: float
    """Degrees of freedom of `descent_stderr`."""
    drop_at_mean: float
    """nbeta times the difference between the checkpoint's loss and the loss at the mean of the draws (`icl.sampling.at_checkpoint`)."""
    drop_at_mean_stderr: float
    drop_at_mean_freedom: float
    """Degrees of freedom of `drop_at_mean_stderr`."""
    lowest: float
    """The smallest excess of any draw; NaN if minibatches make the losses noisy."""
    sensitivity: float
    """Rate at which the LLC falls per e-fold of localization (`convergence.sensitivity`); NaN for a short list of batches."""
    sensitivity_stderr: float
    localization: float
    target_stderr: float | None
    share_batches: bool

    @property
    def interval(self) -> tuple[float, float]:
        """Nominal 95 % interval of the LLC, by Student's t. Two known errors widen it, each if it exceeds half of the standard error.

        The first known error is the bias bound, which is subtracted from the lower end. The second is the shortfall, (1 - filled) LLC,
        which is added to the upper end. The LLC falls short if the chains have not yet visited a far part of a valley, or have visited it
        too rarely. Then pull + spread is below its exact mean d. Under the sampled density, Cov(excess, pull + spread) = E[pull]
        (integration by parts), and the variance of pull + spread is 2 d for a quadratic loss. So if pull + spread is too small by
        d (1 - filled), we expect the LLC to be too small by (1 - filled) pull / 2, which is about (1 - filled) LLC. This overestimates the
        shortfall if only flat directions are not filled.

        The number of degrees of freedom is ESS / 10 (but at least 1), because the estimated autocorrelation time has a relative variance of
        about 20 / ESS. Among estimates with few effective draws, those whose standard error is too small by chance pass the verdict most
        often. So for fewer than `convergence.MANY_CHAINS` chains and an ESS below `WIDE_ESS`, the variance is multiplied by `WIDE_ESS` /
        ESS (`tools.coverage` measures the effect).
        """
        reach = self.stderr * float(stdtrit(max(self.ess / 10, 1.0), 0.975)) if self.ess > 0 else math.nan
        if self.num_chains_used < convergence.MANY_CHAINS:
            reach *= max(1.0, WIDE_ESS / self.ess) ** 0.5 if self.ess > 0 else 1.0
        shortfall = max(1 - self.filled, 0.0) * self.llc
        below, above = (size if size > self.stderr / 2 else 0.0 for size in (self.bias_bound, shortfall))
        return self.llc - reach - below, self.llc + reach + above

    @property
    def rise(self) -> float:
        """Rise of the mean sampled loss above the checkpoint's loss."""
        return self.mean_loss - self.init_loss

    @property
    def headroom(self) -> float:
        """The trivial predictor's loss minus the checkpoint's loss, or 0 if the difference is negative; NaN without a trivial predictor."""
        return math.nan if self.trivial_loss is None else max(self.trivial_loss - self.init_loss, 0.0)

    @property
    def filled(self) -> float:
        """The sum pull + spread as a fraction of the number d of sampled dimensions.

        It is 1 in equilibrium, and larger if the step size is too large.
        """
        return max(self.pull + self.spread, 0.0) / self.num_params

    @property
    def error(self) -> float:
        """The standard error, or 0 if it is NaN."""
        return 0.0 if math.isnan(self.stderr) else self.stderr

    @property
    def num_masked(self) -> int:
        """Number of chains that are left out of all averages."""
        return self.num_chains - self.num_chains_used

    @property
    def are_most_masked(self) -> bool:
        """Whether more than half of the chains are masked, or all."""
        return self.num_chains_used < 0.5 * self.num_chains or not self.num_chains_used

    @property
    def num_diverged(self) -> int:
        """Number of chains that are masked because they diverged upwards, or became non-finite although their data are good."""
        return self.num_masked - self.num_diverged_down - self.num_bad_data

    @property
    def least_significant_drop(self) -> float:
        """Smallest drop at the mean that would be significant."""
        return significance_threshold(self.drop_at_mean_freedom) * self.drop_at_mean_stderr

    @property
    def has_significant_drop(self) -> bool:
        """Whether the loss at the mean of the draws is significantly lower than at the checkpoint."""
        return self.drop_at_mean > self.least_significant_drop

    @property
    def drop_share(self) -> float:
        """Drop at the mean as a fraction of LLC + drop. LLC + drop is the LLC with the loss at the mean of the draws in place of L(w0)."""
        llc = 0.0 if math.isnan(self.llc) else self.llc
        return self.drop_at_mean / max(llc + self.drop_at_mean, 1e-300)

    def columns(self) -> dict[str, Any]:
        """Return the numbers that are columns of `llc.csv`, keyed by column."""
        low, high = self.interval
        return {name: getattr(self, name) for name in _COLUMNS} | {"interval_low": low, "interval_high": high}


@dataclass(frozen=True)
class Rule:
    """A rule of the verdict: a test of the evidence, and the verdict if the evidence breaks the rule."""

    name: str
    level: Level
    """The verdict if the rule is broken. A note does not change the verdict."""
    source: str
    """Source of the rule and of its threshold. A `fixed outcome` follows from counts or missing numbers, without a statistical test."""
    reason: Callable[[Evidence], str | None]
    """Function that returns the reason as a phrase for the user if the evidence breaks the rule, and None otherwise."""


def rule(level: Level, *, source: str) -> Callable[[Callable[[Evidence], str | None]], Rule]:
    """Turn a function into a rule. The rule's name is the function's name, with spaces instead of underscores."""

    def decorate(function: Callable[[Evidence], str | None]) -> Rule:
        return Rule(function.__name__.replace("_", " "), level, source, function)

    return decorate


def evidence_of(
    traces: Traces,
    checkpoint: AtCheckpoint,
    settings: ChainsConfig,
    *,
    trivial_loss: float | None,
    num_params: int,
) -> Evidence:
    """Compute the evidence about one checkpoint from its K chains. `num_params` is the number of parameters that move."""
    used, nbeta, drop = traces.alive, settings.inverse_temperature, traces.drop_at_mean
    finite = checkpoint.losses.isfinite().all(1)
    init_losses = checkpoint.losses[finite].mean(1)
    init_loss = float(init_losses.mean()) if len(init_losses) else math.nan
    excess = (nbeta * traces.mean_excess[used]).numpy()  # K S
    pull, spread = (traces.quantities[name][used].numpy() for name in ("pull", "spread"))
    bias_bound, bias_bound_stderr = _bias_bound(traces)
    llc = _mean(excess)
    drift, drift_stderr = convergence.drift(excess)
    sensitivity, sensitivity_stderr = math.nan, math.nan
    if not traces.few_batches:
        sensitivity, sensitivity_stderr = convergence.sensitivity(excess, pull, spread, is_noisy=not traces.one_batch)
    is_fixed_length = settings.target_stderr is None
    return Evidence(
        llc=llc,
        stderr=(convergence.standard_error if is_fixed_length else convergence.standard_error_at_stop)(excess),
        num_params=num_params,
        num_chains=settings.num_chains,
        num_chains_used=int(used.sum()),
        num_diverged_down=int(traces.diverged_down.sum()),
        num_bad_data=int((traces.bad_data & ~used & ~traces.diverged_down).sum()),
        init_loss=init_loss,
        init_loss_stderr=_standard_error_over_batches(init_losses, checkpoint.are_all),
        rounding=nbeta * checkpoint.rounding * abs(init_loss),
        mean_loss=init_loss + llc / nbeta,
        num_bad_batches=int((~finite).sum()),
        trivial_loss=trivial_loss,
        rhat=convergence.rhat(excess) if settings.num_chains > 1 else math.nan,
        ess=convergence.ess(excess) if len(excess) else math.nan,
        drift=drift,
        drift_stderr=drift_stderr,
        mala_acceptance=float(traces.acceptance[used].mean()),
        pull=_mean(pull),
        pull_stderr=convergence.standard_error(pull),
        spread=_mean(spread),
        filled_stderr=convergence.standard_error(pull + spread),
        gap_stderr=convergence.standard_error(excess - pull),
        bias_bound=bias_bound,
        bias_bound_stderr=bias_bound_stderr,
        descent=checkpoint.descent,
        descent_stderr=checkpoint.descent_stderr,
        descent_freedom=checkpoint.descent_freedom,
        drop_at_mean=nbeta * drop.value,
        drop_at_mean_stderr=nbeta * drop.stderr,
        drop_at_mean_freedom=drop.degrees_of_freedom,
        lowest=float(excess.min()) if traces.one_batch and excess.size else math.nan,
        sensitivity=sensitivity,
        sensitivity_stderr=sensitivity_stderr,
        localization=settings.localization,
        target_stderr=settings.target_stderr,
        share_batches=traces.share_batches,
    )


def _bias_bound(traces: Traces) -> tuple[float, float]:
    """Return the bound on the bias with its standard error, or the measured bias if it is significantly larger than the bound."""
    draws = (traces.quantities[name][traces.alive].numpy() for name in ("bias_bound", "measured_bias"))
    bound, measured = ((_mean(values), convergence.standard_error(values)) for values in draws)
    return measured if measured[0] - 2 * measured[1] > bound[0] else bound


def _mean(draws: np.ndarray) -> float:
    return float(draws.mean()) if draws.size else math.nan


def _standard_error_over_batches(losses: Float[Tensor, " I"], are_all: bool) -> float:
    """Return the standard error of a mean over batches: 0 for a single batch that is all the data, NaN for any other single batch."""
    if len(losses) > 1:
        return float(losses.std()) / len(losses) ** 0.5
    return 0.0 if are_all and len(losses) else math.nan

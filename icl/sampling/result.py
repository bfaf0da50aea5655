"""The result of an LLC estimate: numbers, standard errors, traces, settings and the verdict."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icl.config import ChainsConfig
from icl.config.validation import ConfigError
from icl.sampling import convergence
from icl.sampling.at_checkpoint import AtCheckpoint
from icl.sampling.target import Target
from icl.sampling.traces import Traces
from icl.sampling.verdict import Evidence, Judgement, Verdict, evidence_of, judge

if TYPE_CHECKING:
    import pandas as pd
    import xarray

_ESTIMATE_COLUMNS = ("step", "checkpoint_hash", "llc", "stderr", "init_loss", "init_loss_stderr", "mean_loss")
"""The first columns of a row of `llc.csv`."""
_SETTINGS = ("lr", "nbeta", "localization", "num_chains", "num_draws", "num_burnin_steps", "seed", "thinning", "kernel")
"""The settings that are columns of a row of `llc.csv`."""


class CheckpointId(NamedTuple):
    """Step and hash of an estimate's checkpoint. The noise of a chain depends only on the seed, the hash and the chain's index."""

    step: int | None = None
    checkpoint_hash: str | None = None


@dataclass(frozen=True, kw_only=True)
class Fluctuation:
    """Fluctuation of the losses l_i of fixed samples under the posterior at nbeta (Watanabe 2009, sections 1.4 and 6.3)."""

    functional_variance: float | None
    """Functional variance V, the sum of Var_w[l_i] over n samples; None without `num_samples`."""
    singular_fluctuation: float
    """Singular fluctuation nu, which is nbeta/2 times the mean of Var_w[l_i] over samples. If the losses are negative log-likelihoods of a
    regular model that contains the truth, nu is d/2."""
    stderr: float
    """Standard error of the singular fluctuation, from the spread between chains; NaN for one chain."""


@dataclass(frozen=True, kw_only=True)
class LLCResult(Evidence):
    """An LLC estimate of one checkpoint: the evidence, the traces and the verdict.

    Chains that diverged or became non-finite are masked: they are NaN in `llc_per_chain` and are left out of all averages.
    """

    llc_per_chain: Float[Tensor, " K"]
    loss_trace: Float[Tensor, "K S"]
    """Minibatch losses at the draws, without burn-in."""
    burnin_trace: Float[Tensor, "K burnin"]
    """Minibatch losses during burn-in."""
    excess_trace: Float[Tensor, "K S"]
    """Excess nbeta (L(w) - L(w0)) on the draw's minibatch, in nats. Its mean over the chains that are not masked is `llc`."""
    observables: dict[str, Float[Tensor, "K S ..."]]
    """Values of the caller's observables at the draws."""
    llc_per_component: Float[Tensor, " T"] | None
    """LLC of each component, if the loss is a vector (per position, say). The mean of these LLCs is `llc`."""
    stderr_per_component: Float[Tensor, " T"] | None
    wbic: float | None
    """The product of `num_samples` and `mean_loss`, which is a WBIC (Watanabe 2013) if nbeta = n / ln n. None without `num_samples`."""
    fluctuation: Fluctuation | None
    settings: ChainsConfig
    """The settings of the chains, with the actual values of `nbeta` and `num_draws`."""
    num_init_batches: int
    """Number of distinct batches over which `init_loss` is averaged."""
    loss_name: str
    step: int | None
    checkpoint_hash: str | None

    @cached_property
    def judgement(self) -> Judgement:
        """Verdict, reasons and the names of the broken rules."""
        return judge(self)

    @property
    def verdict(self) -> Verdict:
        """One word: `ok`, `suspect` or `invalid`."""
        return self.judgement.verdict

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the estimate may be wrong: one phrase for each broken rule, the most serious first."""
        return self.judgement.reasons

    def to_dataframe(self, by: Literal["checkpoint", "chain", "component"] = "checkpoint") -> "pd.DataFrame":
        """Return a table with one row for the checkpoint, or one row for each chain or component. All rows include the settings.

        Raises:
            ValueError: If `by` is `component` and the loss was a single number.
        """
        import pandas as pd

        if by == "checkpoint":
            return pd.DataFrame([self.row()])
        if by == "chain":
            values = {
                "llc": self.llc_per_chain,
                "mean_loss": self.init_loss + self.llc_per_chain / self.settings.inverse_temperature,
            }
        elif self.llc_per_component is None or self.stderr_per_component is None:
            raise ValueError(
                "The loss was a single number. To get an LLC per component, use a loss that returns a vector."
            )
        else:
            values = {"llc": self.llc_per_component, "stderr": self.stderr_per_component}
        common = {name: value for name, value in self.row().items() if name not in ("llc", "stderr", "mean_loss")}
        table = pd.DataFrame({name: value.tolist() for name, value in values.items()} | common)
        return table.rename_axis(by).reset_index()

    def to_arviz(self) -> "xarray.DataTree":
        """Return the draws for ArviZ, in the groups `posterior` and `sample_stats` with dimensions chain and draw.

        `posterior` contains the observables and `llc`. The values of `llc` are the excess in nats at each draw, and their mean is the LLC.
        `sample_stats` contains `loss`. The attributes contain the estimate's row of `llc.csv`. Masked chains are left out.

        Raises:
            ConfigError: If the extra `arviz` is not installed, or no chain is left.

        Example:
            ```python
            arviz.summary(result.to_arviz(), var_names="llc")
            ```
        """
        try:
            from arviz_base import from_dict
        except ImportError:
            raise ConfigError(
                "`to_arviz` needs the extra `arviz`: `pip install 'icl[arviz]'`, on Python 3.11 or later."
            ) from None
        used = self.llc_per_chain.isfinite()
        if not used.any():
            raise ConfigError("All chains of this estimate are masked, so there are no draws to export. See `reasons`.")
        posterior = {"llc": self.excess_trace} | self.observables
        groups = {"posterior": posterior, "sample_stats": {"loss": self.loss_trace}}
        arrays = {
            group: {name: values[used].numpy() for name, values in values.items()} for group, values in groups.items()
        }
        attributes = {name: value for name, value in self.row().items() if value is not None}
        return from_dict(arrays, attrs={"posterior": attributes})

    def __str__(self) -> str:
        """Return the estimate with its errors, on one line."""
        return headline(self.row())

    def row(self) -> dict[str, Any]:
        """Return the scalar results as a row of `llc.csv`."""
        return {
            **{name: getattr(self, name) for name in _ESTIMATE_COLUMNS},
            "trivial_loss": self.trivial_loss,
            "loss_name": self.loss_name,
            "num_samples": self.settings.num_samples,
            **{name: getattr(self.settings, name) for name in _SETTINGS},
            "friction": self.settings.friction if self.settings.kernel == "baoab" else None,
            "num_params": self.num_params,
            "num_init_batches": self.num_init_batches,
            "num_chains_used": self.num_chains_used,
            "num_draws_used": self.num_chains_used * self.settings.num_draws,
            **self.columns(),
            "wbic": self.wbic,
            "singular_fluctuation": None if self.fluctuation is None else self.fluctuation.singular_fluctuation,
            "verdict": self.verdict,
            "reasons": "; ".join(self.reasons),
        }


def headline(row: Mapping[str, Any]) -> str:
    """Return the estimate in a row of `llc.csv` as text, with its standard error, bias bound and sensitivity.

    Examples:
        >>> headline({"llc": 45.9, "stderr": 0.7, "bias_bound": 1.2, "sensitivity": 10.0, "localization": 1e3, "verdict": "ok"})
        '45.9 ± 0.7 (bias at most 1.2; falls 10 per e-fold of localization, here 1000), ok'
    """
    change = row["sensitivity"]
    trend = f"{'falls' if change > 0 else 'rises'} {abs(change):.2g} per e-fold of localization, here"
    if math.isnan(change) or not change:
        trend = "at localization"
    return (
        f"{row['llc']:.3g} ± {row['stderr']:.2g} (bias at most {row['bias_bound']:.2g}; {trend} {row['localization']:g}), "
        f"{row['verdict']}"
    )


def make_result(
    traces: Traces,
    checkpoint: AtCheckpoint,
    settings: ChainsConfig,
    identity: CheckpointId,
    *,
    target: Target,
    num_params: int,
) -> LLCResult:
    """Compute the estimate of one checkpoint from its K chains. `num_params` is the number of parameters that move."""
    evidence = evidence_of(traces, checkpoint, settings, trivial_loss=target.trivial_loss, num_params=num_params)
    used, nbeta, num_samples = traces.alive, settings.inverse_temperature, settings.num_samples
    stop_early = settings.target_stderr is not None
    standard_error = convergence.standard_error_at_stop if stop_early else convergence.standard_error
    llc_per_component, stderr_per_component = _per_component(nbeta * traces.excess[used], standard_error)
    return LLCResult(
        **vars(evidence),
        llc_per_chain=(nbeta * traces.mean_excess).mean(1).where(used, torch.nan),
        loss_trace=traces.losses,
        burnin_trace=traces.burnin,
        excess_trace=nbeta * traces.mean_excess,
        observables=traces.observables,
        llc_per_component=llc_per_component,
        stderr_per_component=stderr_per_component,
        wbic=None if num_samples is None else num_samples * evidence.mean_loss,
        fluctuation=_fluctuation(traces, used, nbeta, num_samples),
        settings=dataclasses.replace(settings, nbeta=nbeta, num_draws=traces.losses.shape[1]),
        num_init_batches=len(checkpoint.losses),
        loss_name=target.name,
        step=identity.step,
        checkpoint_hash=identity.checkpoint_hash,
    )


def _per_component(
    excess: Float[Tensor, "K S *T"], standard_error: Callable[[np.ndarray], float]
) -> tuple[Tensor | None, Tensor | None]:
    if excess.ndim < 3:
        return None, None
    errors = [standard_error(component.numpy()) for component in excess.unbind(2)]
    return excess.mean((0, 1)), torch.tensor(errors, dtype=torch.float64)


def _fluctuation(traces: Traces, used: Tensor, nbeta: float, num_samples: int | None) -> Fluctuation | None:
    """Return the fluctuation from the variance over all draws: the variance within chains plus the variance of the chains' means.

    Without the second part, the variance of short chains would be too small. The second part is computed around the common mean of the K
    chains, which is itself computed from these chains. So the second part is multiplied by K / (K - 1).
    """
    if traces.sample_variance is None or traces.sample_mean is None:
        return None
    within, means = traces.sample_variance[used], traces.sample_mean[used]
    num_chains, num_draws = len(within), traces.losses.shape[1]
    per_chain = within.mean(1)
    if num_chains > 1:
        between = (means - means.mean(0)).square() * num_chains / (num_chains - 1)
        per_chain = (within * (num_draws - 1) / num_draws + between).mean(1)
    mean = float(per_chain.mean())
    return Fluctuation(
        functional_variance=None if num_samples is None else num_samples * mean,
        singular_fluctuation=nbeta / 2 * mean,
        stderr=nbeta / 2 * float(per_chain.std() / num_chains**0.5) if num_chains > 1 else math.nan,
    )

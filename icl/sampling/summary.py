"""From the traces of a checkpoint's chains to its estimate: means over the chains used, their errors, and the verdict."""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from icl.sampling import convergence, diagnostics
from icl.sampling.chains import Traces
from icl.sampling.diagnostics import Evidence
from icl.sampling.result import Fluctuation, Label, LLCResult
from icl.sampling.settings import SamplerSettings


def select(traces: Traces, i: int) -> Traces:
    """The traces of checkpoint i, with a leading axis of chains."""
    chosen: list[Any] = [value[i] if isinstance(value, Tensor) else value for value in traces]
    return Traces(*chosen)


def summarise(
    traces: Traces,
    init: Float[Tensor, "I T"],
    gain: tuple[float, float],
    settings: SamplerSettings,
    label: Label,
    *,
    num_params: int,
    num_samples: int | None,
    trivial_loss: float | None,
    loss_name: str,
) -> LLCResult:
    """The estimate of one checkpoint.

    Args:
        traces: Its chains.
        init: The checkpoint's losses on I batches, T components each.
        gain: What one step along its gradient gains, and the standard error.
        settings: What the chains were told.
        label: Which checkpoint it is.
        num_params: Sampled dimensions d.
        num_samples: The sample size n, if there is one.
        trivial_loss: Loss of a predictor that knows nothing.
        loss_name: The loss's name in result rows.
    """
    nbeta, finite = settings.nbeta, init.isfinite().all(1)
    init_means = init[finite].mean(1)
    init_loss, init_stderr = float(init_means.mean()), float(_mean_error(init_means)) if len(init_means) else math.nan
    excess = nbeta * traces.excess  # K S, or K S T
    draws = excess.mean(2) if excess.ndim > 2 else excess  # K S
    used = traces.alive
    evidence = _evidence(
        traces,
        draws,
        used,
        init_loss,
        gain,
        settings,
        num_params=num_params,
        trivial_loss=trivial_loss,
        bad_batches=int((~finite).sum()),
    )
    verdict, reasons = diagnostics.judge(evidence)
    per_component = _per_component(excess[used])
    return LLCResult(
        llc=evidence.llc,
        stderr=evidence.stderr,
        llc_per_chain=draws.mean(1).where(used, torch.nan),
        loss_trace=traces.losses,
        burnin_trace=traces.burnin,
        init_loss=init_loss,
        init_loss_stderr=init_stderr,
        mean_loss=evidence.mean_loss,
        llc_per_component=per_component[0],
        stderr_per_component=per_component[1],
        wbic=None if num_samples is None else num_samples * evidence.mean_loss,
        fluctuation=_fluctuation(traces, used, nbeta, num_samples),
        rhat=evidence.rhat,
        ess=evidence.ess,
        verdict=verdict,
        reasons=reasons,
        evidence=evidence,
        settings=settings,
        num_samples=num_samples,
        num_init_batches=len(init),
        num_chains_used=evidence.num_chains_used,
        loss_name=loss_name,
        step=label.step,
        checkpoint_hash=label.checkpoint_hash,
    )


def _evidence(
    traces: Traces,
    excess: Float[Tensor, "K S"],
    used: Bool[Tensor, " K"],
    init_loss: float,
    gain: tuple[float, float],
    settings: SamplerSettings,
    *,
    num_params: int,
    trivial_loss: float | None,
    bad_batches: int,
) -> Evidence:
    """What the verdict's rules look at, of the chains used; `gain` is a number with its error."""
    draws = excess[used].numpy()
    pull, spread, heat = (trace[used].numpy() for trace in (traces.pull, traces.spread, traces.heat))
    drift, drift_stderr = convergence.drift(draws)
    sensitivity, sensitivity_stderr = convergence.sensitivity(draws, pull)
    llc = _mean(draws)
    return Evidence(
        llc=llc,
        stderr=convergence.standard_error(draws),
        num_params=num_params,
        num_chains=settings.num_chains,
        num_chains_used=int(used.sum()),
        fallen=int(traces.fallen.sum()),
        init_loss=init_loss,
        mean_loss=init_loss + llc / settings.nbeta,
        bad_batches=bad_batches,
        trivial_loss=trivial_loss,
        rhat=convergence.rhat(draws) if settings.num_chains > 1 else math.nan,
        ess=convergence.ess(draws) if len(draws) else math.nan,
        drift=drift,
        drift_stderr=drift_stderr,
        acceptance=float(traces.acceptance[used].mean()),
        pull=_mean(pull),
        pull_stderr=convergence.standard_error(pull),
        spread=_mean(spread),
        fill_stderr=convergence.standard_error(pull + spread),
        heat=_mean(heat),
        heat_stderr=convergence.standard_error(heat),
        descent=gain[0],
        descent_stderr=gain[1],
        settled=settings.nbeta * float(traces.settled[0]),
        settled_stderr=settings.nbeta * float(traces.settled[1]),
        settled_freedom=float(traces.settled[2]),
        sensitivity=sensitivity,
        sensitivity_stderr=sensitivity_stderr,
        localization=settings.localization,
        lowest=float(draws.min()) if traces.one_batch and draws.size else math.nan,
        share_batches=traces.share_batches,
    )


def _mean(draws: np.ndarray) -> float:
    return float(draws.mean()) if draws.size else math.nan


def _mean_error(batches: Float[Tensor, "I *T"]) -> Float[Tensor, "*T"]:
    """Standard error of a mean over batches; one batch alone is the whole data."""
    return batches.std(0) / len(batches) ** 0.5 if len(batches) > 1 else torch.zeros_like(batches[0])


def _per_component(excess: Float[Tensor, "K S *T"]) -> tuple[Tensor | None, Tensor | None]:
    if excess.ndim < 3:
        return None, None
    errors = [convergence.standard_error(one.numpy()) for one in excess.unbind(2)]
    return excess.mean((0, 1)), torch.tensor(errors, dtype=torch.float64)


def _fluctuation(traces: Traces, used: Tensor, nbeta: float, num_samples: int | None) -> Fluctuation | None:
    if traces.sample_variance is None:
        return None
    per_chain = traces.sample_variance[used].mean(1)
    mean = float(per_chain.mean())
    return Fluctuation(
        functional_variance=None if num_samples is None else num_samples * mean,
        singular_fluctuation=nbeta / 2 * mean,
        stderr=nbeta / 2 * float(per_chain.std() / len(per_chain) ** 0.5) if len(per_chain) > 1 else math.nan,
    )

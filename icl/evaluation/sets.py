"""Fixed sets of prompts for evaluation, with the predictions of the baselines for them.

The sets are `pretrain` (the run's M tasks), `true` (new tasks from the prior, usually N(0, I)) and the shifts of `icl.tasks.shifts`. If the
pool of tasks changes during training, `pretrain` uses the pool of the last update before the evaluated step. Each set exists in two
versions with different prompts, `MONITOR` and `REPORT`. Training evaluates on the prompts of `MONITOR`, so these prompts decide when early
stopping ends the run. Everything after training uses the prompts of `REPORT`, so that no checkpoint is judged on the prompts that were used
to choose it. Versions up to 0.1.0 used the prompts of `MONITOR` for both purposes.

A language run has one set, `test`, with rows that no training step sees. Its baselines `unigram` and `bigram` are stored as losses.
`unigram` predicts tokens from the frequencies of tokens, and `bigram` from the frequencies of pairs of tokens. The frequencies are
counted in a sample of the training text (`icl.evaluation.frequencies`).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from icl import baselines, evidence
from icl.bayes import bayes
from icl.config import RunConfig
from icl.evaluation.frequencies import frequency_losses
from icl.tasks.prompts import (
    Prompts,
    last_pool_step,
    noise_law,
    require_prompt_memory,
    sample_prompts,
    training_pool,
)
from icl.tasks.rows import TEST, TokenRows, row_source
from icl.tasks.shifts import SHIFTS, sample_shifted_prompts

MONITOR, REPORT = 0, 1
"""Step numbers that select the fixed prompts in the random streams: `MONITOR` for evaluation during training, `REPORT` for everything after it."""


class EvaluationSet(NamedTuple):
    """Fixed prompts with the predictions (B, K) of each baseline, or fixed rows of text with the losses of each baseline."""

    name: str
    prompts: Prompts | TokenRows
    baselines: dict[str, Tensor]
    is_about_query: bool
    """Whether the shift changes how the query (the last position) relates to the examples. If so, only the numbers at
    the query are computed."""
    nll: Mapping[str, Tensor] = MappingProxyType({})
    """Negative log-likelihoods (B, K) of `ridge`, `dmmse` and `bayes`. Empty if the model has no predictive distribution or there is no noise."""
    variances: Mapping[str, Tensor] = MappingProxyType({})
    """Squared standard errors (B, K) of the baseline `bayes`: `bayes_variance` for its predictions, `bayes_nll_variance` for its NLL."""
    is_gaussian: bool = True
    """Whether prior and noise are both Gaussian. If so, ridge is the Bayes predictor for new tasks."""

    @property
    def bayes(self) -> str | None:
        """Name of the baseline that is the Bayes predictor of these prompts.

        None for shifts and text, or if the Bayes predictor was not computed.
        """
        if self.name == "pretrain" and "dmmse" in self.baselines:
            return "dmmse"
        if self.name not in ("pretrain", "true"):
            return None
        if self.is_gaussian:
            return "ridge"
        return "bayes" if "bayes" in self.baselines else None


def set_names(config: RunConfig) -> tuple[str, ...]:
    """Return the names of the sets that are evaluated during training."""
    return (TEST,) if config.model.is_language else ("pretrain", "true")


def evaluation_set(
    config: RunConfig,
    name: str,
    *,
    num_prompts: int,
    step: int = REPORT,
    model_step: int | None = None,
    with_bayes: bool = False,
    device: torch.device | str = "cpu",
) -> EvaluationSet:
    """Make the fixed prompts called `name` (`pretrain`, `true`, or a shift), with their baselines.

    All sets have the baselines ridge, OLS and zero. Without noise, `ridge` has the predictions of OLS, which is the limit of ridge for
    zero noise. If the run has finitely many tasks, `pretrain` and `true` also have dMMSE and the mean task. With `with_bayes`, these two
    sets also have the Bayes predictor for new tasks if the prior or the noise is not Gaussian. If the model has a predictive distribution
    and there is noise, the set also has the negative log-likelihoods of ridge, dMMSE and this Bayes predictor. For a language run, `name`
    is `test`.

    Args:
        config: The run.
        name: Name of the set.
        num_prompts: Number of prompts.
        step: `MONITOR` for the prompts of evaluations during training, `REPORT` for the prompts of everything after it.
        model_step: Training step of the evaluated model. It is needed for `pretrain` if the pool of tasks changes during training.
        with_bayes: Whether to compute the Bayes predictor for new tasks. The computation can take minutes.
        device: Device of the prompts.
    """
    if config.model.is_language:
        xs, ys = row_source(config, stream=TEST).sample(range(step, step + 1), range(num_prompts), device=device)
        rows = TokenRows(xs[0], ys[0])
        return EvaluationSet(name, rows, frequency_losses(config, rows), False)
    shift, task = SHIFTS.get(name), config.task
    pool_step = None if model_step is None else last_pool_step(model_step)
    has_noise = task.noise_variance > 0
    require_prompt_memory(num_prompts, task.max_examples, task.task_size, device, for_ridge=has_noise)
    if shift is not None:
        prompts = sample_shifted_prompts(config, name, batch_size=num_prompts, step=step, device=device)
    else:
        prompts = sample_prompts(
            config, stream=name, step=step, batch_size=num_prompts, pool_step=pool_step, device=device
        )
    is_about_query = shift is not None and shift.is_about_query
    is_gaussian = (task.prior, task.noise) == ("gaussian", "gaussian")
    has_nll = config.model.has_density and has_noise
    nll = _bayes_nll(config, name, prompts, pool_step) if has_nll else {}
    predictions = _baseline_predictions(config, name, prompts, pool_step)
    variances = {}
    if with_bayes and name in ("pretrain", "true") and (estimate := bayes(config, prompts.xs, prompts.ys)) is not None:
        predictions["bayes"], variances["bayes_variance"] = estimate.predictions, estimate.stderrs.square()
        if has_nll:
            nll["bayes"], variances["bayes_nll_variance"] = estimate.nll, estimate.nll_stderrs.square()
    return EvaluationSet(name, prompts, predictions, is_about_query, nll, variances, is_gaussian)


def _baseline_predictions(config: RunConfig, name: str, prompts: Prompts, pool_step: int | None) -> dict[str, Tensor]:
    task, (xs, ys, _) = config.task, prompts
    ols = baselines.ols(xs, ys)
    ridge = baselines.ridge(xs, ys, noise_variance=task.noise_variance) if task.noise_variance > 0 else ols
    predictions = {"ridge": ridge, "ols": ols, "zero": baselines.zero(xs, ys)}
    if name == "true" and task.has_moving_pool and pool_step is None:
        return predictions
    if not task.is_gaussian and name in ("pretrain", "true"):
        tasks = training_pool(config, step=pool_step, device=xs.device)
        noise = noise_law(config)
        predictions["dmmse"] = baselines.dmmse(xs, ys, tasks=tasks, noise_variance=task.noise_variance, noise=noise)
        predictions["task_mean"] = baselines.task_mean(xs, ys, tasks=tasks)
    return predictions


def _bayes_nll(config: RunConfig, name: str, prompts: Prompts, pool_step: int | None) -> dict[str, Tensor]:
    """Return the negative log-likelihoods of ridge, and of dMMSE if `_baseline_predictions` computes it."""
    task, (xs, ys, _) = config.task, prompts
    nll = {"ridge": evidence.ridge_nll(xs, ys, noise_variance=task.noise_variance)}
    if not task.is_gaussian and name in ("pretrain", "true") and (pool_step is not None or not task.has_moving_pool):
        tasks = training_pool(config, step=pool_step, device=xs.device)
        noise = noise_law(config)
        nll["dmmse"] = evidence.dmmse_nll(xs, ys, tasks=tasks, noise_variance=task.noise_variance, noise=noise)
    return nll

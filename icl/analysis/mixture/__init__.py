"""Which prior a model has learned: the mixtures of dMMSE and ridge that are closest to the model, at every saved step.

dMMSE is the Bayes predictor for the M training tasks, so a model that has memorised these tasks predicts like dMMSE.
Ridge is the Bayes predictor for new tasks, so a model that generalises to all tasks predicts like ridge.
`icl.analysis.mixture.fits` defines two mixtures of these predictors: `fixed`, with the same weight for all prompts, and
`bayes`, with prior odds and the posterior weights of Bayes' rule. If the prior or the noise is not Gaussian, the Bayes
predictor for new tasks (`icl.bayes`) takes the place of ridge everywhere. For some priors and noise distributions,
particle filters estimate the predictions of this Bayes predictor. The errors of the estimates make the residuals too
large by at most `predictor_variance`, which is the mean squared standard error of the estimated predictions. The
prompts of training tasks (`pretrain`) and of new tasks (`true`) are the same as in `icl evaluate`.

Rows of the table, by `quantity`. Rows of a saved step have a `position` (1..K, or `mean` for a single mixture that is fitted to all
positions):

- `weight` (of `fixed`): the weight p of dMMSE. `log_odds` (of `bayes`): the prior log odds of dMMSE against ridge. At a limit of the
  search, the log odds are only a bound and have no standard error.
- `residual`: the mean squared difference, per target, between the model and the closest mixture. `residual_share`: the residual divided by
  the mean squared difference between dMMSE and ridge. If this share is above 0.1, the row of the mixture is `suspect`. If it is
  above 1, the row is `invalid`: the model is then further from every mixture than dMMSE and ridge are from each other.
- `loss_advantage`: how much smaller the squared error of dMMSE is than the squared error of ridge on `pretrain`. The difference is
  divided by 2 sigma^2, which gives nats per target for Gaussian noise.
- `separation`: the mean squared difference between dMMSE and ridge. `predictor_variance`: the mean squared standard
  error of the estimated Bayes predictor; there is no such row if the prior and the noise are Gaussian.
  `loss_advantage`, `separation` and `predictor_variance` do not depend on the model, so their rows have no step.

Rows of a whole run (`icl.analysis.mixture.findings`):

- `transition_step`: the step at which the weight crosses 1/2, or the log odds cross 0. `finding` says whether the model changes to
  dMMSE or to ridge.

Rows of all runs together, `run` = `all`:

- `growth_exponent`: the exponent `a` in t + 1 ~ M^a, where t is the step of the last transition to dMMSE in the run
  with M tasks. If at least two seeds have an exponent, there is one row for each seed, and the row `all` contains the
  mean and its standard error over seeds. `num_seeds` is the number of seeds with an exponent. If there are at least
  three, `lower` and `upper` are the 95 % interval.
- `curve_alpha`, `curve_beta`, `curve_gamma`, `curve_r2`: parameters and R^2 of the theory curve of Wurgaft et al. 2025
  (`icl.analysis.mixture.theory`). `curve_weight` is the value of the curve at each saved step. At the steps to which the curve is
  fitted, `curve_residual` is the fitted weight p minus `curve_weight`. `curve_step` is the step at which a run's curve crosses 1/2.

Standard errors are over prompts, to first order (the delta method), except for the standard errors of the curve and of the exponent.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icl import baselines, metrics
from icl.analysis import NotApplicableError
from icl.analysis.mixture import fits
from icl.analysis.mixture.findings import RunFits, ladder_rows, summary, transition_rows
from icl.analysis.mixture.fits import Fit, Pair
from icl.analysis.mixture.judging import judge_bayes, judge_fixed, verdict
from icl.analysis.run import Members, Result, as_table, named_runs, over_checkpoints, setting
from icl.bayes import bayes
from icl.config import RunConfig
from icl.config.validation import require, require_count
from icl.evaluation.predictors import predict_prompts
from icl.evaluation.sets import REPORT
from icl.evidence import discrete_evidence, gaussian_evidence
from icl.model.stacked import apply
from icl.runs.checkpoints import checkpoint_files, read_config_of
from icl.runs.measure import Measurement
from icl.tasks.prompts import Prompts, noise_law, sample_prompts, training_pool

VERSION = 2
"""Version of the measurements. Results of older versions are computed again. Version 2 uses the fixed prompts for reports
(`icl.evaluation.sets.REPORT`); version 1 used other prompts."""
SETS = ("pretrain", "true")

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Settings of the measurements at every saved step. If they change, all steps are measured again."""

    num_prompts: int = setting(1024, "number of prompts in each set")

    def __post_init__(self) -> None:
        require_count("num_prompts", self.num_prompts, 2)


@dataclass(frozen=True, kw_only=True)
class Settings(StepSettings):
    """Options of `icl analyse RUN --what mixture`."""

    jointly_with: str | None = setting(
        None,
        "other runs with the same task settings but another M, separated by commas, or a pattern such as 'runs/ladder/*'; one theory curve is fitted to all runs",
    )


class Reference(NamedTuple):
    """Fixed prompts of one distribution, and the predictions of dMMSE and ridge on these prompts."""

    name: str
    prompts: Prompts
    pair: Pair
    errors: Float[Tensor, "2 B"]
    """Squared errors of ridge and of dMMSE, averaged over positions."""
    variance: Float[Tensor, "B K"] | None = None
    """Squared standard errors of the predictor that takes the place of ridge; None for ridge itself."""


def analyse(path: Path, settings: Settings) -> Result:
    """Fit the mixtures at every saved step of one run or of several runs, then find transitions and fit the theory curve.

    Raises:
        CheckpointError: If a run has no usable checkpoint.
        NotApplicableError: If a run has M = inf, or no noise.
    """
    runs = _runs(path, settings.jointly_with)
    step_settings = StepSettings(num_prompts=settings.num_prompts)
    rows: list[Row] = []
    measured: list[RunFits] = []
    for name, folder in runs.items():
        measure = partial(measure_members, settings=step_settings)
        entries, config = over_checkpoints("mixture", folder, step_settings, measure, version=VERSION)
        run = RunFits(name, config.task, entries, _reference_rows(config, settings.num_prompts), config.seeds)
        measured.append(run)
        labels = {"run": name, "num_tasks": config.task.num_tasks}
        steps = [
            {"step": entry.step, "checkpoint_hash": entry.checkpoint_hash} | labels | row
            for entry in entries
            for row in entry.rows
        ]
        rows += [*steps, *(labels | row for row in (*run.references, *transition_rows(run)))]
    rows += ladder_rows(measured)
    return Result(as_table([], settings, whole_run=rows), summary(measured, rows))


def measure_members(members: Members, *, settings: StepSettings) -> list[Measurement]:
    """Fit both mixtures to every checkpoint. The arrays contain the scores of every single prompt, from which transitions are found."""
    predict = partial(predict_prompts, partial(apply, members.config.model), members.params)
    device = next(iter(members.params.values())).device
    rows: list[list[Row]] = [[] for _ in members.checkpoints]
    arrays: list[dict[str, np.ndarray]] = [{} for _ in members.checkpoints]
    for reference in references(members.config, settings.num_prompts):
        prompts = Prompts(*(tensor.to(device) for tensor in reference.prompts))
        for index, predictions in enumerate(predict(prompts).cpu().double()):
            rows[index] += fit_rows(reference, predictions)
            offset = predictions - reference.pair.ridge
            scores = {
                "fixed": fits.fixed_scores(reference.pair.difference, offset),
                "bayes": fits.bayes_scores(reference.pair, offset),
            }
            arrays[index] |= {f"{reference.name}/{mixture}": values.numpy() for mixture, values in scores.items()}
    return list(map(Measurement, rows, arrays))


@lru_cache(maxsize=1)
def references(config: RunConfig, num_prompts: int) -> list[Reference]:
    """Return the prompts of both sets, with the predictions of dMMSE and ridge and the Bayes factors, in float64 on the CPU.

    Raises:
        NotApplicableError: If the run has M = inf, no noise, or a pool that changes.
    """
    require_mixture(config)
    return [
        reference(config, name, sample_prompts(config, stream=name, step=REPORT, batch_size=num_prompts))
        for name in SETS
    ]


def reference(config: RunConfig, name: str, prompts: Prompts) -> Reference:
    """Compute dMMSE, ridge and the Bayes factors on these prompts, in float64."""
    task, tasks, noise = config.task, training_pool(config).double(), noise_law(config)
    xs, ys = prompts.xs.double(), prompts.ys.double()
    dmmse = baselines.dmmse(xs, ys, tasks=tasks, noise_variance=task.noise_variance, noise=noise)
    estimate = bayes(config, xs, ys)
    if estimate is None:
        ridge, variance = baselines.ridge(xs, ys, noise_variance=task.noise_variance), None
        new = gaussian_evidence(xs, ys, noise_variance=task.noise_variance)
    else:
        ridge, variance, new = estimate.predictions, estimate.stderrs.square(), -estimate.nll.cumsum(-1)
    pool = discrete_evidence(xs, ys, tasks=tasks, noise_variance=task.noise_variance, noise=noise)
    errors = metrics.squared_error(ridge, ys).mean(-1), metrics.squared_error(dmmse, ys).mean(-1)
    pair = Pair(ridge, dmmse - ridge, fits.log_bayes_factors(pool, new))
    return Reference(name, prompts, pair, torch.stack(errors), variance)


def require_mixture(config: RunConfig) -> None:
    """Raise an error for a run to which the mixtures of dMMSE and ridge do not apply.

    Raises:
        NotApplicableError: If the run has M = inf, no noise, or a pool that changes.
    """
    if config.task.is_gaussian:
        raise NotApplicableError(
            f"`mixture` compares dMMSE with the Bayes predictor for new tasks, but the run {config.run_name} has M = inf, for which the two "
            "predictors are the same; give runs with a finite `task.num_tasks`."
        )
    if config.task.has_moving_pool:
        raise NotApplicableError(
            f"`mixture` needs a pool of tasks that stays the same during training, but the pool of the run {config.run_name} changes "
            f"(`task.pool` = {config.task.pool}); use `icl evaluate`, which compares every step with the pool at that step."
        )
    if config.task.noise_variance == 0:
        raise NotApplicableError(
            f"`mixture` needs noise, because it uses the marginal likelihoods of prompts, but the run {config.run_name} has "
            "`task.noise_variance` 0; give runs with noise."
        )


def fit_rows(reference: Reference, predictions: Float[Tensor, "B K"]) -> Iterator[Row]:
    """Yield the numbers of both mixtures for one model on one set of prompts."""
    for mixture, quantity, fit, judge in (
        ("fixed", "weight", fits.fit_fixed(reference.pair, predictions), judge_fixed),
        ("bayes", "log_odds", fits.fit_bayes(reference.pair, predictions), judge_bayes),
    ):
        for column, position in enumerate((*map(str, range(1, predictions.shape[1] + 1)), "mean")):
            labels = {"mixture": mixture, "distribution": reference.name, "position": position}
            level, reasons = judge(*(value.item() for value in _at(fit, column)))
            judgement = {"verdict": level, "reasons": "; ".join(reasons)}
            for name, estimate in (
                (quantity, fit.parameter),
                ("residual", fit.residual),
                ("residual_share", fit.share),
            ):
                value, stderr = (number[column].item() for number in estimate)
                yield {"quantity": name} | labels | {"value": value, "stderr": stderr} | judgement


def _at(fit: Fit, column: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the arguments of the verdict for one column of a fit: residual share, standard error of the parameter, `Fit.excess`."""
    return fit.share.value[column], fit.parameter.stderr[column], fit.excess[column]


def _reference_rows(config: RunConfig, num_prompts: int) -> list[Row]:
    """Return the rows about dMMSE and ridge: `loss_advantage` on training tasks; `separation` and `predictor_variance` on both sets."""
    rows: list[Row] = []
    for each in references(config, num_prompts):
        numbers = {"separation": metrics.overall_mean(each.pair.difference.square())}
        if each.name == "pretrain":
            gain = (each.errors[0] - each.errors[1]) / (2 * config.task.noise_variance)
            numbers["loss_advantage"] = metrics.overall_mean(gain.unsqueeze(-1))
        if each.variance is not None:
            numbers["predictor_variance"] = metrics.overall_mean(each.variance)
        for quantity, (value, stderr) in numbers.items():
            labels: Row = {"quantity": quantity, "distribution": each.name, "position": "mean"}
            rows.append(labels | {"value": value.item(), "stderr": stderr.item()} | verdict([]))
    return rows


def _runs(path: Path, others: str | None) -> dict[str, Path]:
    """Return the runs, keyed by name, after a check that mixtures apply to all runs and that the runs can share one theory curve."""
    runs = named_runs(path, others)
    configs = [read_config_of(checkpoint_files(folder)[0]) for folder in runs.values()]
    for config in configs:
        require_mixture(config)
    tasks = [dataclasses.replace(config.task, num_tasks=1) for config in configs]
    require(
        all(task == tasks[0] for task in tasks),
        "Runs that are analysed together must form a ladder: their `task` settings may differ only in `num_tasks`. Leave out the runs that differ in other settings.",
    )
    return runs

"""The prior over tasks that a model has learned: we compare samples from it with candidate priors at every saved step.

A model with a predictive distribution (`model.output` is `gaussian` or `mixture`) can generate prompts, which we call
rollouts (`icl.analysis.prior.rollouts`). Ridge regression estimates the task behind each rollout. The same estimator is
applied to prompts from each candidate prior (`icl.bayes`): `pool`, the run's M training tasks; `gaussian`, N(0, I); and
`prior`, the run's prior of new tasks if it is not N(0, I). The prompts of all candidates have inputs and noise from the
run's distributions. The energy distance (`icl.analysis.prior.energy`) between the model's estimates and a candidate's
estimates is zero if the model is the Bayes predictor of the candidate. A distance of zero does not prove that the model
is this Bayes predictor, because the distance depends only on the estimates.

With `num_context` > 0, every rollout begins with this number of ordinary examples. The rollouts then show the posterior
that the model implies. We compare these rollouts with prompts of each candidate. Such a prompt begins with ordinary
examples too, and its other targets come from a task that is drawn from the candidate's posterior. A candidate's
posterior is computed exactly, or approximated by particle filters (`icl.bayes.posterior`).

Rows of the table, by `quantity`. `preference`, `energy_share` and `separation` use two candidates. The first is the prior of the training
tasks (`pool`, or with M = inf `prior` or `gaussian`). The second is the next one in the order `pool`, `prior`, `gaussian`.

- `energy_distance`, for each `candidate`: the distance between the estimates of the model and of the candidate. `finding` says whether
  this distance is zero within 2 standard errors. `energy_share`: the distance divided by `separation`.
- `separation`: the distance between the two candidates. Its row has no `step`, because this distance does not depend on the model.
- `preference`: the model's distance to the second candidate minus its distance to the first. `finding` names the nearer candidate. A
  distance counts as zero if it is at most 2 standard errors above zero. The verdict is `suspect` if the preference is within 2 standard
  errors of zero. It is also `suspect` if neither candidate explains the model, which means that the smaller distance is not zero and
  exceeds 0.1 times `separation`. The verdict is `invalid` if the smaller distance is not zero and exceeds `separation`, or if `separation`
  is at most 4 standard errors above zero.
- `mean_square`: the mean of |w|^2 / D over the estimates of the model and, in rows without a step, of each candidate.

The pool of tasks may change during training. Each saved model is then compared with the pool used in its last update.
The rows that do not depend on the model then have a step too. Standard errors are from the block jackknife over all
samples, which includes the errors of particle filters. Inputs and random numbers are the same at all steps.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from icl import metrics
from icl.analysis import NotApplicableError
from icl.analysis.prior.energy import NUM_BLOCKS, Energy, Sample, energy_distance
from icl.analysis.prior.judging import Judgement, judge_distance, judge_preference, judge_separation
from icl.analysis.prior.rollouts import Draws, bayes_prompts, estimate_tasks, make_draws, model_rollouts
from icl.analysis.run import Members, Result, as_table, over_checkpoints, setting
from icl.bayes import Candidate, candidates
from icl.config import RunConfig
from icl.config.validation import require, require_count
from icl.model.stacked import Params
from icl.runs.checkpoints import checkpoint_files, read_config_of
from icl.runs.measure import Entry, Measurement
from icl.tasks.prompts import Distribution, last_pool_step

VERSION = 1

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of `icl analyse RUN --what prior`."""

    num_samples: int = setting(
        2048, f"number of rollouts, and number of prompts from each candidate prior; a multiple of {NUM_BLOCKS}"
    )
    num_context: int = setting(0, "number of given examples at the beginning of each rollout")
    context: Distribution = setting(
        "pretrain", "tasks of the given examples: the run's M training tasks (pretrain), or new tasks (true)"
    )

    def __post_init__(self) -> None:
        require_count("num_samples", self.num_samples, 2 * NUM_BLOCKS)
        require_count("num_context", self.num_context, 0)
        require(
            self.num_samples % NUM_BLOCKS == 0,
            f"`num_samples` must be a multiple of {NUM_BLOCKS} (the number of blocks of the jackknife), got {self.num_samples}.",
        )


class Reference(NamedTuple):
    """Draws for the model's rollouts, and estimates from prompts of each candidate, in the order of `icl.bayes.candidates`."""

    draws: Draws
    samples: dict[Candidate, Sample]

    @property
    def pair(self) -> tuple[Candidate, ...]:
        """The two candidates between which `preference` decides, or the only candidate."""
        return tuple(self.samples)[:2]


def analyse(path: Path, settings: Settings) -> Result:
    """Compare the estimated tasks of the model's rollouts with all candidate priors at every saved step.

    Raises:
        CheckpointError: If there is no usable checkpoint.
        NotApplicableError: If the model has no predictive distribution, or the run has no noise.
        ConfigError: If `num_context` is not below K, or the tasks of an imported run are not known.
    """
    config = read_config_of(checkpoint_files(path)[0])
    require_rollouts(config, settings)
    entries, config = over_checkpoints(
        "prior", path, settings, partial(measure_members, settings=settings), version=VERSION
    )
    whole_run = [] if config.task.has_moving_pool else list(candidate_rows(reference(config, settings)))
    return Result(as_table(entries, settings, whole_run=whole_run), _summary(entries, whole_run))


def measure_members(members: Members, *, settings: Settings) -> list[Measurement]:
    """Compare every checkpoint with the candidates. The arrays contain the estimated tasks of the model's rollouts."""
    config = members.config
    if not config.task.has_moving_pool:
        return _measure(config, members.params, reference(config, settings), settings)
    results = []
    for index, checkpoint in enumerate(members.checkpoints):
        params = {name: tensor[index : index + 1] for name, tensor in members.params.items()}
        known = reference(config, settings, last_pool_step(checkpoint.step))
        (result,) = _measure(config, params, known, settings)
        results.append(Measurement([*result.rows, *candidate_rows(known)], result.arrays))
    return results


def _measure(config: RunConfig, params: Params, known: Reference, settings: Settings) -> list[Measurement]:
    targets = model_rollouts(config.model, params, known.draws, num_context=settings.num_context).cpu()
    estimates = estimate_tasks(known.draws.xs, targets, noise_variance=config.task.noise_variance)
    return [Measurement(list(sample_rows(known, tasks)), {"tasks": tasks.numpy()}) for tasks in estimates]


@lru_cache(maxsize=1)
def reference(config: RunConfig, settings: Settings, pool_step: int | None = None) -> Reference:
    """Return the task estimates from prompts of all candidates, and the draws for the model's rollouts.

    Both are the same at all saved steps unless the pool changes.
    """
    samples: dict[Candidate, Sample] = {}
    draw = partial(make_draws, config, count=settings.num_samples, distribution=settings.context, pool_step=pool_step)
    for name in candidates(config):
        draws = draw(name)
        targets = bayes_prompts(config, name, draws, num_context=settings.num_context, pool_step=pool_step)
        samples[name] = Sample(estimate_tasks(draws.xs, targets, noise_variance=config.task.noise_variance))
    return Reference(draw("model"), samples)


def sample_rows(known: Reference, tasks: Float[Tensor, "B D"]) -> Iterator[Row]:
    """Yield the table's rows for one model. `tasks` are the tasks that were estimated from the model's rollouts."""
    own = Sample(tasks)
    distances = {name: energy_distance(own, sample) for name, sample in known.samples.items()}
    separation = _separation(known)
    for name, distance in distances.items():
        judgement = judge_distance(distance.estimate)
        yield _row("energy_distance", name, distance.estimate, judgement)
        if separation is not None:
            share = metrics.Estimate(*(number / separation.value for number in distance.estimate))
            yield _row("energy_share", name, share, judgement)
    if separation is not None:
        first, second = known.pair
        preference = (distances[second] - distances[first]).estimate
        nearest = min((distances[first], distances[second]), key=lambda distance: float(distance.value))
        judgement = judge_preference(preference, nearest.estimate, separation.estimate, names=(first, second))
        yield _row("preference", "", preference, judgement)
    yield _mean_square_row("model", tasks)


def candidate_rows(known: Reference) -> Iterator[Row]:
    """Yield the table's rows about the candidates alone. These rows do not depend on the model."""
    separation = _separation(known)
    if separation is not None:
        yield _row("separation", "", separation.estimate, judge_separation(separation.estimate))
    for name, sample in known.samples.items():
        yield _mean_square_row(name, sample.points)


def require_rollouts(config: RunConfig, settings: Settings) -> None:
    """Raise an error for a run whose model cannot generate prompts.

    Raises:
        NotApplicableError: If the model has no predictive distribution, or the run has no noise.
        ConfigError: If `num_context` is not below K.
    """
    if not config.model.has_density:
        raise NotApplicableError(
            f"`prior` needs a model with a predictive distribution, but the run {config.run_name} has `model.output` "
            f"{config.model.output}; train one with `--model.output mixture` (or gaussian)."
        )
    if config.task.noise_variance == 0:
        raise NotApplicableError(
            f"`prior` needs noise, but the run {config.run_name} has `task.noise_variance` 0, for which predictive densities do not exist; "
            "give a run with noise."
        )
    require(
        settings.num_context < config.task.max_examples,
        f"`num_context` must be below K = {config.task.max_examples}, the number of examples of the run's prompts, got "
        f"{settings.num_context}.",
    )


def _separation(known: Reference) -> Energy | None:
    """Return the distance between the first two candidates, or None if there is only one candidate."""
    if len(known.pair) < 2:
        return None
    first, second = known.pair
    return energy_distance(known.samples[second], known.samples[first])


def _mean_square_row(name: str, tasks: Float[Tensor, "B D"]) -> Row:
    square = metrics.overall_mean(tasks.square())
    is_finite = math.isfinite(float(square.value))
    judgement = Judgement("", "ok" if is_finite else "invalid", "" if is_finite else "the estimates are not finite")
    return _row("mean_square", name, square, judgement)


def _row(quantity: str, candidate: str, estimate: metrics.Estimate, judgement: Judgement) -> Row:
    value, stderr = (float(number) for number in estimate)
    numbers = {"quantity": quantity, "candidate": candidate, "value": value, "stderr": stderr}
    return numbers | judgement._asdict()


def _summary(entries: list[Entry], whole_run: list[Row]) -> list[str]:
    """Return the printed lines: the nearer candidate over the steps, then the numbers of the last step."""
    lines = []
    findings = [(entry.step, row) for entry in entries for row in entry.rows if row["quantity"] == "preference"]
    if findings:
        usable = [(step, row["finding"]) for step, row in findings if row["verdict"] == "ok"]
        changes = [
            f"{name} from step {step:,}"
            for index, (step, name) in enumerate(usable)
            if index == 0 or usable[index - 1][1] != name
        ]
        lines.append(
            f"Nearer prior (verdict ok at {len(usable)} of {len(findings)} steps): {', then '.join(changes) or 'none'}."
        )
    last = entries[-1]
    lines.append(f"At step {last.step:,}, the last of {len(entries)} saved steps:")
    lines += [_line(row) for row in (*last.rows, *whole_run)]
    return lines


def _line(row: Row) -> str:
    name = " ".join(filter(None, (row["quantity"].replace("_", " "), row["candidate"])))
    finding = f"   {row['finding']}" if row["finding"] else ""
    doubt = f"   {row['verdict']}: {row['reasons']}" if row["reasons"] else ""
    return f"  {name:26s} {row['value']:>9.4f} ± {row['stderr']:<8.2g}{finding}{doubt}"

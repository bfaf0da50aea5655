"""Bayes predictors of other task priors and other noise, at every prefix of a prompt.

All priors and noises of `icl.tasks.laws` are mixtures of Gaussians: given a component or a scale for each coordinate of w, and a scale for the
noise of each target, w and the targets are jointly Gaussian. The Bayes predictor is a weighted mean over the mixture.

- `icl.bayes.gaussians` is exact. It sums over the components of a finite mixture with Gaussian noise: one component for `gaussian` and `low_rank`, J
  for `mixture`, 2^D for `sparse`.
- `icl.bayes.particles` draws the scales by a particle filter, and gives a standard error.

The inputs' distribution does not matter, because predictors are given the inputs. So under `student_t` and `ar1` inputs, ridge and dMMSE
remain the Bayes predictors. With finitely many tasks, `icl.baselines.dmmse` is exact for every noise.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from icl.bayes.gaussians import exact_components, gaussian_mixture
from icl.bayes.particles import BayesPredictions, particle_filter
from icl.config import RunConfig
from icl.tasks import laws
from icl.tasks.prompts import noise_law, task_law


def bayes(config: RunConfig, xs: Float[Tensor, "B K D"], ys: Float[Tensor, "B K"]) -> BayesPredictions | None:
    """Return the Bayes predictions under the run's prior and noise with new tasks, or None if ridge is this predictor or there is no noise."""
    task, law, noise = config.task, task_law(config), noise_law(config)
    if task.noise_variance == 0 or (law == laws.GAUSSIAN_TASKS and noise == laws.GAUSSIAN):
        return None
    if xs.device.type not in ("cpu", "cuda"):  # other devices have no float64
        estimate = bayes(config, xs.cpu(), ys.cpu())
        return None if estimate is None else BayesPredictions(*(part.to(xs.device) for part in estimate))
    components = exact_components(law, task.task_size) if noise == laws.GAUSSIAN else None
    if components is None:
        return particle_filter(xs, ys, law=law, noise=noise, noise_variance=task.noise_variance)
    predictions = gaussian_mixture(xs, ys, components=components, noise_variance=task.noise_variance)
    return BayesPredictions(predictions, torch.zeros_like(predictions))

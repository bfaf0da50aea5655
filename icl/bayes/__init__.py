"""Bayes predictors and posteriors of a run's candidate priors, at every prefix of a prompt, for all priors and noises of `icl.tasks.laws`.

The candidates (`candidates`) are what a model may have learned as its prior:

- `pool`: uniform on the run's M tasks. dMMSE is its predictor (`icl.baselines`), and its NLL is in `icl.evidence`. Both are exact for every noise.
- `gaussian`: N(0, I). With Gaussian noise, ridge is its predictor.
- `prior`: the run's prior of new tasks, if it is not N(0, I).

All priors and noises are mixtures of Gaussians: given a component or a scale for each coordinate of w, and a scale for the
noise of each target, w and the targets are jointly Gaussian. The Bayes predictor is a weighted mean over the mixture.

- `icl.bayes.gaussians` is exact. It sums over the components of a finite mixture with Gaussian noise: one component for `gaussian` and `low_rank`, J
  for `mixture`, 2^D for `sparse`.
- `icl.bayes.particles` draws the scales by a particle filter, and gives a standard error.
- `icl.bayes.posterior` draws tasks from the posterior of a candidate given a few examples.

The inputs' distribution does not matter, because predictors are given the inputs. So under `student_t` and `ar1` inputs, ridge and dMMSE
remain the Bayes predictors.
"""

from jaxtyping import Float
from torch import Tensor

from icl.bayes.gaussians import BayesPredictions, exact_components, gaussian_mixture
from icl.bayes.particles import particle_filter
from icl.bayes.posterior import Candidate, candidates, posterior_tasks
from icl.config import RunConfig
from icl.tasks import laws
from icl.tasks.prompts import noise_law, task_law

__all__ = ["BayesPredictions", "Candidate", "bayes", "candidates", "posterior_tasks"]


def bayes(config: RunConfig, xs: Float[Tensor, "B K D"], ys: Float[Tensor, "B K"]) -> BayesPredictions | None:
    """Return the Bayes predictions and NLL under the run's prior and noise with new tasks, or None if ridge is this predictor or there is no noise."""
    task, law, noise = config.task, task_law(config), noise_law(config)
    if task.noise_variance == 0 or (law == laws.GAUSSIAN_TASKS and noise == laws.GAUSSIAN):
        return None
    if xs.device.type not in ("cpu", "cuda"):  # other devices have no float64
        estimate = bayes(config, xs.cpu(), ys.cpu())
        return None if estimate is None else BayesPredictions(*(part.to(xs.device) for part in estimate))
    components = exact_components(law, task.task_size) if noise == laws.GAUSSIAN else None
    if components is None:
        return particle_filter(xs, ys, law=law, noise=noise, noise_variance=task.noise_variance)
    return gaussian_mixture(xs, ys, components=components, noise_variance=task.noise_variance)

"""Bayes predictors and posteriors of candidate priors, at every prefix of a prompt, for all distributions in `icl.tasks.laws`.

The candidates are the priors that a model may have learned (`candidates`):

- `pool`: uniform on the run's M tasks. The Bayes predictor is dMMSE (`icl.baselines`), and its NLL is in `icl.evidence`. Both are exact for
  every distribution of the noise.
- `gaussian`: N(0, I). With Gaussian noise, the Bayes predictor is ridge.
- `prior`: the run's prior of new tasks, if it is not N(0, I).

The priors of new tasks and all noise laws are mixtures of Gaussians. Such a mixture has a finite number of components, or it has scales:
random factors that multiply the variances. Given the component of the prior (or a scale for each coordinate of w) and a scale for the
noise of each target, w and the targets are jointly Gaussian. The Bayes predictor is a weighted mean over these components or scales.

- `icl.bayes.gaussians` is exact. It sums over the components of a finite mixture, for Gaussian noise. There is one component for `gaussian`
  and `low_rank`, and there are J components for `mixture`. For `sparse` there are 2^D components, and the sum is used only if 2^D is at
  most 1,024.
- `icl.bayes.particles` draws the scales with a particle filter, and gives a standard error.
- `icl.bayes.posterior` draws tasks from the posterior of a candidate given a few examples.

The distribution of the inputs does not matter, because all posteriors are conditional on the inputs. So ridge and dMMSE remain the Bayes
predictors under `student_t` and `ar1` inputs.
"""

from jaxtyping import Float
from torch import Tensor

from icl.bayes.gaussians import BayesPredictions, exact_components, gaussian_mixture, require_noise
from icl.bayes.particles import particle_filter
from icl.bayes.posterior import Candidate, candidates, posterior_tasks
from icl.config import RunConfig
from icl.tasks import laws
from icl.tasks.prompts import noise_law, task_law

__all__ = ["BayesPredictions", "Candidate", "bayes", "candidates", "posterior_tasks"]


def bayes(config: RunConfig, xs: Float[Tensor, "B K D"], ys: Float[Tensor, "B K"]) -> BayesPredictions | None:
    """Return the Bayes predictions and their NLL for new tasks, under the run's prior and noise.

    Return None if there is no noise, or if ridge is the Bayes predictor.

    Raises:
        ConfigError: If the noise variance is positive but too small for the rounding errors of float64.
    """
    task, law, noise = config.task, task_law(config), noise_law(config)
    if task.noise_variance == 0 or (law == laws.GAUSSIAN_TASKS and noise == laws.GAUSSIAN):
        return None
    require_noise(task.noise_variance, law)
    if xs.device.type not in ("cpu", "cuda"):  # other devices have no float64
        estimate = bayes(config, xs.cpu(), ys.cpu())
        return None if estimate is None else BayesPredictions(*(part.to(xs.device) for part in estimate))
    components = exact_components(law, task.task_size) if noise == laws.GAUSSIAN else None
    if components is None:
        return particle_filter(xs, ys, law=law, noise=noise, noise_variance=task.noise_variance)
    return gaussian_mixture(xs, ys, components=components, noise_variance=task.noise_variance)

"""Out-of-distribution prompts: shifts of the inputs, the tasks, the noise or the query.

Each shift transforms the prompts of the stream `true` (new tasks from the prior, noise variance sigma^2). So every shifted prompt is paired
with an unshifted prompt, and differences between shifts have small standard errors. A shift that needs random numbers draws them from a
separate stream. So a shifted prompt is a pure function of (evaluation seed, shift, step, index).

- `input_scale_<g>`: each input x is multiplied by g, so its variance is g^2. `task_scale_<g>`: each task vector w is multiplied by g. The
  targets change accordingly, but the noise does not. The code of Hoogland et al. (2024) uses g = 3, 5, 10, 100, although the paper says
  that the variance is g. Garg et al. (2022) use g = 1/3, 1/2, 2, 3.
- `skewed_covariance`: the standard deviation of x along the i-th of D random orthogonal axes is proportional to 1/i.
- `half_subspace`: x lies in a random subspace of max(1, floor(D / 2)) dimensions.
- `label_noise`: the noise variance is set to 1. Then the targets and the task are multiplied by a common factor, so that the variance of
  the targets is D + sigma^2, as without the shift.
- `random_quadrants`: all examples lie in one random orthant. The query may lie in any orthant.
- `orthogonal_query`: the query is orthogonal to every example.
- `seen_query`: the query equals the input of one of the examples. The target of the query has new noise.

Source: the evaluations in the files eval.py and samplers.py of Garg et al. (2022). We differ from their code in four ways:

- We draw axes and subspaces for each prompt, not once for all prompts, so that standard errors include the randomness of the axes.
- For `label_noise`, we rescale by the variance of the targets' distribution. Garg et al. rescale by the variance in the batch.
- Our query is the last x of a prompt, and only the prediction at this x is evaluated.
- Garg et al. make the query orthogonal to the examples, which is possible only with fewer than D examples. We keep the query, project the
  examples onto the orthogonal complement of the query, and rescale the examples.

All shifts except `input_scale_<g>` keep E|x|^2 = D.
"""

import difflib
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from icl import rng
from icl.config import RunConfig
from icl.config.validation import ConfigError, whole
from icl.tasks import laws
from icl.tasks.prompts import MAX_PROMPTS, MAX_STEP, Prompts, prompt_source

BASE_STREAM = "true"
"""The stream whose prompts are shifted."""
_SCALES = (1 / 3, 1 / 2, 2.0, 3.0, 5.0, 10.0, 100.0)


class Parts(NamedTuple):
    """Parts of a batch of prompts, with y = w . x + sqrt(noise variance) * noise."""

    xs: Float[Tensor, "B K D"]
    ws: Float[Tensor, "B D"]
    noise: Float[Tensor, "B K"]  # scaled to variance 1
    noise_variance: float


class Randomness(NamedTuple):
    """Source of a shift's random numbers, with one row for each prompt."""

    key: rng.Stream
    step: Int64[Tensor, " 1"]
    indices: Int64[Tensor, " B"]

    def normal(self, size: int) -> Float[Tensor, "B {size}"]:
        """Draw standard normals."""
        return rng.normal(self.key, self.step, self.indices, size)[0]

    def integers(self, bound: int) -> Int64[Tensor, " B"]:
        """Draw whole numbers, uniformly from 0 to bound - 1."""
        return rng.integers(self.key, self.step, self.indices, bound)[0]


class Shift(NamedTuple):
    """Definition of a shift, with the smallest D and K for which the shift exists."""

    transform: Callable[[Parts, Randomness], Parts]
    is_about_query: bool = False
    """Whether the shift changes how the query relates to the examples. If so, only the prediction at the query (the
    last position) counts."""
    min_task_size: int = 1
    min_examples: int = 1


def sample_shifted_prompts(
    config: RunConfig, shift: str, *, batch_size: int, step: int = 0, device: torch.device | str = "cpu"
) -> Prompts:
    """Return the batch of one step of a shift: xs (B, K, D), ys (B, K), ws (B, D).

    Prompts are made on the CPU, so they are the same on every device. A smaller batch consists of the first prompts of a larger
    batch.

    Raises:
        ConfigError: If the shift is unknown (the message names the nearest one), D or K is too small for it, `batch_size`
            is not a whole number of at least 1, or `step` is not a whole number of at least 0.

    Examples:
        >>> xs, ys, ws = sample_shifted_prompts(RunConfig(), "seen_query", batch_size=4)
        >>> bool((xs[:, :-1] == xs[:, -1:]).all(-1).any(-1).all())
        True
    """
    step, batch_size = whole("step", step, 0, MAX_STEP), whole("batch_size", batch_size, 1, MAX_PROMPTS)
    require_shift(shift)
    family = SHIFTS[shift]
    _require_sizes(config, shift, family)
    source = prompt_source(config, stream=BASE_STREAM, distribution="true")
    clean = source.sample(range(step, step + 1), range(batch_size))
    steps, indices = torch.tensor([step]), torch.arange(batch_size)
    noise = laws.draw(source.noise, source.noise_key, steps, indices, source.max_examples)[0]  # B K
    randomness = Randomness(rng.stream(config.seeds.evaluation, f"{shift}/shift"), steps, indices)
    parts = family.transform(Parts(clean.xs[0], clean.ws[0], noise, source.noise_variance), randomness)
    ys = (parts.xs * parts.ws.unsqueeze(-2)).sum(-1) + parts.noise_variance**0.5 * parts.noise  # B K
    return Prompts(*(part.to(device) for part in (parts.xs, ys, parts.ws)))


def require_shift(name: str) -> None:
    """Refuse an unknown shift.

    Raises:
        ConfigError: If there is no shift of this name. The message names the nearest one.
    """
    if not (isinstance(name, str) and name in SHIFTS):
        nearest = difflib.get_close_matches(str(name), SHIFTS, n=1, cutoff=0)[0]
        raise ConfigError(f"There is no shift `{name}`. Did you mean `{nearest}`? The shifts are {', '.join(SHIFTS)}.")


def available_shifts(config: RunConfig) -> list[str]:
    """Return the names of the shifts for which D and K of this run are large enough."""
    task = config.task
    return [
        name
        for name, shift in SHIFTS.items()
        if task.task_size >= shift.min_task_size and task.max_examples >= shift.min_examples
    ]


def _require_sizes(config: RunConfig, name: str, shift: Shift) -> None:
    sizes = (
        ("task_size", config.task.task_size, shift.min_task_size),
        ("max_examples", config.task.max_examples, shift.min_examples),
    )
    for key, value, minimum in sizes:
        if value < minimum:
            raise ConfigError(f"The shift `{name}` needs `task.{key}` of at least {minimum}, got {value}.")


def _scale_inputs(parts: Parts, randomness: Randomness, *, scale: float) -> Parts:
    return parts._replace(xs=scale * parts.xs)


def _scale_tasks(parts: Parts, randomness: Randomness, *, scale: float) -> Parts:
    return parts._replace(ws=scale * parts.ws)


def _skew(parts: Parts, randomness: Randomness) -> Parts:
    return _stretch(parts, randomness, 1 / torch.arange(1, parts.xs.shape[-1] + 1).double())


def _halve(parts: Parts, randomness: Randomness) -> Parts:
    task_size = parts.xs.shape[-1]
    return _stretch(parts, randomness, (torch.arange(task_size) < max(1, task_size // 2)).double())


def _stretch(parts: Parts, randomness: Randomness, deviations: Float[Tensor, " D"]) -> Parts:
    """Stretch the inputs along random orthogonal axes, to standard deviations proportional to `deviations`. E|x|^2 stays D."""
    task_size = len(deviations)
    # The factor Q of a QR decomposition of Gaussian numbers has uniformly random axes, up to signs. A stretch does not depend on the signs.
    axes = torch.linalg.qr(randomness.normal(task_size**2).double().unflatten(-1, (task_size, task_size))).Q  # B D D
    scales = deviations * math.sqrt(task_size) / deviations.norm()
    xs = (parts.xs.double() @ axes * scales) @ axes.mT  # B K D
    return parts._replace(xs=xs.float())


def _add_label_noise(parts: Parts, randomness: Randomness) -> Parts:
    task_size = parts.xs.shape[-1]
    variance = (task_size + parts.noise_variance) / (task_size + 1)
    return parts._replace(ws=variance**0.5 * parts.ws, noise_variance=variance)


def _gather_examples_in_a_quadrant(parts: Parts, randomness: Randomness) -> Parts:
    signs = torch.where(randomness.normal(parts.xs.shape[-1]) < 0, -1.0, 1.0).unsqueeze(1)  # B 1 D
    return parts._replace(xs=torch.cat((parts.xs[:, :-1].abs() * signs, parts.xs[:, -1:]), dim=1))


def _turn_examples_from_the_query(parts: Parts, randomness: Randomness) -> Parts:
    task_size = parts.xs.shape[-1]
    examples, query = parts.xs[:, :-1].double(), parts.xs[:, -1:].double()  # B K-1 D, B 1 D
    direction = query / query.norm(dim=-1, keepdim=True)
    along = (examples * direction).sum(-1, keepdim=True)  # B K-1 1
    # The projection removes one of D dimensions. The factor restores E|x|^2 = D.
    turned = (examples - along * direction) * math.sqrt(task_size / (task_size - 1))
    return parts._replace(xs=torch.cat((turned.float(), parts.xs[:, -1:]), dim=1))


def _ask_again(parts: Parts, randomness: Randomness) -> Parts:
    seen = randomness.integers(parts.xs.shape[1] - 1)  # B
    query = parts.xs[randomness.indices, seen].unsqueeze(1)  # B 1 D
    return parts._replace(xs=torch.cat((parts.xs[:, :-1], query), dim=1))


SHIFTS: dict[str, Shift] = {
    **{f"input_scale_{scale:.3g}": Shift(partial(_scale_inputs, scale=scale)) for scale in _SCALES},
    **{f"task_scale_{scale:.3g}": Shift(partial(_scale_tasks, scale=scale)) for scale in _SCALES},
    "skewed_covariance": Shift(_skew),
    "half_subspace": Shift(_halve),
    "label_noise": Shift(_add_label_noise),
    "random_quadrants": Shift(_gather_examples_in_a_quadrant, is_about_query=True),
    "orthogonal_query": Shift(_turn_examples_from_the_query, is_about_query=True, min_task_size=2),
    "seen_query": Shift(_ask_again, is_about_query=True, min_examples=2),
}
"""All shifts, keyed by name. To add a shift, write a function of `Parts` and `Randomness` and add it to this table. The contract tests
cover all entries."""

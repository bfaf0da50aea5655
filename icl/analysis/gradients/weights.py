"""Gradients of the loss with respect to the weights, and unbiased statistics of these gradients.

The functions take the stacked weights of N checkpoints, called members. The prompts are split into J batches of size b. For one member,
batch j gives a gradient g_j. The g_j are independent, unbiased estimates of the expected gradient G with covariance Sigma / b, where
Sigma is the covariance of the gradient for one prompt. All statistics are functions of Gram matrices K_ij = g_i . h_j of two sets of
gradients with expectations G and H. We use two averages:

    inner(K)      = mean of K_ij over i != j    (unbiased for G . H, even if batch j of both sets has the same prompts)
    batch_norm(K) = mean of K_jj                (with expectation |G|^2 + tr(Sigma) / b for h = g)

- Squared norm |G|^2 = inner, and noise trace tr(Sigma) = b (batch_norm - inner); both are unbiased. `norm` is sqrt(|G|^2), or 0 if
  the estimate of |G|^2 is negative.
- Simple noise scale tr(Sigma) / |G|^2, in prompts: the batch size at which noise and signal are equal (McCandlish,
  Kaplan, Amodei et al. 2018, "An empirical model of large-batch training", section 2.2). Our estimates of tr(Sigma) and
  |G|^2 follow their appendix A.1, with one batch as the small batch and all J batches together as the large one.
- Alignment: the cosine inner(K_gh) / sqrt(inner(K_gg) inner(K_hh)). The alignment between tasks is defined differently:
  it is the mean inner product of the gradients of two tasks, divided by the mean squared norm of the tasks' gradients.

Standard errors are from the delete-one jackknife over the J batches. If noise dominates the gradient, the standard errors are
too large by a factor of at most sqrt(2) (Efron and Stein 1981, "The jackknife estimate of variance"). A ratio is NaN if the
estimate of its denominator is not positive.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad

from icl.config import ModelConfig
from icl.metrics import Estimate
from icl.model.stacked import Params, target_losses
from icl.tasks.prompts import Prompts

Gradients = dict[str, Tensor]
"""Gradients (N, J, p) of each parameter, with a row for each batch. The keys are the names of the parameters."""
Grams = dict[str, Tensor]
"""Gram matrices (N, J, J) of each group of parameters, in float64 on the CPU. The group `all` covers all parameters."""

_FAMILIES = (("norm", "norms"), ("embedding", "embeddings"), ("attention", "attention"), ("mlp", "mlp"))


class WithDeleted(NamedTuple):
    """A statistic of all J batches, and the same statistic with each batch left out in turn."""

    value: Float[Tensor, "*N"]
    deleted: Float[Tensor, "J *N"]


def batch_gradients(model: ModelConfig, params: Params, prompts: Prompts, num_batches: int) -> Gradients:
    """Return the gradient of every member's mean loss on each of `num_batches` equal batches of the prompts (B, K, D)."""
    batches = list(_gradients(model, params, prompts, num_batches))
    return {name: torch.stack([gradients[name].flatten(1) for gradients in batches], dim=1) for name in params}  # N J p


def mean_gradient(
    model: ModelConfig, params: Params, prompts: Prompts, num_batches: int
) -> tuple[Float[Tensor, "N P"], Float[Tensor, " N"]]:
    """Return the gradient of every member's mean loss on all prompts, and its expected squared error.

    The expected squared error is tr(Sigma) / B, estimated from the scatter of the batches' gradients. Only one batch's gradient
    is in memory at a time.
    """
    total, squares = torch.zeros(()), torch.zeros(())
    for gradients in _gradients(model, params, prompts, num_batches):
        flat = _to_double(torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1)).cpu()
        total, squares = total + flat, squares + flat.square().sum(1)
    mean = total / num_batches
    return mean, ((squares / num_batches - mean.square().sum(1)) / (num_batches - 1)).clamp(min=0)


def grams(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Grams:
    """Return K_ij = g_i . h_j of every member, for every group of parameters (see `groups`)."""
    by_group: Grams = {}
    for name in first:
        product = (_to_double(first[name]) @ _to_double(second[name]).mT).cpu().double()  # N J J
        for group in groups(name):
            by_group[group] = by_group[group] + product if group in by_group else product
    return by_group


def groups(name: str) -> tuple[str, ...]:
    """Return the groups of a parameter: `all`, its family (such as `attention`) and its module (such as `blocks.0.attention`)."""
    parts = name.split(".")
    module = ".".join(parts[:3] if parts[0] == "blocks" else parts[:1])
    family = next((family for word, family in _FAMILIES if word in module and module != "unembedding"), module)
    return tuple(dict.fromkeys(("all", family, module)))


def inner(gram: Float[Tensor, "*N J J"]) -> WithDeleted:
    """Return the unbiased estimate of G . H."""
    count = gram.shape[-1]
    total, diagonal = gram.sum((-2, -1)), gram.diagonal(dim1=-2, dim2=-1)  # *N, *N J
    crossed = total - diagonal.sum(-1)
    touched = gram.sum(-1) + gram.sum(-2) - 2 * diagonal  # *N J: the off-diagonal entries of row and column j
    without = (crossed.unsqueeze(-1) - touched) / ((count - 1) * (count - 2))
    return WithDeleted(crossed / (count * (count - 1)), without.movedim(-1, 0))


def batch_norm(gram: Float[Tensor, "*N J J"]) -> WithDeleted:
    """Return the mean squared norm of one batch's gradient."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)  # *N J
    count, total = gram.shape[-1], diagonal.sum(-1)
    return WithDeleted(total / count, ((total.unsqueeze(-1) - diagonal) / (count - 1)).movedim(-1, 0))


def norm(squared: WithDeleted) -> Estimate:
    """Return sqrt(|G|^2), or 0 if the estimate of |G|^2 is negative. The error is propagated to first order."""
    square = squared_norm(squared)
    value = square.value.clamp(min=0).sqrt()
    return Estimate(value, square.stderr / (2 * value))


def squared_norm(squared: WithDeleted) -> Estimate:
    """Return the unbiased estimate of |G|^2. It can be negative if noise dominates the gradient."""
    return _jackknife(lambda square: square, squared)


def noise_trace(gram: Float[Tensor, "*N J J"], batch_size: int) -> Estimate:
    """Return tr(Sigma), the trace of the covariance of one prompt's gradient."""
    return _jackknife(lambda norm, square: batch_size * (norm - square), batch_norm(gram), inner(gram))


def noise_scale(gram: Float[Tensor, "*N J J"], batch_size: int) -> Estimate:
    """Return tr(Sigma) / |G|^2, in prompts."""
    return _jackknife(lambda norm, square: batch_size * _ratio(norm - square, square), batch_norm(gram), inner(gram))


def alignment(
    crossed: Float[Tensor, "*N J J"], first: Float[Tensor, "*N J J"], second: Float[Tensor, "*N J J"]
) -> Estimate:
    """Return the cosine between two expected gradients."""
    return _jackknife(
        lambda product, a, b: _ratio(product, (a * b).sqrt()), inner(crossed), inner(first), inner(second)
    )


def task_alignment(between: Float[Tensor, "*N Q Q J J"]) -> Estimate:
    """Return the mean inner product of the gradients of two of Q tasks, divided by their mean squared norm."""
    count = between.shape[-3]

    def cosine(products: Tensor, same: Tensor) -> Tensor:
        different = products.sum((-2, -1)) / count - same  # the sum over j != i of g_i . g_j, averaged over i
        return _ratio(different / (count - 1), same)

    return _jackknife(cosine, inner(between), mean_squared_norm(between))


def mean_squared_norm(between: Float[Tensor, "*N Q Q J J"]) -> WithDeleted:
    """Return the mean over Q tasks of the squared norm of the task's gradient."""
    return WithDeleted(*(products.diagonal(dim1=-2, dim2=-1).mean(-1) for products in inner(between)))


def _gradients(model: ModelConfig, params: Params, prompts: Prompts, num_batches: int) -> Iterator[Params]:
    """Yield the gradients of all members, one batch at a time."""

    def loss(weights: Params, xs: Tensor, ys: Tensor) -> Tensor:
        losses = target_losses(model, weights, xs, ys)  # N B K
        return losses.mean((-2, -1)).sum()  # members do not interact, so the sum gives each member its own gradient

    size = len(prompts.ys) // num_batches
    for xs, ys in zip(prompts.xs.split(size), prompts.ys.split(size), strict=True):
        yield grad(loss)(params, xs, ys)


def _jackknife(function: Callable[..., Tensor], *statistics: WithDeleted) -> Estimate:
    """Return the value of a function of statistics, with its delete-one jackknife standard error."""
    deleted = function(*(statistic.deleted for statistic in statistics))
    variance = (len(deleted) - 1) * (deleted - deleted.mean(0)).square().mean(0)
    return Estimate(function(*(statistic.value for statistic in statistics)), variance.sqrt())


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient; NaN where the denominator is not positive."""
    return torch.where(denominator > 0, numerator / denominator, torch.nan)


def _to_double(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "mps" else tensor.double()  # mps has no float64

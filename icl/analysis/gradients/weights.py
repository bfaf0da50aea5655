"""Gradients of the loss in the weights, and what can be said of them without the bias of noise.

The prompts are cut into J batches of b; batch j of a member gives a gradient g_j, an unbiased and independent estimate of
the expected gradient G whose covariance is Sigma / b, Sigma being that of one prompt. Everything here is a function of
the Gram matrices K_ij = g_i . h_j of two such sets, through

    inner(K) = mean of K_ij over i != j    (unbiased for G . H, also if batch j of both is the same prompts)
    own(K)   = mean of K_jj                (its expectation is |G|^2 + tr(Sigma) / b)

- squared norm |G|^2 = inner; noise trace tr(Sigma) = b (own - inner), both unbiased; `norm` is sqrt(|G|^2), 0 if negative;
- simple noise scale tr(Sigma) / |G|^2, in prompts: the batch size at which noise and signal are equal (McCandlish, Kaplan,
  Amodei et al. 2018, "An empirical model of large-batch training", section 2.2; with J batches against all of them
  together our two estimates are those of their appendix A.1);
- alignment: the cosine inner(K_gh) / sqrt(inner(K_gg) inner(K_hh)). Between tasks it is weighted by norms: the mean inner
  product of two tasks' gradients over their mean squared norm.

Standard errors are the delete-one jackknife over the J batches; where noise drowns the gradient they are too large, by
sqrt(2) at most (Efron and Stein 1981, "The jackknife estimate of variance"). A ratio whose squared norms are not positive is NaN.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad

from icl import metrics
from icl.config import ModelConfig
from icl.metrics import Estimate
from icl.stacked import Params, apply
from icl.tasks.prompts import Prompts

Gradients = dict[str, Tensor]
"""By parameter name: (N, J, p), a row for each batch."""
Grams = dict[str, Tensor]
"""By group of parameters: (N, J, J) in float64 on the CPU; `all` is their sum."""

_FAMILIES = (("norm", "norms"), ("embedding", "embeddings"), ("attention", "attention"), ("mlp", "mlp"))


class WithDeleted(NamedTuple):
    """A statistic of all J batches, and of all but each one of them."""

    value: Float[Tensor, "*N"]
    deleted: Float[Tensor, "J *N"]


def batch_gradients(model: ModelConfig, params: Params, prompts: Prompts, num_batches: int) -> Gradients:
    """The gradient of every member's mean loss on each of `num_batches` equal batches of the same prompts (B, K, D)."""
    found = list(_gradients(model, params, prompts, num_batches))
    return {name: torch.stack([one[name].flatten(1) for one in found], dim=1) for name in params}  # N J p


def mean_gradient(
    model: ModelConfig, params: Params, prompts: Prompts, num_batches: int
) -> tuple[Float[Tensor, "N P"], Float[Tensor, " N"]]:
    """The gradient of every member's mean loss on all prompts, and its estimated squared distance to the expected one.

    The latter is tr(Sigma) / B, from the scatter of the batches' gradients; no more than one of them is kept at a time.
    """
    total, squares = torch.zeros(()), torch.zeros(())
    for one in _gradients(model, params, prompts, num_batches):
        flat = _precise(torch.cat([gradient.flatten(1) for gradient in one.values()], dim=1)).cpu()
        total, squares = total + flat, squares + flat.square().sum(1)
    mean = total / num_batches
    return mean, ((squares / num_batches - mean.square().sum(1)) / (num_batches - 1)).clamp(min=0)


def grams(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Grams:
    """K_ij = g_i . h_j of every member, for all weights, families and modules."""
    found: Grams = {}
    for name in first:
        left, right = (_precise(side[name]) for side in (first, second))
        product = (left @ right.mT).cpu().double()  # N J J
        for group in groups(name):
            found[group] = found[group] + product if group in found else product
    return found


def groups(name: str) -> tuple[str, ...]:
    """The groups of a parameter: `all`, its family (such as `attention`), its module (such as `blocks.0.attention`)."""
    parts = name.split(".")
    module = ".".join(parts[:3] if parts[0] == "blocks" else parts[:1])
    family = next((family for word, family in _FAMILIES if word in module and module != "unembedding"), module)
    return tuple(dict.fromkeys(("all", family, module)))


def inner(gram: Float[Tensor, "*N J J"]) -> WithDeleted:
    """The unbiased G . H, with all batches and without each."""
    count = gram.shape[-1]
    total, diagonal = gram.sum((-2, -1)), gram.diagonal(dim1=-2, dim2=-1)  # *N, *N J
    crossed = total - diagonal.sum(-1)
    touched = gram.sum(-1) + gram.sum(-2) - 2 * diagonal  # *N J: the off-diagonal entries of row and column j
    without = (crossed.unsqueeze(-1) - touched) / ((count - 1) * (count - 2))
    return WithDeleted(crossed / (count * (count - 1)), without.movedim(-1, 0))


def own(gram: Float[Tensor, "*N J J"]) -> WithDeleted:
    """The mean squared norm of one batch's gradient, with all batches and without each."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)  # *N J
    count, total = gram.shape[-1], diagonal.sum(-1)
    return WithDeleted(total / count, ((total.unsqueeze(-1) - diagonal) / (count - 1)).movedim(-1, 0))


def norm(squared: WithDeleted) -> Estimate:
    """sqrt(|G|^2), and 0 where the estimate of the square is negative; its error from that of the square."""
    square = _jackknife(squared)
    value = square.value.clamp(min=0).sqrt()
    return Estimate(value, square.stderr / (2 * value))


def squared_norm(squared: WithDeleted) -> Estimate:
    """|G|^2, unbiased; negative where noise drowns it."""
    return _jackknife(squared)


def noise_trace(gram: Float[Tensor, "*N J J"], batch_size: int) -> Estimate:
    """tr(Sigma) of one prompt's gradient."""
    whole, squared = own(gram), inner(gram)
    return _jackknife(WithDeleted(*(batch_size * (a - b) for a, b in zip(whole, squared, strict=True))))


def noise_scale(gram: Float[Tensor, "*N J J"], batch_size: int) -> Estimate:
    """tr(Sigma) / |G|^2, in prompts."""
    whole, squared = own(gram), inner(gram)
    ratios = (batch_size * _ratio(a - b, b) for a, b in zip(whole, squared, strict=True))
    return _jackknife(WithDeleted(*ratios))


def alignment(
    crossed: Float[Tensor, "*N J J"], first: Float[Tensor, "*N J J"], second: Float[Tensor, "*N J J"]
) -> Estimate:
    """The cosine between two expected gradients."""
    sides = zip(inner(crossed), inner(first), inner(second), strict=True)
    return _jackknife(WithDeleted(*(_ratio(c, (a * b).sqrt()) for c, a, b in sides)))


def task_alignment(between: Float[Tensor, "*N Q Q J J"]) -> Estimate:
    """The mean inner product of two of Q tasks' gradients over their mean squared norm: their cosine, weighted by norms."""
    count = between.shape[-3]
    sides = zip(inner(between), mean_squared_norm(between), strict=True)
    different = ((products.sum((-2, -1)) / count - same, same) for products, same in sides)
    return _jackknife(WithDeleted(*(_ratio(above / (count - 1), same) for above, same in different)))


def mean_squared_norm(between: Float[Tensor, "*N Q Q J J"]) -> WithDeleted:
    """The mean of Q tasks' squared gradients."""
    return WithDeleted(*(products.diagonal(dim1=-2, dim2=-1).mean(-1) for products in inner(between)))


def _gradients(model: ModelConfig, params: Params, prompts: Prompts, num_batches: int) -> Iterator[Params]:
    """Every member's gradient, batch by batch."""

    def loss(weights: Params, xs: Tensor, ys: Tensor) -> Tensor:
        errors = metrics.squared_error(apply(model, weights, xs, ys), ys)  # N B K
        return errors.mean((-2, -1)).sum()  # members do not meet, so the gradient of the sum is each one's own

    for xs, ys in _batches(prompts, num_batches):
        yield grad(loss)(params, xs, ys)


def _jackknife(statistic: WithDeleted) -> Estimate:
    """The value and its delete-one standard error."""
    deleted = statistic.deleted
    count = len(deleted)
    return Estimate(statistic.value, ((count - 1) * (deleted - deleted.mean(0)).square().mean(0)).sqrt())


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """The quotient, NaN unless what is below is positive."""
    return torch.where(below > 0, above / below, torch.nan)


def _batches(prompts: Prompts, num_batches: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = len(prompts.ys) // num_batches
    return zip(prompts.xs.split(size), prompts.ys.split(size), strict=True)


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "mps" else tensor.double()  # mps has no float64

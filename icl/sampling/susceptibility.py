"""Susceptibilities: how a component of a model responds to a change of the data.

Let l' be the loss on some part of the data: one position of the prompts, one group of tasks, or a shifted distribution. Change the loss
from L to L + e (l' - L) with a small e. The posterior mean of f = nbeta (L - L0) then changes at the rate nbeta chi, where

    chi = -Cov(f, l' - L)

and the covariance is over draws of the localised posterior. If only one component moves, such as one head (`restrict`), chi is the
susceptibility of that component. A negative value means that the component matters more for this part of the data than on average: draws
that raise the training loss raise the loss on this part by even more. Source: Baker, Wang, Hoogland and Murfet 2025, "Structural inference:
interpreting small language models with susceptibilities" (arXiv 2504.18274).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from icl.config.validation import ConfigError
from icl.sampling import convergence
from icl.sampling.result import LLCResult


class Susceptibility(NamedTuple):
    """Susceptibilities to Q parts of the data, with their standard errors."""

    value: Float[Tensor, " Q"]
    stderr: Float[Tensor, " Q"]


def susceptibility(
    excess: Float[Tensor, "K S"], difference: Float[Tensor, "K S"] | Float[Tensor, "K S Q"]
) -> Susceptibility:
    """Estimate -Cov(excess, difference) over the draws of K chains.

    Args:
        excess: nbeta (L - L0) at every draw, in nats. Its minibatch noise increases the standard error, but causes no bias if consecutive
            draws have different minibatches and `difference` is measured on other data.
        difference: l' - L at every draw, for each of Q parts of the data.

    Returns:
        The estimates, with standard errors from the chains and their autocorrelation (`icl.sampling.convergence`).

    Raises:
        ConfigError: If `excess` and `difference` differ in their chains or draws, or have fewer than two draws.
    """
    if difference.shape[:2] != excess.shape or excess.numel() < 2:
        raise ConfigError(
            "`difference` must have as many chains and draws as `excess`, with at least two draws in total, got the shapes "
            f"{tuple(difference.shape)} and {tuple(excess.shape)}."
        )
    parts = difference.reshape(*excess.shape, -1).double()  # K S Q
    centred = excess.double() - excess.double().mean()
    terms = -centred[:, :, None] * (parts - parts.mean((0, 1)))
    num = excess.numel()
    errors = [convergence.standard_error(column.numpy()) for column in terms.unbind(2)]
    return Susceptibility(terms.sum((0, 1)) / (num - 1), torch.tensor(errors, dtype=torch.float64))


def susceptibility_of(result: LLCResult, observable: str, *, reference: str | None = None) -> Susceptibility:
    """Estimate the susceptibilities to losses that were recorded as an observable of an LLC estimate.

    Args:
        result: The estimate. Restrict its chains to a component to get that component's susceptibilities.
        observable: Name of an observable with the losses l' of Q parts of the data.
        reference: Name of an observable with the loss L on the same data. By default L is the mean of the Q losses.

    Raises:
        ConfigError: If there is no such observable.

    Example:
        ```python
        result = estimate_llc(loss, params, batches, restrict=head, observables={"by_position": losses_on_held_out_prompts}, **settings)
        susceptibility_of(result, "by_position").value  # one for each position
        ```
    """
    for name in (observable, *([] if reference is None else [reference])):
        if name not in result.observables:
            raise ConfigError(
                f"The estimate has no observable `{name}`. Its observables are: {', '.join(result.observables) or 'none'}."
            )
    used = result.llc_per_chain.isfinite()
    parts = result.observables[observable][used]
    parts = parts[..., None] if parts.ndim == 2 else parts.flatten(2)  # K S Q
    whole = parts.mean(2) if reference is None else result.observables[reference][used]
    return susceptibility(result.excess_trace[used], parts - whole[:, :, None])

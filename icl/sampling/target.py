"""What chains sample: a loss with its minibatches, and faster ways to compute it where there are some."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from icl.sampling.batches import Batch, Batches
from icl.sampling.gradients import Gradient, Loss, looped_gradient, own_losses, stacked_loss, vmapped_gradient
from icl.stacked import Params


@dataclass(frozen=True, kw_only=True)
class Target:
    """A loss with its minibatches."""

    loss: Loss
    """`loss(params, batch)` of one member: a number, or a vector of components whose mean is the loss."""
    batches: Batches
    """Minibatches by (chain, draw), or an iterable."""
    trivial_loss: float | None = None
    """Loss of a predictor that knows nothing; None if it is not known."""
    name: str = "loss"
    vectorize: bool = True
    """False runs one chain after another by plain autograd, for losses that `vmap` cannot map."""
    gradient: Gradient | None = None
    """A faster gradient of the same loss for the chains' moves."""
    shared_losses: Callable[[Params, Batch], Tensor] | None = None
    """A faster loss of stacked parameters on one batch for all."""
    own_losses: Callable[[Params, Batch], Tensor] | None = None
    """A faster loss of stacked parameters, each on its own batch."""

    @property
    def default_gradient(self) -> Gradient:
        """The gradient of the loss itself."""
        return vmapped_gradient(self.loss) if self.vectorize else looped_gradient(self.loss)

    @property
    def chain_gradient(self) -> Gradient:
        """The gradient for the chains' moves."""
        return self.gradient or self.default_gradient

    @property
    def losses_on_shared_batch(self) -> Callable[[Params, Batch], Tensor]:
        """The losses (N,) or (N, T) of stacked parameters, all on the same batch."""
        return self.shared_losses or stacked_loss(self.loss, vectorize=self.vectorize)

    @property
    def losses_on_own_batches(self) -> Callable[[Params, Batch], Tensor]:
        """The losses (N,) or (N, T) of stacked parameters, each on its own batch."""
        return self.own_losses or own_losses(self.loss, vectorize=self.vectorize)

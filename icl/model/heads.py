"""Output heads: how a model's outputs at the x-tokens predict the next target.

The setting `model.output` chooses the head, and with it the loss that training minimises:

- `scalar`, `token`: coordinate 0 of the outputs is the prediction of y. The loss is the squared error.
- `gaussian`: the predictive distribution of y is N(m, exp(s)), with m = o_0 and s = 10 tanh(o_1 / 10), where o_0 and o_1
  are the outputs. The loss is the negative log-likelihood -log p(y), in nats.
- `mixture`: the predictive distribution is a mixture of J Gaussians (Bishop 1994, "Mixture density networks"). The 3J outputs are the means
  m_j, then J numbers o_j, then the logits of the weights w_j. The log-variances are s_j = 10 tanh(o_j / 10). The loss is
  -log sum_j w_j N(y; m_j, exp(s_j)), in nats.

The function 10 tanh(o / 10) bounds the log-variances, so variances lie between 4.5e-5 and 22,000. Without a lower bound, a component could
shrink onto one target, and the likelihood of this target would be infinite. The negative log-likelihoods include the constant
log(2 pi) / 2.

For `gaussian` and `mixture`, the prediction is the mean of the predictive distribution, sum_j w_j m_j. All code that compares predictions
uses this mean. The definition of the model (`icl.model.transformer`) and its fast form (`icl.model.stacked`) both use the functions of this
module.

Axis letters: *S any leading axes, J components, O outputs.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from icl.config import ModelConfig

MAX_LOG_VARIANCE = 10.0
"""Upper bound on the absolute value of a log-variance."""
_LOG_2_PI = math.log(2 * math.pi)


class Predictive(NamedTuple):
    """Predictive distributions of targets: mixtures of J Gaussians. A single Gaussian has J = 1."""

    log_weights: Float[Tensor, "*S J"]
    means: Float[Tensor, "*S J"]
    log_variances: Float[Tensor, "*S J"]

    @property
    def mean(self) -> Float[Tensor, "*S"]:
        """The mean of each distribution."""
        return (self.log_weights.exp() * self.means).sum(-1)


def output_size(config: ModelConfig, token_size: int) -> int:
    """Return the number of outputs at each token."""
    sizes = {"scalar": 1, "token": token_size, "gaussian": 2, "mixture": 3 * config.num_components}
    return sizes[config.output]


def predictive(config: ModelConfig, outputs: Float[Tensor, "*S O"]) -> Predictive:
    """Return the predictive distributions of a model with the output `gaussian` or `mixture`.

    Raises:
        ValueError: If `model.output` is `scalar` or `token`.
    """
    if config.output == "gaussian":
        means, raw = outputs.split(1, dim=-1)
        return Predictive(torch.zeros_like(means), means, _bounded(raw))
    if config.output == "mixture":
        means, raw, logits = outputs.chunk(3, dim=-1)
        return Predictive(logits.log_softmax(-1), means, _bounded(raw))
    raise ValueError(
        f"A model with `model.output` = {config.output} has no predictive distribution. Use `gaussian` or `mixture`."
    )


def predictions(config: ModelConfig, outputs: Float[Tensor, "*S O"]) -> Float[Tensor, "*S"]:
    """Return the predictions of targets: coordinate 0 of the outputs, or the mean of the predictive distribution."""
    return predictive(config, outputs).mean if config.output == "mixture" else outputs[..., 0]


def target_losses(config: ModelConfig, outputs: Float[Tensor, "*S O"], ys: Float[Tensor, "*#S"]) -> Float[Tensor, "*S"]:
    """Return the training loss of every target: the squared error, or the negative log-likelihood in nats."""
    if not config.has_density:
        return (predictions(config, outputs) - ys).square()
    return -log_density(predictive(config, outputs), ys)


def log_density(distributions: Predictive, ys: Float[Tensor, "*#S"]) -> Float[Tensor, "*S"]:
    """Return log p(y) of each target under its distribution."""
    log_weights, means, log_variances = distributions
    squares = (ys.unsqueeze(-1) - means).square() * torch.exp(-log_variances)
    return torch.logsumexp(log_weights - (squares + log_variances + _LOG_2_PI) / 2, dim=-1)


def draw(
    distributions: Predictive, uniforms: Float[Tensor, "*#S"], normals: Float[Tensor, "*#S"]
) -> Float[Tensor, "*S"]:
    """Return a sample of each distribution.

    Args:
        distributions: The distributions.
        uniforms: Uniform numbers in [0, 1], which choose the components. Each number chooses the first component whose cumulative weight
            exceeds this number.
        normals: Standard normal numbers, which are scaled and shifted to the chosen component.
    """
    log_weights, means, log_variances = distributions
    cumulative = log_weights.exp().cumsum(-1)  # S J
    is_below = cumulative[..., :-1] <= uniforms.unsqueeze(-1) * cumulative[..., -1:]  # S J-1
    chosen = is_below.sum(-1, keepdim=True)  # S 1
    mean, log_variance = (part.gather(-1, chosen).squeeze(-1) for part in (means, log_variances))
    return mean + torch.exp(log_variance / 2) * normals


def _bounded(raw: Tensor) -> Tensor:
    return MAX_LOG_VARIANCE * torch.tanh(raw / MAX_LOG_VARIANCE)

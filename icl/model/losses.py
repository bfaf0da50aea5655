"""The training loss of every family of models, at each position, for many members of a population at once.

Only this module decides how a loss is computed for each family of models. Training, sampling and evaluation get their losses here:

- regression: the squared error of the prediction of y_k, or the negative log-likelihood of y_k (`icl.model.stacked.target_losses`), for
  prompts xs (N, B, K, D) and ys (N, B, K);
- language: -log P(next token) in nats, for tokens xs (N, B, T) and the tokens after them, ys (N, B, T).

Language rows can be long, so a batch of them is split into parts, and the gradients of the parts are summed. The size of a part comes from
`icl.model.language.rows_at_once`, so the memory for activations does not grow with the size of the batch. Regression prompts are short, so
their batches are not split.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from icl.compute.calls import grad_and_aux
from icl.config import ModelConfig, RunConfig
from icl.model.language import LanguageModel, next_token_losses, rows_at_once
from icl.model.stacked import Params, target_losses
from icl.model.transformer import ParameterShapes, parameter_shapes, shapes_of_module


def position_losses(model: ModelConfig, params: Params, xs: Tensor, ys: Tensor) -> Float[Tensor, "N B K"]:
    """Return the loss at every position of every prompt or row, for N members."""
    if model.is_language:
        return next_token_losses(model, params, xs, ys)
    return target_losses(model, params, xs, ys)


def batch_losses(model: ModelConfig, params: Params, xs: Tensor, ys: Tensor) -> Float[Tensor, "N B K"]:
    """Return `position_losses` without gradients, computed part by part if a batch needs too much memory."""
    with torch.no_grad():
        parts = [position_losses(model, params, *part) for part in batch_parts(model, params, xs, ys)]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def batch_parts(model: ModelConfig, params: Params, xs: Tensor, ys: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Split a batch along the axis of its rows into parts that fit into memory. The sizes of the parts may differ by one row."""
    num_rows = ys.shape[-2]
    size = rows_at_once(model, params, ys.shape[-1]) if model.is_language else num_rows
    if size >= num_rows:
        return [(xs, ys)]
    num_parts = -(-num_rows // size)
    return list(zip(xs.tensor_split(num_parts, -2), ys.tensor_split(num_parts, -2), strict=True))


def grads_in_parts(
    model: ModelConfig,
    to_params: Callable[[Tensor], Params],
    combine: Callable[[Tensor], tuple[Tensor, Tensor]],
    leaves: Tensor,
    batch: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Apply `grad_and_aux` to a loss that is a mean over the rows of a batch. Long batches are processed in parts, one after the other.

    Args:
        model: The architecture.
        to_params: Function from `leaves` to stacked parameters.
        combine: Function from losses (N, B, K) to two results: the number whose gradient is computed, and the tensor to return. Both must
            be means over rows of the batch.
        leaves: Flat parameters (`icl.model.flat`), with respect to which the gradient is computed.
        batch: The inputs and targets of every member.
    """

    def gradient(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return grad_and_aux(lambda leaves: combine(position_losses(model, to_params(leaves), *part)), leaves)

    with torch.no_grad():
        parts = batch_parts(model, to_params(leaves), *batch) if model.is_language else [batch]
    if len(parts) == 1:
        return gradient(parts[0])
    num_rows = batch[1].shape[-2]
    grads = aux = torch.zeros(())
    for number, part in enumerate(parts):
        share = part[1].shape[-2] / num_rows
        part_grads, part_aux = gradient(part)
        grads = grads.add_(part_grads, alpha=share) if number else part_grads * share
        aux = aux + part_aux * share
    return grads, aux


def shapes_of(config: RunConfig) -> ParameterShapes:
    """Return the shapes of the parameters of a run's model, without allocating the model.

    Raises:
        ValueError: If a tensor would be larger than PyTorch allows.
    """
    if config.model.is_language:
        text = config.language
        return shapes_of_module(LanguageModel, config.model, vocab_size=text.vocab_size, context_size=text.context_size)
    return parameter_shapes(config.model, task_size=config.task.task_size, max_examples=config.task.max_examples)

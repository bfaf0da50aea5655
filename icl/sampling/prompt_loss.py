"""The training loss of a run as the sampler's target: per position, with a fast gradient and reproducible minibatches.

The loss is the one that training minimised. For regression, it is the mean squared error per target, not divided by D, or the negative
log-likelihood in nats per target if `model.output` is `gaussian` or `mixture`. For language, it is -log P(next token) in nats. The
sampler gets a vector with one component for each of the K positions; the mean of the components is the loss. The column `loss_name` of the
results says which loss was used: `mse`, `nll` or `cross_entropy`, or `subsequence`, `subsequence_nll` or `subsequence_cross_entropy`.

The `subsequence` loss (Hoogland et al. 2024, calibration) is the mean error of the first K' targets, with K' uniform on 1, ..., K. We use
the expectation of this loss over K', which weights position k by the sum over K' >= k of 1 / (K K'). The authors' code draws one K' for
each prompt, which adds noise but no information.

Prompts follow the run's training distribution. `fixed` minibatches are blocks of one set of n = `num_samples` prompts. The set consists of
the first n prompts of the stream `llc`, so a larger set contains every smaller one. For each (seed, chain, draw), a block is drawn
uniformly. `fresh` minibatches are new prompts for each (seed, chain, draw); then n is used only in nbeta = n / ln n.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from icl import rng
from icl.compute.calls import (
    RELEASE_GIL,
    Function,
    Result,
    compiling_pays,
    in_parallel,
    one_graph,
)
from icl.config import ModelConfig, RunConfig, SamplerConfig
from icl.model.flat import Layout
from icl.model.losses import batch_losses, batch_parts, grads_in_parts, position_losses, shapes_of
from icl.model.stacked import Params, size
from icl.sampling.batches import Batch, Pool
from icl.sampling.target import Gradient, Loss, Observable, StackedLosses, Target
from icl.tasks.prompts import Distribution, sample_prompts, training_pool
from icl.tasks.streams import stream_source

_MAX_COUNTED_TASKS = 2**16
"""Largest number of tasks for which the pool's mean |w|^2 is computed. For a larger pool, we use D. For Gaussian tasks, D differs from this
mean by about half a percent at most."""
PARTS: tuple[Distribution, ...] = ("pretrain", "true")
"""Distributions of the prompts in `losses_by_part`, in order."""
NUM_PART_PROMPTS = 256
"""Number of prompts from each distribution in `PARTS`. At each draw, their losses cost about as much as the loss of a minibatch."""
_PROMPTS_AHEAD = 2**15
"""Number of prompts that are generated at once, for all chains together."""
_NUMBERS_AHEAD = 2**10
"""Number of moves of a chain for which the indices of the minibatches are drawn at once."""
_CUDA_NORMALS_AHEAD = 2**24
"""Number of random numbers that are generated at once on a GPU, where drawing a few numbers takes as long as drawing many. For language
models, this number is used on every device."""


def prompt_target(
    config: RunConfig, sampler: SamplerConfig, *, device: torch.device | str = "cpu", num_moves: int = 0
) -> Target:
    """Return the training loss of a run as the sampler's target.

    Args:
        config: Settings of the run.
        sampler: Settings of the sampler.
        device: Device of the parameters.
        num_moves: Number of moves of all chains together. If they would take minutes, the gradient is compiled.
    """
    device = torch.device(device)
    weights = _position_weights(sampler.loss, config.num_positions).to(device)
    compiled = _is_compiled(config, sampler, num_moves, device)
    return Target(
        name=_loss_name(config.model, sampler.loss),
        loss=_loss(config.model, weights),
        gradient=_gradient(config.model, weights, compiled=compiled),
        shared_losses=_losses(config.model, weights),
        own_losses=_losses(config.model, weights, own_batches=True, compiled=compiled and device.type == "cpu"),
        batches=_batches(config, sampler, device),
        trivial_loss=trivial_loss(config),
        part=(lambda params, batch: batch_parts(config.model, params, *batch)[0]) if config.model.is_language else None,
    )


def losses_by_part(config: RunConfig, *, device: torch.device | str = "cpu") -> Observable:
    """Return a function from parameters to their losses at each position, on fixed prompts that are in no minibatch.

    The function returns 2K numbers: the losses at positions 1 to K on the training distribution, then the losses at these positions on new
    tasks. The susceptibilities to these losses show for which positions and tasks a component of the model matters
    (`icl.sampling.susceptibility`).
    """
    batches = [
        sample_prompts(
            config,
            stream=f"llc/parts/{distribution}",
            step=0,
            batch_size=NUM_PART_PROMPTS,
            distribution=distribution,
            device=device,
        )
        for distribution in PARTS
    ]
    loss = _loss(config.model, torch.ones(config.task.max_examples, device=device))

    def observable(params: Params) -> Tensor:
        return torch.cat([loss(params, (batch.xs, batch.ys)) for batch in batches])

    return observable


def trivial_loss(config: RunConfig) -> float:
    """Return the loss of a predictor that ignores the prompt, on the run's training distribution.

    The squared error of predicting zero is E[y^2] = E|w|^2 + sigma^2. The negative log-likelihood of N(0, E[y^2]) is
    log(2 pi e E[y^2]) / 2. For language, the trivial predictor is the uniform distribution over tokens, with the loss ln V.
    """
    if config.model.is_language:
        return math.log(config.language.vocab_size)
    task = config.task
    square = float(task.task_size)
    if task.num_tasks <= _MAX_COUNTED_TASKS:
        square = float(training_pool(config).square().sum(1).mean())
    mean_square = square + task.noise_variance
    return math.log(2 * math.pi * math.e * mean_square) / 2 if config.model.has_density else mean_square


def _loss_name(model: ModelConfig, loss: str) -> str:
    """Return the name of the loss in results, such as `mse`."""
    if not model.is_language and not model.has_density:
        return loss
    name = "cross_entropy" if model.is_language else "nll"
    return name if loss == "mse" else f"{loss}_{name}"


def _position_weights(loss: str, max_examples: int) -> Float[Tensor, " K"]:
    """Return the weight of each position's error in the mean over positions; the weights have mean 1."""
    if loss == "mse":
        return torch.ones(max_examples)
    lengths = torch.arange(1, max_examples + 1, dtype=torch.float64)
    return (1 / lengths).flip(0).cumsum(0).flip(0).float()


def _components(model: ModelConfig, weights: Tensor, params: Params, xs: Tensor, ys: Tensor) -> Float[Tensor, "N K"]:
    compute = position_losses if torch.is_grad_enabled() else batch_losses  # without gradients, the batch may be split
    return compute(model, params, xs, ys).mean(dim=1) * weights


def _loss(model: ModelConfig, weights: Tensor) -> Loss:
    def loss(params: Params, batch: Batch) -> Tensor:
        xs, ys = batch
        return _components(model, weights, {n: t.unsqueeze(0) for n, t in params.items()}, xs, ys).squeeze(0)

    return loss


def _losses(model: ModelConfig, weights: Tensor, *, own_batches: bool = False, compiled: bool = False) -> StackedLosses:
    """Return a function that computes the losses of stacked parameters, without gradients.

    On a CPU it computes each member separately, which is several times as fast as vmap.
    """

    def losses(params: Params, xs: Tensor, ys: Tensor) -> Tensor:
        return _components(model, weights, params, xs, ys)

    each = _member_by_member(_graph(losses) if compiled else losses, compiled=compiled)

    def call(params: Params, batch: Batch) -> Tensor:
        if next(iter(params.values())).device.type != "cpu":
            with torch.no_grad():
                return losses(params, *batch)
        members = range(size(params))
        return torch.cat(each([(_rows(params, i), *(_rows(batch, i) if own_batches else batch)) for i in members]))

    return call


def _gradient(model: ModelConfig, weights: Tensor, *, compiled: bool) -> Gradient:
    """Return a function that computes gradients of stacked parameters, by a compiled graph or by plain autograd.

    Plain autograd is a tenth faster than vmap. On a CPU the gradient is computed chain by chain. A compiled graph checks all of its inputs
    at every call, so a chain's parameters are passed as a single row instead of many tensors.
    """

    @cache
    def of_rows(layout: Layout) -> tuple[Callable[..., Any], Callable[..., list[tuple[Tensor, Tensor]]]]:
        def gradient(rows: Tensor, fixed: Params, batch: Batch) -> tuple[Tensor, Tensor]:
            def to_params(rows: Tensor) -> Params:
                # With several chains, `contiguous` copies: matrix products on a GPU are slow on views at unaligned addresses.
                return {name: tensor.contiguous() for name, tensor in layout.to_params(rows, fixed).items()}

            def combine(losses: Tensor) -> tuple[Tensor, Tensor]:
                components = losses.mean(dim=1) * weights  # N K
                return components.mean(
                    1
                ).sum(), components  # row i of the gradient of this sum is the gradient of member i

            return grads_in_parts(model, to_params, combine, rows, batch)

        together = _graph(gradient) if compiled else gradient
        return together, _member_by_member(together, compiled=compiled)

    def call(layout: Layout, rows: Tensor, fixed: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        together, each = of_rows(layout)
        if rows.device.type != "cpu":
            return together(rows, fixed, batch)
        results = each([tuple(_rows(tree, i) for tree in (rows, fixed, batch)) for i in range(len(rows))])
        grads, values = (torch.cat(parts) for parts in zip(*results, strict=True))
        return grads, values

    return call


def _graph(function: Function) -> Function:
    return one_graph(function, work="Sampling", options=RELEASE_GIL)


def _member_by_member(
    function: Callable[..., Result], *, compiled: bool
) -> Callable[[Sequence[tuple[Any, ...]]], list[Result]]:
    """Return a function that computes each member separately, and several members in parallel on several cores.

    The members are not computed as one batch, because the data of one member already fill a core's caches.
    """
    # With another number of threads, the graph would be compiled again.
    return in_parallel(function, threads_each=1 if compiled else None)


def _rows(tree: Any, i: int) -> Any:
    """Return member i of stacked tensors, with a leading axis of length 1."""
    return pytree.tree_map(lambda leaf: leaf[i : i + 1] if isinstance(leaf, Tensor) else leaf, tree)


def _is_compiled(config: RunConfig, sampler: SamplerConfig, num_moves: int, device: torch.device) -> bool:
    # For language, we have not measured the speed, and the graph of a batch in many parts would be very long.
    if config.model.is_language:
        return False
    return device.type in ("cpu", "cuda") and compiling_pays(
        num_params=shapes_of(config).num_params,
        num_tokens=config.num_tokens * sampler.batch_size,
        num_steps=num_moves,
    )


def _batches(config: RunConfig, sampler: SamplerConfig, device: torch.device) -> "_Ahead":
    size = sampler.batch_size
    is_fixed = sampler.minibatches == "fixed"
    source = stream_source(config, stream="llc" if is_fixed else f"llc/fresh/{sampler.seed}")
    num_prompts = _PROMPTS_AHEAD
    if device.type == "cuda" or config.model.is_language:
        num_prompts = _CUDA_NORMALS_AHEAD // source.numbers_per_row
    key, num_blocks = rng.stream(sampler.seed, "llc/minibatches"), sampler.num_samples // size

    def block_numbers(chain: int, draws: range) -> Tensor:
        return rng.integers(key, torch.tensor(draws), torch.tensor([chain]), num_blocks)  # S 1

    def blocks(numbers: Tensor) -> Batch:
        indices = (numbers * size + torch.arange(size)).flatten().to(device)
        xs, ys = source.sample(range(1), indices, device=device)[:2]
        return xs[0].unflatten(0, (len(numbers), size)), ys[0].unflatten(0, (len(numbers), size))

    def fixed(chain: int, draws: range) -> Batch:
        return blocks(block_numbers(chain, draws))

    @cache
    def numbers_from(chain: int, first: int) -> list[int]:
        return block_numbers(chain, range(first, first + _NUMBERS_AHEAD)).flatten().tolist()

    def number_of(chain: int, draw: int) -> int:  # also for moves beyond `sampler.num_moves`, which a calibration makes
        return numbers_from(chain, draw - draw % _NUMBERS_AHEAD)[draw % _NUMBERS_AHEAD]

    def block(number: int) -> Batch:
        xs, ys = blocks(torch.tensor([[number]]))
        return xs[0], ys[0]

    def fresh(chain: int, draws: range) -> Batch:
        return source.sample(draws, range(chain * size, (chain + 1) * size), device=device)[:2]

    ahead = _Ahead(fixed if is_fixed else fresh, sampler, num_prompts)
    if is_fixed:
        ahead.pool = Pool(num_blocks, number_of, block, is_uniform=True)
    return ahead


class _Ahead:
    """Callable that returns the minibatch of (chain, draw), and generates the minibatches of many draws at once.

    This is many times faster than generating them one by one, and gives the same minibatches.
    """

    def __init__(self, make: Callable[[int, range], Batch], sampler: SamplerConfig, num_prompts: int) -> None:
        self.make = make
        self.num_draws = max(1, num_prompts // (sampler.batch_size * sampler.num_chains))
        self.pool: Pool | None = None
        self.blocks: dict[int, tuple[int, Batch]] = {}  # index and minibatches of each chain's latest block of draws

    def __call__(self, chain: int, draw: int) -> Batch:
        block, index = divmod(draw, self.num_draws)
        number, batches = self.blocks.get(chain, (-1, None))
        if number != block:
            batches = self.make(chain, range(block * self.num_draws, (block + 1) * self.num_draws))
            self.blocks[chain] = (block, batches)
        xs, ys = batches
        return xs[index], ys[index]

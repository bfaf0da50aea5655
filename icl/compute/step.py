"""One optimiser step of a population, written as one function of tensors so that it compiles to one graph.

A population is a set of models, its members, that are trained together. A step computes each member's loss (`icl.model.losses`) and the
gradient, and clips the gradient by its norm. Then the step updates the member's parameters p in place with Adam (Kingma and Ba 2015,
algorithm 1, as in `torch.optim.Adam`). Let g be the clipped gradient, m and v the moments, b1 and b2 their decays, `rate` the learning
rate, and t the number of updates including this one. Then

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   p <- p - rate (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

With a weight decay d, p is multiplied by 1 - rate d before the update (AdamW; Loshchilov and Hutter 2019, as in `torch.optim.AdamW`).

All parameters of a member are one row of a matrix (`icl.model.flat`), so clipping and Adam take a dozen operations for any model. Learning
rates and step counts are tensors. So a step never waits for the host, has no shapes that depend on data, and is compiled only once. The
results of the eager and the compiled step differ by rounding.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from icl.compute.calls import RELEASE_GIL, in_parallel, keep_freed_memory, one_graph
from icl.config import ModelConfig, OptimConfig
from icl.model.flat import Layout, layout_of
from icl.model.losses import grads_in_parts

SMALLEST_PART = 32
"""Minimum number of prompts in a part of a batch. Smaller parts would not make a step faster."""
_CLIP_EPS = 1e-6  # added to the norm that a gradient is divided by, as in torch.nn.utils.clip_grad_norm_


class AdamState(NamedTuple):
    """Parameters and Adam's moments of a population, one row per member. A step changes them in place."""

    rows: Float[Tensor, "N P"]
    exp_avg: Float[Tensor, "N P"]
    exp_avg_sq: Float[Tensor, "N P"]
    count: Int64[Tensor, " N"]  # type: ignore[assignment]  # Adam's t; the name hides a method of tuple

    def members(self, chosen: slice) -> "AdamState":
        """Return the chosen members, as views."""
        return AdamState(*(tensor[chosen] for tensor in self))


class StepInfo(NamedTuple):
    """Report of a step: losses before the update, and gradient norms before clipping."""

    losses: Float[Tensor, " N"]
    norms: Float[Tensor, " N"]


Step: TypeAlias = Callable[[AdamState, Tensor, Tensor, Tensor], StepInfo]
"""Function `step(state, xs, ys, rates)` that updates `state` in place.

xs (N, B, K, D) and ys (N, B, K) are the members' prompts. For language, xs and ys (N, B, T) are the members' tokens and next tokens.
rates (N,) are the members' learning rates.
"""


def adam_state(params: Mapping[str, Tensor]) -> AdamState:
    """Return the state before the first step, with a copy of the parameters."""
    rows = layout_of(params).to_rows(params)
    count = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    return AdamState(rows, torch.zeros_like(rows), torch.zeros_like(rows), count)


def make_step(
    model: ModelConfig,
    optim: OptimConfig,
    layout: Layout,
    *,
    compiled: bool = False,
    packed: bool = False,
    num_parts: int = 1,
    reduce: Callable[[Tensor], None] | None = None,
) -> Step:
    """Return the function that computes one step of a population.

    On a GPU, all members are updated together. On a CPU, the data of one member already fill a core's caches, so members are updated
    separately.

    In eager mode on a CPU, the members are updated one after the other, and each update uses all cores. So a member has the same numbers,
    bit for bit, as if it were trained alone.

    In compiled mode on a CPU, the members of a packed population (one that began with several members) are updated in parallel, each on
    one core. This is faster, but a few sums are rounded differently than if a member is trained alone. Compared with training alone, only
    the key biases differ by more than rounding error. No prediction depends on the key biases, so their gradients consist only of rounding
    errors. Adam scales these gradients up to updates of ordinary size.

    A compiled step of an unpacked population can use several cores for one member. Each core then computes the gradient on a part of the
    prompts, and the step uses the mean of these gradients.

    Args:
        model: The architecture.
        optim: Adam's decays and epsilon, and the largest gradient norm. The learning rate in these settings is not used.
        layout: The order of a member's parameters in its row.
        compiled: Whether to compile the step at its first call, which takes 10 to 30 seconds. If compiling fails, a warning
            says so and the step stays eager.
        packed: Whether the population began with several members. This value must stay the same when only one member is left, because
            the results depend on it.
        num_parts: Number of equal parts into which a compiled step on a CPU splits a member's prompts. Each part has its own thread. A
            different number of parts changes the results by rounding. This setting has no effect if `packed` is true.
        reduce: Function that replaces a tensor by its mean over the processes that share a batch. If it is given, the step stays eager.
    """

    def together(state: AdamState, xs: Tensor, ys: Tensor, rates: Tensor) -> StepInfo:
        losses, grads = losses_and_grads(model, layout, state.rows, xs, ys)
        if reduce is not None:
            reduce(losses)
            reduce(grads)
        return StepInfo(losses, update(state, grads, rates, optim))

    keep_freed_memory()
    move: Step = together
    move_each = None
    if compiled and reduce is None:
        options = RELEASE_GIL if packed else None
        move = one_graph(together, work="Training", changed=lambda state, *prompts: state, options=options)
        move_each = in_parallel(move, threads_each=1) if packed else None
        if num_parts > 1 and not packed:
            move = _in_parts(model, optim, layout, num_parts, otherwise=move)

    def step(state: AdamState, xs: Tensor, ys: Tensor, rates: Tensor) -> StepInfo:
        if state.rows.device.type != "cpu":
            return move(state, xs, ys, rates)
        slices = [slice(i, i + 1) for i in range(len(rates))]
        members = [(state.members(chosen), xs[chosen], ys[chosen], rates[chosen]) for chosen in slices]
        infos = move_each(members) if move_each else [move(*member) for member in members]
        return StepInfo(*(torch.cat(parts) for parts in zip(*infos, strict=True)))

    return step


def most_parts(batch_size: int, num_threads: int) -> int:
    """Return the largest number of equal parts into which a compiled step can split a batch.

    There is at most one part for each thread. Each part has at least `SMALLEST_PART` prompts, unless the batch is not split.
    """
    counts = range(1, num_threads + 1)
    return max(n for n in counts if n == 1 or (batch_size % n == 0 and batch_size // n >= SMALLEST_PART))


def _in_parts(model: ModelConfig, optim: OptimConfig, layout: Layout, num_parts: int, *, otherwise: Step) -> Step:
    """Return the compiled step that gives each core a part of the prompts. On devices other than a CPU, this step calls `otherwise`."""

    def gradient(rows: Tensor, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
        return losses_and_grads(model, layout, rows, xs, ys)

    def finish(state: AdamState, rates: Tensor, losses: list[Tensor], grads: list[Tensor]) -> StepInfo:
        return StepInfo(torch.stack(losses).mean(0), update(state, torch.stack(grads).mean(0), rates, optim))

    each_gradient = in_parallel(one_graph(gradient, work="Training", options=RELEASE_GIL), threads_each=1)
    # This also runs on one thread. Several OpenMP threads would keep cores busy while they wait, and so slow down the next gradients.
    finish_alone = in_parallel(one_graph(finish, work="Training", options=RELEASE_GIL), threads_each=1)

    def step(state: AdamState, xs: Tensor, ys: Tensor, rates: Tensor) -> StepInfo:
        if state.rows.device.type != "cpu":
            return otherwise(state, xs, ys, rates)
        if xs.shape[1] % num_parts:
            raise ValueError(f"{xs.shape[1]} prompts cannot be split into {num_parts} equal parts.")
        prompts = zip(xs.chunk(num_parts, dim=1), ys.chunk(num_parts, dim=1), strict=True)
        losses, grads = zip(*each_gradient([(state.rows, *part) for part in prompts]), strict=True)
        return finish_alone([(state, rates, list(losses), list(grads))])[0]

    return step


def losses_and_grads(
    model: ModelConfig,
    layout: Layout,
    rows: Float[Tensor, "N P"],
    xs: Tensor,
    ys: Shaped[Tensor, "*N B K"],
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N P"]]:
    """Return each member's mean loss over positions and prompts, and its gradient."""

    def combine(losses: Tensor) -> tuple[Tensor, Tensor]:
        means = losses.mean(dim=(1, 2))  # N
        # Row n of the parameters affects only loss n. So row n of the gradient of the sum is the gradient of loss n.
        return means.sum(), means

    grads, losses = grads_in_parts(model, layout.to_params, combine, rows, (xs, ys))
    return losses, grads


@torch.no_grad()
def update(
    state: AdamState,
    grads: Float[Tensor, "N P"],
    rates: Float[Tensor, " N"],
    optim: OptimConfig,
) -> Float[Tensor, " N"]:
    """Clip each member's gradient by its own norm and update the member with Adam, in place.

    Returns:
        The norms before clipping.
    """
    # Keep the order of operations below: another order rounds differently and changes the golden losses and resumed runs.
    norms = torch.linalg.vector_norm(grads, dim=1)  # N
    if optim.grad_clip is not None:
        grads = grads * (optim.grad_clip / (norms + _CLIP_EPS)).clamp(max=1).unsqueeze(1)
    count = state.count + 1
    exp_avg = torch.lerp(state.exp_avg, grads, 1 - optim.beta1)
    exp_avg_sq = torch.lerp(state.exp_avg_sq, grads.square(), 1 - optim.beta2)
    first, second = (_bias_correction(beta, count.to(rates.dtype)).unsqueeze(1) for beta in (optim.beta1, optim.beta2))
    old_rows = state.rows
    if optim.weight_decay:
        old_rows = old_rows * (1 - rates * optim.weight_decay).unsqueeze(1)
    rows = old_rows - rates.unsqueeze(1) / first * exp_avg / ((exp_avg_sq / second).sqrt() + optim.eps)
    for old, new in zip(state, (rows, exp_avg, exp_avg_sq, count), strict=True):
        old.copy_(new)
    return norms


def _bias_correction(beta: float, count: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return 1 - beta^count, without cancellation where beta^count is close to one."""
    return -torch.expm1(count * (math.log(beta) if beta else -math.inf))

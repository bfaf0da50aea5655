"""One optimiser step of a population as one function of tensors, so that it can be compiled as one graph.

A step computes the members' losses (mean squared error per target), their gradients, each member's gradient norm and
its clipping, and Adam (Kingma and Ba 2015, algorithm 1, as `torch.optim.Adam` computes it), in place:

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   p <- p - rate (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

All parameters of a member are one row of a matrix, so clipping and Adam are a dozen operations whatever the model.
Rates and counts are tensors: a step never waits for the host, has no shapes that depend on data, and is compiled once.
Eager and compiled are the same function; they differ by rounding.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from icl.compiling import grad_and_aux, keep_freed_memory, one_graph
from icl.config import ModelConfig, OptimConfig
from icl.flat import Layout, layout_of
from icl.stacked import apply
from icl.threads import RELEASE_GIL, in_parallel

_STABILISER = 1e-6  # clip_grad_norm_'s


class AdamState(NamedTuple):
    """What a population carries from step to step, changed in place; a row has all of a member's parameters."""

    rows: Float[Tensor, "N P"]
    exp_avg: Float[Tensor, "N P"]
    exp_avg_sq: Float[Tensor, "N P"]
    count: Int64[Tensor, " N"]  # type: ignore[assignment]  # Adam's t; hides tuple's method

    def members(self, chosen: slice) -> "AdamState":
        """Some of the members, as views."""
        return AdamState(*(tensor[chosen] for tensor in self))


class StepInfo(NamedTuple):
    """What a step tells about itself: losses before the update, gradient norms before clipping."""

    losses: Float[Tensor, " N"]
    norms: Float[Tensor, " N"]


Step: TypeAlias = Callable[[AdamState, Tensor, Tensor, Tensor], StepInfo]
"""`step(state, xs, ys, rates)`: one update of `state` in place.

xs (N, B, K, D) and ys (N, B, K) are each member's prompts, rates (N,) their learning rates.
"""


def adam_state(params: Mapping[str, Tensor]) -> AdamState:
    """The state before the first step; the parameters are copied."""
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
    reduce: Callable[[Tensor], None] | None = None,
) -> Step:
    """The step of a population of this architecture under these settings of Adam and clipping.

    Elsewhere than on a CPU all members move together. There one fills a core's caches: eagerly they take turns, each on all
    cores, so that a member's numbers are bit for bit those of a population of one; compiled and packed they go side by
    side, each on one core, which is faster and differs by the rounding of a few sums. (Biases of keys, which no prediction
    depends on, then go their own ways: their gradients are rounding, and Adam makes steps of it.)

    Args:
        model: The architecture.
        optim: Adam's decays and stabiliser, and the largest gradient norm; its rate is not used.
        layout: How a member's parameters lie in its row.
        compiled: Whether `torch.compile` makes one graph of it, at the first call (10 to 30 seconds); where it cannot,
            a warning says so and the step stays eager.
        packed: Whether the population began with several members; it steps alike when one of them is left.
        reduce: Replaces a tensor by its mean over the processes that share the batch; such a step stays eager.
    """

    def together(state: AdamState, xs: Tensor, ys: Tensor, rates: Tensor) -> StepInfo:
        losses, grads = losses_and_grads(model, layout, state.rows, xs, ys)
        if reduce is not None:
            reduce(losses)
            reduce(grads)
        return StepInfo(losses, update(state, grads, rates, optim))

    keep_freed_memory()
    move: Step = together
    if compiled and reduce is None:
        options = RELEASE_GIL if packed else None
        move = one_graph(together, work="Training", changed=lambda state, *prompts: state, options=options)
    moves = in_parallel(move, threads_each=1) if move is not together and packed else _in_turns(move)

    def step(state: AdamState, xs: Tensor, ys: Tensor, rates: Tensor) -> StepInfo:
        if state.rows.device.type != "cpu":
            return move(state, xs, ys, rates)
        members = [slice(i, i + 1) for i in range(len(rates))]
        infos = moves([(state.members(one), xs[one], ys[one], rates[one]) for one in members])
        return StepInfo(*(torch.cat(parts) for parts in zip(*infos, strict=True)))

    return step


def _in_turns(move: Step) -> Callable[[Sequence[tuple[Any, ...]]], list[StepInfo]]:
    return lambda arguments: [move(*these) for these in arguments]


def losses_and_grads(
    model: ModelConfig,
    layout: Layout,
    rows: Float[Tensor, "N P"],
    xs: Float[Tensor, "*N B K D"],
    ys: Float[Tensor, "*N B K"],
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N P"]]:
    """Each member's mean squared error per target, and its gradient."""

    def total(rows: Tensor) -> tuple[Tensor, Tensor]:
        losses = (apply(model, layout.to_params(rows), xs, ys) - ys).square().mean(dim=(1, 2))  # N
        return losses.sum(), losses  # the sum's gradient is each member's own

    grads, losses = grad_and_aux(total, rows)
    return losses, grads


@torch.no_grad()
def update(
    state: AdamState,
    grads: Float[Tensor, "N P"],
    rates: Float[Tensor, " N"],
    optim: OptimConfig,
) -> Float[Tensor, " N"]:
    """Clip each member's gradient by its own norm and move the member by Adam, in place.

    Returns:
        The norms before clipping.
    """
    norms = torch.linalg.vector_norm(grads, dim=1)  # N
    if optim.grad_clip is not None:
        grads = grads * (optim.grad_clip / (norms + _STABILISER)).clamp(max=1).unsqueeze(1)
    count = state.count + 1
    exp_avg = torch.lerp(state.exp_avg, grads, 1 - optim.beta1)
    exp_avg_sq = torch.lerp(state.exp_avg_sq, grads.square(), 1 - optim.beta2)
    first, second = (_bias_correction(beta, count.to(rates.dtype)).unsqueeze(1) for beta in (optim.beta1, optim.beta2))
    rows = state.rows - rates.unsqueeze(1) / first * exp_avg / ((exp_avg_sq / second).sqrt() + optim.eps)
    for old, new in zip(state, (rows, exp_avg, exp_avg_sq, count), strict=True):
        old.copy_(new)
    return norms


def _bias_correction(beta: float, count: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """1 - beta^count, without cancellation where beta^count is close to one."""
    return -torch.expm1(count * (math.log(beta) if beta else -math.inf))

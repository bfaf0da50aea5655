"""The local learning coefficient of any PyTorch loss, at one checkpoint or many at once.

    LLC = nbeta (mean over draws of L(w) - L(w0)),   w ~ exp(-nbeta L(w) - localization/2 |w - w0|^2)

Lau, Furman, Wang, Murfet and Wei 2023, after Watanabe 2013 (WBIC). nbeta is n / ln n unless it is given, for a stated n. L is
the loss averaged over a minibatch; burn-in is in no average; L(w0) is the mean over many batches, and its error is part of
the standard error. `icl.sampling.chains` says what a draw is, `diagnostics` when an estimate is not to be trusted.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from icl.checks import ConfigError
from icl.population import Params, size, stack
from icl.sampling.batches import Batch, Batches, batch_function, fingerprint, stack_batches
from icl.sampling.chains import Progress, run_chains
from icl.sampling.gradients import (
    Gradient,
    Loss,
    looped_gradient,
    member_bytes,
    stacked_loss,
    vmapped_gradient,
)
from icl.sampling.minimum import descent
from icl.sampling.packing import Packing, Restriction, make_packing
from icl.sampling.result import Label, LLCResult
from icl.sampling.settings import SamplerSettings
from icl.sampling.summary import select, summarise

MEMORY = 2e9
"""Bytes that chains running at once may need, if nothing else is said; on CUDA half of what is free."""
_COPIES = 10  # tensors of the size of the parameters that a member holds at once


def estimate_llc(
    loss: Loss,
    params: Mapping[str, Tensor],
    batches: Batches,
    *,
    lr: float,
    nbeta: float | None,
    localization: float,
    num_chains: int,
    num_draws: int,
    num_burnin_steps: int,
    seed: int,
    restrict: Restriction = None,
    num_samples: int | None = None,
    num_init_batches: int = 32,
    trivial_loss: float | None = None,
    vectorize: bool = True,
    thinning: int = 1,
    kernel: str = "sgld",
    sample_losses: Callable[[Params], Float[Tensor, " Q"]] | None = None,
    gradient: Gradient | None = None,
    memory: float | None = None,
    progress: Progress | None = None,
    loss_name: str = "loss",
) -> LLCResult:
    """The LLC of one checkpoint; `estimate_llcs` has the arguments.

    Example:
        loss, params = module_loss(model, torch.nn.functional.mse_loss)
        result = estimate_llc(loss, params, loader, lr=1e-4, nbeta=None, num_samples=10_000, localization=100.0,
                              num_chains=8, num_draws=500, num_burnin_steps=500, seed=0, trivial_loss=1.0)
        print(result.llc, result.stderr, result.verdict, result.reasons)
    """
    options = {name: value for name, value in locals().items() if name not in ("loss", "params", "batches")}
    return estimate_llcs(loss, [params], batches, **options)[0]


def estimate_llcs(
    loss: Loss,
    checkpoints: Sequence[Mapping[str, Tensor]],
    batches: Batches,
    *,
    lr: float,
    nbeta: float | None,
    localization: float,
    num_chains: int,
    num_draws: int,
    num_burnin_steps: int,
    seed: int,
    restrict: Restriction = None,
    num_samples: int | None = None,
    num_init_batches: int = 32,
    trivial_loss: float | None = None,
    vectorize: bool = True,
    thinning: int = 1,
    kernel: str = "sgld",
    sample_losses: Callable[[Params], Float[Tensor, " Q"]] | None = None,
    gradient: Gradient | None = None,
    memory: float | None = None,
    progress: Progress | None = None,
    loss_name: str = "loss",
    labels: Sequence[Label] | None = None,
) -> list[LLCResult]:
    """The LLCs of checkpoints of one architecture, chains x checkpoints together.

    Args:
        loss: `loss(params, batch)` gives a number, or a vector of components (per position, say) whose mean is L.
        checkpoints: Parameters by name; neither they nor the model they come from are changed.
        batches: `(chain, draw) -> batch`, or an iterable dealt to the chains in turn, starting over when it ends. Draws
            count every move, burn-in included. Chains see different batches unless the function ignores `chain`.
        lr: Step size epsilon.
        nbeta: Effective inverse temperature; None is n / ln n of `num_samples`.
        localization: Pull gamma back to the checkpoint.
        num_chains: Chains of each checkpoint.
        num_draws: Draws kept of each chain.
        num_burnin_steps: Moves before the first draw.
        seed: Of the noise.
        restrict: What may move: names, globs, or a dict of Boolean masks; None for all.
        num_samples: The sample size n.
        num_init_batches: Distinct batches for L(w0), the first that the chains are dealt; fewer if there are fewer.
        trivial_loss: Loss of a predictor that knows nothing; without it escape from the basin is not checked.
        vectorize: False runs one chain after another by plain autograd, for losses that `vmap` cannot map.
        thinning: Moves from one draw to the next.
        kernel: `sgld` or `rmsprop`.
        sample_losses: Parameters to the losses of fixed samples, for the singular fluctuation.
        gradient: A faster gradient of the same loss for the chains' moves, in place of vmap's.
        memory: Bytes that the chains running at once may need.
        progress: Called with the moves done and those there are, over all chains.
        loss_name: The loss's name in result rows.
        labels: Step and hash of each checkpoint.

    Raises:
        ConfigError: If a setting cannot be used.
    """
    nbeta = inverse_temperature(nbeta, num_samples)
    settings = SamplerSettings(
        lr=lr,
        nbeta=nbeta,
        localization=localization,
        num_chains=num_chains,
        num_draws=num_draws,
        num_burnin_steps=num_burnin_steps,
        seed=seed,
        thinning=thinning,
        kernel=kernel,
    )
    if num_init_batches < 1:
        raise ConfigError(f"`num_init_batches` must be at least 1, got {num_init_batches}.")
    labels = [Label() for _ in checkpoints] if labels is None else labels
    stacked = {name: tensor.detach() for name, tensor in stack([_detached(one) for one in checkpoints]).items()}
    packing = make_packing(checkpoints[0], restrict)
    source = batch_function(batches, num_chains=num_chains, seed=seed)
    init_batches = _distinct_batches(source, settings, num_init_batches)
    default = vmapped_gradient(loss) if vectorize else looped_gradient(loss)
    members = 1
    if vectorize:
        members = _chunk_size(loss, stacked, init_batches[0], packing=packing, memory=memory)
    all_losses = stacked_loss(loss, vectorize=vectorize)
    with torch.no_grad():
        parts = _in_chunks(stacked, members)
        init = torch.cat([_init_losses(all_losses, part, init_batches) for part in parts])  # C batches T
        gains = [
            descent(default, all_losses, part, init_batches, packing=packing, nbeta=nbeta, localization=localization)
            for part in parts
        ]
    traces = run_chains(
        gradient or default,
        stacked,
        source,
        settings,
        packing=packing,
        keys=[label.checkpoint_hash or str(i) for i, label in enumerate(labels)],
        chunk_size=members,
        sample_losses=_mapped(sample_losses, vectorize=vectorize),
        progress=progress,
    )
    gain, gain_stderr = (torch.cat(column) for column in zip(*gains, strict=True))
    return [
        summarise(
            select(traces, i),
            init[i],
            (float(gain[i]), float(gain_stderr[i])),
            settings,
            label,
            num_params=packing.size,
            num_samples=num_samples,
            trivial_loss=trivial_loss,
            loss_name=loss_name,
        )
        for i, label in enumerate(labels)
    ]


def inverse_temperature(nbeta: float | None, num_samples: int | None) -> float:
    """The one place where nbeta is set."""
    if num_samples is not None and num_samples < 2:
        raise ConfigError(f"`num_samples` must be at least 2, got {num_samples}.")
    if nbeta is not None:
        if not 0 < nbeta < math.inf:
            raise ConfigError(
                f"`nbeta` must be positive and finite, got {nbeta!r}. Give None to use n / ln n with n = `num_samples`."
            )
        return float(nbeta)
    if num_samples is None:
        raise ConfigError("`nbeta` is None, which stands for n / ln n, but `num_samples` (n) is not given; give one.")
    return num_samples / math.log(num_samples)


def _detached(params: Mapping[str, Tensor]) -> Params:
    return {name: tensor.detach() for name, tensor in params.items()}


def _distinct_batches(source: Callable[[int, int], Batch], settings: SamplerSettings, wanted: int) -> list[Batch]:
    """The first `wanted` different batches that the chains are dealt, or all there are."""
    found: dict[bytes, Batch] = {}
    repeats = 0
    for number in range(settings.num_moves * settings.num_chains):
        draw, chain = divmod(number, settings.num_chains)
        batch = source(chain, draw)
        repeats = repeats + 1 if found.setdefault(fingerprint(batch), batch) is not batch else 0
        if len(found) == wanted or repeats > 2 * settings.num_chains + len(found):
            break
    return list(found.values())


def _init_losses(losses: Callable[[Params, Batch], Tensor], params: Params, batches: Sequence[Batch]) -> Tensor:
    """Of every checkpoint on every batch, (C, batches, T), in float64 on the CPU; T = 1 for a number."""
    device = next(iter(params.values())).device
    values = [losses(params, _on(batch, device)) for batch in batches]
    return torch.stack([v if v.ndim > 1 else v[:, None] for v in values], dim=1).double().cpu()


def _on(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, as the stacked ones are."""
    from torch.utils import _pytree as pytree

    return pytree.tree_map(lambda x: x[0] if isinstance(x, Tensor) else x, stack_batches([batch], device))


def _chunk_size(loss: Loss, params: Params, batch: Batch, *, packing: Packing, memory: float | None) -> int:
    """Members that fit the memory together, at least one."""
    one = {name: tensor[:1] for name, tensor in params.items()}
    device = next(iter(one.values())).device
    if memory is None:
        memory = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else MEMORY
    moving = packing.unpack(packing.pack(one), packing.frozen(one))
    frozen = {name: tensor for name, tensor in one.items() if name not in moving}
    with torch.no_grad():
        need = member_bytes(vmapped_gradient(loss), moving, frozen, stack_batches([batch], device))
    need += _COPIES * sum(tensor.nbytes for tensor in one.values())
    return max(1, int(memory // need))


def _in_chunks(params: Params, members: int) -> list[Params]:
    starts = range(0, size(params), members)
    return [{name: tensor[i : i + members] for name, tensor in params.items()} for i in starts]


def _mapped(sample_losses: Callable[[Params], Tensor] | None, *, vectorize: bool) -> Callable[[Params], Tensor] | None:
    if sample_losses is None:
        return None
    if vectorize:
        return torch.vmap(sample_losses)
    return lambda params: torch.stack(
        [sample_losses({name: tensor[i] for name, tensor in params.items()}) for i in range(size(params))]
    )

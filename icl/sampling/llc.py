"""The local learning coefficient of any PyTorch loss, at one checkpoint or many at once.

    LLC = nbeta (mean over draws of L(w) - L(w0)),   w ~ exp(-nbeta L(w) - localization/2 |w - w0|^2)

The estimator is due to Lau, Furman, Wang, Murfet and Wei 2023, after Watanabe 2013 (WBIC). If nbeta is not given, it is n / ln n, where n
is the given sample size. L is the loss averaged over a minibatch. At every draw, L(w) and L(w0) are measured on the same minibatch.
Averages do not include the burn-in. `icl.sampling.chains` defines a draw. `icl.sampling.verdict` defines when an estimate should not be
trusted.

`restrict` selects the parameters that the chains move: None (all), names or globs such as `blocks.0.*`, or a dict from parameter names to
Boolean masks.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from jaxtyping import Float
from torch import Tensor, nn

from icl.config import ChainsConfig
from icl.config.sampler import Kernel
from icl.config.validation import ConfigError, real
from icl.model.flat import Restriction, restricted_layout
from icl.model.stacked import Params
from icl.sampling.batches import Batches
from icl.sampling.chains import Advance
from icl.sampling.estimate import estimate
from icl.sampling.modules import ModuleLoss
from icl.sampling.result import CheckpointId, LLCResult
from icl.sampling.target import Gradient, Loss, Observable, Target

LOOP_SIZE = 2**14
"""Number of moving parameters above which a CPU computes the gradient of each chain separately.

For a small model, the calls to PyTorch take most of the time, and `vmap` makes fewer calls. But on a CPU, the batched operations of `vmap`
are slower than plain operations. For example, batched convolutions take 1.6 times as long.
"""
Progress: TypeAlias = Callable[[int, int], None]
"""Function that is called with the number of moves done and the total number of moves, over all chains."""


@dataclass(frozen=True, kw_only=True)
class EstimateOptions:
    """Less common options of an estimate."""

    thinning: int = 1
    """Number of moves from one draw to the next."""
    sample_losses: Callable[[Params], Float[Tensor, " Q"]] | None = None
    """Function from parameters to the losses of fixed samples, for the singular fluctuation."""
    gradient: Gradient | None = None
    """A faster function for the gradient of the same loss. The chains use it instead of the gradient by `vmap`."""
    memory: float | None = None
    """Memory in bytes for the chains that run at once."""
    progress: Progress | None = None
    """Function that is called after every move of the chains, or None. See `Progress` for its arguments."""
    loss_name: str = "loss"
    """Name of the loss in the rows of results."""
    identities: Sequence[CheckpointId] | None = None
    """Step and hash of each checkpoint."""


def estimate_llcs(
    loss: Loss,
    checkpoints: Sequence[Mapping[str, Tensor]],
    batches: Batches,
    settings: ChainsConfig,
    *,
    restrict: Restriction = None,
    trivial_loss: float | None = None,
    vectorize: bool = True,
    observables: Mapping[str, Observable] | None = None,
    options: EstimateOptions = EstimateOptions(),  # frozen
) -> list[LLCResult]:
    """Estimate the LLCs of several checkpoints of one architecture, with all their chains as one population.

    Args:
        loss: See `estimate_llc`.
        checkpoints: Parameters of each checkpoint, keyed by name. They are not changed.
        batches: See `estimate_llc`.
        settings: The settings of every checkpoint's chains.
        restrict: See `estimate_llc`.
        trivial_loss: See `estimate_llc`.
        vectorize: See `estimate_llc`.
        observables: See `estimate_llc`.
        options: Less common options.

    Raises:
        ConfigError: If a setting cannot be used.
    """
    _require_loss_function(loss)
    checkpoints = _require_checkpoints(checkpoints)
    identities = [CheckpointId() for _ in checkpoints] if options.identities is None else options.identities
    if len(identities) != len(checkpoints):
        raise ConfigError(
            f"`identities` must have one entry per checkpoint ({len(checkpoints)}), got {len(identities)}."
        )
    if trivial_loss is not None:
        trivial_loss = real("trivial_loss", trivial_loss, "a number", repair="; leave it out if it is not known")
    memory = options.memory
    if memory is not None:
        memory = real("memory", memory, "positive", repair="; leave it out for the default")
    layout = restricted_layout(checkpoints[0], restrict)
    is_on_cpu = next(iter(checkpoints[0].values())).device.type == "cpu"
    target = Target(
        loss=loss,
        batches=batches,
        trivial_loss=trivial_loss,
        name=options.loss_name,
        vectorize=vectorize,
        maps=vectorize and not (is_on_cpu and layout.size > LOOP_SIZE),
        is_thread_safe=isinstance(loss, ModuleLoss),
        gradient=options.gradient,
        must_depend=options.gradient is None,
    )
    return estimate(
        target,
        checkpoints,
        [settings],
        identities=identities,
        layout=layout,
        sample_losses=options.sample_losses,
        observables=observables,
        memory=memory,
        advance=_advance(options.progress, len(checkpoints) * settings.num_chains * settings.num_moves),
    )[0]


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
    kernel: str = "sgld",
    friction: float | None = None,
    target_stderr: float | None = None,
    num_samples: int | None = None,
    num_init_batches: int = 32,
    trivial_loss: float | None = None,
    vectorize: bool = True,
    observables: Mapping[str, Observable] | None = None,
    options: EstimateOptions = EstimateOptions(),  # frozen
) -> LLCResult:
    """Estimate the LLC of one checkpoint.

    Args:
        loss: `loss(params, batch)` gives a number, or a vector of components (per position, say). The mean of the components is L.
        params: Parameters of the checkpoint, keyed by name. They are not changed.
        batches: A function `(chain, draw) -> batch`, or an iterable whose batches go to the chains in turn. An iterable starts over when it
            ends. The draw number counts all moves, including burn-in. Chains get different batches unless the function ignores `chain`.
            Neither the loss nor `batches`, if it is a function or an iterator, may draw from torch's global generator.
        lr: Step size epsilon.
        nbeta: Effective inverse temperature; None means n / ln n, where n is `num_samples`.
        localization: Strength gamma of the pull back to the checkpoint.
        num_chains: Number of chains.
        num_draws: Number of draws of each chain.
        num_burnin_steps: Number of moves before the first draw.
        seed: Seed for the chains' noise, and for the order of a shuffling DataLoader.
        restrict: Which parameters may move: names, globs, or a dict of Boolean masks; None for all.
        kernel: `sgld`, `rmsprop` or `baoab`.
        friction: Friction factor c of `baoab`, in [0, 1): the share of the velocity that a move keeps; by default 0.5. Despite its
            name, a larger value means less friction.
        target_stderr: Standard error at which the chains stop; `num_draws` is then the largest number of draws. By default, every chain
            makes `num_draws` draws.
        num_samples: The sample size n.
        num_init_batches: Number of distinct batches for `init_loss`: the first that the chains get, or all batches if there are fewer.
        trivial_loss: Loss of a trivial predictor, for example one that predicts zero. Without it, the verdict does not check whether the
            chains left the basin.
        vectorize: If False, chains run one after another by plain autograd. This is needed for losses that `vmap` cannot map.
            If True, chains run together, and their gradients are computed by `vmap`, or by a loop if that is faster
            (`LOOP_SIZE`).
        observables: Functions of the parameters, keyed by name. The result contains their values at every draw of every chain.
        options: Less common options.

    Raises:
        ConfigError: If a setting cannot be used.

    Example:
        ```python
        loss, params = module_loss(model, torch.nn.functional.mse_loss)
        result = estimate_llc(loss, params, loader, lr=1e-4, nbeta=None, num_samples=10_000, localization=100.0,
                              num_chains=8, num_draws=500, num_burnin_steps=500, seed=0, trivial_loss=1.0)
        print(result.llc, result.stderr, result.verdict, result.reasons)
        ```
    """
    settings = ChainsConfig(
        lr=lr,
        nbeta=nbeta,
        localization=localization,
        num_samples=num_samples,
        num_chains=num_chains,
        num_draws=num_draws,
        num_burnin_steps=num_burnin_steps,
        seed=seed,
        kernel=cast(Kernel, kernel),  # ChainsConfig checks it
        target_stderr=target_stderr,
        friction=ChainsConfig.friction if friction is None else friction,
        thinning=options.thinning,
        num_init_batches=num_init_batches,
    )
    (result,) = estimate_llcs(
        loss,
        [params],
        batches,
        settings,
        restrict=restrict,
        trivial_loss=trivial_loss,
        vectorize=vectorize,
        observables=observables,
        options=options,
    )
    return result


def _advance(progress: Progress | None, total: int) -> Advance:
    """Return a function that adds up moves and reports their sum to `progress`."""
    num_done = 0

    def advance(num_moves: int) -> None:
        nonlocal num_done
        num_done += num_moves
        if progress is not None:
            progress(num_done, total)

    return advance


def _require_loss_function(loss: Any) -> None:
    """Refuse a loss that cannot be called with parameters and a batch."""
    try:
        inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).bind("params", "batch")
    except ValueError:  # a built-in function without a signature to check
        return
    except TypeError:
        raise ConfigError(
            f"`loss` must be a function of (params, batch), got {_describe(loss)}. For a module, `module_loss(model, criterion)` returns "
            "such a function."
        ) from None


def _require_checkpoints(checkpoints: Any) -> list[Mapping[str, Tensor]]:
    """Return the checkpoints as a list. Each must be a dict from names to tensors in float32 or float64."""
    if isinstance(checkpoints, (Mapping, nn.Module)) or not isinstance(checkpoints, Iterable):
        raise ConfigError(f"`checkpoints` must be a list of dicts of tensors, got {_describe(checkpoints)}.")
    checkpoints = list(checkpoints)
    for params in checkpoints:
        if not isinstance(params, Mapping) or not all(isinstance(tensor, Tensor) for tensor in params.values()):
            raise ConfigError(
                f"Parameters must be a dict from names to tensors, got {_describe(params)}. For a module, "
                "`loss, params = module_loss(model, criterion)` returns such a dict."
            )
        for name, tensor in params.items():
            # In 16 bits, a chain's moves are often smaller than the spacing of floating-point numbers.
            if not tensor.is_floating_point() or tensor.itemsize < 4:
                raise ConfigError(
                    f"Parameters must be float32 or float64, got {tensor.dtype} in `{name}`. Convert the model with `.float()`, "
                    "and leave out integer and complex tensors."
                )
    if not checkpoints or not all(checkpoints):
        raise ConfigError("There are no parameters to sample; give a non-empty dict from names to tensors.")
    return checkpoints


def _describe(value: Any) -> str:
    values = sorted({type(item).__name__ for item in value.values()}) if isinstance(value, Mapping) else []
    return type(value).__name__ + (f" of {', '.join(values)}" if values else "")

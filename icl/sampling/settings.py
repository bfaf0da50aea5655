"""The settings of chains, validated; and the published settings with the conversion of their parameters."""

import dataclasses
import math
from dataclasses import dataclass

from icl.config import SamplerConfig
from icl.config.validation import Bound, ConfigError, real, whole
from icl.sampling.sgld import KERNELS

_MINIMA = {"num_chains": 1, "num_draws": 2, "num_burnin_steps": 0, "seed": 0, "thinning": 1}
_BOUNDS: dict[str, Bound] = {"lr": "positive", "nbeta": "positive", "localization": "zero or positive"}


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """The settings of a checkpoint's chains."""

    lr: float
    """Step size epsilon."""
    nbeta: float
    """Effective inverse temperature n beta."""
    localization: float
    """Pull gamma back to the checkpoint."""
    num_chains: int
    num_draws: int
    """Draws kept of each chain."""
    num_burnin_steps: int
    """Moves before the first draw; no average contains them."""
    seed: int
    thinning: int = 1
    """Moves from one draw to the next."""
    kernel: str = "sgld"
    """`sgld` or `rmsprop`; see `icl.sampling.sgld`."""

    def __post_init__(self) -> None:
        for name, minimum in _MINIMA.items():
            object.__setattr__(self, name, whole(name, getattr(self, name), minimum))
        for name, bound in _BOUNDS.items():
            object.__setattr__(self, name, real(name, getattr(self, name), bound))
        if not isinstance(self.kernel, str) or self.kernel not in KERNELS:
            raise ConfigError(f"`kernel` must be one of {', '.join(KERNELS)}, got {self.kernel!r}.")
        if self.kernel == "rmsprop" and self.num_burnin_steps == 0:
            raise ConfigError("The kernel `rmsprop` adapts during burn-in only; set `num_burnin_steps` above 0.")

    @property
    def num_moves(self) -> int:
        """Gradients that a chain takes, not counting the diagnostic ones."""
        return self.num_burnin_steps + (self.num_draws - 1) * self.thinning + 1


def chain_settings(sampler: SamplerConfig) -> SamplerSettings:
    """Return the part of a run's sampler settings that its chains need, with nbeta resolved."""
    values = {field.name: getattr(sampler, field.name) for field in dataclasses.fields(SamplerSettings)}
    return SamplerSettings(**values | {"nbeta": inverse_temperature(sampler.nbeta, sampler.num_samples)})


def inverse_temperature(nbeta: float | None, num_samples: int | None) -> float:
    """Return nbeta, or n / ln n if it is None; no other place decides this.

    Raises:
        ConfigError: If a number is out of range, or both are missing.
    """
    if num_samples is not None:
        num_samples = whole("num_samples", num_samples, 2)
    if nbeta is not None:
        return real("nbeta", nbeta, "positive", repair="; None stands for n / ln n with n = `num_samples`")
    if num_samples is None:
        raise ConfigError("`nbeta` is None, which means n / ln n, but `num_samples` (n) is missing; give one of them.")
    return num_samples / math.log(num_samples)


def with_nbeta(sampler: SamplerConfig) -> SamplerConfig:
    """Resolve a missing nbeta to n / ln n, so that equal chains have equal settings."""
    return dataclasses.replace(sampler, nbeta=inverse_temperature(sampler.nbeta, sampler.num_samples))


def num_moves(sampler: SamplerConfig) -> int:
    """Return the number of moves of all chains of a checkpoint."""
    return sampler.num_chains * (sampler.num_burnin_steps + (sampler.num_draws - 1) * sampler.thinning + 1)


def from_scales(*, gradient_scale: float, localization_scale: float, noise_scale: float) -> dict[str, float]:
    """Return `lr`, `nbeta` and `localization` from the parameters of Hoogland et al.'s code.

    Their move is w - gradient_scale grad L - localization_scale (w - w0) + N(0, noise_scale). Ours has lr / 2 in front of the
    whole drift. So lr = noise, nbeta = 2 gradient / noise, localization = 2 localization / noise.

    Raises:
        ConfigError: If a scale is negative, or the noise or the gradient is zero.
    """
    real("gradient_scale", gradient_scale, "positive")
    real("localization_scale", localization_scale, "zero or positive")
    real("noise_scale", noise_scale, "positive")
    return {
        "lr": noise_scale,
        "nbeta": 2 * gradient_scale / noise_scale,
        "localization": 2 * localization_scale / noise_scale,
    }


_SCALES = from_scales(gradient_scale=0.01, localization_scale=0.001, noise_scale=3e-4)
PUBLISHED = SamplerConfig(
    lr=_SCALES["lr"],
    nbeta=_SCALES["nbeta"],
    localization=_SCALES["localization"],
    num_samples=2**20,
    batch_size=1024,
    num_chains=10,
    num_draws=5000,
    num_burnin_steps=0,
    seed=0,
    minibatches="fixed",
)
"""The settings of Hoogland et al. 2024, from their sweep file of January 2024 (icl@a868647,
sweeps/analysis/0-L2H4-llcs-over-time.yaml): nbeta = 66.67, localization = 6.67, no burn-in (their key `num_burn_in` was not read).

We differ in two ways. Their chains used the same noise at every checkpoint, which makes a curve look smoother than it is; ours have
noise of their own. And our L(w0) is the mean over `num_init_batches` minibatches."""

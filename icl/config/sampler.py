"""Settings of the sampler that estimates local learning coefficients."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from icl.config.validation import Bound, require, require_number, require_steps, validate

Kernel = Literal["sgld", "rmsprop", "baoab"]


@dataclass(frozen=True, kw_only=True)
class ChainsConfig:
    """Settings of the chains of an LLC estimate, for any loss."""

    lr: float = 2e-5
    """Step size epsilon."""
    nbeta: float | None = 1000.0
    """Effective inverse temperature n beta, which multiplies the loss. None means n / ln n with n = `num_samples`."""
    localization: float = 1000.0
    """Strength gamma of the pull back to the checkpoint."""
    num_samples: int | None = None
    """Sample size n, or None if it is not known."""
    batch_size: int | None = None
    """Size of a minibatch, or None if the source of the minibatches determines it."""
    num_chains: int = 4
    """Number of independent chains for each checkpoint."""
    num_draws: int = 100
    """Number of draws of each chain. All averages are taken over the draws."""
    num_burnin_steps: int = 150
    """Number of moves (steps) of each chain before its first draw. The averages do not include these moves."""
    seed: int = 0
    """Seed for the chains' noise and minibatches."""
    kernel: Kernel = "sgld"
    """Markov kernel: `sgld`, SGLD preconditioned by RMSprop (`rmsprop`), or underdamped Langevin dynamics (`baoab`)."""
    friction: float = 0.5
    """Friction factor c of `baoab`, in [0, 1): the share of the velocity that a move keeps. Despite its name, a larger
    value means less friction. Other kernels ignore it."""
    target_stderr: float | None = None
    """Target for the standard error of the LLC. The chains of a checkpoint stop when the standard error is at most this target, or after
    `num_draws` draws. Without a target (the default), every chain makes `num_draws` draws."""
    thinning: int = 1
    """Number of moves from one draw to the next."""
    num_init_batches: int = 32
    """Number of minibatches over which the checkpoint's own loss L(w0) is averaged."""

    section: ClassVar[str] = ""
    """Name of the section in error messages."""

    @property
    def inverse_temperature(self) -> float:
        """The value of `nbeta`, or n / ln n if `nbeta` is None. All code takes the inverse temperature from this property."""
        if self.nbeta is not None:
            return self.nbeta
        assert self.num_samples is not None
        return self.num_samples / math.log(self.num_samples)

    @property
    def speed(self) -> float:
        """Speed at which chains spread along flat directions, relative to SGLD with the same lr."""
        return (1 + self.friction) / (1 - self.friction) if self.kernel == "baoab" else 1.0

    @property
    def num_moves(self) -> int:
        """Number of moves of a chain, including burn-in. Each move needs one gradient; diagnostics need further gradients."""
        return self.num_burnin_steps + (self.num_draws - 1) * self.thinning + 1

    def __post_init__(self) -> None:
        sizes = {"num_samples": 2, "batch_size": 1, "num_chains": 1, "num_draws": 2, "num_burnin_steps": 0}
        numbers: dict[str, Bound] = {"lr": "positive", "localization": "zero or positive", "memory": "positive"}
        numbers |= {"friction": "zero or positive", "target_stderr": "positive"}
        validate(self.section, self, counts={**sizes, "seed": 0, "thinning": 1, "num_init_batches": 1}, numbers=numbers)
        prefix = f"{self.section}." if self.section else ""
        require(
            self.nbeta is not None or self.num_samples is not None,
            "`nbeta` is None, which means n / ln n, but `num_samples` (n) is not set. Set `nbeta` or `num_samples`.",
        )
        if self.nbeta is not None:
            repair = f". Write none to use n / ln n with n = `{prefix}num_samples`"
            require_number(f"{prefix}nbeta", self.nbeta, "positive", repair=repair)
        require(self.friction < 1, f"`{prefix}friction` must be in [0, 1), got {self.friction!r}.")
        for name in ("lr", "nbeta", "localization", "friction"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, float(value))
        require(
            self.kernel != "rmsprop" or self.num_burnin_steps > 0,
            f"The kernel `rmsprop` adapts only during burn-in. Set `{prefix}num_burnin_steps` above 0.",
        )


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(ChainsConfig):
    """Settings of `icl llc`, which estimates local learning coefficients (LLC). They have no effect on training."""

    kernel: Kernel = "baoab"
    """Markov kernel: `baoab` (underdamped Langevin dynamics), `sgld`, or SGLD preconditioned by RMSprop (`rmsprop`)."""
    num_samples: int = 2**15
    """Sample size n. If `nbeta` is none, nbeta is n / ln n. If `minibatches` is `fixed`, n is also the number of prompts in the fixed set,
    which is divided into num_samples / batch_size minibatches."""
    num_draws: int = 180
    """Number of draws of each chain. All averages are taken over the draws."""
    num_burnin_steps: int = 60
    """Number of moves (steps) of each chain before its first draw. The averages do not include these moves."""
    num_init_batches: int = 256
    """Number of minibatches over which the checkpoint's own loss L(w0) is averaged."""
    batch_size: int = 256
    """Number of prompts in each chain's minibatch."""
    minibatches: Literal["fixed", "fresh"] = "fixed"
    """Source of the minibatches: one set of `num_samples` prompts (`fixed`), or new prompts for every minibatch (`fresh`)."""
    loss: Literal["mse", "subsequence"] = "mse"
    """Loss whose LLC is estimated. `mse`: the mean squared error per target over all positions. `subsequence`: the mean over the
    first K' positions only, where K' is uniform on 1..K. For some models, the loss of training takes the place of the squared error: the
    negative log-likelihood if `model.output` is `gaussian` or `mixture`, and the cross-entropy for language models."""
    steps: str = "all"
    """Saved steps at which the LLC is estimated: `all`, `last`, a list such as 1,2,3, or a range such as 0:1000:100 (first step, last
    step, spacing)."""
    memory: float | None = None
    """Memory in GiB for the chains that run at the same time. The default is half of the free memory on CUDA, and 2 GiB on other devices."""

    section: ClassVar[str] = "sampler"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_steps(self.steps)
        require(
            self.minibatches == "fresh" or self.num_samples % self.batch_size == 0,
            f"`sampler.num_samples` must be a multiple of `sampler.batch_size` for `fixed` minibatches, got "
            f"{self.num_samples} and {self.batch_size}.",
        )

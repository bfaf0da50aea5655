"""Settings of the estimation of local learning coefficients: of chains for any loss, and of the section `sampler` of a run."""

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
    """Effective inverse temperature n beta, the factor of the loss; None means n / ln n with n = `num_samples`."""
    localization: float = 1000.0
    """Strength gamma of the pull back to the checkpoint."""
    num_samples: int | None = None
    """Sample size n; None if it is not known."""
    batch_size: int | None = None
    """Size of a minibatch; None if whoever gives the minibatches decides it."""
    num_chains: int = 4
    """Independent chains for each checkpoint."""
    num_draws: int = 100
    """Draws of each chain, over which averages are taken."""
    num_burnin_steps: int = 150
    """Moves of each chain before its first draw. They are in no average."""
    seed: int = 0
    """Seed for the chains' noise and minibatches."""
    kernel: Kernel = "sgld"
    """Markov kernel: `sgld`, SGLD preconditioned by RMSprop (`rmsprop`), or underdamped Langevin dynamics (`baoab`)."""
    friction: float = 0.5
    """Friction factor c of `baoab`, in [0, 1): the share of the velocity that a move keeps. Other kernels ignore it."""
    thinning: int = 1
    """Moves from one draw to the next."""
    num_init_batches: int = 32
    """Minibatches over which the checkpoint's own loss L(w0) is averaged."""

    section: ClassVar[str] = ""
    """Name of the section in error messages."""

    @property
    def inverse_temperature(self) -> float:
        """The number `nbeta`, or n / ln n where it is None; no other place decides this."""
        if self.nbeta is not None:
            return self.nbeta
        assert self.num_samples is not None
        return self.num_samples / math.log(self.num_samples)

    @property
    def num_moves(self) -> int:
        """Gradients that a chain takes, not counting the diagnostic ones."""
        return self.num_burnin_steps + (self.num_draws - 1) * self.thinning + 1

    def __post_init__(self) -> None:
        sizes = {"num_samples": 2, "batch_size": 1, "num_chains": 1, "num_draws": 2, "num_burnin_steps": 0}
        numbers: dict[str, Bound] = {"lr": "positive", "localization": "zero or positive", "memory": "positive"}
        numbers["friction"] = "zero or positive"
        validate(
            self.section,
            self,
            counts={**sizes, "seed": 0, "thinning": 1, "num_init_batches": 1},
            numbers=numbers,
        )
        prefix = f"{self.section}." if self.section else ""
        require(
            self.nbeta is not None or self.num_samples is not None,
            "`nbeta` is None, which means n / ln n, but `num_samples` (n) is missing; give one of them.",
        )
        if self.nbeta is not None:
            repair = f". Write none for n / ln n with n = `{prefix}num_samples`"
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
    """Estimation of local learning coefficients by `icl llc`; it has no effect on training."""

    num_samples: int = 2**20
    """Sample size n: the number of prompts in the `fixed` set, and the n of n / ln n."""
    num_init_batches: int = 256
    """Minibatches over which the checkpoint's own loss L(w0) is averaged."""
    batch_size: int = 256
    """Prompts in each chain's minibatch."""
    minibatches: Literal["fixed", "fresh"] = "fixed"
    """Minibatches of one set of `num_samples` prompts (`fixed`), or of new prompts every time (`fresh`)."""
    loss: Literal["mse", "subsequence"] = "mse"
    """Squared error per target over all positions (`mse`), or over the first K', with K' uniform on 1..K (`subsequence`)."""
    steps: str = "all"
    """Saved steps to estimate at: `all`, `last`, a list such as 1,2,3, or a range 0:1000:100, which includes its end."""
    memory: float | None = None
    """GiB of memory for the chains that run at the same time. By default 2, or on CUDA half of the free memory."""

    section: ClassVar[str] = "sampler"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_steps(self.steps)
        require(
            self.minibatches == "fresh" or self.num_samples % self.batch_size == 0,
            f"`sampler.num_samples` must be a multiple of `sampler.batch_size` for `fixed` minibatches, got "
            f"{self.num_samples} and {self.batch_size}.",
        )

"""The sampler settings of Hoogland et al. 2024, and the conversion of their parameters."""

from jaxtyping import Float
from torch import Tensor

from icl.config import SamplerConfig
from icl.config.validation import real
from icl.presets import preset


def from_scales(*, gradient_scale: float, localization_scale: float, noise_scale: float) -> dict[str, float]:
    """Return `lr`, `nbeta` and `localization` from the parameters of Hoogland et al.'s code.

    Their move is w - gradient_scale grad L - localization_scale (w - w0) + N(0, noise_scale). Our move subtracts
    (lr / 2) (nbeta grad L + localization (w - w0)). So lr = noise_scale, nbeta = 2 gradient_scale / noise_scale and
    localization = 2 localization_scale / noise_scale.

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
    kernel="sgld",
    num_samples=2**20,
    batch_size=1024,
    num_chains=10,
    num_draws=5000,
    num_burnin_steps=0,
    seed=0,
    minibatches="fixed",
)
"""The settings of Hoogland et al. 2024, from their sweep file of January 2024 (icl@a868647,
sweeps/analysis/0-L2H4-llcs-over-time.yaml): nbeta = 66.67, localization = 6.67, no burn-in (their code ignores the file's key
`num_burn_in`).

We differ in two ways. First, their chains used the same noise at every checkpoint, which makes a curve look smoother than it is. Our chains
have different noise at each checkpoint. Second, we average L(w0) over `num_init_batches` minibatches."""


PUBLISHED_LANGUAGE = preset("L2W256").sampler
"""The settings of Hoogland et al. 2024 for their language models.

They run 20 chains of 200 draws, without burn-in, and nbeta = n / ln n with n = 100.

In `llc.csv`, the estimate `llc` compares each loss with the checkpoint's loss on the same minibatch. `llc_with_initial_loss_bug` is the
estimate that the authors' code makes from the same chains."""


def llc_with_initial_loss_bug(losses: Float[Tensor, "C S"], *, nbeta: float) -> float:
    """Return the LLC that the language-model code of Hoogland et al. 2024 computes from the losses of C chains at S draws.

    That code averages nbeta (L - L_init) over chains and draws. L_init should be the mean, over all C chains, of the loss at the first
    draw. But the chains run one after the other, and the code computes L_init anew at every draw, while the entries of chains that have not
    yet run are still 0. So for chain c (counted from 0), L_init is only the sum of the first losses of chains 0 to c, divided by C. In the
    average, the first draw of each chain counts as 0.

    If all first losses are L0, the estimate is too large by nbeta L0 (C - 1) / (2 C), apart from the effect of the first draw.
    """
    initial = losses[:, 0].cumsum(0) / len(losses)  # C
    excess = losses[:, 1:] - initial[:, None]
    return float(nbeta * excess.sum(1).mean() / losses.shape[1])


def published(family: str) -> SamplerConfig:
    """Return the published settings for a family of runs (`model.family`)."""
    return PUBLISHED_LANGUAGE if family == "language" else PUBLISHED

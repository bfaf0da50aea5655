"""What an LLC estimate is: numbers, errors, traces, the settings that made them, and the verdict."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

from icl.sampling.diagnostics import Evidence, Verdict
from icl.sampling.settings import SamplerSettings

if TYPE_CHECKING:
    import pandas as pd


class Label(NamedTuple):
    """Which checkpoint an estimate is of; the noise of its chains is a function of the seed and of this."""

    step: int | None = None
    checkpoint_hash: str | None = None


@dataclass(frozen=True, kw_only=True)
class Fluctuation:
    """Of the posterior at nbeta, over fixed samples with losses l_i (Watanabe 2009, sections 1.4 and 6.3)."""

    functional_variance: float | None
    """V = sum over n samples of Var_w[l_i]; None without `num_samples`."""
    singular_fluctuation: float
    """nu = nbeta/2 times the mean over samples of Var_w[l_i]; d/2 for a regular model that holds the truth."""
    stderr: float
    """Of the singular fluctuation, from the spread between chains; NaN for one chain."""


@dataclass(frozen=True, kw_only=True)
class LLCResult:
    """An LLC estimate of one checkpoint. Chains that died are NaN in `llc_per_chain` and in no average."""

    llc: float
    """nbeta times the mean over draws of the loss less the checkpoint's own on the same minibatch."""
    stderr: float
    """From chains and autocorrelation; see `icl.sampling.convergence`."""
    llc_per_chain: Float[Tensor, " K"]
    loss_trace: Float[Tensor, "K S"]
    """Minibatch losses at the draws; burn-in is not in it."""
    burnin_trace: Float[Tensor, "K burnin"]
    init_loss: float
    init_loss_stderr: float
    mean_loss: float
    """init_loss + llc / nbeta: the mean sampled loss, on the minibatches that `init_loss` is the mean of."""
    llc_per_component: Float[Tensor, " T"] | None
    """Where the loss is a vector, say over positions: their mean is `llc`."""
    stderr_per_component: Float[Tensor, " T"] | None
    wbic: float | None
    """num_samples times the mean sampled loss; a WBIC (Watanabe 2013) if nbeta = n / ln n. None without `num_samples`."""
    fluctuation: Fluctuation | None
    rhat: float
    ess: float
    verdict: Verdict
    reasons: tuple[str, ...]
    evidence: Evidence
    """Every number that the verdict rests on."""
    settings: SamplerSettings
    num_samples: int | None
    num_init_batches: int
    """Distinct batches that `init_loss` is the mean of."""
    num_chains_used: int
    loss_name: str
    step: int | None
    checkpoint_hash: str | None

    def to_dataframe(self, by: Literal["checkpoint", "chain", "component"] = "checkpoint") -> "pd.DataFrame":
        """One row for the checkpoint, or one for each chain or component; all with the settings.

        Raises:
            ValueError: If components are asked for and the loss had none.
        """
        import pandas as pd

        if by == "checkpoint":
            return pd.DataFrame([self.row()])
        if by == "chain":
            values = {"llc": self.llc_per_chain, "mean_loss": self.init_loss + self.llc_per_chain / self.settings.nbeta}
        elif self.llc_per_component is None or self.stderr_per_component is None:
            raise ValueError("The loss was one number; return a vector from it for an LLC per component.")
        else:
            values = {"llc": self.llc_per_component, "stderr": self.stderr_per_component}
        rest = {name: value for name, value in self.row().items() if name not in ("llc", "stderr", "mean_loss")}
        rows = [
            {by: i, **{name: float(value[i]) for name, value in values.items()}, **rest}
            for i in range(len(values["llc"]))
        ]
        return pd.DataFrame(rows)

    def row(self) -> dict[str, Any]:
        """The plain numbers, as a row of `llc.csv`."""
        e = self.evidence
        return {
            "step": self.step,
            "checkpoint_hash": self.checkpoint_hash,
            "llc": self.llc,
            "stderr": self.stderr,
            "init_loss": self.init_loss,
            "init_loss_stderr": self.init_loss_stderr,
            "mean_loss": self.mean_loss,
            "trivial_loss": e.trivial_loss,
            "loss_name": self.loss_name,
            "num_samples": self.num_samples,
            **dataclasses.asdict(self.settings),
            "num_params": e.num_params,
            "num_init_batches": self.num_init_batches,
            "num_chains_used": self.num_chains_used,
            "num_draws_used": self.num_chains_used * self.settings.num_draws,
            "rhat": self.rhat,
            "ess": self.ess,
            "drift": e.drift,
            "mala_acceptance": e.acceptance,
            "pull": e.pull,
            "spread": e.spread,
            "heat": e.heat,
            "sensitivity": e.sensitivity,
            "sensitivity_stderr": e.sensitivity_stderr,
            "descent": e.descent,
            "settled": e.settled,
            "settled_stderr": e.settled_stderr,
            "wbic": self.wbic,
            "singular_fluctuation": None if self.fluctuation is None else self.fluctuation.singular_fluctuation,
            "verdict": self.verdict,
            "reasons": "; ".join(self.reasons),
        }

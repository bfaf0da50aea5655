"""Test the sampler on problems with known answers, in about two minutes on one CPU thread.

`sgld` and `baoab` run on all problems. `baoab` has three times the lr of `sgld` and a third of the moves. `rmsprop` runs only on
quadratics without minibatches. Its lr is smaller, because its preconditioner is above 1.

The loss of every problem has its minimum, 0, at the checkpoint. If the true value of the estimate at finite nbeta with localization is
known (`icl.sampling.known`), the estimate must agree with it within `NUM_STDERRS` standard errors. The bias of the step size is known
exactly only for `sgld` and `baoab` on quadratics without minibatches. Otherwise the estimate may differ from the true value by an
additional fraction `STEP_BIAS` of that value.

For deep linear networks only the asymptotic value lambda is known, so we estimate at three values of nbeta. The estimates must rise with
nbeta. At finite nbeta, the localization (strength 1) changes the estimate: a direction in which the loss is quartic loses a fraction
nbeta^(-1/2) of its contribution, and other directions lose less. So the test allows a difference from lambda of lambda / sqrt(nbeta), plus
some standard errors. The multiplicity is 1, so there is no logarithmic term.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from icl import rng
from icl.config import ChainsConfig
from icl.config.sampler import Kernel
from icl.model.stacked import Params
from icl.sampling import known
from icl.sampling.batches import Batch, Batches
from icl.sampling.llc import estimate_llcs
from icl.sampling.result import LLCResult
from icl.sampling.target import Loss

NUM_STDERRS = 3.5
"""Number of standard errors by which an estimate may differ from the true value."""
STEP_BIAS = 0.02
"""Allowed bias from the step size, as a fraction of the true value, if this bias is not known exactly."""
_CHAINS = ChainsConfig(num_chains=32, num_draws=1500, num_burnin_steps=1500)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A test problem: a loss with a known learning coefficient, and the sampler's settings at one or several values of nbeta."""

    name: str
    loss: Loss
    params: Params
    asymptotic: float
    finite: Callable[[float, float], float] | None
    """Function from nbeta and lr to the true value of the estimate with SGLD; None if this value is not known. lr = 0 gives the value
    without the effect of the step size."""
    nbetas: Sequence[float]
    sampler: dict[str, Any]
    batches: Batches = (None,)
    is_quadratic: bool = False
    """Whether the loss is quadratic and has no minibatches, so that the effect of the step size is known exactly."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """An estimate for a test problem, and the true values."""

    problem: str
    kernel: str
    nbeta: float
    asymptotic: float
    finite: float | None
    llc: float
    stderr: float
    allowed: float
    """Largest allowed difference from `finite`, or from `asymptotic` if `finite` is None."""
    verdict: str
    agrees: bool


def self_test(say: Callable[[int, str], None] = lambda number, name: None) -> list[Row]:
    """Run all test problems. Before each problem, `say` is called with its number (from 1) and its name."""
    rows: list[Row] = []
    for number, problem in enumerate(problems(), start=1):
        say(number, problem.name)
        for kernel in ("sgld", "baoab", "rmsprop") if problem.is_quadratic else ("sgld", "baoab"):
            rows += run_problem(problem, kernel)
    return rows


def truth_table(rows: Sequence[Row]) -> str:
    """Return a table of true values and estimates as text."""
    import pandas as pd

    table = pd.DataFrame(
        {
            "problem": [row.problem for row in rows],
            "kernel": [row.kernel for row in rows],
            "nbeta": [f"{row.nbeta:g}" for row in rows],
            "truth, n → ∞": [f"{row.asymptotic:.4g}" for row in rows],
            "truth, this nbeta": ["-" if row.finite is None else f"{row.finite:.4g}" for row in rows],
            "estimate ± stderr": [f"{row.llc:.3f} ± {row.stderr:.3f}" for row in rows],
            "allowed difference": [f"{row.allowed:.2f}" for row in rows],
            "verdict": [row.verdict for row in rows],
            "agrees": ["yes" if row.agrees else "NO" for row in rows],
        }
    )
    return table.to_string(index=False)


def run_problem(problem: Problem, kernel: Kernel = "sgld") -> list[Row]:
    """Estimate the LLC of a test problem with one kernel, at each value of nbeta.

    All chains run as one population with the largest nbeta. Each nbeta has its own copy of the checkpoint. In this copy, the loss is
    multiplied by nbeta / (largest nbeta), so that its chains sample the density at this nbeta.
    """
    largest = problem.nbetas[-1]

    def scaled(params: Params, batch: Batch) -> Tensor:
        return params["scale"] * problem.loss(params, batch)

    checkpoints = [{**problem.params, "scale": torch.tensor(nbeta / largest)} for nbeta in problem.nbetas]
    seed = int(rng.stream(0, problem.name).low)
    settings = dataclasses.replace(_CHAINS, nbeta=largest, seed=seed, kernel=kernel, **problem.sampler)
    if kernel == "baoab":
        lengths = {name: getattr(settings, name) // 3 for name in ("num_draws", "num_burnin_steps")}
        settings = dataclasses.replace(settings, lr=3 * settings.lr, **lengths)
    elif kernel == "rmsprop":
        settings = dataclasses.replace(settings, lr=settings.lr / 8)
    results = estimate_llcs(scaled, checkpoints, problem.batches, settings, restrict=list(problem.params))
    rows = [_row(problem, nbeta, result) for nbeta, result in zip(problem.nbetas, results, strict=True)]
    rises = all(a.llc < b.llc for a, b in itertools.pairwise(rows))
    return rows if rises else [dataclasses.replace(row, agrees=False) for row in rows]


def _row(problem: Problem, nbeta: float, result: LLCResult) -> Row:
    settings = result.settings
    step = settings.lr if settings.kernel == "sgld" else 0.0
    finite = None if problem.finite is None else problem.finite(nbeta, step)
    target = problem.asymptotic if finite is None else finite
    is_exact = problem.is_quadratic and settings.kernel != "rmsprop"
    bias = 0.0 if is_exact else STEP_BIAS * target if finite is not None else target / nbeta**0.5
    allowed = bias + NUM_STDERRS * result.stderr
    return Row(
        problem=problem.name,
        kernel=settings.kernel,
        nbeta=nbeta,
        asymptotic=problem.asymptotic,
        finite=finite,
        llc=result.llc,
        stderr=result.stderr,
        allowed=allowed,
        verdict=result.verdict,
        agrees=result.verdict != "invalid" and abs(result.llc - target) <= allowed,
    )


def problems() -> list[Problem]:
    """Return all test problems."""
    return [
        _quadratic("regular quadratic, d = 10", torch.logspace(-1, 0.5, 10), nbeta=100.0, localization=1.0, lr=2e-3),
        _quadratic(
            "quadratic of rank 4 in d = 10",
            torch.tensor([0.3, 1.0, 2.0, 3.0] + [0.0] * 6),
            nbeta=100.0,
            localization=1.0,
            lr=2e-3,
        ),
        _quadratic(
            "stiff quadratic, steps counted",
            torch.tensor([0.01, 0.1, 1.0, 10.0]),
            nbeta=66.7,
            localization=6.67,
            lr=1e-3,
        ),
        _crossing("normal crossing a^2 b^2", [1, 1]),
        _crossing("normal crossing a^2 b^4", [1, 2]),
        _pointwise(
            "separable a^4 + b^4 + c^2",
            lambda w: w[:, 0] ** 4 + w[:, 1] ** 4 + w[:, 2] ** 2,
            3,
            known.separable([2, 2, 1]),
            lr=2.5e-4,
        ),
        _regression(),
        _reduced_rank(5, 2, 5),
        _deep_linear([3, 3, 3, 3], 0),
    ]


def _quadratic(name: str, h: Tensor, *, nbeta: float, localization: float, lr: float) -> Problem:
    return Problem(
        name=name,
        loss=lambda params, batch: (h * params["w"].square()).sum() / 2,
        params={"w": torch.zeros(len(h))},
        asymptotic=known.regular(int((h > 0).sum())),
        finite=lambda nbeta, lr: known.quadratic_llc(h, nbeta=nbeta, localization=localization, lr=lr),
        nbetas=[nbeta],
        sampler={"lr": lr, "localization": localization},
        is_quadratic=True,
    )


def _pointwise(
    name: str, loss: Callable[[Tensor], Tensor], num_params: int, asymptotic: float, *, lr: float
) -> Problem:
    """Return a test problem for a loss function of points w, given as rows (P, d). The true value is computed by quadrature."""
    localization = 5.0
    return Problem(
        name=name,
        loss=lambda params, batch: loss(params["w"][None])[0],
        params={"w": torch.zeros(num_params)},
        asymptotic=asymptotic,
        finite=lambda nbeta, lr: known.localized_llc(loss, num_params, nbeta=nbeta, localization=localization),
        nbetas=[200.0],
        sampler={"lr": lr, "localization": localization, "num_burnin_steps": 2000, "num_draws": 5000},
    )


def _crossing(name: str, powers: Sequence[int]) -> Problem:
    exponents = 2 * torch.tensor(powers)
    truth = known.normal_crossing(powers).value
    return _pointwise(name, lambda w: w.pow(exponents).prod(1), len(powers), truth, lr=5e-4)


def _regression() -> Problem:
    """Return the test problem of noiseless linear regression with minibatches, in p = 6 dimensions.

    The true value is computed from the Hessian over all 4,096 examples.
    """
    xs = torch.randn(4096, 6, generator=torch.Generator().manual_seed(1))
    h = torch.linalg.eigvalsh(xs.T @ xs / len(xs))
    name = "linear regression, p = 6, minibatches"
    return dataclasses.replace(
        _quadratic(name, h, nbeta=100.0, localization=1.0, lr=1e-3),
        loss=lambda params, batch: (batch @ params["w"]).square().mean() / 2,
        batches=list(xs.split(128)),
        is_quadratic=False,
    )


def _reduced_rank(inputs: int, hidden: int, outputs: int) -> Problem:
    return Problem(
        name=f"reduced-rank regression {inputs}-{hidden}-{outputs}, rank 0",
        loss=lambda params, batch: (params["b"] @ params["a"]).square().sum() / 2,
        params={"a": torch.zeros(hidden, inputs), "b": torch.zeros(outputs, hidden)},
        asymptotic=known.reduced_rank(inputs, hidden, outputs, 0),
        finite=lambda nbeta, lr: known.localized_reduced_rank_llc(
            inputs, hidden, outputs, nbeta=nbeta, localization=1.0
        ),
        nbetas=[1.0, 3.0, 10.0],
        sampler={"lr": 4e-3, "localization": 1.0, "num_burnin_steps": 2000, "num_draws": 3000},
    )


def _deep_linear(widths: Sequence[int], rank: int) -> Problem:
    truth = torch.zeros(widths[-1], widths[0])
    truth[range(rank), range(rank)] = 1.0
    params = {}
    for i in range(len(widths) - 1):
        layer = torch.zeros(widths[i + 1], widths[i])
        layer[range(rank), range(rank)] = 1.0
        params[f"w{i}"] = layer

    def loss(params: Params, batch: Batch) -> Tensor:
        product = params["w0"]
        for i in range(1, len(widths) - 1):
            product = params[f"w{i}"] @ product
        return (product - truth).square().sum() / 2

    return Problem(
        name=f"deep linear network {'-'.join(map(str, widths))}, rank {rank}",
        loss=loss,
        params=params,
        asymptotic=known.deep_linear(widths, rank).value,
        finite=None,
        nbetas=[3.0, 10.0, 30.0],
        sampler={"lr": 1e-3, "localization": 1.0, "num_draws": 3000},
    )

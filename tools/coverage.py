"""Measure how often the intervals of LLC estimates contain the truth, and how often the verdict is `ok`.

`python -m tools.coverage [--runs N] [--target_runs N] [--losses NAME ...] [--out FILE]` writes the table `data/coverage.csv`. Each row is a
cell: a loss, a kernel, a number of chains, a number of draws and perhaps a target standard error (`target_stderr`). All runs of a cell
start at the loss's minimum w0, and have different noise. The truth is the exact LLC of the localised posterior, nbeta (E[L] - L(w0)).
Unlike an estimate, it has no bias from the step size. The nominal coverage of the intervals is 95 %. There are five losses:

- `quadratic`: six directions with curvatures from 0.01 to 10. The truth is known in closed form.
- `product`: L = a^2 b^2, which has a degenerate minimum. The truth is computed by quadrature.
- `fresh`, `pool` and `list`: the same quadratic, with minibatches whose curvatures and gradients differ. With `fresh`, every minibatch is
  new. With `pool`, minibatches are drawn from a pool. With `list`, the chains go through a list of minibatches again and again. The noise
  has mean zero over all minibatches, so the truth is that of `quadratic`.

The runs of a cell are computed together, as populations. Each run has its own minibatches. In cells with a `target_stderr`, the chains of a
run stop when the standard error of its LLC is at most this target and their effective sample size is sufficient. These runs are computed
one after the other, which takes hours; `--target_runs` sets their number.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from icl.config import ChainsConfig
from icl.config.sampler import Kernel
from icl.model.flat import Layout
from icl.model.stacked import Params
from icl.sampling import LLCResult, estimate_llcs, known
from icl.sampling.batches import Batch, Batches, Pool
from icl.sampling.llc import EstimateOptions

CURVATURES = torch.tensor([0.01, 0.04, 0.2, 0.7, 3.0, 10.0])
NBETA, LOCALIZATION = 60.0, 10.0
NUM_BURNIN_STEPS = 400
KERNELS: tuple[Kernel, ...] = ("sgld", "baoab")
RATES: dict[tuple[str, Kernel], float] = {
    ("quadratic", "sgld"): 5e-4,
    ("quadratic", "baoab"): 2e-3,
    ("product", "sgld"): 2e-3,
    ("product", "baoab"): 4e-3,
    ("fresh", "sgld"): 5e-4,
    ("fresh", "baoab"): 1e-3,
    ("pool", "sgld"): 5e-4,
    ("pool", "baoab"): 1e-3,
    ("list", "sgld"): 5e-4,
    ("list", "baoab"): 1e-3,
}
"""Step sizes. The keys are pairs of a loss and a kernel. The step sizes of `baoab` are larger, as in the presets."""
LOSSES = tuple(dict.fromkeys(loss for loss, _ in RATES))
SHAPES = ((2, 2000), (4, 1000), (8, 600), (64, 50))
"""Pairs of a number of chains and a number of draws."""
TARGET_STDERR, MAX_DRAWS = {"quadratic": 0.08, "product": 0.01, "pool": 0.08}, 6000
"""Target standard errors of the runs that stop at a target, and the largest number of draws of each of their four chains."""
NOISE = 0.1
"""Standard deviation of the noise of a minibatch: in each component of the gradient at w0, and in each curvature relative to its mean."""
POOL_SIZE = 64
RUNS_AT_ONCE = 50
"""Number of runs in one population, if the runs have minibatches."""


class Cell(NamedTuple):
    """A loss, a kernel, the number and length of the chains, and the number of runs."""

    loss: str
    kernel: Kernel
    num_chains: int
    num_draws: int
    target_stderr: float | None
    num_runs: int


def main(words: Sequence[str] | None = None) -> None:
    """Measure all cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="number of runs per cell")
    parser.add_argument(
        "--target_runs", type=int, default=0, help="number of runs in each cell that stops at a target (slow)"
    )
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES, help="losses to measure; by default all")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes")
    parser.add_argument("--out", type=Path, default=Path("data/coverage.csv"), help="file to write")
    options = parser.parse_args(words)
    rows = []
    with ProcessPoolExecutor(options.jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for row in pool.map(measure, _cells(options.losses, options.runs, options.target_runs)):
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.append(row)
    options.out.write_text(pd.DataFrame(rows).to_csv(index=False))


def _cells(losses: Sequence[str], num_runs: int, num_target_runs: int) -> Iterator[Cell]:
    for loss in losses:
        for kernel in KERNELS:
            for num_chains, num_draws in SHAPES if num_runs else ():
                yield Cell(loss, kernel, num_chains, num_draws, None, num_runs)
            if num_target_runs and loss in TARGET_STDERR:
                yield Cell(loss, kernel, 4, MAX_DRAWS, TARGET_STDERR[loss], num_target_runs)


def measure(cell: Cell) -> dict[str, str | int | float | None]:
    """Return the row of a cell: the coverage of all intervals, the coverage of intervals with the verdict `ok`, and the share of `ok`."""
    truth = _truth(cell.loss)
    results = _results(cell)
    covered = [low <= truth <= high for low, high in (result.interval for result in results)]
    is_ok = [result.verdict == "ok" for result in results]
    is_long = [result.num_chains >= 4 and result.ess > 400 for result in results]
    return {
        "loss": cell.loss,
        "kernel": cell.kernel,
        "num_chains": cell.num_chains,
        "num_draws": cell.num_draws,
        "target_stderr": cell.target_stderr,
        "num_runs": len(results),
        "truth": round(truth, 4),
        "mean_llc": round(sum(result.llc for result in results) / len(results), 4),
        "coverage": _share(covered),
        "share_ok": _share(is_ok),
        "coverage_ok": _share([hit for hit, ok in zip(covered, is_ok, strict=True) if ok]),
        "share_ok_if_ess_above_400": _share([ok for ok, long in zip(is_ok, is_long, strict=True) if long]),
        "mean_ess": round(sum(result.ess for result in results) / len(results)),
    }


def _share(values: Sequence[bool]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def _truth(loss: str) -> float:
    if loss == "product":
        return known.localized_llc(lambda w: w.square().prod(-1), 2, nbeta=NBETA, localization=LOCALIZATION)
    return known.quadratic_llc(CURVATURES, nbeta=NBETA, localization=LOCALIZATION)


def _results(cell: Cell) -> list[LLCResult]:
    settings = ChainsConfig(
        kernel=cell.kernel,
        lr=RATES[cell.loss, cell.kernel],
        nbeta=NBETA,
        localization=LOCALIZATION,
        num_chains=cell.num_chains,
        num_draws=cell.num_draws,
        num_burnin_steps=NUM_BURNIN_STEPS,
        target_stderr=cell.target_stderr,
    )
    loss, gradient = (_product, _product_gradient) if cell.loss == "product" else (_quadratic, _quadratic_gradient)
    num_at_once = cell.num_runs
    if cell.loss in ("fresh", "pool", "list"):
        num_at_once = RUNS_AT_ONCE if cell.target_stderr is None else 1
    results = []
    for first in range(0, cell.num_runs, num_at_once):
        num = min(num_at_once, cell.num_runs - first)
        # The noise of a run depends on the seed and on the run's position in the population.
        results += estimate_llcs(
            loss,
            [{"w": torch.zeros(2 if cell.loss == "product" else 6), "run": row} for row in torch.eye(num)],
            _minibatches(cell.loss, num, seed=first),
            dataclasses.replace(settings, seed=first),
            restrict=["w"],
            trivial_loss=100.0,
            options=EstimateOptions(gradient=gradient),
        )
    return results


def _quadratic(params: Params, batch: Float[Tensor, "runs 2 6"] | None) -> Tensor:
    w, curvatures, slopes = params["w"], CURVATURES, torch.zeros(6)
    if batch is not None:
        noise = torch.tensordot(params["run"], batch, 1)
        curvatures, slopes = CURVATURES * (1 + noise[0]), noise[1]
    return (curvatures * w.square()).sum() / 2 + (slopes * w).sum()


def _quadratic_gradient(layout: Layout, rows: Tensor, fixed: Params, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the gradient of `_quadratic` in closed form, which is faster than automatic differentiation."""
    w, curvatures, slopes = rows[:, : layout.size], CURVATURES, torch.zeros(6)
    if batch is not None:
        noise = torch.einsum("nr,nrij->nij", fixed["run"], batch)
        curvatures, slopes = CURVATURES * (1 + noise[:, 0]), noise[:, 1]
    losses = ((curvatures * w / 2 + slopes) * w).sum(1)
    return pad(curvatures * w + slopes, (0, layout.width - layout.size)), losses


def _product(params: Params, batch: None) -> Tensor:
    return params["w"].square().prod(-1)


def _product_gradient(layout: Layout, rows: Tensor, fixed: Params, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the gradient of `_product` in closed form, which is faster than automatic differentiation."""
    w = rows[:, : layout.size]
    others = w.flip(1)
    return pad(2 * w * others.square(), (0, layout.width - layout.size)), w.square().prod(1)


class _FromPool:
    """Minibatches drawn uniformly with replacement, with the attribute `pool` that the control variates need."""

    def __init__(self, batches: Sequence[Tensor], seed: int) -> None:
        self.pool = Pool(len(batches), self._number_of, batches.__getitem__, is_uniform=True)
        self.numbers = torch.randint(len(batches), (64, MAX_DRAWS + NUM_BURNIN_STEPS + 1), generator=_generator(seed))

    def _number_of(self, chain: int, draw: int) -> int:
        return int(self.numbers[chain, draw])

    def __call__(self, chain: int, draw: int) -> Tensor:
        return self.pool.get(self._number_of(chain, draw))


def _minibatches(loss: str, num_runs: int, *, seed: int) -> Batches:
    """Return the minibatches of several runs. A minibatch has, for each run, the noise of the curvatures and of the gradient."""
    if loss not in ("fresh", "pool", "list"):
        return [None]
    if loss == "fresh":
        return lambda chain, draw: NOISE * torch.randn(num_runs, 2, 6, generator=_generator(seed, chain, draw))
    noise = NOISE * torch.randn(POOL_SIZE, num_runs, 2, 6, generator=_generator(seed))
    batches = list(noise - noise.mean(0))
    return batches if loss == "list" else _FromPool(batches, seed)


def _generator(seed: int, chain: int = 0, draw: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1000 + chain) * 100_000 + draw)


if __name__ == "__main__":
    main()

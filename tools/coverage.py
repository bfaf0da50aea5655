"""Measure how often the intervals of LLC estimates contain the truth, and how often the verdict is `ok`.

`python -m tools.coverage [--runs N] [--out FILE]` writes the table `data/coverage.csv`. Each row is a cell: a loss, a kernel, a
number of chains and a number of draws. All runs of a cell start at the loss's minimum w0, and have different noise. The truth is the
exact LLC of the localised posterior, nbeta (E[L] - L(w0)). Unlike an estimate, it has no bias from the step size. The nominal coverage
of the intervals is 95 %. There are three losses:

- `quadratic`: six directions with curvatures from 0.01 to 10. The truth is known in closed form.
- `product`: L = a^2 b^2, which has a degenerate minimum. The truth is computed by quadrature.
- `minibatches`: the same quadratic, with gradient noise from fresh minibatches.

All runs of a `quadratic` or `product` cell are computed together, as one population. Runs of `minibatches` are computed one after the
other, because each run has its own minibatches. There are therefore only a twentieth as many of these runs.
With `--target_runs N`, the table also contains cells of N runs that stop at a `target_stderr`.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from icl.config import ChainsConfig
from icl.config.sampler import Kernel
from icl.sampling import LLCResult, estimate_llcs, known

CURVATURES = torch.tensor([0.01, 0.04, 0.2, 0.7, 3.0, 10.0])
NBETA, LOCALIZATION = 60.0, 10.0
NUM_BURNIN_STEPS = 400
RATES: dict[tuple[str, Kernel], float] = {
    ("quadratic", "sgld"): 5e-4,
    ("quadratic", "baoab"): 2e-3,
    ("product", "sgld"): 2e-3,
    ("product", "baoab"): 4e-3,
    ("minibatches", "sgld"): 5e-4,
    ("minibatches", "baoab"): 1e-3,
}
"""Step sizes. The keys are pairs of a loss and a kernel. The step sizes of `baoab` are larger, as in the presets."""
SHAPES = ((2, 2000), (4, 1000), (8, 600), (64, 50))
"""Pairs of a number of chains and a number of draws."""
TARGET_STDERR, MAX_DRAWS = {"quadratic": 0.08, "product": 0.01}, 6000
"""Target standard errors of the runs that stop at a target, and the largest number of draws of each of their four chains."""
NOISE = 0.1
"""Standard deviation, in every direction, of the gradient noise from minibatches."""


class Cell(NamedTuple):
    """A loss, a kernel, and the lengths of the chains."""

    loss: str
    kernel: Kernel
    num_chains: int
    num_draws: int
    target_stderr: float | None
    num_runs: int


def main(words: Sequence[str] | None = None) -> None:
    """Measure all cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=int, default=1000, help="number of runs per cell; `minibatches` has a twentieth as many"
    )
    parser.add_argument(
        "--target_runs", type=int, default=0, help="number of runs in each cell that stops at a target (slow)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="number of processes")
    parser.add_argument("--out", type=Path, default=Path("data/coverage.csv"), help="file to write")
    options = parser.parse_args(words)
    rows = []
    with ProcessPoolExecutor(options.jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for row in pool.map(measure, _cells(options.runs, options.target_runs)):
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.append(row)
    options.out.write_text(pd.DataFrame(rows).to_csv(index=False))


def _cells(num_runs: int, num_target_runs: int) -> Iterator[Cell]:
    kernels: tuple[Kernel, ...] = ("sgld", "baoab")
    for loss, kernel in itertools.product(("quadratic", "product", "minibatches"), kernels):
        shapes: Sequence[tuple[int, int]]
        if loss == "minibatches":
            shapes, runs = SHAPES[1:3], max(1, num_runs // 20)
        else:
            shapes, runs = SHAPES, num_runs
        for num_chains, num_draws in shapes:
            yield Cell(loss, kernel, num_chains, num_draws, None, runs)
        if num_target_runs and loss != "minibatches":
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
        return known.localized_llc(lambda w: _product({"w": w}, None), 2, nbeta=NBETA, localization=LOCALIZATION)
    return known.quadratic_llc(CURVATURES, nbeta=NBETA, localization=LOCALIZATION)


def _quadratic(params: dict[str, Tensor], batch: None) -> Tensor:
    return (CURVATURES * params["w"].square()).sum(-1) / 2


def _product(params: dict[str, Tensor], batch: None) -> Tensor:
    return params["w"].square().prod(-1)


def _noisy(params: dict[str, Tensor], batch: Tensor) -> Tensor:
    return _quadratic(params, None) + batch @ params["w"]


def _minibatches(seed: int) -> Callable[[int, int], Tensor]:
    def batch(chain: int, draw: int) -> Tensor:
        generator = torch.Generator().manual_seed((seed * 1000 + chain) * 100_000 + draw)
        return NOISE * torch.randn(len(CURVATURES), generator=generator)

    return batch


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
    start = {"w": torch.zeros(2 if cell.loss == "product" else len(CURVATURES))}
    if cell.loss == "minibatches":
        return [
            estimate_llcs(
                _noisy, [start], _minibatches(seed), dataclasses.replace(settings, seed=seed), trivial_loss=100.0
            )[0]
            for seed in range(cell.num_runs)
        ]
    loss = _quadratic if cell.loss == "quadratic" else _product
    # All runs of a cell are one population. Each run has different noise, because the seed contains its number in the population.
    return estimate_llcs(loss, [start] * cell.num_runs, [None], settings, trivial_loss=100.0)


if __name__ == "__main__":
    main()

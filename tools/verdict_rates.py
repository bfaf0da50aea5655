"""Measure how often the verdicts of turning points and stages are right, on simulated curves with correlated scatter.

`python -m tools.verdict_rates [--runs N] [--out FILE]` writes the table `data/verdict-rates.csv`. The scatter is an autoregression of
order one over the saved steps. Its standard deviation is 1 at every step, and the correlation between neighbouring steps is phi. Log
time is log(1 + step). There are eight kinds of curves:

- `flat tail`: a loss that falls and then stays flat. A verdict `ok` is a false finding of `transient ridge`.
- `rise`: the same loss, with a rise by ten standard deviations after its minimum.
- `noise`: loss and LLC are only scatter. A verdict `ok` is a false boundary between stages.
- `line`: loss and LLC are straight lines in log time, with scatter of 3 % of their range.
- `turn`: loss and LLC move in one direction until half of the log time has passed, and then back. The strength of this boundary
  is about ten standard errors in each signal.
- `language noise` and `language line`: the loss of a language run, and the score of a head. Their scatter is as in `noise` and `line`.
- `onset`: the two signals of a language run are constant until three quarters of the log time have passed, and then move in one direction.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from icl.analysis import stages
from icl.analysis.behaviour.turning_points import transience
from icl.analysis.stages.agreement import agree
from icl.analysis.stages.points import Signal

STEPS = np.unique(np.r_[0, np.geomspace(1, 500_000, 48), np.linspace(0, 500_000, 48)].astype(int))
"""Saved steps. Half of them are spaced logarithmically and half linearly, as in the published runs."""
TIMES = np.log1p(STEPS)
PHIS = (0.0, 0.5, 0.8, 0.9)
TURN = {0.0: 10.0, 0.5: 20.0, 0.8: 25.0, 0.9: 20.0}
"""Size of the turn for each phi, in standard deviations of the scatter. The turn is larger if the scatter is correlated, so that the
strength of the boundary stays about the same."""
ONSET = 50.0
"""Size of the motion after an onset, in standard deviations of the scatter."""


_STAGE_KINDS = ("noise", "line", "turn", "language noise", "language line", "onset")


class Case(NamedTuple):
    """A kind of curve, a correlation, and the number of simulated runs."""

    kind: str
    phi: float
    num_runs: int


def main(words: Sequence[str] | None = None) -> None:
    """Simulate all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs",
        type=int,
        default=1000,
        help="number of simulated runs for each correlation of `flat tail` and `rise`; the other kinds have half as many",
    )
    parser.add_argument("--jobs", type=int, default=2, help="number of processes")
    parser.add_argument("--out", type=Path, default=Path("data/verdict-rates.csv"), help="file to write")
    options = parser.parse_args(words)
    cases = list(_cases(options.runs))
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = []
        for row in pool.map(rate, cases):
            rows.append(row)
            print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(options.out, index=False)


def rate(case: Case) -> dict[str, object]:
    """Return the row of a case: the share of runs with the verdict `ok`, its standard error, and the share with `suspect`."""
    torch.set_num_threads(1)
    judge = _transience if case.kind in ("flat tail", "rise") else _stages
    verdicts = [judge(case.kind, case.phi, np.random.default_rng([number, 7])) for number in range(case.num_runs)]
    share = verdicts.count("ok") / case.num_runs
    error = math.sqrt(share * (1 - share) / case.num_runs)
    doubtful = (verdicts.count("suspect") / case.num_runs) if case.num_runs else 0.0
    return {
        "kind": case.kind,
        "phi": case.phi,
        "runs": case.num_runs,
        "ok": round(share, 4),
        "stderr": round(error, 4),
        "suspect": round(doubtful, 4),
    }


def autoregression(phi: float, num_steps: int, rng: np.random.Generator) -> np.ndarray:
    """Return scatter of variance one with correlation `phi` between neighbours."""
    noise = rng.standard_normal(num_steps)
    noise[1:] *= math.sqrt(1 - phi**2)
    for step in range(1, num_steps):
        noise[step] += phi * noise[step - 1]
    return noise


def _cases(num_runs: int) -> Iterator[Case]:
    for kind in (*_STAGE_KINDS, "flat tail", "rise"):
        for phi in PHIS:
            yield Case(kind, phi, num_runs if kind in ("flat tail", "rise") else max(1, num_runs // 2))


def _transience(kind: str, phi: float, rng: np.random.Generator) -> str:
    curve = 50 / (1 + np.exp(2 * (TIMES - 4)))
    if kind == "rise":
        curve = curve + 10 * ((TIMES - 8) / (TIMES[-1] - 8)).clip(0, 1)
    curve = curve + autoregression(phi, len(TIMES), rng)
    prompts = 0.02 * rng.standard_normal((len(TIMES), 64))
    losses = torch.from_numpy(curve[:, None] + prompts)
    found = transience(torch.from_numpy(STEPS), losses, zero=torch.full((64,), 50.0), ridge=torch.zeros(64))
    if found.finding == "none":
        return "none"
    return found.verdict


def _stages(kind: str, phi: float, rng: np.random.Generator) -> str:
    """Return the best verdict of any boundary, or `none` if there is no boundary.

    For `turn` and `onset`, only boundaries within one unit of log time of the true one count.
    """
    middle, late = TIMES[-1] / 2, 3 * TIMES[-1] / 4
    is_language = kind in ("language noise", "language line", "onset")
    shapes = {
        "noise": 0 * TIMES,
        "line": TIMES / TIMES[-1] / 0.03,
        "turn": TURN[phi] * (1 - np.abs(TIMES / middle - 1)),
        "onset": ONSET * ((TIMES - late) / (TIMES[-1] - late)).clip(0),
    }
    signals = []
    for name, sign in (("loss", -1.0), ("prefix_matching" if is_language else "llc", 1.0)):
        values = sign * shapes[kind.removeprefix("language ")] + autoregression(phi, len(TIMES), rng)
        points = pd.DataFrame({"step": STEPS, "checkpoint_hash": "", "stderr": 0.0, "value": values})
        signals.append(Signal(name, "simulated", points, has_onsets=is_language))
    settings = stages.Settings()
    fits = {signal.name: stages.smooth_signal(signal, settings) for signal in signals}
    boundaries = agree(signals, fits, tolerance=settings.tolerance, least_change=settings.least_change)
    if kind in ("turn", "onset"):
        true = middle if kind == "turn" else late
        boundaries = [each for each in boundaries if abs(each.time - true) < 1.0]
    verdicts = {each.verdict for each in boundaries}
    return next((verdict for verdict in ("ok", "suspect", "invalid") if verdict in verdicts), "none")


if __name__ == "__main__":
    main()

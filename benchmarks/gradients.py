"""Count the gradients that SGLD and BAOAB need for an LLC of given accuracy: `python -m benchmarks.gradients`.

The counts do not depend on the machine. The losses have known LLCs and no minibatches. Each of many chains gives one estimate, from the
mean of S draws. Over chains, these estimates have variance v / S and bias b. So a root mean square error r needs v / (r^2 - b^2)
gradients, without burn-in. Each kernel uses the best of a few step sizes.

`python -m benchmarks.equal_error` compares samplers on a checkpoint of a model.
"""

import argparse
import math
from typing import NamedTuple

from icl.config import ChainsConfig
from icl.config.sampler import Kernel
from icl.sampling import estimate_llcs
from icl.sampling.self_test import Problem, problems

NAMES = ("stiff quadratic, steps counted", "normal crossing a^2 b^2", "separable a^4 + b^4 + c^2")
"""Names of the test problems, from the self-test."""
STEPS: dict[Kernel, tuple[float, ...]] = {"sgld": (0.125, 0.25, 0.5, 1, 2), "baoab": (0.5, 1, 2, 4)}
"""Step sizes to try, as multiples of the step size that the self-test uses for the problem."""
ERROR = 0.03
"""Root mean square error to reach, as a share of the true LLC."""


class Efficiency(NamedTuple):
    """Accuracy of a kernel's estimates at one step size."""

    bias: float
    variance: float
    """Variance of an estimate, multiplied by the number of gradients in the estimate."""

    def gradients(self, error: float) -> float:
        """Return the number of gradients needed for a root mean square error; infinite if the bias alone exceeds this error."""
        left = error**2 - self.bias**2
        return self.variance / left if left > 0 else math.inf


def on_problem(
    problem: Problem, kernel: Kernel, factor: float, *, num_chains: int = 128, num_draws: int = 4000
) -> Efficiency:
    """Measure a kernel on a problem with a known LLC, at `factor` times the problem's step size."""
    assert problem.finite is not None
    (nbeta,), lr = problem.nbetas, factor * problem.sampler["lr"]
    settings = ChainsConfig(
        kernel=kernel,
        lr=lr,
        nbeta=nbeta,
        localization=problem.sampler["localization"],
        num_chains=num_chains,
        num_draws=num_draws,
        num_burnin_steps=num_draws // 2,
    )
    (result,) = estimate_llcs(problem.loss, [problem.params], problem.batches, settings)
    means = result.llc_per_chain
    return Efficiency(float(means.mean()) - problem.finite(nbeta, 0.0), num_draws * float(means.var()))


def main() -> None:
    """Print the best step size and its number of gradients, for each problem and kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    for problem in problems():
        if problem.name in NAMES:
            assert problem.finite is not None
            truth = problem.finite(problem.nbetas[0], 0.0)
            best = {}
            for kernel, factors in STEPS.items():
                tried = {factor: on_problem(problem, kernel, factor) for factor in factors}
                factor = min(factors, key=lambda factor: tried[factor].gradients(ERROR * truth))
                best[kernel] = tried[factor].gradients(ERROR * truth)
                print(
                    f"{problem.name:34} {kernel:6} lr {factor * problem.sampler['lr']:.3g}: bias {tried[factor].bias:+.4f}, "
                    f"gradients for {ERROR:.0%}: {best[kernel]:,.0f}",
                    flush=True,
                )
            print(f"{problem.name:34} ratio {best['sgld'] / best['baoab']:.1f}", flush=True)


if __name__ == "__main__":
    main()

"""Curvature at every saved step: extreme eigenvalues, trace and spectrum of the Hessian of the loss.

The loss is the training loss per target (squared error, or negative log-likelihood: `icl.model.heads`), averaged over
positions and over fixed prompts, which are the same at all steps. The Hessian covers all P parameters. Some parameters
never affect the loss, so their entries are zero: the last position embedding and, if `model.output` is `token`, all
rows of the unembedding except row 0. A Hessian-vector product is the vector-Jacobian product of the gradient
(torch.func), computed for many checkpoints at once. From these products, `icl.compute.linalg` estimates the eigenvalues
and the spectrum by the Lanczos method, which begins with a random start vector. It estimates the trace with more random
vectors, called probes. Each saved step has its own start vector and probes, so the errors that these vectors cause are
independent between steps.

For comparison: the data released with Hoogland et al. 2024 contain the trace and the three largest eigenvalues for the mean
squared error on 1,024 prompts. For L2H4 with `model.double_residual`, the released trace is about 150 at the start and 2,800 at
step 20,000.

Rows of the table, by `quantity`:

- `eigenvalue`: the parts `top 1`, `top 2`, ... are the largest eigenvalues in descending order. The parts `bottom 1`,
  ... are the smallest (most negative) ones in ascending order. `stderr` is the standard error over the random choice of
  the prompts, to first order. `stderr` does not include the bias of the eigenvalues: with a finite number of prompts,
  the eigenvalues at both ends are more extreme than those of the expected loss. `lanczos_error` is the estimated error
  of the Lanczos method for these prompts. If it exceeds 1 % of the eigenvalue, the verdict is `suspect`.
- `trace`: `stderr` accounts for the random choice of the prompts and of the probes. If the standard error from the
  probes alone exceeds 5 % of the trace, the verdict is `suspect`.
- `spectral_node`, `spectral_weight`: approximate eigenvalues, and the share of all P eigenvalues that each of them represents.
  The shares are estimated from one random start vector.
- `num_parameters`: P.

If the Hessian of a checkpoint is not finite, its numbers are NaN and their verdict is `invalid`.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, vjp

from icl import rng
from icl.analysis.prompts import PromptSettings, fixed_prompts, prompts_at_once, require_multiple
from icl.analysis.run import Members, Result, as_table, over_checkpoints, setting
from icl.compute.linalg import Krylov, Products, Ritz, Trace, lanczos, ritz, trace
from icl.config import ModelConfig
from icl.config.validation import require_count
from icl.model.flat import layout_of
from icl.model.stacked import Params, target_losses
from icl.runs.measure import Entry, Measurement
from icl.tasks.prompts import Prompts

NUM_BATCHES = 8
"""Number of batches of prompts. The standard error over the choice of prompts is estimated from the scatter between
batches."""
VERSION = 1
_MEMBERS_AT_ONCE = 4
"""Largest number of checkpoints that are measured together. With this small number, results are saved every few seconds. A larger
number is hardly faster."""
_MAX_LANCZOS_ERROR = 0.01
_MAX_PROBE_ERROR = 0.05
_NOT_FINITE = "the Hessian of the loss is not finite; check the loss in metrics.csv: training may have diverged"

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings(PromptSettings):
    """Options of `icl analyse RUN --what hessian`."""

    num_prompts: int = setting(256, f"number of prompts, in {NUM_BATCHES} batches; 1024 in Hoogland et al. 2024")
    num_steps: int = setting(40, "number of Lanczos steps; each costs one Hessian-vector product per batch")
    num_probes: int = setting(
        16, "number of random probes for the trace; each costs one Hessian-vector product per batch"
    )
    num_eigenvalues: int = setting(3, "number of eigenvalues reported at each end of the spectrum")

    def __post_init__(self) -> None:
        require_multiple("num_prompts", self.num_prompts, NUM_BATCHES)
        require_count("num_eigenvalues", self.num_eigenvalues, 1)
        require_count("num_steps", self.num_steps, 2 * self.num_eigenvalues)
        require_count("num_probes", self.num_probes, 2)


def analyse(path: Path, settings: Settings) -> Result:
    """Compute eigenvalues, trace and spectrum at every saved step.

    Raises:
        CheckpointError: If there is no usable checkpoint.
    """
    measure = partial(measure_members, settings=settings)
    entries, _ = over_checkpoints("hessian", path, settings, measure, version=VERSION, max_members=_MEMBERS_AT_ONCE)
    return Result(as_table(entries, settings), _summary(entries))


def measure_members(members: Members, *, settings: Settings) -> list[Measurement]:
    """Measure eigenvalues, trace and spectrum of every checkpoint, as many checkpoints at a time as memory allows."""
    prompts = fixed_prompts(members, "hessian/prompts", settings.distribution, settings.num_prompts)
    at_once = prompts_at_once(members)
    group = max(1, at_once // settings.num_prompts)
    steps = torch.tensor([checkpoint.step for checkpoint in members.checkpoints])
    key = rng.stream(members.config.seeds.evaluation, "hessian/vectors")
    measurements: list[Measurement] = []
    for start in range(0, len(steps), group):
        params = {name: tensor[start : start + group] for name, tensor in members.params.items()}
        products = hessian_products(members.config.model, params, prompts, NUM_BATCHES, prompts_at_once=at_once)
        vectors = _random_vectors(key, steps[start : start + group], params)
        krylov = lanczos(products, next(vectors), settings.num_steps)
        signs = (next(vectors).sign() for _ in range(settings.num_probes))
        traces, eigenvalues, num_parameters = trace(products, krylov, signs), _ritz(krylov), krylov.basis.shape[-1]
        for member in range(len(krylov.basis)):
            rows = [*_eigenvalue_rows(eigenvalues, member, settings.num_eigenvalues), _trace_row(traces, member)]
            measurements.append(Measurement(rows + _spectrum_rows(eigenvalues, member, num_parameters)))
    return measurements


def hessian_products(
    model: ModelConfig, params: Params, prompts: Prompts, num_batches: int, *, prompts_at_once: int
) -> Products:
    """Return a function that multiplies vectors (N, P) by the Hessian of each checkpoint's mean loss on each batch.

    The P parameters are in the order of `params`. Each pair of a checkpoint and a batch is treated as a separate model
    (a member). If all prompts fit in one pass (`prompts_at_once`), the gradient is computed once and reused for all
    products.
    """
    layout = layout_of(params, alignment=1)  # no padding: padded entries would count as flat directions
    weights = layout.to_rows(params)  # N P
    count, size = len(weights), len(prompts.ys) // num_batches
    num_together = max(1, min(num_batches, prompts_at_once // size))

    def pullback(first: int) -> Products:
        """Return the products for `num_together` batches, beginning with batch `first`."""
        batches = slice(first * size, min(first + num_together, num_batches) * size)
        xs, ys = (
            tensor[batches].unflatten(0, (-1, size)).repeat(count, *[1] * tensor.ndim)
            for tensor in (prompts.xs, prompts.ys)
        )  # NJ b K D and NJ b K

        def loss(flat: Float[Tensor, "NJ P"]) -> Tensor:
            losses = target_losses(model, layout.to_params(flat), xs, ys)  # NJ b K
            # Members do not interact, so the sum gives each member its own derivatives.
            return losses.mean((-2, -1)).sum()

        copies = len(ys) // count
        pull: Callable[[Tensor], tuple[Tensor]] = vjp(grad(loss), weights.repeat_interleave(copies, dim=0))[1]
        return lambda vectors: pull(vectors.repeat_interleave(copies, dim=0))[0].unflatten(0, (count, copies))

    firsts = range(0, num_batches, num_together)
    if len(firsts) == 1:
        return pullback(0)
    return lambda vectors: torch.cat([pullback(first)(vectors) for first in firsts], dim=1)


def _ritz(krylov: Krylov) -> Ritz:
    """Return the eigenvalues of each checkpoint; NaN for a checkpoint whose Hessian is not finite.

    Such a matrix would make the eigenvalue solver raise an error for all checkpoints, so we replace it by zeros first.
    """
    is_finite = krylov.projected.isfinite().flatten(1).all(1)
    projected = krylov.projected.where(is_finite[:, None, None, None], 0.0)
    return Ritz(*(tensor.where(is_finite[:, None], torch.nan) for tensor in ritz(krylov._replace(projected=projected))))


def _random_vectors(key: rng.Stream, steps: Tensor, params: Params) -> Iterator[Float[Tensor, "N P"]]:
    """Yield vectors of standard normal numbers without end. Each vector depends only on the seed, the step and the vector's index."""
    example = next(iter(params.values()))
    size = sum(tensor[0].numel() for tensor in params.values())
    for index in itertools.count():
        indices = torch.tensor([index], device=example.device)
        yield rng.normal(key, steps.to(example.device), indices, size)[:, 0].to(example)


def _eigenvalue_rows(eigenvalues: Ritz, member: int, num_eigenvalues: int) -> Iterator[Row]:
    values, stderr, errors = (
        column[member].tolist() for column in (eigenvalues.values, eigenvalues.stderr, eigenvalues.errors)
    )
    count = min(num_eigenvalues, len(values))
    ends = [(f"top {i}", -i) for i in range(1, count + 1)] + [(f"bottom {i}", i - 1) for i in range(1, count + 1)]
    for part, index in ends:
        is_far = not errors[index] <= _MAX_LANCZOS_ERROR * abs(values[index])
        reason = f"Lanczos has not converged (error up to about {errors[index]:.2g}); raise num_steps" if is_far else ""
        yield _row("eigenvalue", part, values[index], stderr[index], errors[index], reason)


def _trace_row(traces: Trace, member: int) -> Row:
    value, stderr = (column[member].item() for column in traces.whole)
    probe_stderr = traces.probe_stderr[member].item()
    is_rough = not probe_stderr <= _MAX_PROBE_ERROR * abs(value)
    reason = (
        f"the probes' standard error is {probe_stderr:.2g}, above 5 % of the trace; raise num_probes"
        if is_rough
        else ""
    )
    return _row("trace", "all", value, stderr, reason=reason)


def _spectrum_rows(eigenvalues: Ritz, member: int, num_parameters: int) -> list[Row]:
    rows = [_row("num_parameters", "all", float(num_parameters))]
    pairs = zip(eigenvalues.values[member].tolist(), eigenvalues.weights[member].tolist(), strict=True)
    for number, (node, weight) in enumerate(pairs, start=1):
        # Over random start vectors, a weight has a beta distribution with about this standard deviation.
        stderr = (2 * weight * (1 - weight) / num_parameters) ** 0.5
        rows.append(_row("spectral_node", f"node {number}", node))
        rows.append(_row("spectral_weight", f"node {number}", weight, stderr))
    return rows


def _row(
    quantity: str, part: str, value: float, stderr: float = torch.nan, error: float = torch.nan, reason: str = ""
) -> Row:
    is_finite = math.isfinite(value)
    return {
        "quantity": quantity,
        "part": part,
        "value": value,
        "stderr": stderr,
        "lanczos_error": error,
        "verdict": ("suspect" if reason else "ok") if is_finite else "invalid",
        "reasons": reason if is_finite else _NOT_FINITE,
    }


def _summary(entries: list[Entry]) -> list[str]:
    lines = []
    for quantity, name in (("eigenvalue", "eigenvalues"), ("trace", "traces")):
        verdicts = [row["verdict"] for entry in entries for row in entry.rows if row["quantity"] == quantity]
        num_invalid = verdicts.count("invalid")
        invalid = f", and {num_invalid} invalid" if num_invalid else ""
        lines.append(f"Suspect {name}: {verdicts.count('suspect')} of {len(verdicts)}{invalid}.")
    lines.append(f"At step {entries[-1].step:,}, the last of {len(entries)} saved steps:")
    for row in entries[-1].rows:
        if row["quantity"] in ("eigenvalue", "trace"):
            doubt = f"   {row['verdict']}: {row['reasons']}" if row["reasons"] else ""
            name = "trace" if row["quantity"] == "trace" else f"eigenvalue {row['part']}"
            lines.append(f"  {name:20s} {row['value']:>10.4g} ± {row['stderr']:.2g}{doubt}")
    return lines

"""Curvature at every saved step: the largest and smallest eigenvalues of the loss's Hessian, its trace and its spectrum.

The loss is per target, the mean over positions and fixed prompts, the same at all steps; all parameters count, also those
that no prediction depends on (the unread rows of the unembedding), which have zero rows. Hessian-vector products are
the vector-Jacobian product of the gradient (torch.func), for a population at once; `icl.linalg` makes the
numbers from them. Start and probes are drawn anew at each step, so that their errors do not move along with training.

The data released with Hoogland et al. 2024 have trace and three largest eigenvalues of the mean squared error on 1,024
prompts: of L2H4 with `model.double_residual` a trace of about 150 at the start and 2,800 at 20k steps.

- `eigenvalue`, parts `top 1`, `top 2`, ... from the largest and `bottom 1`, ... from the smallest (most negative). `stderr` is for
  another draw of prompts, to first order (a finite draw's extremes lie outside the expected loss's); `lanczos_error` is what the method
  may be off on these prompts, and the verdict is `suspect` where that is more than 1 %.
- `trace`: `stderr` is for other prompts and other probes; `suspect` where the probes' part is more than 5 %.
- `spectral_node`, `spectral_weight`: eigenvalues and the shares of all P eigenvalues that they stand for (one random start);
  `num_parameters` is P.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, vjp

from icl import metrics, rng
from icl.analysis.prompts import fixed_prompts, prompts_at_once
from icl.analysis.run import Members, Result, as_table, over_checkpoints
from icl.config import ModelConfig
from icl.flat import layout_of
from icl.linalg import Krylov, Products, Ritz, Trace, lanczos, ritz, trace
from icl.measure import Entry, Measurement
from icl.stacked import Params, apply
from icl.tasks.prompts import Prompts
from icl.validation import ConfigError

NUM_BATCHES = 8
"""Into which the prompts are cut, to see what another draw of them would change."""
VERSION = 1
_MEMBERS_AT_ONCE = 4
"""So that progress shows and is kept every few seconds; larger populations are hardly faster."""
_MAX_LANCZOS_ERROR = 0.01
_MAX_PROBE_ERROR = 0.05

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `icl analyse RUN --what hessian` can be told."""

    distribution: Literal["pretrain", "true"] = field(
        default="pretrain", metadata={"help": "tasks of the prompts: the run's M, or new ones"}
    )
    num_prompts: int = field(default=256, metadata={"help": f"prompts, in {NUM_BATCHES} batches; published: 1024"})
    num_steps: int = field(default=40, metadata={"help": "Lanczos steps: Hessian-vector products for the eigenvalues"})
    num_probes: int = field(default=16, metadata={"help": "further products for the trace"})
    num_eigenvalues: int = field(default=3, metadata={"help": "eigenvalues reported at either end"})

    def __post_init__(self) -> None:
        if self.num_prompts < NUM_BATCHES or self.num_prompts % NUM_BATCHES:
            raise ConfigError(
                f"`num_prompts` must be a multiple of {NUM_BATCHES}, the number of its batches, got {self.num_prompts}."
            )
        for name, least in (("num_eigenvalues", 1), ("num_steps", 2 * self.num_eigenvalues), ("num_probes", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")


def analyse(path: Path, settings: Settings) -> Result:
    """Eigenvalues, trace and spectrum at every saved step.

    Raises:
        CheckpointError: If there is no usable checkpoint.
    """
    measure = partial(measure_members, settings=settings)
    entries, _ = over_checkpoints("hessian", path, settings, measure, version=VERSION, max_members=_MEMBERS_AT_ONCE)
    return Result(as_table(entries, settings), _summary(entries))


def measure_members(members: Members, *, settings: Settings) -> list[Measurement]:
    """The rows of every member, some members at a time."""
    prompts = fixed_prompts(
        members, stream="hessian/prompts", distribution=settings.distribution, count=settings.num_prompts
    )
    at_once = prompts_at_once(members)
    group = max(1, at_once // settings.num_prompts)
    steps = torch.tensor([checkpoint.step for checkpoint in members.checkpoints])
    key = rng.stream(members.config.seeds.evaluation, "hessian/vectors")
    found: list[Measurement] = []
    for start in range(0, len(steps), group):
        params = {name: tensor[start : start + group] for name, tensor in members.params.items()}
        products = hessian_products(members.config.model, params, prompts, NUM_BATCHES, prompts_at_once=at_once)
        vectors = _vectors(key, steps[start : start + group], params)
        krylov = lanczos(products, next(vectors), settings.num_steps)
        signs = (next(vectors).sign() for _ in range(settings.num_probes))
        found += _measurements(krylov, trace(products, krylov, signs), settings.num_eigenvalues)
    return found


def hessian_products(
    model: ModelConfig, params: Params, prompts: Prompts, num_batches: int, *, prompts_at_once: int
) -> Products:
    """Products of vectors (N, P) with the Hessian of each member's mean loss on each batch of the same prompts.

    The order of the P parameters is that of `params`. All batches are members of one population; what the gradient
    left behind is kept from product to product if `prompts_at_once` of each member's prompts are all there are.
    """
    layout = layout_of(params, alignment=1)  # no padding: it would count as P - size flat directions
    weights = layout.to_rows(params)  # N P
    count, size = len(weights), len(prompts.ys) // num_batches
    num_together = max(1, min(num_batches, prompts_at_once // size))

    def pullback(first: int) -> Products:
        batches = slice(first * size, min(first + num_together, num_batches) * size)
        xs, ys = (
            each[batches].unflatten(0, (-1, size)).repeat(count, *[1] * each.ndim) for each in (prompts.xs, prompts.ys)
        )  # NJ b K D and NJ b K

        def loss(flat: Float[Tensor, "NJ P"]) -> Tensor:
            errors = metrics.squared_error(apply(model, layout.to_params(flat), xs, ys), ys)  # NJ b K
            return errors.mean((-2, -1)).sum()  # members do not meet, so neither do their derivatives

        copies = len(ys) // count
        pull: Callable[[Tensor], tuple[Tensor]] = vjp(grad(loss), weights.repeat_interleave(copies, dim=0))[1]
        return lambda vectors: pull(vectors.repeat_interleave(copies, dim=0))[0].unflatten(0, (count, copies))

    firsts = range(0, num_batches, num_together)
    kept = pullback(0) if len(firsts) == 1 else None
    return kept or (lambda vectors: torch.cat([pullback(first)(vectors) for first in firsts], dim=1))


def _vectors(key: rng.Stream, steps: Tensor, params: Params) -> Iterator[Float[Tensor, "N P"]]:
    """Endless normal vectors, a pure function of seed, step and number."""
    example = next(iter(params.values()))
    size = sum(tensor[0].numel() for tensor in params.values())
    index = 0
    while True:
        numbers = torch.tensor([index], device=example.device)
        yield rng.normal(key, steps.to(example.device), numbers, size)[:, 0].to(example)
        index += 1


def _measurements(krylov: Krylov, traces: Trace, num_eigenvalues: int) -> list[Measurement]:
    found, num_parameters = ritz(krylov), krylov.basis.shape[-1]
    return [
        Measurement(
            [
                *_eigenvalue_rows(found, n, num_eigenvalues),
                _trace_row(traces, n),
                *_spectrum_rows(found, n, num_parameters),
            ]
        )
        for n in range(len(krylov.basis))
    ]


def _eigenvalue_rows(found: Ritz, member: int, num_eigenvalues: int) -> Iterator[Row]:
    values, stderr, errors = (column[member].tolist() for column in (found.values, found.stderr, found.errors))
    numbers = range(1, min(num_eigenvalues, len(values)) + 1)
    for part, indices in (("top", [-number for number in numbers]), ("bottom", [number - 1 for number in numbers])):
        for number, index in zip(numbers, indices, strict=True):
            is_far = errors[index] > _MAX_LANCZOS_ERROR * abs(values[index])
            reason = f"Lanczos has not converged: may be off by {errors[index]:.2g}; raise num_steps" if is_far else ""
            yield _row("eigenvalue", f"{part} {number}", values[index], stderr[index], errors[index], reason)


def _trace_row(traces: Trace, member: int) -> Row:
    value, stderr = (column[member].item() for column in traces.whole)
    probe_stderr = traces.probe_stderr[member].item()
    is_rough = probe_stderr > _MAX_PROBE_ERROR * abs(value)
    reason = f"standard error over probes {probe_stderr:.2g}; raise num_probes" if is_rough else ""
    return _row("trace", "all", value, stderr, reason=reason)


def _spectrum_rows(found: Ritz, member: int, num_parameters: int) -> Iterator[Row]:
    yield _row("num_parameters", "all", float(num_parameters))
    pairs = zip(found.values[member].tolist(), found.weights[member].tolist(), strict=True)
    for number, (node, weight) in enumerate(pairs, start=1):
        yield _row("spectral_node", f"node {number}", node)
        stderr = (2 * weight * (1 - weight) / num_parameters) ** 0.5
        yield _row("spectral_weight", f"node {number}", weight, stderr)


def _row(
    quantity: str, part: str, value: float, stderr: float = torch.nan, error: float = torch.nan, reason: str = ""
) -> Row:
    return {
        "quantity": quantity,
        "part": part,
        "value": value,
        "stderr": stderr,
        "lanczos_error": error,
        "verdict": "suspect" if reason else "ok",
        "reasons": reason,
    }


def _summary(entries: list[Entry]) -> list[str]:
    rows = [row for entry in entries for row in entry.rows if row["quantity"] in ("eigenvalue", "trace")]
    lines = []
    for quantity, name in (("eigenvalue", "Eigenvalues"), ("trace", "Traces")):
        own = [row for row in rows if row["quantity"] == quantity]
        lines.append(f"{name} in doubt: {sum(row['verdict'] != 'ok' for row in own)} of {len(own)}.")
    lines.append(f"Step {entries[-1].step:,}, the last of {len(entries)}:")
    for row in entries[-1].rows:
        if row["quantity"] in ("eigenvalue", "trace"):
            doubt = f"   {row['verdict']}: {row['reasons']}" if row["reasons"] else ""
            name = "trace" if row["quantity"] == "trace" else f"eigenvalue {row['part']}"
            lines.append(f"  {name:20s} {row['value']:>10.4g} ± {row['stderr']:.2g}{doubt}")
    return lines

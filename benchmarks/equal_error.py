"""Compare the work, in gradients and in CPU time, that samplers need to estimate a checkpoint's LLC with the same error.

    python -m benchmarks.equal_error data/small/models/quickstart/step-000005000.safetensors --reference 44.0

`--reference` is the checkpoint's LLC from a much longer estimate. The error of this reference should be at most a third of the samplers'
errors. Each sampler estimates the LLC several times, with different noise. Its bias is the mean of the estimates minus the reference. Its
error is the root mean square error (RMSE) over the repetitions.

- `baoab` has the sampler of the checkpoint's preset, with the changes that you give, such as `--lr` or `--num_draws`.
- `sgld` runs with several step sizes. Its burn-in has 3 / (lr localization) moves, after which 95 % of the way to equilibrium is done in the
  flattest directions. Its draws are two thirds as many. So the number of moves times lr is the same for every step size.
- `devinterp` is SGLD in devinterp 1.3.2, with the sizes of our SGLD. We give it the checkpoint's loss on many batches. Without this, its
  estimate would have the noise of a few batches.

The columns `gradients` and `seconds` are the costs of one estimate. For our samplers, they include the burn-in, the diagnostics, the
control variates, the prompts and the checkpoint's loss. For devinterp, they include only the burn-in and the draws, so the comparison
favours devinterp.

If a sampler had N times as many draws, the variance of its estimate would be divided by N, and its bias would stay. The last two columns
are the gradients and the CPU seconds for the N with which a sampler reaches the RMSE of `baoab`. They are infinite if the sampler's bias
alone exceeds this RMSE. All costs are multiplied by N, including the burn-in, although a longer chain needs no longer burn-in. The CPU time is
the process time, so run the command with one thread (`OMP_NUM_THREADS=1`). With `--factors 1 --repetitions 6`, the checkpoint above takes about
half an hour on one core; with the default options, several hours.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from benchmarks.peers import PlainTransformer
from benchmarks.sampling import devinterp_sampler, has_devinterp
from icl.build import build_checkpoint_model
from icl.config import SamplerConfig
from icl.config.validation import ConfigError
from icl.model.flat import Layout
from icl.model.stacked import Params
from icl.presets import preset
from icl.runs.checkpoints import Checkpoint, CheckpointError, load_checkpoint_file
from icl.sampling.batches import Batch
from icl.sampling.prompt_loss import prompt_target
from icl.sampling.run import estimate_grid
from icl.tasks.prompts import sample_prompts

FACTORS = (1.0, 0.5, 0.25)
"""Step sizes of SGLD, as multiples of the step size of `baoab`."""
NUM_PLAIN_PROMPTS = 2**17
"""Number of prompts in the data set of devinterp."""
_NAMES = {
    "token_embedding": "embedding",
    "position_embedding": "positions",
    "attention.qkv": "qkv",
    "attention.output": "output",
    "mlp.hidden": "mlp.0",
    "mlp.output": "mlp.2",
    "final_norm": "norm",
}
"""Our names of parameters, and those of `PlainTransformer`."""
_SIZE_OPTIONS = {
    "batch_size": "number of prompts in a minibatch",
    "num_chains": "number of chains of every sampler",
    "num_draws": "number of draws of each chain of `baoab`",
}
_SIZES = ("num_layers", "num_heads", "embed_size", "mlp_size")


class Estimate(NamedTuple):
    """One estimate, with its cost."""

    llc: float
    gradients: int
    seconds: float


class Accuracy(NamedTuple):
    """Accuracy and cost of a sampler, over repeated estimates."""

    bias: float
    bias_stderr: float
    deviation: float
    """Standard deviation of one estimate."""
    gradients: float
    """Gradients of one estimate."""
    seconds: float
    """CPU seconds of one estimate."""

    @classmethod
    def over(cls, estimates: Sequence[Estimate], reference: float) -> "Accuracy":
        """Compare repeated estimates with the reference."""
        llcs = torch.tensor([estimate.llc for estimate in estimates], dtype=torch.float64)
        deviation, num = float(llcs.std()), len(estimates)
        costs = (sum(cost) / num for cost in zip(*(estimate[1:] for estimate in estimates), strict=True))
        return cls(float(llcs.mean()) - reference, deviation / num**0.5, deviation, *costs)

    @property
    def rmse(self) -> float:
        """Root mean square error, without the part of the measured bias that is only noise of the repetitions."""
        return (self._squared_bias + self.deviation**2) ** 0.5

    @property
    def _squared_bias(self) -> float:
        return max(0.0, self.bias**2 - self.bias_stderr**2)

    def share(self, error: float) -> float:
        """Return how many times the work of one estimate is needed for a given RMSE; infinite if the bias alone exceeds the error."""
        left = error**2 - self._squared_bias
        return self.deviation**2 / left if left > 0 else math.inf


def main(words: Sequence[str] | None = None) -> None:
    """Measure all samplers, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a checkpoint file")
    parser.add_argument("--reference", type=float, required=True, help="the checkpoint's LLC from a longer estimate")
    parser.add_argument("--repetitions", type=int, default=12, help="number of estimates of each sampler (default 12)")
    parser.add_argument("--lr", type=float, help="step size of `baoab`, and largest step size of SGLD")
    parser.add_argument(
        "--factors", type=float, nargs="+", default=FACTORS, help="step sizes of SGLD, as multiples of that of `baoab`"
    )
    for name, text in _SIZE_OPTIONS.items():
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.add_argument("--out", type=Path, help="file .csv to write")
    options = parser.parse_args(words)
    try:
        checkpoint = load_checkpoint_file(options.file)
    except CheckpointError as error:
        parser.error(str(error))
    given = {name: value for name in ("lr", *_SIZE_OPTIONS) if (value := getattr(options, name)) is not None}
    samplers = make_samplers(checkpoint, options.factors, **given)
    accuracies = {}
    for name, estimate in samplers.items():
        seeds = tqdm(range(options.repetitions), desc=name, leave=False)
        accuracies[name] = Accuracy.over([estimate(1000 + seed) for seed in seeds], options.reference)
        print(f"{name}: {accuracies[name]}", flush=True)
    table = as_table(accuracies)
    print(table.to_string(index=False))
    if options.out is not None:
        options.out.write_text(table.to_csv(index=False))


def as_table(accuracies: dict[str, Accuracy]) -> pd.DataFrame:
    """Return a table with one row for each sampler. The costs at equal RMSE refer to the RMSE of the first sampler."""
    error = next(iter(accuracies.values())).rmse
    rows = []
    for name, accuracy in accuracies.items():
        share = accuracy.share(error)
        rows.append(
            {
                "sampler": name,
                **{column: float(f"{value:.3g}") for column, value in accuracy._asdict().items()},
                "rmse": float(f"{accuracy.rmse:.3g}"),
                "gradients_at_equal_rmse": float(f"{share * accuracy.gradients:.3g}"),
                "seconds_at_equal_rmse": float(f"{share * accuracy.seconds:.3g}"),
            }
        )
    return pd.DataFrame(rows)


def make_samplers(
    checkpoint: Checkpoint, factors: Sequence[float], **changes: Any
) -> dict[str, Callable[[int], Estimate]]:
    """Return, for each sampler, a function from a seed to an estimate. The first sampler is `baoab`."""
    baoab = dataclasses.replace(preset(checkpoint.config.preset).sampler, **changes)
    sgld = dataclasses.replace(baoab, kernel="sgld", num_samples=4096 * baoab.batch_size)
    samplers = {f"baoab, lr {baoab.lr:.2g}": our_estimate(checkpoint, baoab)}
    for factor in factors:
        lr = factor * sgld.lr
        burnin = 3 / (lr * sgld.localization)
        longer = dataclasses.replace(sgld, lr=lr, num_burnin_steps=round(burnin), num_draws=round(burnin * 2 / 3))
        samplers[f"sgld, lr {longer.lr:.2g}"] = our_estimate(checkpoint, longer)
        if has_devinterp() and not checkpoint.config.model.double_residual:
            samplers[f"devinterp, lr {longer.lr:.2g}"] = devinterp_estimate(checkpoint, longer)
    return samplers


def our_estimate(checkpoint: Checkpoint, sampler: SamplerConfig) -> Callable[[int], Estimate]:
    """Return a function from a seed to an estimate by `icl`."""

    def estimate(seed: int) -> Estimate:
        settings, num_gradients = dataclasses.replace(sampler, seed=seed), 0
        start = time.process_time()
        target = prompt_target(checkpoint.config, settings)
        gradient = target.chain_gradient

        def counting(layout: Layout, rows: Float[Tensor, "N P"], fixed: Params, batch: Batch) -> tuple[Tensor, Tensor]:
            nonlocal num_gradients
            num_gradients += len(rows)
            return gradient(layout, rows, fixed, batch)

        target = dataclasses.replace(target, gradient=counting)
        ((result,),) = estimate_grid(
            [checkpoint], [settings], target, device=torch.device("cpu"), advance=lambda moves: None
        )
        return Estimate(result.llc, num_gradients, time.process_time() - start)

    return estimate


def devinterp_estimate(checkpoint: Checkpoint, sampler: SamplerConfig) -> Callable[[int], Estimate]:
    """Return a function from a seed to an estimate by devinterp. The time does not include the prompts and the checkpoint's loss."""
    model, config = plain_model(checkpoint), checkpoint.config
    prompts = sample_prompts(config, stream="llc", step=0, batch_size=NUM_PLAIN_PROMPTS)
    with torch.no_grad():
        pairs = zip(prompts.xs.split(sampler.batch_size), prompts.ys.split(sampler.batch_size), strict=True)
        init_loss = sum(float((model(xs, ys) - ys).square().mean()) for xs, ys in pairs)
    init_loss *= sampler.batch_size / NUM_PLAIN_PROMPTS
    kernel = {"lr": sampler.lr, "nbeta": sampler.inverse_temperature, "localization": sampler.localization}
    num_moves = sampler.num_burnin_steps + sampler.num_draws

    def evaluate(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(*batch) - batch[1]).square().mean()

    def estimate(seed: int) -> Estimate:
        torch.manual_seed(seed)
        loader = DataLoader(TensorDataset(prompts.xs, prompts.ys), batch_size=sampler.batch_size, shuffle=True)
        call = devinterp_sampler(
            model,
            loader,
            evaluate,
            kernel,
            num_chains=sampler.num_chains,
            num_moves=num_moves,
            num_draws=sampler.num_draws,
            init_loss=init_loss,
            seed=seed,
        )
        start = time.process_time()
        llc = call()
        return Estimate(llc, sampler.num_chains * num_moves, time.process_time() - start)

    return estimate


def plain_model(checkpoint: Checkpoint) -> PlainTransformer:
    """Return the checkpoint's model as a `PlainTransformer`.

    Raises:
        ConfigError: If the checkpoint has another architecture.
    """
    same = dataclasses.replace(
        preset("L2H4").model, **{name: getattr(checkpoint.config.model, name) for name in _SIZES}
    )
    if checkpoint.config.model != same:
        raise ConfigError(
            "The plain model has the architecture of `L2H4` without double residuals; the checkpoint has another."
        )
    build_checkpoint_model(checkpoint)  # checks the weights
    model, weights = PlainTransformer(checkpoint.config), {}
    for name, tensor in checkpoint.params.items():
        for ours, theirs in _NAMES.items():
            name = name.replace(ours, theirs)
        if name.endswith("qkv.weight"):  # ours is divided by heads first, theirs by queries, keys and values first
            tensor = tensor.unflatten(0, (checkpoint.config.model.num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        weights[name] = tensor
    model.load_state_dict(weights, strict=False)  # the masks `future` are not in checkpoints
    return model


if __name__ == "__main__":
    main()

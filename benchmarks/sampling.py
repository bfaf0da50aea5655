"""Compare the speed of LLC chains in devinterp 1.3.2 and `icl`, with the same model, sizes, threads and precision.

Both programs run 8 SGLD chains on minibatches of 256 prompts and record the losses. Neither program computes the checkpoint's loss.

- devinterp: `devinterp.slt.sampler.sample` with its default `SGLD` and `LLCEstimator` and with `cores=1`, because more cores would
  start new processes at every call. The model is `peers.PlainTransformer`, which is faster than our module on CPUs.
- `icl`: `run_chains`. Its time also includes making the minibatches and computing the MALA acceptance of two moves.
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers import PlainTransformer
from icl.build import build_model
from icl.config import RunConfig, SamplerConfig
from icl.model.flat import make_layout
from icl.model.stacked import stack
from icl.sampling.batches import ChainBatches
from icl.sampling.estimate import run_chains
from icl.sampling.prompt_loss import prompt_target
from icl.tasks.prompts import sample_prompts

NUM_CHAINS, BATCH_SIZE = 8, 256
NUM_MOVES = 48
"""Number of moves of each chain in one call."""
_KERNEL: dict[str, Any] = {"lr": 1e-5, "nbeta": 100.0, "localization": 100.0}
_SIZES: dict[str, Any] = {"num_chains": NUM_CHAINS, "num_draws": 2}


def has_devinterp() -> bool:
    """Return whether devinterp is installed. If it is not, print how to install it."""
    found = find_spec("devinterp") is not None
    if not found:
        print(
            'devinterp is not installed, so the comparison with it is left out; install it with `pip install -e ".[bench]"`.'
        )
    return found


def devinterp_chains(config: RunConfig, device: str, *, num_moves: int = NUM_MOVES) -> Callable[[], float]:
    """Return a function that runs all chains of one checkpoint with devinterp."""
    model = PlainTransformer(config).to(device)
    prompts = sample_prompts(config, stream="llc", step=0, batch_size=16 * BATCH_SIZE)
    loader = DataLoader(TensorDataset(prompts.xs, prompts.ys), batch_size=BATCH_SIZE, shuffle=True)

    def evaluate(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(*batch) - batch[1]).square().mean()

    return devinterp_sampler(
        model, loader, evaluate, _KERNEL, num_chains=NUM_CHAINS, num_moves=num_moves, device=device
    )


def devinterp_sampler(
    model: nn.Module,
    loader: DataLoader,
    evaluate: Callable[[nn.Module, Any], Tensor],
    kernel: dict[str, Any],
    *,
    num_chains: int,
    num_moves: int,
    num_draws: int = 2,
    init_loss: float = 1.0,
    seed: int | None = None,
    device: str = "cpu",
) -> Callable[[], float]:
    """Return a function that runs devinterp's chains and returns the LLC. The last `num_draws` moves of each chain are draws."""
    from devinterp.slt.llc import LLCEstimator
    from devinterp.slt.sampler import sample

    def call() -> float:
        start = torch.tensor(init_loss, device=device)
        estimator = LLCEstimator(num_chains, num_draws, init_loss=start, nbeta=kernel["nbeta"], device=device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on settings
            sample(
                model,
                loader,
                [estimator],
                evaluate=evaluate,
                optimizer_kwargs=dict(kernel),
                num_chains=num_chains,
                num_draws=num_draws,
                num_burnin_steps=num_moves - num_draws,
                init_loss=start,
                cores=1,
                seed=seed,
                device=device,
                verbose=False,
            )
        return float(estimator.get_results()["llc/mean"])

    return call


def our_chains(
    config: RunConfig, device: str, *, num_checkpoints: int = 1, num_moves: int = NUM_MOVES, compiled: bool = True
) -> Callable[[], object]:
    """Return a function that runs all chains of some checkpoints with `icl`."""
    sizes = {**_SIZES, "num_burnin_steps": num_moves - 2}
    sampler = SamplerConfig(kernel="sgld", batch_size=BATCH_SIZE, **_KERNEL, **sizes)
    target = prompt_target(config, sampler, device=device, num_moves=2**40 if compiled else 0)
    one = {name: parameter.detach().to(device) for name, parameter in build_model(config).named_parameters()}
    checkpoints = stack([one] * num_checkpoints)
    return lambda: run_chains(
        target,
        checkpoints,
        ChainBatches(target.batches, sampler),
        [sampler] * num_checkpoints,
        layout=make_layout(one),
        keys=[str(number) for number in range(num_checkpoints)],
        chunk_size=num_checkpoints * NUM_CHAINS,
    )

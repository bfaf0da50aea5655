"""LLC chains: devinterp 1.3.2 against ours, on the same model, sizes, threads and precision.

Both sides run 8 chains of SGLD on minibatches of 256 prompts and keep the losses; the checkpoint's own loss is left out on
both. Theirs is `devinterp.slt.sampler.sample` with its default `SGLD` and `LLCEstimator`, cores=1 (more cores are processes
that start anew for every call), on `peers.PlainTransformer`, which on CPUs is faster than our module. Ours is
`run_chains`, whose work includes making the minibatches and the MALA acceptance of two moves.
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

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
"""Of each chain in one call."""
_KERNEL: dict[str, Any] = {"lr": 1e-5, "nbeta": 100.0, "localization": 100.0}
_SIZES: dict[str, Any] = {"num_chains": NUM_CHAINS, "num_draws": 2}


def has_devinterp() -> bool:
    """Whether the peer is installed; if not, says in a sentence how to get it."""
    found = find_spec("devinterp") is not None
    if not found:
        print('The ratio against devinterp is left out, as it is not installed; `pip install -e ".[bench]"` adds it.')
    return found


def devinterp_chains(config: RunConfig, device: str, *, num_moves: int = NUM_MOVES) -> Callable[[], None]:
    """All chains of one checkpoint at each call."""
    from devinterp.slt.llc import LLCEstimator
    from devinterp.slt.sampler import sample

    model = PlainTransformer(config).to(device)
    prompts = sample_prompts(config, stream="llc", step=0, batch_size=16 * BATCH_SIZE)
    loader = DataLoader(TensorDataset(prompts.xs, prompts.ys), batch_size=BATCH_SIZE, shuffle=True)

    def evaluate(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(*batch) - batch[1]).square().mean()

    def call() -> None:
        estimator = LLCEstimator(NUM_CHAINS, 2, init_loss=1.0, nbeta=_KERNEL["nbeta"], device=device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on settings
            sample(
                model,
                loader,
                [estimator],
                evaluate=evaluate,
                optimizer_kwargs=dict(_KERNEL),
                num_burnin_steps=num_moves - 2,
                init_loss=1.0,
                cores=1,
                device=device,
                verbose=False,
                **_SIZES,
            )

    return call


def our_chains(
    config: RunConfig, device: str, *, num_checkpoints: int = 1, num_moves: int = NUM_MOVES, compiled: bool = True
) -> Callable[[], object]:
    """All chains of some checkpoints at each call."""
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

"""Compare `estimate_llc` with devinterp 1.3.2: the speed of LLC chains on three PyTorch modules.

Both programs run 4 SGLD chains on the same list of minibatches, with the same number of threads. devinterp runs one chain after another. `icl`
gives each thread other chains. As in `benchmarks.sampling`, neither program computes the checkpoint's loss. Nearly all moves are burn-in, so we
measure little more than the time of the moves.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.sampling import devinterp_sampler
from icl.config import ChainsConfig
from icl.model.flat import make_layout
from icl.model.stacked import stack
from icl.sampling.batches import ChainBatches
from icl.sampling.estimate import run_chains
from icl.sampling.llc import LOOP_SIZE
from icl.sampling.modules import module_loss
from icl.sampling.target import Target

NUM_CHAINS, NUM_MOVES, BATCH_SIZE = 4, 128, 64
_KERNEL: dict[str, Any] = {"lr": 1e-6, "nbeta": 10.0, "localization": 100.0}


class _LastToken(nn.Module):
    """Return the last position of a sequence (B, T, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1]


def modules() -> dict[str, tuple[nn.Module, Tensor]]:
    """Return three modules with inputs (B, ...): a perceptron of 300,000 parameters, a small convolutional network and a small transformer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        count = 16 * BATCH_SIZE
        perceptron = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10))
        convolutions = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 49, 10)),
        )
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        transformer = nn.Sequential(
            nn.Embedding(100, 64),
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            _LastToken(),
            nn.Linear(64, 10),
        )
        return {
            "perceptron": (perceptron, torch.randn(count, 784)),
            "convolutions": (convolutions, torch.randn(count, 1, 28, 28)),
            "transformer": (transformer, torch.randint(100, (count, 32))),
        }


def devinterp_module_chains(model: nn.Module, inputs: Tensor) -> Callable[[], float]:
    """Return a function that runs all chains with devinterp."""
    loader = DataLoader(TensorDataset(inputs, _targets(inputs)), batch_size=BATCH_SIZE)

    def evaluate(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    return devinterp_sampler(model, loader, evaluate, _KERNEL, num_chains=NUM_CHAINS, num_moves=NUM_MOVES)


def our_module_chains(model: nn.Module, inputs: Tensor) -> Callable[[], object]:
    """Return a function that runs all chains with `icl`."""
    loss, params = module_loss(model, functional.cross_entropy)
    batches = list(zip(inputs.split(BATCH_SIZE), _targets(inputs).split(BATCH_SIZE), strict=True))
    settings = ChainsConfig(
        kernel="sgld",
        num_chains=NUM_CHAINS,
        num_draws=2,
        num_burnin_steps=NUM_MOVES - 2,
        seed=0,
        num_init_batches=1,
        **_KERNEL,
    )
    layout = make_layout(params)
    target = Target(loss=loss, batches=batches, maps=layout.size <= LOOP_SIZE, is_thread_safe=True)
    checkpoints = stack([params])
    return lambda: run_chains(
        target,
        checkpoints,
        ChainBatches(batches, settings),
        [settings],
        layout=layout,
        keys=["0"],
        chunk_size=NUM_CHAINS,
    )


def _targets(inputs: Tensor) -> Tensor:
    return torch.arange(len(inputs)) % 10

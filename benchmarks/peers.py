"""Plain PyTorch code with which `icl` is compared, written as a competent researcher would write it.

The model is L2H4 of Hoogland et al. 2024, as an `nn.Module` on two tokens per example. `torch.optim.Adam` trains it without gradient clipping.
Attention is computed with explicit matrix products and a softmax, as in the authors' code. On CPUs and for a model of this size, this
is faster than PyTorch's fused kernel.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icl.config import RunConfig


class PlainBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, embed_size: int, num_heads: int, mlp_size: int, num_tokens: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(embed_size), nn.LayerNorm(embed_size)
        self.qkv = nn.Linear(embed_size, 3 * embed_size, bias=False)
        self.output = nn.Linear(embed_size, embed_size, bias=False)
        self.mlp = nn.Sequential(nn.Linear(embed_size, mlp_size), nn.ReLU(), nn.Linear(mlp_size, embed_size))
        self.register_buffer("future", torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map activations (B, T, C) to activations (B, T, C)."""
        size = x.shape[-1] // self.num_heads
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, size)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1) / math.sqrt(size)).masked_fill(self.future, -math.inf)
        x = x + self.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class PlainTransformer(nn.Module):
    """The plain model, which maps prompts to predictions (B, K)."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        task, model = config.task, config.model
        num_tokens = 2 * task.max_examples
        self.embedding = nn.Linear(task.task_size + 1, model.embed_size, bias=False)
        self.positions = nn.Parameter(torch.randn(num_tokens, model.embed_size) * num_tokens**-0.5)
        sizes = (model.embed_size, model.num_heads, model.mlp_size, num_tokens)
        self.blocks = nn.Sequential(*(PlainBlock(*sizes) for _ in range(model.num_layers)))
        self.norm = nn.LayerNorm(model.embed_size)
        self.unembedding = nn.Linear(model.embed_size, task.task_size + 1)

    def forward(self, xs: Tensor, ys: Tensor) -> Tensor:
        """Map inputs (B, K, D) and targets (B, K) to predictions (B, K)."""
        y_tokens = F.pad(ys.unsqueeze(-1), (0, xs.shape[-1]))
        tokens = torch.stack([F.pad(xs, (1, 0)), y_tokens], dim=2).flatten(1, 2)  # B 2K D+1
        x = self.blocks(self.embedding(tokens) + self.positions)
        return self.unembedding(self.norm(x))[:, ::2, 0]


def plain_loop(config: RunConfig, device: str) -> Callable[[], None]:
    """Return a function that makes one step of the plain training loop, including the prompts."""
    task, batch_size = config.task, config.trainer.batch_size
    model = PlainTransformer(config).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.optim.lr)

    def step() -> None:
        ws = torch.randn(batch_size, task.task_size, 1, device=device)
        xs = torch.randn(batch_size, task.max_examples, task.task_size, device=device)
        noise = torch.randn(batch_size, task.max_examples, device=device)
        ys = (xs @ ws).squeeze(-1) + task.noise_variance**0.5 * noise
        loss = F.mse_loss(model(xs, ys), ys)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def dmmse_by_prefix(xs: Tensor, ys: Tensor, tasks: Tensor, noise_variance: float) -> Tensor:
    """Return the predictions of discrete MMSE, computed from the formula for each prefix (Raventos et al. 2023, section 2)."""
    predictions = []
    for k in range(ys.shape[1]):
        errors = (ys[:, None, :k] - torch.einsum("bkd,md->bmk", xs[:, :k], tasks)).square().sum(-1)  # B M
        weights = (-errors / (2 * noise_variance)).softmax(dim=1)  # B M
        predictions.append(((weights @ tasks) * xs[:, k]).sum(-1))  # B
    return torch.stack(predictions, dim=1)  # B K


def matrix_products(config: RunConfig, device: str) -> Callable[[], None]:
    """Return a function that computes only the dense matrix products of one training step. Its time is a lower bound for any step.

    These are the products of the forward pass, and of the gradients with respect to inputs and weights. In the last block, all
    products except those of keys and values are computed only for x-tokens, as in our model. The small products inside attention
    are left out.
    """
    model, prompts, num_examples = config.model, config.trainer.batch_size, config.task.max_examples
    width, wide = model.embed_size, model.mlp_size
    shapes = []
    for layer in range(model.num_layers):
        rows = prompts * (2 * num_examples - 1)
        few = prompts * num_examples if layer == model.num_layers - 1 else rows
        shapes += [(few, width, width), (rows, width, 2 * width), (few, width, width)]
        shapes += [(few, width, wide), (few, wide, width)]
    operands = [
        (torch.randn(r, i, device=device), torch.randn(i, o, device=device), torch.randn(r, o, device=device))
        for r, i, o in shapes
    ]

    def step() -> None:
        for x, weight, grad in operands:
            _ = x @ weight, grad @ weight.T, x.T @ grad

    return step

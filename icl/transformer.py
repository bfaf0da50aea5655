"""The model: a decoder-only transformer over prompts, from tokens to predictions, read once from top to bottom.

Tokens x1, y1, ..., xK are embedded, pass through L causal blocks, and are read out at the x-tokens: the prediction
of y_k is coordinate 0 of the output at x_k, which has seen x1, y1, ..., x_k and nothing later.

One model serves the published ones (Raventos et al. 2023, Hoogland et al. 2024, Carroll et al. 2025) by plain options;
`icl.presets` names them. This module is the definition, so attention is written out as in its formula. `icl.stacked` computes
the same for a population of parameter sets, faster, and tests hold the two to the same numbers. Differences from Hoogland
et al.: we drop the last y-token, which no prediction sees (the positional table keeps its 2K rows), and
`double_residual` is off unless asked for.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from icl.config import ModelConfig
from icl.tasks.prompts import to_tokens


def _linear(in_features: int, out_features: int, *, bias: bool) -> nn.Linear:
    """Return a linear map whose weights wait for `initialise`; they are never drawn from the global generator."""
    linear = nn.Linear(in_features, out_features, bias=bias, device="meta")
    for name, parameter in list(linear.named_parameters()):  # `to_empty` would import sympy, a second of every command
        setattr(linear, name, nn.Parameter(torch.empty(parameter.shape)))
    return linear


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


_FIRST_BLOCK = "blocks.0."


class ParameterShapes(NamedTuple):
    """The shapes of a model's parameters by name."""

    around: dict[str, tuple[int, ...]]
    """Those outside the blocks."""
    block: dict[str, tuple[int, ...]]
    """Those of every block, by their names within it."""
    num_layers: int

    @property
    def num_tensors(self) -> int:
        """How many parameter tensors there are."""
        return len(self.around) + self.num_layers * len(self.block)

    def by_name(self) -> dict[str, tuple[int, ...]]:
        """Return all of them; check `num_tensors` first, as there may be millions."""
        blocks = {
            f"blocks.{layer}.{name}": shape for layer in range(self.num_layers) for name, shape in self.block.items()
        }
        return self.around | blocks


class Transformer(nn.Module):
    """Predicts every target of a prompt from the examples before it."""

    def __init__(self, config: ModelConfig, *, task_size: int, max_examples: int) -> None:
        super().__init__()
        self.config, self.task_size, self.max_examples = config, task_size, max_examples
        token_size = task_size + 1
        self.token_embedding = _linear(token_size, config.embed_size, bias=config.embedding_bias)
        self.position_embedding = nn.Parameter(torch.empty(2 * max_examples, config.embed_size))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = _norm(config)
        output_size = 1 if config.output == "scalar" else token_size
        self.unembedding = _linear(config.embed_size, output_size, bias=config.unembedding_bias)

    def forward(self, xs: Float[Tensor, "B K D"], ys: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """The prediction of every y_k from x1, y1, ..., x_k; prompts of any length up to `max_examples`.

        Raises:
            ValueError: If the prompts do not fit the model.
        """
        self._check(xs, ys)
        tokens = to_tokens(xs, ys)  # B T D+1
        num_tokens = tokens.shape[1]
        x = self.token_embedding(tokens) + self.position_embedding[:num_tokens]  # B T C
        future = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=xs.device).triu(1)  # T T
        for block in self.blocks:
            x = block(x, future)  # B T C
        return self.unembedding(self.final_norm(x[:, ::2]))[..., 0]  # B K

    def _check(self, xs: Tensor, ys: Tensor) -> None:
        if xs.ndim != 3 or ys.shape != xs.shape[:2]:
            raise ValueError(f"Expected xs (B, K, D) and ys (B, K), got {tuple(xs.shape)} and {tuple(ys.shape)}.")
        if xs.shape[2] != self.task_size:
            raise ValueError(f"The model was made for inputs of size D = {self.task_size}, got {xs.shape[2]}.")
        if not 1 <= xs.shape[1] <= self.max_examples:
            raise ValueError(f"The model takes 1 to K = {self.max_examples} examples per prompt, got {xs.shape[1]}.")


class Block(nn.Module):
    """Attention, then an MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layer_norm, self.double_residual = config.layer_norm, config.double_residual
        self.attention_norm = _norm(config)
        self.attention = Attention(config)
        self.mlp_norm = _norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Float[Tensor, "B T C"], future: Bool[Tensor, "T T"]) -> Float[Tensor, "B T C"]:
        """The residual stream after this block."""
        if self.layer_norm == "post":
            hidden = self.attention_norm(x + self.attention(x, future))
            hidden = self.mlp_norm(hidden + self.mlp(hidden))
        else:
            hidden = x + self.attention(self.attention_norm(x), future)
            hidden = hidden + self.mlp(self.mlp_norm(hidden))
        return x + hidden if self.double_residual else hidden


class Attention(nn.Module):
    """Causal multi-head self-attention; per head, queries, keys and values of c = C / H channels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.head_size = config.num_heads, config.embed_size // config.num_heads
        self.qkv = _linear(config.embed_size, 3 * config.embed_size, bias=config.attention_bias)
        self.output: nn.Module = nn.Identity()
        if config.attention_output:
            self.output = _linear(config.embed_size, config.embed_size, bias=config.attention_bias)

    def forward(self, x: Float[Tensor, "B T C"], future: Bool[Tensor, "T T"]) -> Float[Tensor, "B T C"]:
        """What each token gathers from those before it and itself."""
        heads = self.qkv(x).unflatten(-1, (self.num_heads, 3, self.head_size))  # B T H 3 c
        q, k, v = heads.permute(3, 0, 2, 1, 4)  # each B H T c
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_size)  # B H T T
        pattern = scores.masked_fill(future, -math.inf).softmax(dim=-1)  # B H T T
        return self.output((pattern @ v).transpose(1, 2).flatten(2))  # B T C


class MLP(nn.Module):
    """One hidden layer, token by token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.hidden = _linear(config.embed_size, config.mlp_size, bias=config.mlp_bias)
        self.output = _linear(config.mlp_size, config.embed_size, bias=config.mlp_bias)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """The MLP's addition to the residual stream."""
        return self.output(self.activation(self.hidden(x)))


@functools.lru_cache(maxsize=16)
def parameter_shapes(config: ModelConfig, *, task_size: int, max_examples: int) -> ParameterShapes:
    """Return the shapes of a model's parameters without making the model, however large it would be.

    Raises:
        ValueError: If PyTorch has no tensors of such a size.
    """
    try:
        with torch.device("meta"):  # tensors that have a shape and no memory
            model = Transformer(
                dataclasses.replace(config, num_layers=1), task_size=task_size, max_examples=max_examples
            )
    except (RuntimeError, TypeError, OverflowError):
        raise ValueError("the configuration describes a model that is too large") from None
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    block = {name.removeprefix(_FIRST_BLOCK): shape for name, shape in shapes.items() if name.startswith(_FIRST_BLOCK)}
    around = {name: shape for name, shape in shapes.items() if not name.startswith(_FIRST_BLOCK)}
    return ParameterShapes(around, block, config.num_layers)


def initialise(model: Transformer, config: ModelConfig, generator: torch.Generator) -> None:
    """Set every parameter in place, in the order of `named_parameters`, from `generator` alone.

    `pytorch` is nn.Linear's default, uniform on +-1/sqrt(fan-in); positions count as a linear map from 2K one-hot
    inputs (Hoogland et al.). `gpt2` is N(0, 0.02^2), residual projections divided by sqrt(2L), biases zero.
    """
    residual_scale = 1 / math.sqrt(2 * config.num_layers)
    fan_in = {
        f"{path}.bias".lstrip("."): module.in_features
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif config.init == "gpt2":
                scale = residual_scale if name.endswith("output.weight") else 1.0
                parameter.zero_() if name.endswith("bias") else parameter.normal_(0, 0.02 * scale, generator=generator)
            else:
                fan = len(parameter) if name == "position_embedding" else fan_in.get(name) or parameter.shape[1]
                parameter.uniform_(-1 / math.sqrt(fan), 1 / math.sqrt(fan), generator=generator)


def _norm(config: ModelConfig) -> nn.Module:
    return nn.Identity() if config.layer_norm == "none" else nn.LayerNorm(config.embed_size)

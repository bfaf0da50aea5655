"""The model: a decoder-only transformer that predicts each target of a prompt from the examples before it.

The tokens x1, y1, ..., xK are embedded, pass through L causal blocks, and are read out at the x-tokens. The output at x_k gives the
prediction of y_k, or its predictive distribution (`icl.model.heads`). This output depends only on x1, y1, ..., x_k.

Depending on its options, this is the model of Raventos et al. (2023), Hoogland et al. (2024) or Carroll et al. (2025).
`icl.presets` contains their settings. Two things differ from Hoogland et al. First, we drop the last y-token, because no
prediction depends on it. The table of position embeddings still has 2K rows. Second, Hoogland et al. add the input of each
block twice. Our option `double_residual` does the same, but is off by default.

This module defines the model, so its code follows the formulas. `icl.model.stacked` computes the same function faster, for many
parameter sets at once. Tests compare the two.

Axis letters: B prompts, K examples, D input dimension, T tokens, C channels, H heads, c = C / H channels of a head, O outputs.
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
from icl.model import heads
from icl.tasks.prompts import to_tokens

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}

_FIRST_BLOCK = "blocks.0."


class ParameterShapes(NamedTuple):
    """The shapes of a model's parameters, keyed by name."""

    outside: dict[str, tuple[int, ...]]
    """Shapes of the parameters outside the blocks."""
    block: dict[str, tuple[int, ...]]
    """Shapes of the parameters of one block, keyed by the names within the block. All blocks have the same shapes."""
    num_layers: int

    @property
    def num_tensors(self) -> int:
        """Number of parameter tensors."""
        return len(self.outside) + self.num_layers * len(self.block)

    @property
    def num_params(self) -> int:
        """Total number of elements of all parameter tensors."""
        in_block = sum(math.prod(shape) for shape in self.block.values())
        return sum(math.prod(shape) for shape in self.outside.values()) + self.num_layers * in_block

    def by_name(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all parameters.

        If the config comes from a checkpoint file, check `num_tensors` first: a damaged file can describe millions of tensors.
        """
        blocks = {
            f"blocks.{layer}.{name}": shape for layer in range(self.num_layers) for name, shape in self.block.items()
        }
        return self.outside | blocks


class Transformer(nn.Module):
    """Transformer that predicts every target of a prompt from the examples before it."""

    def __init__(self, config: ModelConfig, *, task_size: int, max_examples: int) -> None:
        super().__init__()
        self.config, self.task_size, self.max_examples = config, task_size, max_examples
        token_size = task_size + 1
        self.token_embedding = Linear(token_size, config.embed_size, bias=config.embedding_bias)
        self.position_embedding = nn.Parameter(torch.empty(2 * max_examples, config.embed_size))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = _norm(config)
        self.unembedding = Linear(
            config.embed_size, heads.output_size(config, token_size), bias=config.unembedding_bias
        )

    def forward(self, xs: Float[Tensor, "B K D"], ys: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """Predict every y_k from x1, y1, ..., x_k, for prompts of 1 to `max_examples` examples.

        Raises:
            ValueError: If the prompts do not fit the model.
        """
        return heads.predictions(self.config, self.outputs(xs, ys))  # B K

    def predictive(self, xs: Float[Tensor, "B K D"], ys: Float[Tensor, "B K"]) -> heads.Predictive:
        """Return the predictive distribution of every y_k, if `model.output` is `gaussian` or `mixture`.

        Raises:
            ValueError: If the prompts do not fit the model, or `model.output` is `scalar` or `token`.
        """
        return heads.predictive(self.config, self.outputs(xs, ys))

    def losses(self, xs: Float[Tensor, "B K D"], ys: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """Return the training loss of every target: the squared error, or the negative log-likelihood in nats.

        Raises:
            ValueError: If the prompts do not fit the model.
        """
        return heads.target_losses(self.config, self.outputs(xs, ys), ys)

    def outputs(self, xs: Float[Tensor, "B K D"], ys: Float[Tensor, "B K"]) -> Float[Tensor, "B K O"]:
        """Return all outputs at the x-tokens.

        Raises:
            ValueError: If the prompts do not fit the model.
        """
        self._require_prompts_that_fit(xs, ys)
        tokens = to_tokens(xs, ys)  # B T D+1
        num_tokens = tokens.shape[1]
        x = self.token_embedding(tokens) + self.position_embedding[:num_tokens]  # B T C
        # Row t is True at the later tokens s > t, to which token t must not attend.
        future = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=xs.device).triu(1)  # T T
        for block in self.blocks:
            x = block(x, future)  # B T C
        return self.unembedding(self.final_norm(x[:, ::2]))  # B K O; x-tokens are at even positions

    def _require_prompts_that_fit(self, xs: Tensor, ys: Tensor) -> None:
        if xs.ndim != 3 or ys.shape != xs.shape[:2]:
            raise ValueError(f"Expected xs (B, K, D) and ys (B, K), got {tuple(xs.shape)} and {tuple(ys.shape)}.")
        if xs.shape[2] != self.task_size:
            raise ValueError(f"The model takes inputs of size D = {self.task_size}, got {xs.shape[2]}.")
        if not 1 <= xs.shape[1] <= self.max_examples:
            raise ValueError(f"The model takes 1 to K = {self.max_examples} examples per prompt, got {xs.shape[1]}.")


class Block(nn.Module):
    """Block of attention followed by an MLP. The outputs of both are added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layer_norm, self.double_residual = config.layer_norm, config.double_residual
        self.attention_norm = _norm(config)
        self.attention = Attention(config)
        self.mlp_norm = _norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Float[Tensor, "B T C"], future: Bool[Tensor, "T T"]) -> Float[Tensor, "B T C"]:
        """Return the residual stream after this block. `future` marks the tokens that each token must not attend to."""
        if self.layer_norm == "post":
            hidden = self.attention_norm(x + self.attention(x, future))
            hidden = self.mlp_norm(hidden + self.mlp(hidden))
        else:
            hidden = x + self.attention(self.attention_norm(x), future)
            hidden = hidden + self.mlp(self.mlp_norm(hidden))
        return x + hidden if self.double_residual else hidden  # Hoogland et al. add the block's input once more


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2), with c = C / H channels in each head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.head_size = config.num_heads, config.embed_size // config.num_heads
        self.qkv = Linear(config.embed_size, 3 * config.embed_size, bias=config.attention_bias)
        self.output: nn.Module = nn.Identity()
        if config.attention_output:
            self.output = Linear(config.embed_size, config.embed_size, bias=config.attention_bias)

    def forward(self, x: Float[Tensor, "B T C"], future: Bool[Tensor, "T T"]) -> Float[Tensor, "B T C"]:
        """Return the contribution of attention to the residual stream.

        At each token, a head takes the weighted mean of the values of this token and the tokens before it.
        """
        # The 3C outputs of `qkv` are q, k and v of head 1, then q, k and v of head 2, and so on. Checkpoints rely on this order.
        heads = self.qkv(x).unflatten(-1, (self.num_heads, 3, self.head_size))  # B T H 3 c
        q, k, v = heads.permute(3, 0, 2, 1, 4)  # each B H T c
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_size)  # B H T T
        pattern = scores.masked_fill(future, -math.inf).softmax(dim=-1)  # B H T T
        return self.output((pattern @ v).transpose(1, 2).flatten(2))  # B T C


class MLP(nn.Module):
    """Perceptron with one hidden layer, applied to each token separately."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.hidden = Linear(config.embed_size, config.mlp_size, bias=config.mlp_bias)
        self.output = Linear(config.mlp_size, config.embed_size, bias=config.mlp_bias)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """Return the MLP's contribution to the residual stream."""
        return self.output(self.activation(self.hidden(x)))


class Linear(nn.Linear):
    """Linear map that draws no initial weights when it is created. `initialise` draws them from a given generator."""

    def reset_parameters(self) -> None:
        """Leave the weights undefined. PyTorch's own method would draw them from the global generator."""


def _norm(config: ModelConfig) -> nn.Module:
    return nn.Identity() if config.layer_norm == "none" else nn.LayerNorm(config.embed_size)


def parameter_shapes(config: ModelConfig, *, task_size: int, max_examples: int) -> ParameterShapes:
    """Return the shapes of a model's parameters without allocating the model, which may be too large for memory.

    Raises:
        ValueError: If a tensor would be larger than PyTorch allows.
    """
    return shapes_of_module(Transformer, config, task_size=task_size, max_examples=max_examples)


@functools.lru_cache(maxsize=16)
def shapes_of_module(kind: Callable[..., nn.Module], config: ModelConfig, **sizes: int) -> ParameterShapes:
    """Return the shapes of the parameters of `kind(config, **sizes)`, whose blocks are called blocks.0, blocks.1 and so on.

    Raises:
        ValueError: If a tensor would be larger than PyTorch allows.
    """
    one_layer = dataclasses.replace(config, num_layers=1)
    try:
        with torch.device("meta"):  # tensors on this device have a shape but no memory
            model = kind(one_layer, **sizes)
    except (RuntimeError, TypeError, OverflowError):
        raise ValueError("the configuration describes a model that is too large") from None
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    block = {name.removeprefix(_FIRST_BLOCK): shape for name, shape in shapes.items() if name.startswith(_FIRST_BLOCK)}
    outside = {name: shape for name, shape in shapes.items() if not name.startswith(_FIRST_BLOCK)}
    return ParameterShapes(outside, block, config.num_layers)


def initialise(model: Transformer, config: ModelConfig, generator: torch.Generator) -> None:
    """Set every parameter in place, in the order of `named_parameters`. All random numbers come from `generator`.

    Norm gains are set to 1 and norm shifts to 0. With `model.init` = `pytorch`, all other parameters are drawn as nn.Linear draws
    them by default, uniformly between -1/sqrt(fan-in) and 1/sqrt(fan-in). The position embedding counts as a linear map from 2K
    one-hot inputs (Hoogland et al. 2024).

    With `gpt2`, biases are 0 and weights are drawn from N(0, 0.02^2), as in Radford et al. (2018) and the code of GPT-2. For the
    output projections of attention and MLP, the standard deviation is divided by sqrt(2L) (Radford et al. 2019).
    """
    residual_scale = 1 / math.sqrt(2 * config.num_layers)
    fan_in = {"position_embedding": 2 * model.max_examples}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            fan_in |= {f"{path}.weight": module.in_features, f"{path}.bias": module.in_features}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif config.init == "gpt2":
                scale = residual_scale if name.endswith("output.weight") else 1.0
                parameter.zero_() if name.endswith("bias") else parameter.normal_(0, 0.02 * scale, generator=generator)
            else:
                bound = 1 / math.sqrt(fan_in[name])
                parameter.uniform_(-bound, bound, generator=generator)

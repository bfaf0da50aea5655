"""The same model for many parameter sets at once: `icl.transformer`'s maths, laid out for speed.

`icl.transformer` is the definition; this is a second realisation of it, held to the same numbers by tests, on stacked
parameters with a leading axis N. Four things make it fast. Every linear map of all members is one batched matrix
product over all tokens of the batch (one member alone has PyTorch's own fused operations, a tenth faster where they are
not compiled). After the last attention only x-tokens are computed, as only they predict.
Prompts are filled up with an empty last token, which no prediction sees, to the even length T = 2K, for which the
small products of attention run about a quarter faster on CPUs. And there is no mapping by `torch.func.vmap` and no
Python state, so that `torch.compile` sees one plain function.
"""

import math
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from icl.config import ModelConfig
from icl.tasks.prompts import to_tokens
from icl.transformer import ACTIVATIONS

Params: TypeAlias = dict[str, Tensor]
"""Parameters by name; stacked ones have a leading axis N."""

_WIDE = 16
"""Inputs from which on a lone member takes F.linear; of a narrower one's weight CPUs take six times as long a gradient."""


def predict(
    config: ModelConfig, params: Params, xs: Float[Tensor, "*N B K D"], ys: Float[Tensor, "*N B K"]
) -> Float[Tensor, "N B K"]:
    """The predictions of every member, each on prompts of its own or all on the same.

    Args:
        config: The architecture.
        params: Stacked parameters under the names of `icl.transformer`.
        xs: Inputs (N, B, K, D), or (B, K, D) shared by all members.
        ys: Targets likewise.
    """
    tokens = F.pad(to_tokens(xs, ys), (0, 0, 0, 1))  # N B T D+1
    return _outputs(config, params, tokens, last_stride=2)[..., 0]  # N B K


def token_outputs(
    config: ModelConfig, params: Params, xs: Float[Tensor, "*N B K D"], ys: Float[Tensor, "*N B K"]
) -> Float[Tensor, "N B T O"]:
    """The whole output at every token of x1, y1, ..., xK, yK, of which training looks at coordinate 0 of x-tokens only.

    Args:
        config: The architecture; the output has D + 1 coordinates, or one if `config.output` is `scalar`.
        params: Stacked parameters under the names of `icl.transformer`.
        xs: Inputs (N, B, K, D), or (B, K, D) shared by all members.
        ys: Targets likewise.
    """
    last = F.pad(ys[..., -1:, None], (0, xs.shape[-1]))  # N B 1 D+1
    return _outputs(config, params, torch.cat([to_tokens(xs, ys), last], dim=-2), last_stride=1)


def _outputs(
    config: ModelConfig, params: Params, tokens: Float[Tensor, "*N B T E"], *, last_stride: int
) -> Float[Tensor, "N B Q O"]:
    """The outputs at every `last_stride`-th token; elsewhere the last block is not computed."""
    positions = params["position_embedding"]  # N 2K C
    tokens = tokens.to(positions.dtype)
    tokens = tokens.expand(len(positions), *tokens.shape[-3:])
    num_tokens = tokens.shape[2]
    x = _linear(params, "token_embedding", tokens) + positions[:, None, :num_tokens]  # N B T C
    future = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=x.device).triu(1)  # T T
    for layer in range(config.num_layers):
        stride = last_stride if layer == config.num_layers - 1 else 1
        x = _block(config, params, f"blocks.{layer}", x, stride, future[::stride])
    return _linear(params, "unembedding", _norm(params, "final_norm", x))


def _block(
    config: ModelConfig,
    params: Params,
    path: str,
    x: Float[Tensor, "N B T C"],
    stride: int,
    future: Bool[Tensor, "Q T"],
) -> Float[Tensor, "N B Q C"]:
    """The residual stream after a block, at every `stride`-th token."""
    here = x[:, :, ::stride]  # N B Q C
    if config.layer_norm == "post":
        hidden = _norm(params, f"{path}.attention_norm", here + _attention(config, params, path, x, stride, future))
        hidden = _norm(params, f"{path}.mlp_norm", hidden + _mlp(config, params, path, hidden))
    else:
        normed = _norm(params, f"{path}.attention_norm", x)  # N B T C
        hidden = here + _attention(config, params, path, normed, stride, future)
        hidden = hidden + _mlp(config, params, path, _norm(params, f"{path}.mlp_norm", hidden))
    return here + hidden if config.double_residual else hidden


def _attention(
    config: ModelConfig,
    params: Params,
    path: str,
    x: Float[Tensor, "N B T C"],
    stride: int,
    future: Bool[Tensor, "Q T"],
) -> Float[Tensor, "N B Q C"]:
    """What every `stride`-th token gathers from those before it and itself."""
    q = _heads(config, params, path, x[:, :, ::stride], 0)  # N B H Q c
    k, v = (_heads(config, params, path, x, part) for part in (1, 2))  # N B H T c
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # N B H Q T
    pattern = scores.masked_fill(future, -math.inf).softmax(dim=-1)  # N B H Q T
    gathered = (pattern @ v).transpose(2, 3).flatten(3)  # N B Q C
    return _linear(params, f"{path}.attention.output", gathered) if config.attention_output else gathered


def _heads(
    config: ModelConfig, params: Params, path: str, x: Float[Tensor, "N B T C"], part: int
) -> Float[Tensor, "N B H T c"]:
    """Queries, keys or values (0, 1, 2), head by head; the rows of `qkv` are (H, 3, c)."""
    shape = (config.num_heads, 3, config.embed_size // config.num_heads)
    bias = params.get(f"{path}.attention.qkv.bias")
    mapped = _affine(
        x,
        params[f"{path}.attention.qkv.weight"].unflatten(1, shape)[:, :, part].flatten(1, 2),
        None if bias is None else bias.unflatten(1, shape)[:, :, part].flatten(1, 2),
    )
    return mapped.unflatten(-1, (shape[0], shape[2])).transpose(2, 3)


def _mlp(config: ModelConfig, params: Params, path: str, x: Float[Tensor, "N B T C"]) -> Float[Tensor, "N B T C"]:
    hidden = ACTIVATIONS[config.activation](_linear(params, f"{path}.mlp.hidden", x))
    return _linear(params, f"{path}.mlp.output", hidden)


def _norm(params: Params, name: str, x: Float[Tensor, "N B T C"]) -> Float[Tensor, "N B T C"]:
    """Layer norm over channels, or the identity where the model has none."""
    if f"{name}.weight" not in params:
        return x
    weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]  # N C
    if len(weight) == 1:
        return F.layer_norm(x, x.shape[-1:], weight[0], bias[0])
    return torch.addcmul(bias[:, None, None], F.layer_norm(x, x.shape[-1:]), weight[:, None, None])  # N B T C


def _linear(params: Params, name: str, x: Float[Tensor, "N B T I"]) -> Float[Tensor, "N B T O"]:
    return _affine(x, params[f"{name}.weight"], params.get(f"{name}.bias"))


def _affine(
    x: Float[Tensor, "N B T I"], weight: Float[Tensor, "N O I"], bias: Float[Tensor, "N O"] | None
) -> Float[Tensor, "N B T O"]:
    """Each member's linear map, as one batched matrix product over all its tokens."""
    if len(weight) == 1 and weight.shape[2] >= _WIDE:
        return F.linear(x, weight[0], None if bias is None else bias[0])
    rows = x.flatten(1, 2)  # N BT I
    product = rows @ weight.mT if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)  # N BT O
    return product.unflatten(1, x.shape[1:3])

"""Populations: one architecture with many parameter sets, stacked on a leading axis N and applied at once.

The seeds of a sweep, the values of M in a ladder, the chains of an LLC estimate and the checkpoints of a run are all
populations. This is the one place that stacks, unstacks and applies them. Parameters are a dict of tensors under the names of
the module's own state dict. A single run is a population of one.

`icl.transformer` is the definition of the model. `apply` computes the same function, and tests hold it to the same numbers. Six
things make it fast:

- Each linear map of all members is one batched matrix product. A single member uses PyTorch's fused operations.
- When compiled, the first queries, keys and values are computed from the tokens' D + 1 coordinates, not from the C
  channels that they are embedded in (`_heads_of_tokens`).
- After the last attention we compute x-tokens only, since only they predict.
- Attention has its own kernel on CPUs (`icl.tiny_attention`).
- Without that kernel we pad prompts to the even length T = 2K, because PyTorch's small products then run a quarter faster.
- There is no `torch.func.vmap` and no Python state, so `torch.compile` sees one plain function.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from icl.config import ModelConfig
from icl.tasks.prompts import to_tokens
from icl.tiny_attention import attention, has_kernel_for
from icl.transformer import ACTIVATIONS

Params: TypeAlias = dict[str, Tensor]
"""Parameters by name; stacked ones have a leading axis N."""

_NORM_EPS = 1e-5
"""Epsilon of layer norms; PyTorch's default."""
_MIN_FUSED_WIDTH = 16
"""Minimum input width at which a single member uses F.linear; below it, the weight gradient is 6x slower on CPU."""


def stack(members: Sequence[Mapping[str, Tensor]]) -> Params:
    """Stack parameter sets on a new leading axis.

    Raises:
        ValueError: If there are none, or their names or shapes differ.
    """
    if not members:
        raise ValueError("A population needs at least one member.")
    shapes = [{name: tuple(tensor.shape) for name, tensor in member.items()} for member in members]
    for number, other in enumerate(shapes):
        if other != shapes[0]:
            raise ValueError(f"Member {number} has another architecture than member 0; a population shares one.")
    return {name: torch.stack([member[name] for member in members]) for name in members[0]}


def unstack(params: Mapping[str, Tensor]) -> list[Params]:
    """The members of a population, as views."""
    return [{name: tensor[i] for name, tensor in params.items()} for i in range(size(params))]


def size(params: Mapping[str, Tensor]) -> int:
    """The number of members N."""
    return len(next(iter(params.values())))


def apply(
    config: ModelConfig, params: Params, xs: Float[Tensor, "*N B K D"], ys: Float[Tensor, "*N B K"]
) -> Float[Tensor, "N B K"]:
    """Predict every target of every member's prompts.

    Args:
        config: The architecture.
        params: Stacked parameters under the names of `icl.transformer`; predictions have their dtype.
        xs: Inputs (N, B, K, D), or (B, K, D) shared by all members.
        ys: Targets (N, B, K), or (B, K) shared by all members.
    """
    tokens = to_tokens(xs, ys)  # N B 2K-1 D+1
    if not has_kernel_for(params["position_embedding"]):
        tokens = F.pad(tokens, (0, 0, 0, 1))  # an empty token that no prediction sees
    return _outputs(config, params, tokens, last_stride=2)[..., 0]  # N B K


def token_outputs(
    config: ModelConfig, params: Params, xs: Float[Tensor, "*N B K D"], ys: Float[Tensor, "*N B K"]
) -> Float[Tensor, "N B T O"]:
    """Return the whole output at every token of x1, y1, ..., xK, yK; training uses coordinate 0 at x-tokens only.

    Args:
        config: The architecture; the output has D + 1 coordinates, or one if `config.output` is `scalar`.
        params: Stacked parameters under the names of `icl.transformer`.
        xs: Inputs (N, B, K, D), or (B, K, D) shared by all members.
        ys: Targets (N, B, K), or (B, K) shared by all members.
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
    for layer in range(config.num_layers):
        stride = last_stride if layer == config.num_layers - 1 else 1
        x = _block(config, params, layer, x, tokens, stride)
    return _linear(params, "unembedding", _norm(params, "final_norm", x))


def _block(
    config: ModelConfig,
    params: Params,
    layer: int,
    x: Float[Tensor, "N B T C"],
    tokens: Float[Tensor, "N B T E"],
    stride: int,
) -> Float[Tensor, "N B Q C"]:
    """The residual stream after a block, at every `stride`-th token."""
    path, here = f"blocks.{layer}", x[:, :, ::stride]  # N B Q C
    if config.layer_norm != "pre":
        queries, keys, values = _heads(config, params, path, x, stride)
    elif layer == 0 and torch.compiler.is_compiling():  # eagerly, more passes over memory cost what it saves
        queries, keys, values = _heads_of_tokens(config, params, path, x, tokens, stride)
    else:
        queries, keys, values = _heads(config, params, path, _norm(params, f"{path}.attention_norm", x), stride)
    gathered = attention(queries, keys, values, num_heads=config.num_heads, stride=stride)  # N B Q C
    if config.attention_output:
        gathered = _linear(params, f"{path}.attention.output", gathered)
    if config.layer_norm == "post":
        hidden = _norm(params, f"{path}.attention_norm", here + gathered)
        hidden = _norm(params, f"{path}.mlp_norm", hidden + _mlp(config, params, path, hidden))
    else:
        hidden = here + gathered
        hidden = hidden + _mlp(config, params, path, _norm(params, f"{path}.mlp_norm", hidden))
    return here + hidden if config.double_residual else hidden


def _heads(
    config: ModelConfig, params: Params, path: str, x: Float[Tensor, "N B T C"], stride: int
) -> list[Float[Tensor, "N B _ C"]]:
    """Queries of every `stride`-th token, keys and values of all; the heads side by side."""
    weight, bias = params[f"{path}.attention.qkv.weight"], params.get(f"{path}.attention.qkv.bias")
    weights = _by_part(config, weight).unbind(1)  # each N C C
    biases = [None] * 3 if bias is None else _by_part(config, bias).unbind(1)  # each N C
    return [_affine(*one) for one in zip((x[:, :, ::stride], x, x), weights, biases, strict=True)]


def _heads_of_tokens(
    config: ModelConfig,
    params: Params,
    path: str,
    x: Float[Tensor, "N B T C"],
    tokens: Float[Tensor, "N B T E"],
    stride: int,
) -> list[Float[Tensor, "N B _ C"]]:
    """The same for the first block's normed input, LN(x), from the tokens it was embedded from: x = A token + p.

    Layer norm is linear but for its scale s = 1 / deviation of x, so W LN(x) = s W' A' token + s W' p' + W b, with W' = W times the
    gains, b the shifts, and A' and p' less their means over channels: products with D + 1 channels instead of C.
    """
    weight, bias = params[f"{path}.attention.qkv.weight"], params.get(f"{path}.attention.qkv.bias")
    gains, shifts = params[f"{path}.attention_norm.weight"], params[f"{path}.attention_norm.bias"]  # N C
    embedding, positions = params["token_embedding.weight"], params["position_embedding"][:, : x.shape[2]]
    if "token_embedding.bias" in params:
        positions = positions + params["token_embedding.bias"].unsqueeze(1)  # N T C
    weight = _by_part(config, weight).flatten(1, 2)  # N 3C C
    offset = (weight @ shifts.unsqueeze(2)).squeeze(2)  # N 3C
    if bias is not None:
        offset = offset + _by_part(config, bias).flatten(1)
    weight = weight * gains.unsqueeze(1)
    of_tokens = weight @ (embedding - embedding.mean(1, keepdim=True))  # N 3C E
    of_positions = (positions - positions.mean(2, keepdim=True)) @ weight.mT  # N T 3C
    scale = torch.rsqrt(x.var(-1, correction=0, keepdim=True) + _NORM_EPS)  # N B T 1
    parts = zip(of_tokens.chunk(3, dim=1), of_positions.chunk(3, dim=2), offset.chunk(3, dim=1), strict=True)
    queries, keys, values = (
        torch.addcmul(b[:, None, None], _affine(tokens, of_token, None) + of_position.unsqueeze(1), scale)
        for of_token, of_position, b in parts
    )
    return [queries[:, :, ::stride], keys, values]


def _by_part(config: ModelConfig, qkv: Float[Tensor, "N O *I"]) -> Float[Tensor, "N 3 C *I"]:
    """Rows of (H, 3, c), in which the parameters are kept, as (3, C): queries', keys' and values'."""
    return qkv.unflatten(1, (config.num_heads, 3, -1)).transpose(1, 2).flatten(2, 3)


def _mlp(config: ModelConfig, params: Params, path: str, x: Float[Tensor, "N B T C"]) -> Float[Tensor, "N B T C"]:
    hidden = ACTIVATIONS[config.activation](_linear(params, f"{path}.mlp.hidden", x))
    return _linear(params, f"{path}.mlp.output", hidden)


def _norm(params: Params, name: str, x: Float[Tensor, "N B T C"]) -> Float[Tensor, "N B T C"]:
    """Layer norm over channels, or the identity where the model has none."""
    if f"{name}.weight" not in params:
        return x
    weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]  # N C
    if len(weight) == 1:
        return F.layer_norm(x, x.shape[-1:], weight[0], bias[0], _NORM_EPS)
    return torch.addcmul(
        bias[:, None, None], F.layer_norm(x, x.shape[-1:], eps=_NORM_EPS), weight[:, None, None]
    )  # N B T C


def _linear(params: Params, name: str, x: Float[Tensor, "N B T I"]) -> Float[Tensor, "N B T O"]:
    return _affine(x, params[f"{name}.weight"], params.get(f"{name}.bias"))


def _affine(
    x: Float[Tensor, "N B T I"], weight: Float[Tensor, "N O I"], bias: Float[Tensor, "N O"] | None
) -> Float[Tensor, "N B T O"]:
    """Each member's linear map, as one batched matrix product over all its tokens."""
    if len(weight) == 1 and weight.shape[2] >= _MIN_FUSED_WIDTH:
        return F.linear(x, weight[0], None if bias is None else bias[0])
    rows = x.flatten(1, 2)  # N BT I
    product = rows @ weight.mT if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)  # N BT O
    return product.unflatten(1, x.shape[1:3])

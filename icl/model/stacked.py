"""Populations: many parameter sets of one architecture, stacked on a leading axis N, whose outputs are computed together.

The runs of a sweep over seeds or over M, the chains of an LLC estimate and the checkpoints of a run are all populations. A single
run is a population of one. Each parameter set is a member of the population: a dict of tensors with the names of the state dict of
`icl.model.transformer.Transformer`. This module stacks and unstacks parameter sets, and computes the outputs of regression models.
`icl.model.language` computes the outputs of language models.

`icl.model.transformer` defines the model. `apply` computes the same function, and tests compare the two, including their gradients.
`apply` is faster for six reasons:

- A linear map of all members is one batched matrix product. A single member uses PyTorch's fused operations.
- With pre-norm, compiled code computes the first block's queries, keys and values directly from the D + 1 token coordinates
  (`_heads_of_tokens`). This is cheaper than starting from the C channels of the embeddings.
- After the last attention, only the x-tokens are processed, because predictions are read out only at these tokens.
- Attention has its own kernel on CPUs (`icl.model.attention`).
- Without that kernel we pad prompts to the even length T = 2K: PyTorch's small products then take a quarter less time.
- The functions use neither `torch.func.vmap` nor Python state, so `torch.compile` sees one plain function.

Axis letters: N members, B prompts, K examples, D input dimension, T tokens, E = D + 1 token coordinates, Q queries (every `stride`-th
token), C channels, H heads, c = C / H channels of a head, I and O inputs and outputs of a linear map. For the whole model, O is the number
of outputs of the unembedding, its last linear map.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from icl.config import ModelConfig
from icl.model import heads
from icl.model.attention import attention, has_kernel_for
from icl.model.transformer import ACTIVATIONS
from icl.tasks.prompts import to_tokens

Params: TypeAlias = dict[str, Tensor]
"""Parameters, keyed by name. Stacked parameters have a leading axis N."""

_NORM_EPS = 1e-5
"""Epsilon of layer norms; PyTorch's default."""
_MIN_FUSED_WIDTH = 16
"""Minimum input width at which a single member uses F.linear. Below it, the weight gradient of F.linear takes 6x as long on CPUs as that of
the batched product."""


def stack(members: Sequence[Mapping[str, Tensor]]) -> Params:
    """Stack parameter sets on a new leading axis.

    Raises:
        ValueError: If there are no members, or the names or shapes of their parameters differ.
    """
    if not members:
        raise ValueError("A population needs at least one member.")
    shapes = [{name: tensor.shape for name, tensor in member.items()} for member in members]
    for number, member_shapes in enumerate(shapes):
        if member_shapes != shapes[0]:
            raise ValueError(
                f"All members of a population must have one architecture, but member {number} differs from member 0."
            )
    return {name: torch.stack([member[name] for member in members]) for name in members[0]}


def unstack(params: Mapping[str, Tensor]) -> list[Params]:
    """Return the parameter sets of the members, as views of the stacked tensors."""
    return [{name: tensor[i] for name, tensor in params.items()} for i in range(size(params))]


def size(params: Mapping[str, Tensor]) -> int:
    """Return the number of members N."""
    return len(next(iter(params.values())))


def apply(
    config: ModelConfig, params: Params, xs: Float[Tensor, "*N B K D"], ys: Float[Tensor, "*N B K"]
) -> Float[Tensor, "N B K"]:
    """Predict every target of every member's prompts.

    Args:
        config: The architecture.
        params: Stacked parameters, with the names of `icl.model.transformer`. Predictions have the dtype of the parameters.
        xs: Inputs (N, B, K, D), or (B, K, D) shared by all members.
        ys: Targets (N, B, K), or (B, K) shared by all members.
    """
    return heads.predictions(config, outputs(config, params, xs, ys))  # N B K


def target_losses(
    config: ModelConfig, params: Params, xs: Float[Tensor, "*N B K D"], ys: Float[Tensor, "*N B K"]
) -> Float[Tensor, "N B K"]:
    """Return the training loss of every target: the squared error, or the negative log-likelihood in nats (`icl.model.heads`)."""
    return heads.target_losses(config, outputs(config, params, xs, ys), ys)


def outputs(
    config: ModelConfig, params: Params, xs: Float[Tensor, "*N B K D"], ys: Float[Tensor, "*N B K"]
) -> Float[Tensor, "N B K O"]:
    """Return all outputs at the x-tokens, which `icl.model.heads` turns into predictions or predictive distributions."""
    tokens = to_tokens(xs, ys)  # N B 2K-1 E; no axis N if the members share the prompts
    if not has_kernel_for(params["position_embedding"]):
        tokens = F.pad(tokens, (0, 0, 0, 1))  # add a last token of zeros, on which no prediction depends
    return _outputs(config, params, tokens, last_stride=2)  # N B K O


def token_outputs(
    config: ModelConfig, params: Params, xs: Float[Tensor, "*N B K D"], ys: Float[Tensor, "*N B K"]
) -> Float[Tensor, "N B T O"]:
    """Return all coordinates of the output at all 2K tokens x1, y1, ..., xK, yK.

    Training uses only the outputs at the x-tokens. If `model.output` is `token`, it uses only coordinate 0 of these outputs.

    Args:
        config: The architecture, which determines the number O of coordinates (`icl.model.heads`).
        params: Stacked parameters, with the names of `icl.model.transformer`.
        xs: Inputs (N, B, K, D), or (B, K, D) shared by all members.
        ys: Targets (N, B, K), or (B, K) shared by all members.
    """
    last_token = F.pad(ys[..., -1:, None], (0, xs.shape[-1]))  # N B 1 E; no axis N if the members share the prompts
    return _outputs(config, params, torch.cat([to_tokens(xs, ys), last_token], dim=-2), last_stride=1)


def _outputs(
    config: ModelConfig, params: Params, tokens: Float[Tensor, "*N B T E"], *, last_stride: int
) -> Float[Tensor, "N B Q O"]:
    """Return the outputs at every `last_stride`-th token. The last block skips all other tokens."""
    positions = params["position_embedding"]  # N 2K C
    tokens = tokens.to(positions.dtype).expand(len(positions), *tokens.shape[-3:])  # N B T E
    x = _linear(params, "token_embedding", tokens) + positions[:, None, : tokens.shape[2]]  # N B T C
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
    """Return the residual stream after a block, at every `stride`-th token."""
    path, residual = f"blocks.{layer}", x[:, :, ::stride]  # N B Q C
    if config.layer_norm != "pre":
        queries, keys, values = _heads(config, params, path, x, stride)
    elif layer == 0 and torch.compiler.is_compiling():
        # Only compiled code uses this branch. In eager mode, its extra passes over memory would cost as much time as the smaller products
        # save.
        queries, keys, values = _heads_of_tokens(config, params, path, x, tokens, stride)
    else:
        queries, keys, values = _heads(config, params, path, _norm(params, f"{path}.attention_norm", x), stride)
    gathered = attention(queries, keys, values, num_heads=config.num_heads, stride=stride)  # N B Q C
    if config.attention_output:
        gathered = _linear(params, f"{path}.attention.output", gathered)
    if config.layer_norm == "post":
        hidden = _norm(params, f"{path}.attention_norm", residual + gathered)
        hidden = _norm(params, f"{path}.mlp_norm", hidden + _mlp(config, params, path, hidden))
    else:
        hidden = residual + gathered
        hidden = hidden + _mlp(config, params, path, _norm(params, f"{path}.mlp_norm", hidden))
    return residual + hidden if config.double_residual else hidden


def _heads(
    config: ModelConfig, params: Params, path: str, x: Float[Tensor, "N B T C"], stride: int
) -> list[Float[Tensor, "N B _ C"]]:
    """Return the queries of every `stride`-th token and the keys and values of all tokens. The C channels are sorted by head."""
    weight, bias = params[f"{path}.attention.qkv.weight"], params.get(f"{path}.attention.qkv.bias")
    # We compute three products instead of one, for two reasons. Queries are needed at every `stride`-th token only. And the attention
    # kernel reads contiguous tensors, so it would have to copy slices of one product.
    weights = _by_part(config, weight).unbind(1)  # each N C C
    biases = [None] * 3 if bias is None else _by_part(config, bias).unbind(1)  # each N C
    return [affine(*part) for part in zip((x[:, :, ::stride], x, x), weights, biases, strict=True)]


def _heads_of_tokens(
    config: ModelConfig,
    params: Params,
    path: str,
    x: Float[Tensor, "N B T C"],
    tokens: Float[Tensor, "N B T E"],
    stride: int,
) -> list[Float[Tensor, "N B _ C"]]:
    """Return the queries, keys and values of the first block, as `_heads` does, but compute them directly from the tokens.

    The input of the first block is x = A token + p, where A is the embedding, and p is the position embedding plus the bias of the
    embedding, if it has one. Layer norm subtracts the mean of x over channels, and multiplies by s = 1 / sqrt(variance of x + epsilon).
    It then multiplies by the gains and adds the shifts b. Everything except s is affine in the token. Let W and a be the weights and
    biases of q, k and v. Then

        W LN(x) + a = s (W' A') token + s W' p' + W b + a

    Here W' is W times the gains, and A' and p' are A and p minus their means over channels. The product W' A' is computed once for all
    tokens. It has D + 1 columns, so the matrix product with the tokens has inner dimension D + 1 instead of C.
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
    of_tokens = weight @ (embedding - embedding.mean(1, keepdim=True))  # W' A': N 3C E
    of_positions = (positions - positions.mean(2, keepdim=True)) @ weight.mT  # W' p': N T 3C
    scale = torch.rsqrt(x.var(-1, correction=0, keepdim=True) + _NORM_EPS)  # N B T 1
    parts = zip(of_tokens.chunk(3, dim=1), of_positions.chunk(3, dim=2), offset.chunk(3, dim=1), strict=True)
    queries, keys, values = (
        torch.addcmul(b[:, None, None], affine(tokens, of_token, None) + of_position.unsqueeze(1), scale)
        for of_token, of_position, b in parts
    )
    return [queries[:, :, ::stride], keys, values]


def _by_part(config: ModelConfig, qkv: Float[Tensor, "N O *I"]) -> Float[Tensor, "N 3 C *I"]:
    """Reorder the 3C outputs of `qkv` from the stored order (H, 3, c) to (3, C): queries, then keys, then values."""
    return qkv.unflatten(1, (config.num_heads, 3, -1)).transpose(1, 2).flatten(2, 3)


def _mlp(config: ModelConfig, params: Params, path: str, x: Float[Tensor, "N B T C"]) -> Float[Tensor, "N B T C"]:
    hidden = ACTIVATIONS[config.activation](_linear(params, f"{path}.mlp.hidden", x))
    return _linear(params, f"{path}.mlp.output", hidden)


def _norm(params: Params, name: str, x: Float[Tensor, "N B T C"]) -> Float[Tensor, "N B T C"]:
    """Apply the layer norm over channels. If the model has no such norm, return x unchanged."""
    if f"{name}.weight" not in params:
        return x
    return layer_norm(x, params[f"{name}.weight"], params[f"{name}.bias"])


def layer_norm(
    x: Float[Tensor, "N B T C"], weight: Float[Tensor, "N C"], bias: Float[Tensor, "N C"]
) -> Float[Tensor, "N B T C"]:
    """Apply each member's layer norm over channels."""
    if len(weight) == 1:
        return F.layer_norm(x, x.shape[-1:], weight[0], bias[0], _NORM_EPS)
    # `F.layer_norm` takes only one set of gains for all members, so each member's gains are applied below.
    normed = F.layer_norm(x, x.shape[-1:], eps=_NORM_EPS)
    return torch.addcmul(bias[:, None, None], normed, weight[:, None, None])  # N B T C


def _linear(params: Params, name: str, x: Float[Tensor, "N B T I"]) -> Float[Tensor, "N B T O"]:
    return affine(x, params[f"{name}.weight"], params.get(f"{name}.bias"))


def affine(
    x: Float[Tensor, "N B T I"], weight: Float[Tensor, "N O I"], bias: Float[Tensor, "N O"] | None
) -> Float[Tensor, "N B T O"]:
    """Apply each member's linear map to all its tokens, as one batched matrix product over the members."""
    if len(weight) == 1 and weight.shape[2] >= _MIN_FUSED_WIDTH:
        return F.linear(x, weight[0], None if bias is None else bias[0])
    rows = x.flatten(1, 2)  # N BT I
    product = rows @ weight.mT if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)  # N BT O
    return product.unflatten(1, x.shape[1:3])

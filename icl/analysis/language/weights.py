"""Measurements of the weights of a language model: composition of heads, norm of all weights, spectrum of position embeddings.

The measurements are exact functions of the weights, so they have no standard error.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from icl.config import ModelConfig
from icl.model.stacked import Params


def k_composition(config: ModelConfig, params: Params) -> Float[Tensor, "N P"]:
    """Return the K-composition of every pair of heads of `head_pairs` (Elhage et al. 2021, "A mathematical framework").

    K-composition measures how strongly the keys of a later head depend on the output of an earlier head. It is defined as
    |W_QK W_OV^T| / (|W_QK| |W_OV|) in Frobenius norms. W_QK = W_Q W_K^T is from the later head, and W_OV = W_V W_O is from the
    earlier head. Both matrices act on row vectors.
    """
    values = [
        _ratio(
            _head(params, "Q", *later) @ _head(params, "K", *later).mT,
            _head(params, "V", *earlier) @ _output(params, *earlier),
        )
        for earlier, later in head_pairs(config)
    ]
    return (
        torch.stack(values, dim=1) if values else next(iter(params.values())).new_zeros(len(params["unembed.b_U"]), 0)
    )


def head_pairs(config: ModelConfig) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return all pairs of heads in which the second head is in a later block than the first. Each head is given as (layer, head)."""
    heads = [(layer, head) for layer in range(config.num_layers) for head in range(config.num_heads)]
    return [(earlier, later) for earlier in heads for later in heads if earlier[0] < later[0]]


def weight_norm(params: Params) -> Float[Tensor, " N"]:
    """Return the Euclidean norm of all weights together."""
    return torch.stack([tensor.flatten(1).square().sum(1) for tensor in params.values()]).sum(0).sqrt()


def position_spectrum(params: Params) -> Float[Tensor, "N R"]:
    """Return the singular values of the matrix of position embeddings, largest first."""
    return torch.linalg.svdvals(params["pos_embed.W_pos"])


def _ratio(qk: Float[Tensor, "N C C"], ov: Float[Tensor, "N C C"]) -> Float[Tensor, " N"]:
    norms = (torch.linalg.matrix_norm(matrix) for matrix in (qk @ ov.mT, qk, ov))
    product, first, second = norms
    return product / (first * second)


def _head(params: Params, part: str, layer: int, head: int) -> Float[Tensor, "N C c"]:
    return params[f"blocks.{layer}.attn.W_{part}"][:, head]


def _output(params: Params, layer: int, head: int) -> Float[Tensor, "N c C"]:
    return params[f"blocks.{layer}.attn.W_O"][:, head]

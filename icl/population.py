"""Populations: one architecture, many parameter sets, stacked on a leading axis N and applied at once.

The seeds of a sweep, the rungs of an M-ladder, the chains of an LLC estimate and the checkpoints of a run are all
populations, and this is the one place that stacks and unstacks them; `icl.stacked` computes their predictions. Parameters are `dict[str, Tensor]`
with the names of the module's own state dict. A run is a population of one.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from icl import stacked
from icl.stacked import Params as Params
from icl.transformer import Transformer


def stack(members: Sequence[Mapping[str, Tensor]]) -> Params:
    """Many parameter sets as one, on a new leading axis.

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
    model: Transformer, params: Mapping[str, Tensor], xs: Float[Tensor, "*N B K D"], ys: Float[Tensor, "*N B K"]
) -> Float[Tensor, "N B K"]:
    """The predictions of every member, each on prompts of its own or all on the same.

    Args:
        model: The architecture; its own parameters are not used.
        params: Stacked parameters, whose type the predictions have whatever the prompts were made in.
        xs: Inputs (N, B, K, D), or (B, K, D) shared by all members.
        ys: Targets likewise.
    """
    return stacked.predict(model.config, dict(params), xs, ys)


def token_outputs(
    model: Transformer, params: Mapping[str, Tensor], xs: Float[Tensor, "*N B K D"], ys: Float[Tensor, "*N B K"]
) -> Float[Tensor, "N B T O"]:
    """Every member's whole outputs at all tokens, y-tokens and the last of them included; arguments as `apply`."""
    return stacked.token_outputs(model.config, dict(params), xs, ys)

"""Components of the transformer. If chains move only the parameters of one component, the estimate is the component's refined LLC.

The refined LLC of a component measures the component's effective number of parameters while the rest of the model stays fixed (Wang,
Hoogland, van Wingerden, Furman and Murfet 2024, "Differentiation and specialization of attention heads via the refined local learning
coefficient", arXiv 2410.02984). There are two ways to divide the model:

- `heads`: each attention head. L0H1 is head 1 of layer 0: its queries, keys and values, and the columns of the output projection
  for this head. MLPs, embeddings and normalisations belong to no head.
- `layers`: the embedding (of tokens and positions), the blocks L0, L1, ..., and the unembedding (with the final normalisation). Every
  parameter belongs to exactly one of these components.
"""

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from icl.config import ModelConfig
from icl.config.language import require_regression
from icl.config.validation import ConfigError

Division: TypeAlias = Literal["heads", "layers"]
"""A way to divide the model into components."""
DIVISIONS: tuple[Division, ...] = get_args(Division)
_EMBEDDING = ("token_embedding.", "position_embedding")
_UNEMBEDDING = ("unembedding.", "final_norm.")


def component_names(config: ModelConfig, division: Division) -> list[str]:
    """Return the names of a model's components, from its input to its output.

    Examples:
        >>> component_names(ModelConfig(num_layers=2, num_heads=2), "heads")
        ['L0H0', 'L0H1', 'L1H0', 'L1H1']
        >>> component_names(ModelConfig(num_layers=2, num_heads=2), "layers")
        ['embedding', 'L0', 'L1', 'unembedding']
    """
    require_regression(config.family, "`--components`")
    layers = range(config.num_layers)
    if division == "layers":
        return ["embedding", *(f"L{layer}" for layer in layers), "unembedding"]
    return [f"L{layer}H{head}" for layer in layers for head in range(config.num_heads)]


def component_masks(
    config: ModelConfig, params: Mapping[str, Tensor], component: str
) -> dict[str, Bool[Tensor, "..."]]:
    """Return a mask for each parameter tensor of a component. True marks the elements that belong to the component.

    Args:
        config: Architecture of the model.
        params: The model's parameters, keyed by name, without a leading axis.
        component: One of the names that `component_names` returns.

    Raises:
        ConfigError: If the model has no such component.
    """
    if component not in (*component_names(config, "heads"), *component_names(config, "layers")):
        raise ConfigError(
            f"The model has no component `{component}`: choose a head such as L0H0, a layer such as L0, `embedding` or `unembedding`; the "
            f"model has {config.num_layers} layers of {config.num_heads} heads."
        )
    layer, _, head = component.removeprefix("L").partition("H")
    if head:
        return _head_masks(config, params, f"blocks.{layer}.attention", int(head))
    prefixes = {"embedding": _EMBEDDING, "unembedding": _UNEMBEDDING}.get(component, (f"blocks.{layer}.",))
    return {
        name: torch.ones(tensor.shape, dtype=torch.bool) for name, tensor in params.items() if name.startswith(prefixes)
    }


def _head_masks(config: ModelConfig, params: Mapping[str, Tensor], attention: str, head: int) -> dict[str, Tensor]:
    """Return the masks of one head. The docstring of `icl.model.transformer.Attention` gives the order of the rows."""
    size = config.embed_size // config.num_heads
    rows, columns = slice(3 * size * head, 3 * size * (head + 1)), slice(size * head, size * (head + 1))
    masks = {}
    for name, place in (("qkv.weight", (rows,)), ("qkv.bias", (rows,)), ("output.weight", (slice(None), columns))):
        tensor = params.get(f"{attention}.{name}")
        if tensor is not None:
            masks[f"{attention}.{name}"] = torch.zeros(tensor.shape, dtype=torch.bool)
            masks[f"{attention}.{name}"][place] = True
    return masks

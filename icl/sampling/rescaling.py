"""Rescale a model's weights without changing its function, to test whether an LLC estimate measures more than the geometry of the loss.

In each block, one linear map is multiplied by a factor c and the next map by 1/c, so that the function stays the same:

- With a ReLU MLP, (W1, b1) is multiplied by c and W2 by 1/c, because relu(c z) = c relu(z).
- With another activation, the attention's values are multiplied by c and its output projection by 1/c, because attention is linear
  in its values.
- If the model has neither a ReLU MLP nor an output projection, the scale and shift of the layer norm before the MLP are multiplied by c,
  and the MLP's first linear map by 1/c.

The rescaling is a change of coordinates of the weights, so the learning coefficient stays the same. But the
localization and the step size act differently in the new coordinates. If an estimate depends on c, it measures the size
of the weights as well as the geometry of the loss. Then a fall of the estimate during training may be due to growing
weights.
"""

from icl.config import ModelConfig
from icl.config.language import require_regression
from icl.config.validation import ConfigError
from icl.model.stacked import Params


def rescaled(model: ModelConfig, params: Params, factor: float) -> Params:
    """Return a model's parameters after multiplying one map of every block by c = `factor`, and the next map by 1/c.

    The model computes the same function as before. The module docstring says which two maps are rescaled.

    Raises:
        ConfigError: If the factor is not positive, or the blocks have no two maps that can be rescaled in this way.
    """
    if not 0 < factor < float("inf"):
        raise ConfigError(f"`--rescale` must be positive and finite, got {factor!r}.")
    require_regression(model.family, "`--rescale`")
    changed = dict(params)
    for block in (f"blocks.{layer}" for layer in range(model.num_layers)):
        if model.activation != "relu" and model.attention_output:
            changed |= _rescaled_values(model, params, block, factor)
        else:
            powers = _powers(model, block)
            changed |= {name: params[name] * factor**power for name, power in powers.items() if name in params}
    return changed


def describe_pair(model: ModelConfig) -> str:
    """Return a phrase that names the two rescaled maps."""
    if model.activation == "relu":
        return "the two maps of each ReLU MLP"
    return (
        "values and output projection of each attention layer"
        if model.attention_output
        else "the layer norm before each MLP and the linear map after it"
    )


def _powers(model: ModelConfig, block: str) -> dict[str, int]:
    """Return the exponent of the factor for each parameter tensor that is rescaled as a whole."""
    if model.activation == "relu":
        return {f"{block}.mlp.hidden.weight": 1, f"{block}.mlp.hidden.bias": 1, f"{block}.mlp.output.weight": -1}
    if model.layer_norm != "pre":
        raise ConfigError(
            "`--rescale` needs a model with a ReLU MLP, an output projection or layer norms before the sublayers; this model has none "
            "of these."
        )
    return {f"{block}.mlp_norm.weight": 1, f"{block}.mlp_norm.bias": 1, f"{block}.mlp.hidden.weight": -1}


def _rescaled_values(model: ModelConfig, params: Params, block: str, factor: float) -> Params:
    """Multiply the attention's values by the factor, and divide its output projection by the factor.

    The rows of `qkv` are ordered by head, then by query, key and value, then by channel.
    """
    changed = {f"{block}.attention.output.weight": params[f"{block}.attention.output.weight"] / factor}
    for name in (f"{block}.attention.qkv.weight", f"{block}.attention.qkv.bias"):
        if name in params:
            parts = params[name].unflatten(0, (model.num_heads, 3, -1)).clone()
            parts[:, 2] *= factor
            changed[name] = parts.flatten(0, 2)
    return changed

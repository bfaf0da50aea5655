"""A control of what an estimate measures: the same function with other weights.

Two neighbouring linear maps can trade a factor c without any change of the function: the MLP of a ReLU block (W1, b1) -> c,
W2 -> 1/c, as relu(c z) = c relu(z); else values -> c and the output projection -> 1/c, as attention is linear in its
values; else a layer norm's scale and shift -> c and the map that follows -> 1/c. The learning coefficient is unchanged by
this (it is a change of coordinates), but a Gaussian localisation around the weights is not, nor is a step size: so an
estimate that moves with c measures the size of the weights beside the geometry of the loss. Growing weights are a rival
explanation of a falling estimate.
"""

import math

import pandas as pd

from icl.config import ModelConfig
from icl.stacked import Params
from icl.validation import ConfigError


def rescaled(model: ModelConfig, params: Params, factor: float) -> Params:
    """One member's parameters with a factor moved between two maps of every block, the function unchanged.

    Raises:
        ConfigError: If the factor is not positive, or the architecture has no such pair.
    """
    if not 0 < factor < float("inf"):
        raise ConfigError(f"`--rescale` must be positive and finite, got {factor!r}.")
    changed = dict(params)
    for layer in range(model.num_layers):
        for name, power in _pair(model, f"blocks.{layer}").items():
            if name in changed:
                changed[name] = params[name] * factor**power
    if model.activation != "relu" and model.attention_output:
        for layer in range(model.num_layers):
            changed |= _rescaled_values(model, params, f"blocks.{layer}", factor)
    return changed


def describe_pair(model: ModelConfig) -> str:
    """What trades the factor, in words."""
    if model.activation == "relu":
        return "the two maps of each ReLU MLP"
    return (
        "values and output projection of each attention" if model.attention_output else "each norm and the map after it"
    )


def _pair(model: ModelConfig, block: str) -> dict[str, int]:
    """Whole parameters and the power of the factor that each takes."""
    if model.activation == "relu":
        return {f"{block}.mlp.hidden.weight": 1, f"{block}.mlp.hidden.bias": 1, f"{block}.mlp.output.weight": -1}
    if model.attention_output:
        return {}
    if model.layer_norm != "pre":
        raise ConfigError(
            "The rescaling control needs a ReLU MLP, an output projection or norms before the sublayers; this model has none."
        )
    return {f"{block}.mlp_norm.weight": 1, f"{block}.mlp_norm.bias": 1, f"{block}.mlp.hidden.weight": -1}


def _rescaled_values(model: ModelConfig, params: Params, block: str, factor: float) -> Params:
    """Values times the factor, output projection divided by it; the rows of `qkv` are (head, q or k or v, channel)."""
    changed = {f"{block}.attention.output.weight": params[f"{block}.attention.output.weight"] / factor}
    for name in (f"{block}.attention.qkv.weight", f"{block}.attention.qkv.bias"):
        if name in params:
            parts = params[name].unflatten(0, (model.num_heads, 3, -1)).clone()
            parts[:, 2] *= factor
            changed[name] = parts.flatten(0, 2)
    return changed


def compare(plain: pd.DataFrame, control: pd.DataFrame) -> list[str]:
    """What the control says, a line for each step and one for all: estimates against those of the rescaled weights."""
    both = plain.merge(control, on=["step", "checkpoint_hash"], suffixes=("", "_control"))
    lines, moved, unknown = [], 0, 0
    for row in both.to_dict("records"):
        difference = (row["llc_control"] - row["llc"]) / math.hypot(row["stderr"], row["stderr_control"])
        word = "differs" if abs(difference) > 3 else "agrees" if abs(difference) <= 3 else "cannot be compared"
        moved, unknown = moved + (word == "differs"), unknown + math.isnan(difference)
        lines.append(
            f"step {row['step']}: {row['llc']:.4g} ± {row['stderr']:.2g}, rescaled {row['llc_control']:.4g} ± "
            f"{row['stderr_control']:.2g}: {word} ({difference:+.1f} standard errors)"
        )
    end = f"{moved} of {len(both)} differ"
    if moved:
        return [
            *lines,
            f"{end}: the estimate depends on the size of the weights, not on the function's geometry alone.",
        ]
    if unknown:
        return [*lines, f"{end}, {unknown} cannot be compared."]
    return [*lines, f"{end}: no sign that the estimate measures the size of the weights."]

"""Files of the code base with `ICRegConfig` (`ic_regression.py`): layout, settings and tasks.

A file contains a dict with the keys `model_state_dict`, `step`, `cfg` (an ICRegConfig) and `M`, and with the state of the optimiser. The
model is a GPT-like transformer on `nn.MultiheadAttention`, with exact GELU and a final layer norm. The setting `use_prenorm` says
whether layer norm comes before or after attention and MLP.

The training tasks are not saved. The code draws `torch.randn(max_M, D)` on the CPU with a generator of seed 0. The first M rows of this
table are the pool.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from icl.config import RunConfig
from icl.config.validation import ConfigError, is_count
from icl.files.reading import ContentError
from icl.importing.pickles import as_settings, as_table
from icl.importing.weights import Weights, by_head
from icl.model.stacked import Params

PRESET = "icr"
_ROUND = 16
"""Number of values that `torch.randn` draws together on a CPU. If the size of a tensor is not a multiple of 16, `torch.randn` draws its last 16
values again."""
_DOUBLE = {
    "D": "task.task_size",
    "K": "task.max_examples",
    "n_layers": "model.num_layers",
    "d_model": "model.embed_size",
    "d_mlp": "model.mlp_size",
}
"""Settings that are also determined by the shapes of the weights. The keys are the names of the settings in the older config."""


def is_mine(tree: Any) -> bool:
    """Return whether the code with `ICRegConfig` wrote this file."""
    return isinstance(tree, Mapping) and ("model_state_dict" in tree or _is_state(tree))


def step_of(tree: Mapping[str, Any]) -> int | None:
    """Return the number of updates before the checkpoint, or None if the file does not contain this number."""
    step = as_settings(tree).get("step")
    return step if is_count(step) else None


def facts(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a file determines, keyed by dotted name.

    Raises:
        ContentError: If the file contains no model of the code with `ICRegConfig`, or its config and its weights contradict each other.
    """
    weights = Weights(_state(tree))
    embed_size, token_size = weights.shape("input_proj.weight", 2)
    num_layers = weights.num_layers("blocks.{}.ln1.weight")
    found: dict[str, Any] = {
        "task.task_size": token_size - 1,
        "task.max_examples": weights.shape("pos_emb", 3)[1] // 2,
        "model.embed_size": embed_size,
        "model.num_layers": num_layers,
        "model.mlp_size": weights.shape("blocks.0.mlp.0.weight", 2)[0] if num_layers else 0,
        **{f"model.{key}": True for key in ("attention_output", "mlp_bias", "unembedding_bias")},
        **{f"model.{key}": True for key in ("embedding_bias", "attention_bias")},
        "model.double_residual": False,
        "model.activation": "gelu",
        "model.output": "token",
        "model.init": "gpt2",
    }
    config = as_settings(tree.get("cfg", tree.get("config")))
    for older, key in _DOUBLE.items():
        if older in config and config[older] != found[key]:
            raise ContentError(f"its config says {older} = {config[older]!r}, but its weights imply {found[key]}")
    if "n_heads" in config:
        found["model.num_heads"] = config["n_heads"]
    if "sigma2" in config:
        found["task.noise_variance"] = config["sigma2"]
    if isinstance(config.get("use_prenorm"), bool):
        found["model.layer_norm"] = "pre" if config["use_prenorm"] else "post"
    num_tasks = as_settings(tree).get("M") if "M" in tree else config.get("M")
    if num_tasks is not None:
        found["task.num_tasks"] = num_tasks
    return found | _learning_rate(tree)


def params(tree: Mapping[str, Any], config: RunConfig) -> Params:
    """Return the weights, keyed by their names in `icl`.

    Raises:
        ContentError: If the weights do not fit the configuration.
    """
    weights, model = Weights(_state(tree)), config.model
    width, hidden, heads = model.embed_size, model.mlp_size, model.num_heads
    num_tokens, token_size = 2 * config.task.max_examples, config.task.task_size + 1
    result = {
        "token_embedding.weight": weights.take("input_proj.weight", width, token_size),
        "token_embedding.bias": weights.take("input_proj.bias", width),
        "position_embedding": weights.take("pos_emb", 1, num_tokens, width)[0].contiguous(),
        "final_norm.weight": weights.take("ln_f.weight", width),
        "final_norm.bias": weights.take("ln_f.bias", width),
        "unembedding.weight": weights.take("output_proj.weight", token_size, width),
        "unembedding.bias": weights.take("output_proj.bias", token_size),
    }
    weights.drop("attn_mask", num_tokens, num_tokens)
    for layer in range(model.num_layers):
        there, here = f"blocks.{layer}.", f"blocks.{layer}."
        for theirs, ours in (("ln1", "attention_norm"), ("ln2", "mlp_norm")):
            result[f"{here}{ours}.weight"] = weights.take(f"{there}{theirs}.weight", width)
            result[f"{here}{ours}.bias"] = weights.take(f"{there}{theirs}.bias", width)
        fused = weights.take(f"{there}attn.in_proj_weight", 3 * width, width)
        result[f"{here}attention.qkv.weight"] = by_head(fused, heads)
        result[f"{here}attention.qkv.bias"] = by_head(weights.take(f"{there}attn.in_proj_bias", 3 * width), heads)
        result[f"{here}attention.output.weight"] = weights.take(f"{there}attn.out_proj.weight", width, width)
        result[f"{here}attention.output.bias"] = weights.take(f"{there}attn.out_proj.bias", width)
        for theirs, ours, sizes in (("0", "hidden", (hidden, width)), ("2", "output", (width, hidden))):
            result[f"{here}mlp.{ours}.weight"] = weights.take(f"{there}mlp.{theirs}.weight", *sizes)
            result[f"{here}mlp.{ours}.bias"] = weights.take(f"{there}mlp.{theirs}.bias", sizes[0])
    weights.finish()
    return result


def draw_tasks(tree: Mapping[str, Any], config: RunConfig) -> Float[Tensor, "M D"]:
    """Draw the M training tasks as the older code did.

    Raises:
        ConfigError: If the file contains no `max_M`, or a `max_M` below M. The tasks depend on `max_M`.
    """
    table = as_settings(tree.get("cfg", tree.get("config")))
    rows, size, count = table.get("max_M"), config.task.task_size, int(config.task.num_tasks)
    if not is_count(rows) or rows < count:
        raise ConfigError(
            "The run's training tasks cannot be drawn again. The older code drew a table of `max_M` tasks and used the "
            f"first M = {count:,}, but the config in the file contains no `max_M` of at least {count:,}. "
            "Give the tasks with --tasks FILE, or write --tasks unknown to import the run without its tasks."
        )
    generator = torch.Generator().manual_seed(config.seeds.tasks)
    needed = -(-count * size // _ROUND) * _ROUND
    is_prefix = needed <= rows * size - _ROUND or rows * size % _ROUND == 0
    # Except for the last 16, the numbers in a table do not depend on the table's size. So we usually draw only the numbers of the
    # first M tasks. The whole table can be large, because `max_M` can be 2^25.
    count_drawn = max(needed, _ROUND) if is_prefix else rows * size
    drawn = torch.randn(count_drawn, generator=generator, dtype=torch.float32, device="cpu")
    return drawn[: count * size].unflatten(0, (count, size)).clone()


def _is_state(tree: Mapping[Any, Any]) -> bool:
    return any(isinstance(name, str) and name.endswith("input_proj.weight") for name in tree)


def _state(tree: Mapping[str, Any]) -> Mapping[Any, Any]:
    state = tree if _is_state(tree) else tree.get("model_state_dict")
    if not isinstance(state, Mapping):
        raise ContentError("it contains no model_state_dict")
    return state


def _learning_rate(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the setting `optim.lr` if the learning rate was constant, else an empty dict.

    With a schedule, the file contains only the learning rate of one step, from which the peak rate is not known.
    """
    groups = as_table(tree.get("optimizer_state_dict")).get("param_groups")
    rate = as_table(groups[0]).get("lr") if isinstance(groups, list) and groups else None
    is_known = isinstance(rate, float) and 0 < rate < 1 and "scheduler_state_dict" not in tree
    return {"optim.lr": rate} if is_known else {}

"""Files of mansheej/icl-task-diversity, the code of Raventós et al. (2023): layout, settings and tasks.

A run's folder has `config.json` and one `checkpoint_<step>` for each saved step. `checkpoint_<step>` is a file, or a folder that
contains the file `checkpoint`. The file is in the msgpack format of Flax. It contains a table with the keys `step`, `params` and
`opt_state`, or only the parameters. The model is a GPT-2. A Flax kernel is the transpose of PyTorch's weight. The fused projection of
attention contains first all queries, then all keys, then all values.

The tasks are `jax.random.normal(fold_in(PRNGKey(task_seed), 0), (M, D, 1))`. JAX 0.5 changed this function, so the tasks are drawn again
only if the user requests it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icl.config import RunConfig
from icl.config.validation import is_count
from icl.files.reading import ContentError, parse_json, read_bytes
from icl.importing import threefry
from icl.importing.msgpack import parse_msgpack
from icl.importing.pickles import MAX_FILE, OlderFileError
from icl.importing.weights import Weights, by_head
from icl.model.stacked import Params

PRESET = "raventos-base"
PATTERNS = ("checkpoint_*", "checkpoint_*/checkpoint", "checkpoint", "*.msgpack")
_MODULES = ("_in", "_h", "_out")
_KEYS = {
    "task.n_tasks": "task.num_tasks",
    "task.n_dims": "task.task_size",
    "task.n_points": "task.max_examples",
    "task.batch_size": "trainer.batch_size",
    "task.task_seed": "seeds.tasks",
    "task.data_seed": "seeds.data",
    "task.noise_seed": "seeds.noise",
    "model.n_layer": "model.num_layers",
    "model.n_embd": "model.embed_size",
    "model.n_head": "model.num_heads",
    "model.seed": "seeds.model",
    "training.lr": "optim.lr",
    "training.total_steps": "trainer.max_steps",
}
"""Settings of `config.json` with their names in `icl`."""


def read(path: Path) -> Any:
    """Return the content of a file.

    Raises:
        OlderFileError: If the file cannot be read.
    """
    try:
        return parse_msgpack(read_bytes(path, limit=MAX_FILE))
    except ContentError as error:
        raise OlderFileError(f"{path} cannot be imported: {error}. Copy the file again.") from None
    except OSError as error:
        raise OlderFileError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from None


def is_mine(tree: Any) -> bool:
    """Return whether the code of Raventós et al. wrote this file."""
    return isinstance(tree, Mapping) and all(name in _params(tree) for name in _MODULES)


def step_of(tree: Mapping[str, Any]) -> int | None:
    """Return the number of updates before the checkpoint, or None if the file does not contain this number."""
    step = tree.get("step")
    step = step.item() if isinstance(step, np.ndarray) and step.size == 1 else step
    return step if is_count(step) else None


def folder_facts(path: Path) -> dict[str, Any]:
    """Return the settings in the `config.json` of the run's folder, keyed by dotted name. The dict is empty if there is no such file.

    Raises:
        OlderFileError: If `config.json` cannot be read, or sets a scale of inputs or tasks other than 1.
    """
    folders = path.parents[: 2 if path.name == "checkpoint" else 1]
    file = next((folder / "config.json" for folder in folders if (folder / "config.json").is_file()), None)
    if file is None:
        return {}
    try:
        tree = parse_json(read_bytes(file), limit=1000)
    except (ContentError, OSError) as error:
        raise OlderFileError(f"{file} cannot be read: {error}. Copy the file again.") from None
    sections = tree if isinstance(tree, Mapping) else {}
    flat = {
        f"{section}.{key}": value
        for section, table in sections.items()
        if isinstance(table, Mapping)
        for key, value in table.items()
    }
    for key in ("task.data_scale", "task.task_scale"):
        if flat.get(key, 1) != 1:
            raise OlderFileError(
                f"{file} has {key} = {flat[key]}, so the run cannot be imported: `icl` supports only inputs and tasks of scale 1."
            )
    found = {ours: flat[theirs] for theirs, ours in _KEYS.items() if theirs in flat}
    if found.get("task.num_tasks") == 0:
        found["task.num_tasks"] = "inf"
    if isinstance(scale := flat.get("task.noise_scale"), (int, float)):
        # For a huge number, `**` would raise an OverflowError.
        found["task.noise_variance"] = float(scale) * float(scale)
    if flat.get("training.schedule") == "triangle":
        found["optim.schedule"] = "triangle"
        if is_count(warmup := flat.get("training.warmup_steps")):
            found["optim.warmup_steps"] = warmup
    return found


def facts(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a file determines, keyed by dotted name.

    Raises:
        ContentError: If the file contains no model of Raventós et al.
    """
    weights = _weights(tree)
    token_size, embed_size = weights.shape("_in/kernel", 2)
    num_layers = weights.num_layers("_h/hs_{}/ln_1/scale")
    return {
        "task.task_size": token_size - 1,
        "task.max_examples": weights.shape("_h/wpe/embedding", 2)[0] // 2,
        "model.embed_size": embed_size,
        "model.num_layers": num_layers,
        "model.mlp_size": weights.shape("_h/hs_0/mlp/c_fc/kernel", 2)[1] if num_layers else 0,
        "model.layer_norm": "pre",
        **{f"model.{key}": True for key in ("attention_output", "attention_bias", "mlp_bias")},
        **{f"model.{key}": False for key in ("embedding_bias", "unembedding_bias", "double_residual")},
        "model.activation": "gelu_tanh",
        "model.output": "scalar",
        "model.init": "gpt2",
    }


def params(tree: Mapping[str, Any], config: RunConfig) -> Params:
    """Return the weights, keyed by their names in `icl`.

    Raises:
        ContentError: If the weights do not fit the configuration.
    """
    weights, model = _weights(tree), config.model
    width, hidden, heads = model.embed_size, model.mlp_size, model.num_heads
    result = {
        "token_embedding.weight": _transposed(weights, "_in/kernel", config.task.task_size + 1, width),
        "position_embedding": weights.take("_h/wpe/embedding", 2 * config.task.max_examples, width),
        "final_norm.weight": weights.take("_h/ln_f/scale", width),
        "final_norm.bias": weights.take("_h/ln_f/bias", width),
        "unembedding.weight": _transposed(weights, "_out/kernel", width, 1),
    }
    for layer in range(model.num_layers):
        there, here = f"_h/hs_{layer}/", f"blocks.{layer}."
        for theirs, ours in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
            result[f"{here}{ours}.weight"] = weights.take(f"{there}{theirs}/scale", width)
            result[f"{here}{ours}.bias"] = weights.take(f"{there}{theirs}/bias", width)
        result[f"{here}attention.qkv.weight"] = by_head(
            _transposed(weights, f"{there}attn/c_attn/kernel", width, 3 * width), heads
        )
        result[f"{here}attention.qkv.bias"] = by_head(weights.take(f"{there}attn/c_attn/bias", 3 * width), heads)
        for theirs, ours, rows, columns in (
            ("attn/c_proj", "attention.output", width, width),
            ("mlp/c_fc", "mlp.hidden", width, hidden),
            ("mlp/c_proj", "mlp.output", hidden, width),
        ):
            result[f"{here}{ours}.weight"] = _transposed(weights, f"{there}{theirs}/kernel", rows, columns)
            result[f"{here}{ours}.bias"] = weights.take(f"{there}{theirs}/bias", columns)
    weights.finish()
    return result


def draw_tasks(tree: Mapping[str, Any], config: RunConfig) -> Float[Tensor, "M D"]:
    """Draw the M training tasks again, as JAX before version 0.5 drew them. The seed `task_seed` of the older code is our `seeds.tasks`."""
    key = threefry.fold_in(threefry.key_of(config.seeds.tasks), 0)
    return torch.from_numpy(threefry.normal(key, (int(config.task.num_tasks), config.task.task_size)))


def _params(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the table of the model's modules. It may be inside one or two nested tables with the name `params`."""
    for _ in range(2):
        if isinstance(inner := tree.get("params"), Mapping):
            tree = inner
    return tree


def _weights(tree: Mapping[str, Any]) -> Weights:
    modules = {name: _params(tree)[name] for name in _params(tree)}
    return Weights({name: _tensor(name, value) for name, value in _flat(modules, "").items()})


def _flat(table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, str) and value.startswith("PLACEHOLDER://"):
        raise ContentError(
            "its arrays are in other files of Orbax; in the environment of the older code, save them in one file with "
            "flax.serialization.to_bytes"
        )
    if not isinstance(value, np.ndarray):
        raise ContentError(f"its entry {name} must be an array, got {type(value).__name__}")
    return torch.from_numpy(value)


def _transposed(weights: Weights, name: str, rows: int, columns: int) -> Tensor:
    return weights.take(name, rows, columns).T.contiguous()

"""Files of Timaeus's language models on the Hugging Face Hub, in two formats. The models include those of Hoogland et al. (2024).

- Format A (`georgeyw/L2W256-3m-rr`): `checkpoints/checkpoint_{step:07d}.pth`, each a dict with the keys `model_state_dict` and
  `optimizer_state_dict`. There is no file of settings. The code saves after the update, so file 0 contains the state after one update. We
  keep the number in the file's name.
- Format B (`timaeus/H8-dh64`): `model.safetensors`, with `config.json` and `model.yaml` beside it, and perhaps a folder `checkpoints`.

The weights have TransformerLens's names, which `icl` also uses. Buffers (`attn.mask`, `attn.IGNORE`) are left out. All sizes are taken
from the weights. The kind of positions and the activation of MLPs are read from `config.json` or `model.yaml`. `model.yaml` begins with a
Python object, so both files are read as plain text, and nothing in them is ever executed. Without such files, positions are `shortformer`, as in
all published models of format A.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from icl.config import RunConfig
from icl.config.validation import ConfigError
from icl.files.reading import ContentError, first_line, read_bytes
from icl.importing.pickles import MAX_FILE, OlderFileError, read_pickle
from icl.importing.weights import Weights
from icl.model.losses import shapes_of
from icl.model.stacked import Params

NAME = "timaeus-lm"
PRESET = "L2W256"
PATTERNS = ("checkpoints/checkpoint_*.pth", "checkpoint_*.pth", "checkpoints/*.safetensors", "model.safetensors")
"""Patterns of the paths of files. Only one pattern is used: the first pattern that matches at least one file."""
_SETTINGS = ("config.json", "model.yaml")
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"}
"""Activation functions: the names in TransformerLens, each with the name in `icl`."""
_STATE = ("model_state_dict", "state_dict", "model")


def read(path: Path) -> Any:
    """Return the content of a file, without unpickling it.

    Raises:
        OlderFileError: If the file cannot be read.
    """
    if path.suffix != ".safetensors":
        return read_pickle(path)
    try:
        return safetensors.torch.load(read_bytes(path, limit=MAX_FILE))
    except OSError as error:
        raise OlderFileError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from None
    except (ContentError, SafetensorError, ValueError, TypeError) as error:
        raise OlderFileError(
            f"{path} is damaged, or is not a file of safetensors ({first_line(error)}). Copy the file again."
        ) from None


def is_mine(tree: Any) -> bool:
    """Return whether the file contains a language model of Timaeus."""
    return isinstance(tree, Mapping) and "embed.W_E" in _state(tree)


def step_of(tree: Mapping[str, Any]) -> int | None:
    """Return None, because the step is in the file's name, not in its content."""
    return None


def facts(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the weights determine, keyed by dotted name.

    Raises:
        ContentError: If the file contains no language model of Timaeus.
    """
    weights = Weights(_state(tree))
    vocab_size, embed_size = weights.shape("embed.W_E", 2)
    num_layers = weights.num_layers("blocks.{}.attn.W_Q")
    if not num_layers:
        raise ContentError("it contains no blocks.0.attn.W_Q")
    num_heads, _, head_size = weights.shape("blocks.0.attn.W_Q", 3)
    mlp = "blocks.0.mlp.W_in"
    return {
        "language.vocab_size": vocab_size,
        "language.context_size": weights.shape("pos_embed.W_pos", 2)[0],
        "model.family": "language",
        "model.num_layers": num_layers,
        "model.num_heads": num_heads,
        "model.head_size": None if num_heads * head_size == embed_size else head_size,
        "model.embed_size": embed_size,
        "model.mlp_size": weights.shape(mlp, 2)[1] if mlp in weights else 0,
    } | _learning_rate(tree)


def folder_facts(path: Path) -> dict[str, Any]:
    """Return the settings in `config.json` and `model.yaml`.

    These files may be beside the checkpoint. If the checkpoint is in a folder named checkpoints, they may also be in the folder above. No
    other folder is searched, because it could contain the settings of another model.

    Raises:
        OlderFileError: If the files contradict each other, or describe a model that `icl` does not support.
    """
    found: dict[str, Any] = {}
    folders = path.parents[: 2 if path.parent.name == "checkpoints" else 1]
    for file in (folder / name for folder in folders for name in _SETTINGS):
        try:
            text = read_bytes(file).decode("utf-8")
        except (OSError, ContentError, UnicodeDecodeError):
            continue
        positions, norm, activation = (
            _word(text, key) for key in ("positional_embedding_type", "normalization_type", "act_fn")
        )
        if positions not in (None, "standard", "shortformer") or norm not in (None, "LN"):
            raise OlderFileError(
                f"{file} describes a model that cannot be imported: positional_embedding_type {positions}, normalization_type {norm}. Only "
                "the positions standard and shortformer, and the normalization LN, are supported."
            )
        is_unused = (_word(text, "attn_only") or "").lower() == "true"
        activation = _ACTIVATIONS.get(activation or "", None if is_unused else activation)
        for key, value in (("model.positions", positions), ("model.activation", activation)):
            if value is not None and found.setdefault(key, value) != value:
                raise OlderFileError(
                    f"{file} says that `{key}` is {value}, but another file of this model says {found[key]}. Remove the wrong file."
                )
    return found


def params(tree: Mapping[str, Any], config: RunConfig) -> Params:
    """Return the weights, without buffers.

    Raises:
        ContentError: If the weights do not fit the configuration.
    """
    weights, size = Weights(_state(tree)), config.language.context_size
    for layer in range(config.model.num_layers):
        weights.drop(f"blocks.{layer}.attn.mask", size, size)
        weights.drop(f"blocks.{layer}.attn.IGNORE")
    result = {name: weights.take(name, *shape) for name, shape in shapes_of(config).by_name().items()}
    weights.finish()
    return result


def draw_tasks(tree: Mapping[str, Any], config: RunConfig) -> Float[Tensor, "M D"]:
    """Refuse to draw tasks, because a language run has no tasks.

    Raises:
        ConfigError: Always.
    """
    raise ConfigError("A language run has no tasks; leave out --tasks.")


def fetch(address: str) -> Path:
    """Return the folder with the local copy of a repository of the Hugging Face Hub. Files that are not in the local cache are fetched.

    Args:
        address: Address of the repository, such as hf://georgeyw/L2W256-3m-rr.

    Raises:
        ConfigError: If `huggingface_hub` is not installed.
        OlderFileError: If the repository cannot be fetched.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(
            f"{address} needs the package `huggingface_hub`. Install it with `pip install icl[hub]`."
        ) from None
    try:
        patterns = [*PATTERNS, *_SETTINGS]
        return Path(snapshot_download(address.removeprefix("hf://"), allow_patterns=patterns))
    except Exception as error:  # a dozen kinds of errors: no network, no such repository, no access
        raise OlderFileError(
            f"{address} cannot be fetched from the Hugging Face Hub ({first_line(error)[:150].rstrip('.')}). Without a network, copy the "
            "repository's files to a folder and import that folder."
        ) from None


def _word(text: str, key: str) -> str | None:
    match = re.search(rf"""\b{key}["']?\s*:\s*["']?(\w+)""", text)
    return None if match is None or match[1] in ("null", "None") else match[1]


def _state(tree: Mapping[Any, Any]) -> Mapping[Any, Any]:
    return next((tree[key] for key in _STATE if isinstance(tree.get(key), Mapping)), tree)


def _learning_rate(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the learning rate and the weight decay of the optimiser, if the checkpoint contains them and they are between 0 and 1."""
    optimiser = tree.get("optimizer_state_dict")
    groups = optimiser.get("param_groups") if isinstance(optimiser, Mapping) else None
    group = groups[0] if isinstance(groups, list) and groups and isinstance(groups[0], Mapping) else {}
    values = {"optim.lr": group.get("lr"), "optim.weight_decay": group.get("weight_decay")}
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, float) and not isinstance(value, torch.Tensor) and 0 < value < 1
    }

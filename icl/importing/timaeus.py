"""Files of timaeus-research/icl, the code of Hoogland et al. (2024): layout, settings and tasks.

A file contains either the state dict alone, or a dict with the keys `model`, `optimizer` and `scheduler`. In later versions, this dict also
has the keys `rng_state` and `metadata`. The file's name is the step: `checkpoints/icl/M-inf-seed-0-task-.../1465.pt`, in a folder or a bucket. The code counts
steps from 0 and saves after the update, so file t contains the state after t + 1 updates. We keep the number t, because the published
data use it.

The code adds each block's input twice (`model.double_residual`). The projection to queries, keys and values contains q, k and v of
head 1, then of head 2, and so on, as in `icl`. A file does not contain the number of heads, the noise or the tasks. The tasks are drawn on
the CPU with `torch.normal`, after the global generator is seeded with `pretrain_seed`.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from icl.config import RunConfig
from icl.files.reading import ContentError
from icl.importing.pickles import as_table
from icl.importing.weights import Weights
from icl.model.stacked import Params

PRESET = "L2H4"
_ROOT = "token_sequence_transformer."
_RUN = re.compile(r"M-(inf|\d{1,10})-seed-(\d{1,18}|None)-task-.*")
"""Pattern of the name of a run's folder, which begins with the number of tasks and the seed of the initial weights."""


def is_mine(tree: Any) -> bool:
    """Return whether the code of Hoogland et al. wrote this file."""
    return isinstance(tree, Mapping) and any(_is_own(name) for name in _state(tree) if isinstance(name, str))


def step_of(tree: Mapping[str, Any]) -> int | None:
    """Return None, because the step is in the file's name, not in its content."""
    return None


def folder_facts(name: str) -> dict[str, Any]:
    """Return the settings in the name of a run's folder, keyed by dotted name. For any other name, the dict is empty."""
    match = _RUN.fullmatch(name)
    if match is None:
        return {}
    seed = {} if match[2] == "None" else {"seeds.model": int(match[2])}
    return {"task.num_tasks": "inf" if match[1] == "inf" else int(match[1]), **seed}


def facts(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a file determines, keyed by dotted name.

    Raises:
        ContentError: If the file contains no model of Hoogland et al.
    """
    weights = Weights(_own(tree))
    embed_size, token_size = weights.shape("token_embedding.weight", 2)
    num_layers = weights.num_layers("blocks.{}.attention.attention.weight")
    return {
        "task.task_size": token_size - 1,
        "task.max_examples": weights.shape("postn_embedding.weight", 2)[1] // 2,
        "model.embed_size": embed_size,
        "model.num_layers": num_layers,
        "model.mlp_size": weights.shape("blocks.0.compute.0.weight", 2)[0] if num_layers else 0,
        "model.layer_norm": "pre" if "blocks.0.layer_norms.0.weight" in weights else "none",
        "model.attention_output": "blocks.0.attention.output.weight" in weights,
        "model.double_residual": True,
        "model.activation": "relu",
        **{f"model.{key}": False for key in ("embedding_bias", "attention_bias")},
        **{f"model.{key}": True for key in ("mlp_bias", "unembedding_bias")},
        "model.output": "token",
        "model.init": "pytorch",
    } | _schedule(tree)


def params(tree: Mapping[str, Any], config: RunConfig) -> Params:
    """Return the weights, keyed by their names in `icl`.

    Raises:
        ContentError: If the weights do not fit the configuration.
    """
    weights, model = Weights(_own(tree)), config.model
    width, hidden, has_norm = model.embed_size, model.mlp_size, model.layer_norm == "pre"
    num_tokens, token_size = 2 * config.task.max_examples, config.task.task_size + 1
    last = "unembedding.1" if has_norm else "unembedding"
    result = {
        "token_embedding.weight": weights.take("token_embedding.weight", width, token_size),
        "position_embedding": weights.take("postn_embedding.weight", width, num_tokens).T.contiguous(),
        "unembedding.weight": weights.take(f"{last}.weight", token_size, width),
        "unembedding.bias": weights.take(f"{last}.bias", token_size),
    }
    norms = {"unembedding.0": "final_norm"} if has_norm else {}
    for layer in range(model.num_layers):
        block, attention = f"blocks.{layer}.", f"blocks.{layer}.attention."
        weights.drop(f"{attention}causal_mask", num_tokens, num_tokens)
        result[f"{attention}qkv.weight"] = weights.take(f"{attention}attention.weight", 3 * width, width)
        if model.attention_output:
            result[f"{attention}output.weight"] = weights.take(f"{attention}output.weight", width, width)
        for theirs, ours, sizes in (("0", "hidden", (hidden, width)), ("2", "output", (width, hidden))):
            result[f"{block}mlp.{ours}.weight"] = weights.take(f"{block}compute.{theirs}.weight", *sizes)
            result[f"{block}mlp.{ours}.bias"] = weights.take(f"{block}compute.{theirs}.bias", sizes[0])
        if has_norm:
            norms |= {f"{block}layer_norms.0": f"{block}attention_norm", f"{block}layer_norms.1": f"{block}mlp_norm"}
    for theirs, ours in norms.items():
        result[f"{ours}.weight"] = weights.take(f"{theirs}.weight", width)
        result[f"{ours}.bias"] = weights.take(f"{theirs}.bias", width)
    weights.finish()
    return result


def draw_tasks(tree: Mapping[str, Any], config: RunConfig) -> Float[Tensor, "M D"]:
    """Draw the M training tasks again, as the older code did. The seed `pretrain_seed` of the older code is our `seeds.tasks`."""
    generator = torch.Generator().manual_seed(config.seeds.tasks)
    shape = (int(config.task.num_tasks), config.task.task_size)
    return torch.normal(0.0, 1.0, shape, generator=generator, dtype=torch.float32, device="cpu")


def _is_own(name: str) -> bool:
    return name.endswith(f"{_ROOT}token_embedding.weight")


def _state(tree: Mapping[Any, Any]) -> Mapping[Any, Any]:
    inner = tree.get("model")
    return inner if isinstance(inner, Mapping) else tree


def _own(tree: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the tensors of a file, keyed by name. The prefix of the transformer's tensors is removed from the names."""
    state = _state(tree)
    if not any(_is_own(name) for name in state if isinstance(name, str)):
        raise ContentError(f"it contains no {_ROOT}token_embedding.weight")
    own = {name.replace(_ROOT, "", 1) if isinstance(name, str) else name: value for name, value in state.items()}
    if len(own) < len(state):
        raise ContentError("it contains a tensor twice")
    return own


def _schedule(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the learning-rate schedule that the file contains, keyed by dotted name."""
    found: dict[str, Any] = {}
    groups = as_table(tree.get("optimizer")).get("param_groups")
    rate = as_table(groups[0]).get("max_lr") if isinstance(groups, list) and groups else None
    if isinstance(rate, float) and 0 < rate < 1:
        found["optim.lr"] = rate
    scheduler = as_table(tree.get("scheduler"))
    length = scheduler.get("total_steps")
    if isinstance(length, int) and 2 <= length < 2**40:
        found["trainer.max_steps"] = length
        warmup = _warmup_steps(scheduler)
        if warmup is not None and 1 <= warmup < length:
            found |= {"optim.schedule": "triangle", "optim.schedule_steps": length}
            found |= {} if warmup == length // 2 else {"optim.warmup_steps": warmup}
    return found


def _warmup_steps(scheduler: Mapping[str, Any]) -> int | None:
    """Return the number of steps up to the peak of OneCycleLR. Return None if its schedule is not a triangle; its default is a cosine."""
    phases = scheduler.get("_schedule_phases")
    if scheduler.get("_anneal_func_type", "linear") != "linear" or not isinstance(phases, list) or len(phases) != 2:
        return None
    peak = as_table(phases[0]).get("end_step")
    return round(peak) + 1 if isinstance(peak, float) and abs(peak) < 2**40 else None

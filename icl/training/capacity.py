"""How many members fit on a device at once.

Elsewhere than on a CPU all members move together. There each needs its parameters, their gradient, Adam's two moments and
three temporaries of that size, and the activations that its backward pass needs: those are counted by running forward
passes of a few prompts and looking at what autograd keeps.

On a CPU at most one member moves on each core, so activations count at most once for each. A member then needs parameters
and moments (three times that when it is resumed, as they are read and put together), the prompts of a step while they are
drawn or what its evaluation takes, and its evaluation prompts with their baselines, which members that differ in their
training seeds alone share.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from icl import stacked
from icl.build import build_model
from icl.config import RunConfig
from icl.population import Params, size, stack

_ROWS = 7
"""Parameters, gradient, two moments; the new values of parameters and moments before they replace the old."""
_CPU_ROWS = 3
"""Parameters and two moments."""
_RESUMED_ROWS = 9
"""These; what the members' files hold of them; and the same put together."""
_DRAWN_BYTES = 128
"""For every number of a batch of prompts while it is drawn from counters, as measured."""
_EVALUATED_ARRAYS = 48
"""Arrays of one float32 a target by which an evaluation of many members grows for each of them, as measured."""
_NUM_BASELINES = 5
_SHARE = 0.85
"""Of the memory that is there, what a population may take; the rest is for fragments."""
_MEMORY, _PROCESS_GROUPS, _CGROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def num_fitting(configs: Sequence[RunConfig], device: torch.device | str) -> int:
    """About how many members of this kind fit on a device at once, at least one."""
    config = configs[0]
    is_cpu = torch.device(device).type == "cpu"
    member = dict(build_model(config).named_parameters())
    row = sum(tensor.nbytes for tensor in member.values())
    members = stack([member] if is_cpu else [member] * 2)
    if not is_cpu:  # where attention has no kernel, and keeps more
        members = {name: tensor.to("meta") for name, tensor in members.items()}
    activations = activation_bytes(config, members) * config.trainer.batch_size
    room = _SHARE * device_bytes(device)
    if is_cpu:
        return max(1, int((room - torch.get_num_threads() * activations) // _cpu_bytes(configs, row)))
    return max(1, int(room // (_ROWS * row + activations)))


def _cpu_bytes(configs: Sequence[RunConfig], row: int) -> float:
    """What a member needs on a CPU beside the activations, of which so many bytes are its parameters'."""
    task, trainer, evaluation = configs[0].task, configs[0].trainer, configs[0].evaluation
    drawn = _DRAWN_BYTES * trainer.batch_size * task.max_examples * (task.task_size + 1)
    num_sets = len({(config.task, config.seeds.tasks, config.seeds.evaluation) for config in configs})
    targets = 4 * evaluation.num_prompts * task.max_examples if evaluation.every is not None else 0
    one_set = targets * (task.task_size + 1 + _NUM_BASELINES)
    evaluated = _EVALUATED_ARRAYS * targets + (one_set if num_sets > 1 else 0)  # as sets that differ are stacked
    kept = 2 * one_set * num_sets / len(configs)  # `pretrain` and `true`
    return max(_RESUMED_ROWS * row, _CPU_ROWS * row + max(drawn, evaluated)) + kept


def activation_bytes(config: RunConfig, params: Params) -> int:
    """What the backward pass keeps for each prompt of a member, in bytes; alone it keeps less than as one of several."""
    return (_kept_bytes(config, params, 4) - _kept_bytes(config, params, 2)) // (2 * size(params))


def device_bytes(device: torch.device | str) -> int:
    """The memory of a GPU, or what this process can still have of the machine's."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return min([_available_bytes(), *_group_bytes()])


def _available_bytes() -> int:
    """What the system could give without swapping; all of its memory where it does not say."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group_bytes() -> list[int]:
    """What the limits of this process's control groups, such as a container's or a Slurm job's, leave."""
    left = []
    try:
        groups = [line.split(":", 2) for line in _PROCESS_GROUPS.read_text().splitlines()]
    except OSError:
        return []
    for _, controllers, place in groups:
        if controllers == "memory":
            root, limit, used = _CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        elif not controllers:
            root, limit, used = _CGROUPS, "memory.max", "memory.current"
        else:
            continue
        own = root / place.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(root):
                left += _left_bytes(folder, limit, used)
    return left


def _left_bytes(folder: Path, limit: str, used: str) -> list[int]:
    """What a control group leaves, beside the files it caches; nothing if it has no limit."""
    try:
        most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # `max`
        return []
    cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return [max(0, most - taken + cached)]


def _kept_bytes(config: RunConfig, params: Params, num_prompts: int) -> int:
    """What autograd keeps of a forward pass, beside the parameters."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    weights = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
    device = next(iter(weights.values())).device
    xs = torch.zeros(num_prompts, config.task.max_examples, config.task.task_size, device=device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        predictions = stacked.predict(config.model, weights, xs, xs[..., 0])
    own = {tensor.untyped_storage()._cdata for tensor in weights.values()}
    del predictions  # until here every kept tensor is alive, so no two storages are the same
    return sum(nbytes for storage, nbytes in kept.items() if storage not in own)

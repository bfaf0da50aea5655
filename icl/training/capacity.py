"""How many members fit on a device at once.

Elsewhere than on a CPU all members move together. There each needs its parameters, their gradient, Adam's two moments and
three temporaries of that size, and the activations that its backward pass needs: those are counted by running forward
passes of a few prompts and looking at what autograd keeps.

On a CPU at most one member moves on each core, so activations count at most once for each. A member then needs parameters
and moments (three times that when it is resumed, as they are read and put together), the prompts of a step while they are
drawn or what its evaluation takes, and its evaluation prompts with their baselines, which members that differ in their
training seeds alone share.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from icl.build import build_model
from icl.config import RunConfig
from icl.memory import device_bytes, require_memory
from icl.stacked import Params, apply, size, stack

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


def require_room(config: RunConfig, device: torch.device | str) -> None:
    """Refuse a run that cannot fit on the device, before anything is built or written.

    What is counted is less than what training takes, so nothing that fits is refused.

    Raises:
        ConfigError: Naming the setting that needs most.
    """
    task, model, trainer, num_prompts = config.task, config.model, config.trainer, config.evaluation.num_prompts
    batch = trainer.batch_size // (trainer.devices * trainer.num_nodes)
    width = model.embed_size
    block = 3 * width**2 + 2 * width * model.mlp_size
    drawn = batch * task.max_examples * (task.task_size + 1)
    kept = batch * (2 * task.max_examples - 1) * model.num_layers * width
    ridge = num_prompts * task.max_examples * (task.task_size + (task.max_examples if task.noise_variance else 0))
    sizes = {
        f"a model of {model.num_layers:,} layers (`model.num_layers`) of width {width:,} (`model.embed_size`) and "
        f"{model.mlp_size:,} (`model.mlp_size`)": 16 * (model.num_layers * block + width * (task.task_size + 1)),
        f"a batch of {batch:,} prompts (`trainer.batch_size`) of {task.max_examples:,} examples (`task.max_examples`) in "
        f"{task.task_size:,} dimensions (`task.task_size`)": 4 * (drawn + kept),
        f"evaluating {num_prompts:,} prompts (`evaluation.num_prompts`) of {task.max_examples:,} examples "
        f"(`task.max_examples`) in {task.task_size:,} dimensions (`task.task_size`)": 8 * ridge,
    }
    require_memory(sizes, device)


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
        predictions = apply(config.model, weights, xs, xs[..., 0])
    own = {tensor.untyped_storage()._cdata for tensor in weights.values()}
    del predictions  # until here every kept tensor is alive, so no two storages are the same
    return sum(nbytes for storage, nbytes in kept.items() if storage not in own)

"""How many members fit on a device at once.

A member needs its parameters, their gradient, Adam's two moments and three temporaries of that size, and, where all
members move together, the activations that its backward pass needs: those are counted by running forward passes of a
few prompts and looking at what autograd keeps. On a CPU at most one member moves on each core, so there the activations
count at most once for each.
"""

import os

import torch
from torch import Tensor

from icl import stacked
from icl.build import build_model
from icl.config import RunConfig
from icl.population import Params, size, stack

_ROWS = 7
"""Parameters, gradient, two moments; the new values of parameters and moments before they replace the old."""
_SHARE = 0.85
"""Of the device's memory that a population may take; the rest is for prompts, evaluation and fragments."""


def num_fitting(config: RunConfig, device: torch.device | str) -> int:
    """About how many members of this kind fit on a device at once, at least one."""
    is_cpu = torch.device(device).type == "cpu"
    member = dict(build_model(config).named_parameters())
    rows = _ROWS * sum(tensor.nbytes for tensor in member.values())
    activations = activation_bytes(config, stack([member] if is_cpu else [member] * 2)) * config.trainer.batch_size
    room = _SHARE * device_bytes(device)
    if is_cpu:
        return max(1, int((room - torch.get_num_threads() * activations) // rows))
    return max(1, int(room // (rows + activations)))


def activation_bytes(config: RunConfig, params: Params) -> int:
    """What the backward pass keeps for each prompt of a member, in bytes; alone it keeps less than as one of several."""
    return (_kept_bytes(config, params, 4) - _kept_bytes(config, params, 2)) // (2 * size(params))


def device_bytes(device: torch.device | str) -> int:
    """The memory of a device, or of the machine."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _kept_bytes(config: RunConfig, params: Params, num_prompts: int) -> int:
    """What autograd keeps of a forward pass, beside the parameters."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
    xs = torch.zeros(num_prompts, config.task.max_examples, config.task.task_size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        predictions = stacked.predict(config.model, weights, xs, xs[..., 0])
    own = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    del predictions  # until here every kept tensor is alive, so no two share an address
    return sum(nbytes for address, nbytes in kept.items() if address not in own)

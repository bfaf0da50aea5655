"""Adam, the learning rate and gradient clipping for stacked parameters.

Adam is elementwise, so one optimiser over tensors with a leading axis N is N optimisers. Clipping is not: each member
is scaled by the norm of its own gradient, as `torch.nn.utils.clip_grad_norm_` would scale it alone.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from icl.config import RunConfig
from icl.schedules import rate_factor

_STABILISER = 1e-6  # clip_grad_norm_'s


def make_optimizer(params: Iterable[nn.Parameter], config: RunConfig, device_type: str) -> torch.optim.Adam:
    """Adam as the config says; one fused kernel where the device has it."""
    optim = config.optim
    fused = device_type in ("cpu", "cuda")
    adam = torch.optim.Adam(
        list(params), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=fused or None
    )
    adam.register_load_state_dict_pre_hook(_keep_kernel)
    return adam


def make_scheduler(optimizer: torch.optim.Optimizer, config: RunConfig) -> LambdaLR:
    """The learning rate as a function of the number of updates done."""
    factor = rate_factor(
        config.optim.schedule, warmup_steps=config.optim.warmup_steps, schedule_steps=config.schedule_steps
    )
    return LambdaLR(optimizer, factor)


def clip_by_member(params: Iterable[nn.Parameter], max_norm: float) -> Float[Tensor, " N"]:
    """Scale each member's gradient in place to a norm of at most `max_norm`.

    Returns:
        The norms before clipping, one per member.
    """
    grads = [param.grad for param in params if param.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in grads])  # P N
    norm = torch.linalg.vector_norm(norms, dim=0)  # N
    scale = (max_norm / (norm + _STABILISER)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale.view(-1, *[1] * (grad.ndim - 1)))
    return norm


def _keep_kernel(adam: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """What was saved, but for the kernel: a run may be resumed on another kind of device."""
    groups = zip(saved["param_groups"], adam.param_groups, strict=True)
    return saved | {"param_groups": [old | {"fused": own["fused"]} for old, own in groups]}

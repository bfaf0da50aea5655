"""Estimate how many members of a population fit on a device at once, and refuse runs that are too large for the device.

A member is one of the runs that train together as a population. On a GPU, all members are updated together. Each member then needs
memory for seven arrays of the size of its parameters: the parameters, their gradient, Adam's two moments, and the new parameters and
moments. Each member also needs memory for the activations that its backward pass uses. To estimate the size of the activations, we run
forward passes of a few prompts and measure the tensors that autograd keeps.

On a CPU, at most one member per core is updated at a time, so we count the activations of one member for each core. Each member also
needs memory for:

- Its parameters and moments. While members are resumed, they need three times as much memory, because the arrays are read from the
  resume files and then copied into joined arrays.
- The prompts of one training step while they are drawn, or the arrays of the member's evaluation, whichever is larger.
- Its evaluation prompts, with the baselines' predictions. Members that differ only in their training seeds share these prompts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from icl.build import build_model
from icl.compute.devices import device_bytes, require_memory
from icl.config import RunConfig
from icl.model.language import MAX_NUMBERS
from icl.model.losses import shapes_of
from icl.model.stacked import Params, apply, size, stack
from icl.tasks.priors import task_sequence

_ROWS = 7
"""Number of arrays per member on a GPU: parameters, gradient, two moments, and the new parameters and moments."""
_CPU_ROWS = 3
"""Number of arrays per member on a CPU: parameters and two moments."""
_RESUMED_ROWS = 9
"""Number of arrays per resumed member on a CPU: parameters and two moments. Each of these exists three times: in the member, in the
data read from the resume file, and in the joined arrays."""
_DRAWN_BYTES = 128
"""Bytes of memory per number in a batch of prompts, while our counter-based generator draws the batch (measured)."""
_EVALUATED_ARRAYS = 48
"""Number of arrays that each further member adds to an evaluation (measured). An array has one float32 per target."""
_NUM_BASELINES = 5
_SHARE = 0.85
"""Share of the device's memory that a population may use. The rest is left free, because fragmentation makes some memory unusable."""


def num_fitting(configs: Sequence[RunConfig], device: torch.device | str) -> int:
    """Estimate how many members with these settings fit on a device at once. The result is at least 1."""
    config = configs[0]
    is_cpu = torch.device(device).type == "cpu"
    member = dict(build_model(config).named_parameters())
    row_bytes = sum(tensor.nbytes for tensor in member.values())
    members = stack([member] if is_cpu else [member] * 2)
    if not is_cpu:  # our attention kernel runs only on CPUs; without this kernel, autograd keeps more tensors
        members = {name: tensor.to("meta") for name, tensor in members.items()}
    activations = activation_bytes(config, members) * config.trainer.batch_size
    available = _SHARE * device_bytes(device)
    if is_cpu:
        return max(1, int((available - torch.get_num_threads() * activations) // _cpu_bytes(configs, row_bytes)))
    return max(1, int(available // (_ROWS * row_bytes + activations)))


def require_room(config: RunConfig, device: torch.device | str) -> None:
    """Refuse a run that cannot fit on the device, before anything is built or written.

    The estimate is a lower bound on the memory that training needs, so no run that fits is refused.

    Raises:
        ConfigError: If the run cannot fit; the message names the settings that need the most memory.
    """
    if config.model.is_language:
        _require_language_room(config, device)
        return
    task, model, trainer, num_prompts = config.task, config.model, config.trainer, config.evaluation.num_prompts
    batch = trainer.batch_size // trainer.num_processes
    width = model.embed_size
    block = 3 * width**2 + 2 * width * model.mlp_size
    drawn = batch * task.max_examples * (task.task_size + 1)
    activations = batch * (2 * task.max_examples - 1) * model.num_layers * width
    ridge = num_prompts * task.max_examples * (task.task_size + (task.max_examples if task.noise_variance else 0))
    sizes = {
        f"a model of {model.num_layers:,} layers (`model.num_layers`) of width {width:,} (`model.embed_size`) and "
        f"{model.mlp_size:,} (`model.mlp_size`)": 16 * (model.num_layers * block + width * (task.task_size + 1)),
        f"a batch of {batch:,} prompts (`trainer.batch_size`) of {task.max_examples:,} examples (`task.max_examples`) in "
        f"{task.task_size:,} dimensions (`task.task_size`)": 4 * (drawn + activations),
        f"evaluating {num_prompts:,} prompts (`evaluation.num_prompts`) of {task.max_examples:,} examples "
        f"(`task.max_examples`) in {task.task_size:,} dimensions (`task.task_size`)": 8 * ridge,
    }
    require_memory(sizes, device)


def _require_language_room(config: RunConfig, device: torch.device | str) -> None:
    shapes, text, trainer = shapes_of(config), config.language, config.trainer
    model = f"a model of {shapes.num_params:,} weights (sections `model` and `language`)"
    batch = f"a batch of {trainer.batch_size:,} rows (`trainer.batch_size`) of {text.context_size:,} tokens"
    require_memory({model: 16 * shapes.num_params, batch: 16 * trainer.batch_size * text.context_size}, device)


def _cpu_bytes(configs: Sequence[RunConfig], row_bytes: int) -> float:
    """Return the number of bytes per member on a CPU, not counting activations. `row_bytes` is the size of a member's parameters in bytes."""
    task, trainer, evaluation = configs[0].task, configs[0].trainer, configs[0].evaluation
    if configs[0].model.is_language:  # activations are not counted here; `MAX_NUMBERS` limits them
        return float(
            _RESUMED_ROWS * row_bytes + 48 * (trainer.batch_size + evaluation.num_prompts) * configs[0].num_tokens
        )
    drawn = _DRAWN_BYTES * trainer.batch_size * task.max_examples * (task.task_size + 1)
    num_sets = len({(config.task, task_sequence(config), config.seeds.evaluation) for config in configs})
    targets = 4 * evaluation.num_prompts * task.max_examples if evaluation.every is not None else 0
    set_bytes = targets * (task.task_size + 1 + _NUM_BASELINES)
    # If the members have different evaluation prompts, these are copied into one stacked array.
    evaluated = _EVALUATED_ARRAYS * targets + (set_bytes if num_sets > 1 else 0)
    # The factor 2 counts two sets of prompts: of the run's own tasks (`pretrain`), and of new tasks (`true`).
    stored = 2 * set_bytes * num_sets / len(configs)
    return max(_RESUMED_ROWS * row_bytes, _CPU_ROWS * row_bytes + max(drawn, evaluated)) + stored


def activation_bytes(config: RunConfig, params: Params) -> int:
    """Return the number of bytes of activations that autograd keeps for the backward pass, per prompt and member.

    A population of one needs fewer bytes per member than a larger population. A language model keeps at most `MAX_NUMBERS` numbers for
    a whole batch.
    """
    if config.model.is_language:
        return 4 * MAX_NUMBERS // config.trainer.batch_size
    return (_saved_bytes(config, params, 4) - _saved_bytes(config, params, 2)) // (2 * size(params))


def _saved_bytes(config: RunConfig, params: Params, num_prompts: int) -> int:
    """Return the number of bytes that autograd saves in a forward pass, not counting the parameters."""
    saved: dict[int, int] = {}  # number of bytes, keyed by storage, because several tensors can share one storage

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    weights = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
    device = next(iter(weights.values())).device
    xs = torch.zeros(num_prompts, config.task.max_examples, config.task.task_size, device=device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        predictions = apply(config.model, weights, xs, xs[..., 0])
    of_weights = {tensor.untyped_storage()._cdata for tensor in weights.values()}
    del predictions  # `predictions` kept every saved tensor alive, so no address of a storage was used twice
    return sum(nbytes for storage, nbytes in saved.items() if storage not in of_weights)

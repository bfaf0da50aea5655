"""The one place where configuration becomes objects; everything else takes plain arguments."""

import os

import torch

from icl.checkpoints import Checkpoint, CheckpointError
from icl.config import RunConfig
from icl.evaluation import EvaluationSet, evaluation_set
from icl.transformer import Transformer, initialise
from icl.validation import ConfigError

_KINDS = ("cpu", "cuda", "tpu", "mps")


def build_model(config: RunConfig) -> Transformer:
    """The run's model with its initial weights, on the CPU in float32.

    The weights depend on `seeds.model` and the model's shape only; the global generator is neither read nor set.

    Example:
        >>> from icl.presets import preset
        >>> sum(p.numel() for p in build_model(preset("L2H4")).parameters())
        51717
    """
    model = build_architecture(config)
    initialise(model, config.model, torch.Generator().manual_seed(config.seeds.model))
    return model


def build_architecture(config: RunConfig) -> Transformer:
    """Return the model of a run with unset weights, for loading into."""
    return Transformer(config.model, task_size=config.task.task_size, max_examples=config.task.max_examples)


def build_checkpoint_model(checkpoint: Checkpoint, *, device: torch.device | str = "cpu") -> Transformer:
    """The model that a checkpoint holds.

    Raises:
        CheckpointError: If the weights are not those that its configuration describes.
    """
    model = build_architecture(checkpoint.config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if {name: tuple(tensor.shape) for name, tensor in checkpoint.params.items()} != expected:
        raise CheckpointError("The checkpoint does not hold the weights that its own configuration describes.")
    model.load_state_dict(checkpoint.params)
    return model.to(device)


def build_evaluation_sets(
    config: RunConfig, *, num_prompts: int, shifts: tuple[str, ...] = (), device: torch.device | str = "cpu"
) -> list[EvaluationSet]:
    """The run's fixed prompts with their baselines: `pretrain`, `true`, and the shifts asked for."""
    names = ("pretrain", "true", *shifts)
    return [evaluation_set(config, name, num_prompts=num_prompts, device=device) for name in names]


def choose_device(accelerator: str = "auto") -> str:
    """The device kind to run on: what is asked for, else $DEVICE, else the best of cuda, mps and cpu.

    Raises:
        ConfigError: If it is unknown, or not on this machine.
    """
    wanted = os.environ.get("DEVICE", "").strip().lower() or "auto" if accelerator == "auto" else accelerator
    wanted = "cuda" if wanted == "gpu" else wanted
    if wanted == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if _is_present(kind))
    if wanted not in _KINDS:
        raise ConfigError(f"There is no device kind `{wanted}`; set DEVICE to one of {', '.join(_KINDS)}.")
    if not _is_present(wanted):
        raise ConfigError(
            f"This machine has no usable {wanted} device; set DEVICE=cpu or --trainer.accelerator cpu, "
            f"or install the torch build that supports {wanted}."
        )
    return wanted


def _is_present(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_available()
    if kind == "mps":
        return torch.backends.mps.is_available()
    if kind == "tpu":
        import importlib.util

        return importlib.util.find_spec("torch_xla") is not None
    return True

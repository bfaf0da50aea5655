"""XLA devices: one core of a TPU, or XLA's own CPU backend in its place (`PJRT_DEVICE=CPU`).

XLA traces a step into a graph and compiles it; the graph is the same whatever the backend. So the CPU backend shows without
a TPU that a step is compiled once and never waits for the host (`tests/xla/train_on_xla_cpu.py`).
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.plugins import XLACheckpointIO
from lightning.pytorch.accelerators import XLAAccelerator

from icl.config import TrainerConfig
from icl.training.members import Member
from icl.training.saving import MemberFiles
from icl.validation import ConfigError


class HostXLAAccelerator(XLAAccelerator):
    """XLA's CPU backend: one device. Lightning's accelerator counts TPU chips, and asks a cloud's server about them."""

    @staticmethod
    def is_available() -> bool:  # type: ignore[override]
        """Always."""
        return True

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        """What was asked for, which is one."""
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """The device."""
        return [torch.device("xla", 0)]


class XLAMemberFiles(MemberFiles, XLACheckpointIO):
    """The members' files, of the type that Lightning's XLA strategy insists on."""


def xla_options(settings: TrainerConfig, members: Sequence[Member]) -> dict[str, Any]:
    """What Lightning's Trainer needs for an XLA device.

    Raises:
        ConfigError: If there is none, or other than one device in float32 is asked for.
    """
    if settings.devices * settings.num_nodes > 1:
        raise ConfigError(
            "A run uses one TPU device; leave `trainer.devices` and `trainer.num_nodes` at 1, "
            "and train several runs there as one population (`--population.seeds`)."
        )
    if settings.precision != "32-true":
        # XLA's half precision is the whole process's: the prompts would be rounded with the weights.
        raise ConfigError(f"`trainer.precision` must be 32-true on a TPU, got {settings.precision}.")
    on_host = os.environ.get("PJRT_DEVICE") == "CPU"
    if not on_host and not XLAAccelerator.is_available():
        raise ConfigError(
            "torch_xla finds no TPU on this machine; set DEVICE=cpu, or PJRT_DEVICE=CPU to try XLA's CPU backend."
        )
    return {"accelerator": HostXLAAccelerator() if on_host else "tpu", "plugins": [XLAMemberFiles(members)]}

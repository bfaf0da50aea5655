"""Train on an XLA device: one core of a TPU, or XLA's CPU backend (`PJRT_DEVICE=CPU`).

XLA traces a step into a graph and compiles the graph. The graph is the same for all backends. So a test on the CPU backend needs no TPU,
and can still check that a step is compiled only once and that the host never waits for the device (`tests/xla/train_on_xla_cpu.py`).
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.plugins import XLACheckpointIO
from lightning.pytorch.accelerators import XLAAccelerator

from icl.config import TrainerConfig
from icl.config.validation import ConfigError
from icl.training.members import Member
from icl.training.saving import MemberFiles


class HostXLAAccelerator(XLAAccelerator):
    """Accelerator for XLA's CPU backend, with one device.

    We do not use Lightning's own accelerator, because it counts TPU chips and asks a cloud server about them.
    """

    @staticmethod
    def is_available() -> bool:  # type: ignore[override]
        """Return True, because a CPU always exists."""
        return True

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        """Return the number of devices unchanged; `xla_options` has checked that it is 1."""
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """Return a list with the only device, XLA's CPU device."""
        return [torch.device("xla", 0)]


class XLAMemberFiles(MemberFiles, XLACheckpointIO):
    """Variant of `MemberFiles` that also has the base class that Lightning's XLA strategy requires."""


def xla_options(settings: TrainerConfig, members: Sequence[Member]) -> dict[str, Any]:
    """Return the arguments of Lightning's Trainer for an XLA device.

    Raises:
        ConfigError: If there is no XLA device, or the settings ask for several devices or for a precision other than 32-true.
    """
    if settings.num_processes > 1:
        raise ConfigError(
            "A run uses one TPU device; leave `trainer.devices` and `trainer.num_nodes` at 1, "
            "and train several runs on it as one population (`--population.seeds`)."
        )
    if settings.precision != "32-true":
        # XLA's half precision applies to the whole process, so it would also round the prompts.
        raise ConfigError(f"`trainer.precision` must be 32-true on a TPU, got {settings.precision}.")
    on_host = os.environ.get("PJRT_DEVICE") == "CPU"
    if not on_host and not XLAAccelerator.is_available():
        raise ConfigError(
            "torch_xla finds no TPU on this machine; set DEVICE=cpu, or PJRT_DEVICE=CPU to try XLA's CPU backend."
        )
    return {"accelerator": HostXLAAccelerator() if on_host else "tpu", "plugins": [XLAMemberFiles(members)]}

"""What holds for XLA devices without one; `tests/xla/train_on_xla_cpu.py` trains on XLA's own CPU backend."""

import pytest
import torch
from lightning.fabric.plugins import XLACheckpointIO
from tiny_runs import TINY

from icl.config import ConfigError, TrainerConfig
from icl.training.optim import make_optimizer
from icl.training.saving import MemberFiles
from icl.training.xla import XLAMemberFiles, xla_options


def moved_optimizer(saved_on, resumed_on):
    """An optimiser with the state of another one, as if of another device kind; its parameter."""
    parameters = [torch.nn.Parameter(torch.ones(1, 3)) for _ in range(2)]
    old, new = (
        make_optimizer([parameter], TINY, kind)
        for parameter, kind in zip(parameters, (saved_on, resumed_on), strict=True)
    )
    parameters[0].grad = torch.full((1, 3), 0.5)
    old.step()
    new.load_state_dict(old.state_dict())
    return new, parameters[1]


@pytest.mark.parametrize(("saved_on", "resumed_on", "fused"), [("cpu", "xla", None), ("xla", "cpu", True)])
def test_a_run_resumed_on_another_kind_of_device_takes_that_ones_kernel(saved_on, resumed_on, fused):
    optimizer, parameter = moved_optimizer(saved_on, resumed_on)
    assert optimizer.param_groups[0]["fused"] is fused
    assert optimizer.state[parameter]["step"] == 1
    assert torch.allclose(optimizer.state[parameter]["exp_avg"], torch.full((1, 3), 0.05))
    parameter.grad = torch.full((1, 3), 0.5)
    optimizer.step()
    assert optimizer.state[parameter]["step"] == 2


@pytest.mark.parametrize("settings", [{"devices": 8, "batch_size": 8}, {"num_nodes": 2}, {"precision": "bf16-true"}])
def test_what_a_tpu_run_cannot_do_is_one_sentence(settings, monkeypatch):
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    with pytest.raises(ConfigError, match=r"`trainer\.(devices|precision)`.*\.$"):
        xla_options(TrainerConfig(**settings), [])


def test_without_a_tpu_the_sentence_says_what_to_set(monkeypatch):
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    with pytest.raises(ConfigError, match="no TPU on this machine; set DEVICE=cpu"):
        xla_options(TrainerConfig(), [])


def test_lightning_takes_the_members_files_for_its_own_kind_but_ours_writes_them():
    assert isinstance(XLAMemberFiles([]), XLACheckpointIO)
    assert XLAMemberFiles.save_checkpoint is MemberFiles.save_checkpoint
    assert XLAMemberFiles.load_checkpoint is MemberFiles.load_checkpoint

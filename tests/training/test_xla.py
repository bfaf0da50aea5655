"""Properties needed on XLA devices, tested without one; `tests/xla/train_on_xla_cpu.py` trains on XLA's own CPU backend."""

import pytest
from lightning.fabric.plugins import XLACheckpointIO

from icl.config import TrainerConfig
from icl.config.validation import ConfigError
from icl.training.saving import MemberFiles
from icl.training.xla import XLAMemberFiles, xla_options


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

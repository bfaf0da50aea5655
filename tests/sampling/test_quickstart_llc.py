"""The recommended settings give `ok` at the quickstart's last checkpoint; deliberately bad settings do not."""

import pytest

from icl.cli import main
from icl.presets import preset
from icl.runs.folder import RunFolder, local_root
from icl.sampling.run import estimate_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """Return a run of the preset, trained to its end."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LOCAL_ROOT", str(tmp_path_factory.mktemp("runs")))
    patch.setenv("WANDB_MODE", "disabled")
    patch.setenv("DEVICE", "cpu")
    try:
        assert main(["train"]) == 0
        return RunFolder(local_root() / "quickstart")
    finally:
        patch.undo()


def test_the_recommended_settings_are_ok_at_the_last_checkpoint(quickstart, capsys):
    assert main(["llc", str(quickstart.path), "--steps", "last"]) == 0
    assert "Verdicts: 1 ok." in capsys.readouterr().out


def test_a_step_size_a_hundred_times_too_large_is_never_ok(quickstart):
    sampler = preset("quickstart").sampler
    found = estimate_run(quickstart.path, type(sampler)(lr=100 * sampler.lr, steps="last"))
    assert found.table["verdict"].item() == "invalid"


def test_the_untrained_checkpoint_is_never_ok(quickstart):
    found = estimate_run(quickstart.path, type(preset("quickstart").sampler)(steps="0"))
    assert found.table["verdict"].item() != "ok"

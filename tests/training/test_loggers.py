"""The loggers of `trainer.loggers`: what TensorBoard reads equals `metrics.csv`, also after a resume, and wrong choices are refused."""

import math
import signal
import struct
from pathlib import Path

import pytest
from lightning.fabric.loggers import tensorboard as lightnings
from tiny_runs import TINY, as_arguments, change

from icl.cli import main
from icl.config import RunConfig
from icl.config.validation import ConfigError
from icl.resolve import resolve
from icl.run_names import run_name
from icl.runs.folder import RunFolder, local_root
from icl.runs.metrics_file import whole_rows
from icl.training import callbacks
from icl.training.run import train

Event = pytest.importorskip("tensorboardX.proto.event_pb2", reason="an older environment: pip install -e .").Event
SHORT = change(TINY, trainer={"max_steps": 40, "loggers": "csv,tensorboard"})


def events_of(folder: Path) -> dict[tuple[str, int], float]:
    """Return the scalars in all event files, by name and step. Read twice, a value must be the same."""
    scalars: dict[tuple[str, int], float] = {}
    for file in sorted((folder / "tensorboard").glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[12 + length + 4 :]
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    assert (value.tag, event.step) not in scalars
                    scalars[value.tag, event.step] = value.simple_value
    return scalars


def require_same(folder: RunFolder) -> None:
    rows = [
        ((name, int(row["step"])), float(value))
        for row in whole_rows(folder.metrics_file)
        for name, value in row.items()
        if value and name != "step"
    ]
    events = events_of(folder.path)
    assert len(events) == len(rows) > 20
    assert all(math.isclose(events[key], value, rel_tol=1e-6) for key, value in rows)


def test_tensorboard_gets_the_rows_of_metrics_csv(tmp_path):
    folder = train(SHORT, folder=tmp_path / "a").folder
    require_same(folder)


def test_a_logger_that_is_chosen_at_a_resume_gets_earlier_rows_and_changes_no_result(tmp_path, monkeypatch):
    plain = change(SHORT, trainer={"loggers": "csv"})

    original = callbacks.StopSignals.on_train_batch_end

    def stop(self: callbacks.StopSignals, trainer, *rest) -> None:
        if trainer.global_step >= 25:
            signal.raise_signal(signal.SIGTERM)
        original(self, trainer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.StopSignals, "on_train_batch_end", stop)
        assert train(plain, folder=tmp_path / "a").status.state == "preempted"
    assert not (tmp_path / "a" / "tensorboard").exists()
    folder = train(SHORT, folder=tmp_path / "a").folder
    require_same(folder)
    undisturbed = train(plain, folder=tmp_path / "b").folder
    assert folder.metrics_file.read_bytes() == undisturbed.metrics_file.read_bytes()


@pytest.mark.parametrize("value", ["csv,tensorbord", "", ",", "csv;wandb", "none", "auto,csv"])
def test_unknown_loggers_are_refused(value):
    with pytest.raises(ConfigError, match=r"`trainer.loggers` must be auto, or some of csv, tensorboard, wandb"):
        resolve({"trainer.loggers": value})


@pytest.mark.parametrize("value", ["csv, TensorBoard", ["csv", "tensorboard"], "tensorboard"])
def test_lists_of_loggers(value):
    settings = resolve({"trainer.loggers": value}).trainer
    assert "tensorboard" in settings.logger_names


def test_loggers_are_no_part_of_the_name():
    assert run_name(resolve({"trainer.loggers": "csv"})) == run_name(RunConfig())


def test_wandb_that_is_chosen_and_not_set_up_is_an_error_but_disabled_wins(tmp_path, monkeypatch, capsys):
    words = ["train", *as_arguments(SHORT), "--trainer.loggers", "csv,wandb", "--trainer.max_steps", "2"]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "")
    assert main(words) == 2
    assert "W&B is not set up. Run `wandb login`" in capsys.readouterr().err
    assert not (local_root() / "tiny").exists()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert main(words) == 0


def test_csv_alone_leaves_wandb_out(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = train(change(SHORT, trainer={"loggers": "csv", "max_steps": 2}), folder=tmp_path / "a").folder
    assert not (folder.path / "wandb").exists()


def test_tensorboard_without_its_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(lightnings, "_TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr(lightnings, "_TENSORBOARDX_AVAILABLE", False)
    with pytest.raises(
        ConfigError, match=r"no package that writes its files is installed. Run `pip install tensorboard`"
    ):
        train(SHORT, folder=tmp_path / "a")
    assert not (tmp_path / "a").exists()

"""Copies of runs: the later `last.ckpt` is never lost, and a run that is trained or rewritten during the copying is copied consistently."""

import dataclasses
import functools
from pathlib import Path

import pytest
from tiny_runs import TINY, change

from icl.cli import main
from icl.config import RunConfig
from icl.files.writing import StorageError
from icl.runs import delivery, transfer
from icl.runs.checkpoints import checkpoint_name
from icl.runs.copied_files import copied_names
from icl.runs.delivery import note_delivered, send_results
from icl.runs.folder import RunError, RunFolder, local_root
from icl.runs.mirror import Mirror, open_mirror, pull, push, saved_step, take_up
from icl.runs.resume_file import pack
from icl.runs.status import Status
from icl.store.base import DamagedError, LocalStore
from icl.training.run import train

NAMES = ("run-id", "config.yaml", "status.json", "last.ckpt", "previous.ckpt")
SHORT = change(TINY, trainer={"max_steps": 20}, evaluation={"every": None}, checkpoints={"every": 10, "num_log": 0})


@pytest.fixture
def url(tmp_path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def config(url) -> RunConfig:
    return change(TINY, trainer={"max_steps": 10_000}, checkpoints={"store": url})


@functools.cache
def resume_file(config: RunConfig, step: int) -> bytes:
    member = {"note": "only the step and the settings matter here"}
    return pack({"global_step": step, "configs": [config.to_dict()], "members": [member], "state_dict": {}})


def write(run: RunFolder, config: RunConfig, step: int, *, status: int | None = None) -> None:
    """Write a run whose last save is at a step. `status` is the step in its status, which may be later."""
    if not run.config_file.exists():
        run.write_config(config)
    reached = step if status is None else status
    run.store.write("metrics.csv", "".join(f"{row},1\n" for row in range(1000, reached + 1, 1000)).encode())
    run.store.write("last.ckpt", resume_file(config, step))
    run.write_status(Status(state="running", step=reached, max_steps=10_000))


def at(folder: Path, url: str) -> Mirror:
    return open_mirror(RunFolder(folder), url, "tiny")


@pytest.fixture
def mirror(config, url) -> Mirror:
    """Return a run at step 5000 and its copy at step 3000."""
    mirror = at(local_root() / "tiny", url)
    write(mirror.run, config, 3000)
    push(mirror)
    write(mirror.run, config, 5000)
    return mirror


def contents(mirror: Mirror) -> dict[str, bytes]:
    return {name: mirror.here.read(name) for name in copied_names(mirror.here)}


# Age


@pytest.mark.parametrize("status", [b"", b"{", None], ids=["empty", "cut short", "missing"])
def test_a_folder_whose_status_was_lost_in_a_power_cut_keeps_its_later_save(mirror, config, status):
    if status is None:
        mirror.run.status_file.unlink()
    else:
        mirror.run.status_file.write_bytes(status)
    before = contents(mirror)
    assert not take_up(mirror, config)
    with pytest.raises(RunError, match=r"is at step 5,000 and .* only at step 3,000"):
        pull(mirror)
    assert contents(mirror) == before
    push(mirror)
    assert saved_step(mirror.there) == 5000


@pytest.mark.parametrize(
    "kept", [("run-id", "last.ckpt", "status.json"), ("run-id", "last.ckpt"), ("run-id", "previous.ckpt")]
)
def test_a_folder_that_lost_its_settings_keeps_its_later_save(mirror, config, kept):
    mirror.run.previous_file.write_bytes(resume_file(config, 4500))
    for name in set(NAMES) - set(kept):
        (mirror.run.path / name).unlink()
    before = {name: (mirror.run.path / name).read_bytes() for name in (*kept, "metrics.csv")}
    assert not take_up(mirror, config)
    with pytest.raises(RunError, match="push instead"):
        pull(mirror)
    assert {name: (mirror.run.path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("name", ["last.ckpt", "status.json"])
def test_a_folder_that_may_contain_another_run_is_not_fetched_over(mirror, config, name, tmp_path, url):
    other = at(tmp_path / "other", url)
    other.here.write(name, mirror.here.read(name))
    with pytest.raises(RunError, match="another run"):
        take_up(other, config)
    with pytest.raises(RunError, match="another run"):
        pull(other, force=True)
    assert copied_names(other.here) == [name]


def test_a_new_folder_takes_over_the_copy(mirror, config, tmp_path, url):
    other = at(tmp_path / "other", url)
    assert take_up(other, config)
    assert saved_step(other.here) == 3000
    assert other.run.read_config() == config


def test_a_take_over_that_broke_off_is_continued(mirror, config, tmp_path, url):
    other = at(tmp_path / "other", url)
    other.here.write("run-id", mirror.there.read("run-id"))
    assert take_up(other, config)
    assert saved_step(other.here) == 3000
    assert other.run.read_config() == config


def test_the_later_resume_file_decides_and_not_the_later_status(mirror, config, tmp_path, url):
    elsewhere = at(tmp_path / "B", url)
    assert take_up(elsewhere, config)
    write(elsewhere.run, config, 5000)
    push(elsewhere)
    write(mirror.run, config, 4000, status=6000)
    with pytest.raises(RunError, match=r"is at step 5,000 and .* only at step 4,000; pull instead"):
        push(mirror)
    assert saved_step(mirror.there) == 5000
    assert take_up(mirror, config)
    assert contents(mirror) == contents(elsewhere)


def test_without_resume_files_the_status_decides(mirror, config):
    mirror.there.delete("last.ckpt")
    mirror.run.resume_file.unlink()
    mirror.run.write_status(Status(state="finished", step=2000, max_steps=10_000))
    with pytest.raises(RunError, match=r"is at step 3,000 and .* only at step 2,000"):
        push(mirror)
    mirror.run.status_file.unlink()
    with pytest.raises(RunError, match=r"has neither a resume file nor a status; pull instead"):
        push(mirror)


@pytest.mark.parametrize("state", ["running", "failed"])
def test_a_folder_that_lost_its_resume_files_takes_the_copy_whatever_its_status_says(mirror, state):
    """Otherwise training would begin again at step 0, and overwrite the later copy."""
    mirror.run.resume_file.unlink()
    mirror.run.write_status(Status(state=state, step=5000, max_steps=10_000))
    assert take_up(mirror, mirror.run.read_config())
    assert saved_step(mirror.here) == 3000


def test_a_run_that_lost_its_resume_files_is_not_begun_again_over_a_damaged_copy(mirror, config):
    mirror.run.resume_file.unlink()
    mirror.there.write("last.ckpt", resume_file(config, 3000)[:-1])
    with pytest.raises(DamagedError, match="cannot be resumed from this copy"):
        take_up(mirror, config)


def test_a_damaged_save_counts_as_the_save_before_it(mirror, config):
    push(mirror)
    mirror.run.previous_file.write_bytes(resume_file(config, 4500))
    mirror.run.resume_file.write_bytes(resume_file(config, 5000)[:-1])
    assert saved_step(mirror.here) == 4500
    assert take_up(mirror, config)
    assert saved_step(mirror.here) == 5000


def test_a_damaged_save_in_the_store_is_reported_and_the_run_continues_here(mirror, config, tmp_path, url, capsys):
    mirror.there.write("last.ckpt", resume_file(config, 3000)[:-1])
    before = contents(mirror)
    assert not take_up(mirror, config)
    said = capsys.readouterr().err
    assert f"{mirror.there}/last.ckpt is damaged" in said
    assert f"The run continues from the files in {mirror.run.path}." in said
    assert contents(mirror) == before
    with pytest.raises(DamagedError, match="cannot be resumed from this copy"):
        take_up(at(tmp_path / "other", url), config)


def test_a_run_that_lost_its_status_resumes_from_its_own_last_save(url, no_figures, capsys):
    """The whole way: a finished run with an empty status and an earlier copy is not trained again."""
    config = change(SHORT, checkpoints={"store": url})
    run = train(config).folder
    mirror = at(run.path, url)
    saved = run.resume_file.read_bytes()
    mirror.there.write("last.ckpt", resume_file(run.read_config(), 10))
    mirror.there.write("status.json", run.status_file.read_bytes().replace(b'"step": 20', b'"step": 10'))
    run.status_file.write_bytes(b"")
    capsys.readouterr()
    result = train(config)
    assert result.status.state == "finished"
    assert "Resuming" in (said := capsys.readouterr().out)
    assert "from step 20" in said
    assert run.resume_file.read_bytes() == saved
    assert saved_step(mirror.there) == 20


# Runs that change during the copying


class Moving(LocalStore):
    """A store whose run is trained further while it is copied: a step follows each read of one of the first `num_steps` files."""

    def __init__(self, root: Path, config: RunConfig, num_steps: int) -> None:
        super().__init__(root)
        self.steps = iter(range(4000, 4000 + 1000 * num_steps, 1000))
        self.config = config

    def read(self, key: str, *, limit: int | None = None) -> bytes:
        """Return the value of a key, and then train further."""
        data = super().read(key, limit=limit)
        if key in ("run.log", "last.ckpt", "metrics.csv"):
            step = next(self.steps, None)
            if step is not None:
                write(RunFolder(self.root), self.config, step)
        return data


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 5, 1000])
@pytest.mark.parametrize("num_files", [1, 3])
def test_a_run_that_is_uploaded_during_a_pull_is_fetched_consistently(
    mirror, config, tmp_path, url, num_steps, num_files, monkeypatch
):
    mirror.there.write("run.log", b"starting\n")
    monkeypatch.setattr(LocalStore, "files_per_write", num_files)
    other = dataclasses.replace(at(tmp_path / "B", url), there=Moving(Path(url) / "tiny", config, num_steps))
    pull(other)
    rows = [int(line.partition(",")[0]) for line in other.run.metrics_file.read_text().splitlines()]
    step, status = saved_step(other.here), other.run.read_status()
    assert rows[-1] >= step
    assert status is not None
    assert status.step <= step
    if num_steps <= 5:  # the source came to rest
        assert contents(other) == contents(at(Path(url) / "tiny", str(tmp_path / "none")))


@pytest.mark.parametrize("num_files", [1, 3])
def test_a_former_best_checkpoint_that_training_deletes_does_not_stop_the_copying(mirror, monkeypatch, num_files):
    monkeypatch.setattr(LocalStore, "files_per_write", num_files)
    mirror.run.checkpoints.write(checkpoint_name(5), b"a former best checkpoint")

    def delete_first(*_) -> bool:
        mirror.run.checkpoints.delete(checkpoint_name(5))
        return False

    monkeypatch.setattr(transfer, "same_file", delete_first)
    assert "metrics.csv" in push(mirror)
    assert not mirror.there.keys("checkpoints")


def test_metrics_that_are_later_than_the_save_do_no_harm(url, tmp_path, no_figures, capsys):
    """A copy may contain rows after the step of its `last.ckpt`. Training removes them and writes them again."""
    config = change(SHORT, checkpoints={"store": url, "resume_seconds": 0.0}, trainer={"log_every": 1})
    run = train(config).folder
    mirror, rows = at(run.path, url), run.metrics_file.read_bytes()
    mirror.there.write("last.ckpt", run.previous_file.read_bytes())
    mirror.there.write("status.json", run.status_file.read_bytes().replace(b"finished", b"running"))
    result = train(config, folder=tmp_path / "B" / "tiny")
    said = capsys.readouterr()
    assert "from step 19" in said.out
    assert "altered" not in said.err
    assert result.folder.metrics_file.read_bytes() == rows
    assert main(["checkpoints", str(result.folder.path), "verify"]) == 0


# Results that change during the upload


def test_a_result_that_is_rewritten_during_the_upload_is_sent_again(mirror, config, monkeypatch):
    push(mirror)
    note_delivered(mirror.run, config, ["config.yaml"])
    mirror.run.write_result("llc.csv", "old\n")

    def rewrite(mirror: Mirror) -> None:
        mirror.run.write_result("llc.csv", "new\n")

    with monkeypatch.context() as patched:
        patched.setattr(delivery, "write_card", rewrite)
        assert send_results(mirror.run) == ["results/llc.csv"]
    assert mirror.there.read("results/llc.csv") == b"old\n"
    assert send_results(mirror.run) == ["results/llc.csv"]
    assert mirror.there.read("results/llc.csv") == b"new\n"
    assert send_results(mirror.run) == []


def test_a_file_that_cannot_be_a_resume_file_is_named(mirror, config):
    mirror.run.resume_file.unlink()
    mirror.run.resume_file.mkdir()
    with pytest.raises(StorageError, match=r"last\.ckpt"):
        take_up(mirror, config)

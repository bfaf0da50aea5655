"""Files removed while a run trains, and full disks: one sentence, no false success, and no leftover files."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny_runs import TINY, as_arguments, change

from icl.cli import main
from icl.files.writing import StorageError
from icl.runs.checkpoints import checkpoint_name, list_steps, load_step
from icl.runs.folder import RunError, RunFolder, local_root
from icl.runs.metrics_file import MetricsFile
from icl.training import saving
from icl.training.run import train, train_population

CONFIG = change(
    TINY,
    trainer={"max_steps": 40},
    checkpoints={"every": 10, "num_log": 0, "resume_seconds": 0.0, "moments": True},
)
COMMAND = ["train", *as_arguments(CONFIG)]


def slow(*values):
    """Mark a case as slow, because another case of the same kind is in the default run."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> RunFolder:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DEVICE", "cpu")
        return train(CONFIG, folder=tmp_path_factory.mktemp("whole") / "tiny").folder


@pytest.fixture
def folder() -> RunFolder:
    return RunFolder(local_root() / "tiny")


def at_step(monkeypatch, step, act) -> None:
    """Change the run's folder once, right after the checkpoint of a given step was saved."""
    save, done = saving.save_checkpoint, []

    def save_then_act(store, at, config, params):
        save(store, at, config, params)
        if at == step and store.root.name == "checkpoints" and not done:
            done.append(True)
            act(RunFolder(store.root.parent))

    monkeypatch.setattr(saving, "save_checkpoint", save_then_act)


def assert_same(folder: RunFolder, expected: RunFolder) -> None:
    assert folder.metrics_file.read_bytes() == expected.metrics_file.read_bytes()
    for mine, theirs in ((folder.checkpoints, expected.checkpoints), (folder.moments, expected.moments)):
        assert list_steps(mine) == list_steps(theirs)
        for step in list_steps(theirs):
            assert load_step(mine, step).digest == load_step(theirs, step).digest, step
    assert not list(folder.path.rglob(".tmp-*"))


def state(folder: RunFolder) -> str | None:
    status = folder.read_status()
    return status.state if status is not None else None


# Removed while the run trains


def test_a_removed_folder_ends_the_run_and_is_not_made_anew(monkeypatch, folder, whole, capsys, no_figures):
    at_step(monkeypatch, 20, lambda run: shutil.rmtree(run.path))
    assert main(COMMAND) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith(
        f"icl: The folder {folder.path} was moved or removed while the run was trained"
    )
    assert "Traceback" not in said
    assert not folder.path.exists()
    assert main(COMMAND) == 0
    assert_same(folder, whole)


def test_a_member_whose_folder_is_removed_fails_alone(monkeypatch, whole):
    configs = [CONFIG, change(CONFIG, seeds={"model": 1})]
    gone = []

    def remove(run: RunFolder) -> None:
        gone.append(run)
        shutil.rmtree(run.path)

    at_step(monkeypatch, 20, remove)
    results = train_population(configs, folders=[local_root() / "b", local_root() / "a"])
    assert [result.status.state for result in results] == ["failed", "finished"]
    assert "was moved or removed" in str(results[0].status.reason)
    assert not gone[0].path.exists()
    assert list_steps(results[1].folder.checkpoints) == [0, 10, 20, 30, 40]


@pytest.mark.parametrize(
    "name", ["metrics.csv", "config.yaml", *map(slow, ("status.json", "run.log", "last.ckpt", "previous.ckpt"))]
)
def test_what_is_in_memory_is_written_again(monkeypatch, folder, whole, name):
    at_step(monkeypatch, 20, lambda run: (run.path / name).unlink())
    assert train(CONFIG, folder=folder.path).status.state == "finished"
    assert_same(folder, whole)
    assert {path.name for path in folder.path.iterdir()} >= {path.name for path in whole.path.iterdir()}


@pytest.mark.slow
def test_altered_rows_are_written_again(monkeypatch, folder, whole):
    at_step(monkeypatch, 20, lambda run: run.metrics_file.write_text("step,train/loss\n"))
    train(CONFIG, folder=folder.path)
    assert_same(folder, whole)


@pytest.mark.parametrize("which", ["one", slow("all"), slow("moments")])
def test_removed_checkpoints_are_a_failure_that_every_rerun_repeats(monkeypatch, folder, capsys, no_figures, which):
    def remove(run: RunFolder) -> None:
        if which == "all":
            shutil.rmtree(run.checkpoints.root)
        else:
            store = run.moments if which == "moments" else run.checkpoints
            store.delete(checkpoint_name(10))

    at_step(monkeypatch, 20, remove)
    steps = "steps 0, 10, 20." if which == "all" else "step 10."
    for _ in range(2):
        assert main(COMMAND) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"icl: {folder.path} lacks the checkpoint")
        assert steps in said
        assert f"icl checkpoints {folder.path} pull" in said
        assert state(folder) == "failed"


def test_removed_checkpoints_that_are_put_back_let_the_run_finish(monkeypatch, folder, whole, no_figures):
    at_step(monkeypatch, 20, lambda run: run.checkpoints.delete(checkpoint_name(10)))
    assert main(COMMAND) == 1
    shutil.copy(whole.checkpoints.root / checkpoint_name(10), folder.checkpoints.root)
    assert main(COMMAND) == 0
    assert state(folder) == "finished"


# Removed between two starts


def test_resuming_names_missing_checkpoints_and_goes_on(monkeypatch, folder, capsys, no_figures):
    def interrupt(run: RunFolder) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        at_step(patched, 30, interrupt)
        with contextlib.suppress(SystemExit):
            main(COMMAND)
    folder.checkpoints.delete(checkpoint_name(10))
    folder.moments.delete(checkpoint_name(0))
    capsys.readouterr()
    assert main(COMMAND) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("icl:")]
    assert len(said) == 1
    assert f"{folder.path} lacks the checkpoints of steps 0, 10." in said[0]
    assert said[0].endswith("Training continues without them.")
    assert state(folder) == "finished"
    assert main(COMMAND) == 0  # a later start of the finished run says the same, and is no failure either
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("icl:")]
    assert len(said) == 1
    assert f"{folder.path} lacks the checkpoints of steps 0, 10." in said[0]
    assert main(["checkpoints", "tiny", "verify"]) == 1


def test_a_finished_run_that_lost_a_scheduled_checkpoint_says_so_and_is_no_failure(folder, whole, capsys, no_figures):
    shutil.copytree(whole.path, folder.path)
    folder.checkpoints.delete(checkpoint_name(10))
    assert main(COMMAND) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("icl:")]
    assert len(said) == 1
    assert said[0].startswith(f"icl: {folder.path} lacks the checkpoint of step 10.")
    result = train(CONFIG, folder=folder.path)
    assert (result.was_done, result.incomplete, f"icl: {result.lacking}") == (True, None, said[0])
    assert main(["checkpoints", "tiny", "verify"]) == 1


def test_altered_rows_of_a_finished_run_are_told_by_training_reports_and_verify(folder, whole, capsys, no_figures):
    shutil.copytree(whole.path, folder.path)
    text = folder.metrics_file.read_text()
    digit = text.index(".", text.index("\n")) + 1
    folder.metrics_file.write_text(f"{text[:digit]}{(int(text[digit]) + 1) % 10}{text[digit + 1 :]}")
    told = f"{folder.metrics_file} has changed since step 40 was saved; its rows are shown as they are now."
    assert main(COMMAND) == 0
    assert told in capsys.readouterr().err
    assert main(["report", "tiny"]) == 0
    assert told in capsys.readouterr().out
    assert main(["checkpoints", "tiny", "verify"]) == 1


def test_a_run_killed_between_its_last_save_and_its_end_goes_on_without_what_it_lacks(
    folder, whole, capsys, no_figures
):
    shutil.copytree(whole.path, folder.path)
    folder.checkpoints.delete(checkpoint_name(10))
    folder.write_status(dataclasses.replace(folder.read_status(), state="running"))
    assert main(COMMAND) == 0
    assert "lacks the checkpoint of step 10." in capsys.readouterr().err
    assert state(folder) == "finished"


@pytest.mark.parametrize("name", ["checkpoints/step-000000040.safetensors", "metrics.csv", "checkpoints"])
def test_a_finished_run_that_lost_files_is_one_sentence_and_no_success(folder, whole, capsys, name):
    shutil.copytree(whole.path, folder.path)
    lost = folder.path / name
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    assert main(COMMAND) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "has lost the row of step 0" in said if name == "metrics.csv" else "lacks the checkpoint" in said
    assert state(folder) == "finished"
    result = train(CONFIG, folder=folder.path)
    assert (result.was_done, said.strip()) == (True, f"icl: {result.incomplete}")


@pytest.mark.slow
def test_what_the_sentence_says_brings_a_run_back(folder, whole, no_figures):
    shutil.copytree(whole.path, folder.path)
    shutil.rmtree(folder.checkpoints.root)
    for file in (folder.resume_file, folder.previous_file, folder.status_file):
        file.unlink()
    assert main(COMMAND) == 0
    assert_same(folder, whole)


# A full disk


class FullDisk:
    """A full disk: after a given number of writes, writing to files whose name ends in `suffix` fails."""

    def __init__(self, monkeypatch, suffix: str, first: int) -> None:
        self.suffix, self.first, self.num, self.is_full = suffix, first, 0, False
        self._open = pathlib.Path.open
        monkeypatch.setattr(pathlib.Path, "open", lambda path, mode="r", *a, **k: self.open(path, mode, *a, **k))

    def open(self, path: Path, mode: str, *arguments, **options):
        """Open a file to which writing may fail."""
        if mode[0] in "wax":
            if path.name.endswith(self.suffix):
                self.num += 1
                self.is_full = self.is_full or self.num == self.first
            if self.is_full:
                self._open(path, "ab").close()  # the name is there, its bytes are not
                return self._open(Path("/dev/full"), mode.replace("x", "w"), *arguments, **options)
        return self._open(path, mode, *arguments, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("suffix", "first"),
    [
        slow("metrics.csv", 3),
        ("status.json", 4),
        slow("run.log", 1),
        slow("step-000000020.safetensors", 1),
        slow("step-000000020.safetensors", 2),
        ("last.ckpt", 5),
        slow("config.yaml", 1),
    ],
    ids=["metrics", "status", "log", "moments", "checkpoint", "last.ckpt", "config"],
)
def test_a_full_disk_is_one_sentence_a_failed_run_and_no_temporary_file(
    monkeypatch, folder, whole, capsys, no_figures, suffix, first
):
    with monkeypatch.context() as patched:
        disk = FullDisk(patched, suffix, first)
        assert main(COMMAND) == 1
        assert disk.is_full
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("icl: Cannot write")
    assert "No space left on device" in said
    assert "Earlier saves are intact" in said
    assert state(folder) == (
        None if suffix in ("config.yaml", "run.log") else "failed"
    )  # None: before there is a status
    assert not list(folder.path.rglob(".tmp-*"))
    assert main(COMMAND) == 0
    assert_same(folder, whole)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["evaluate", "tiny"], "results/evaluation/step-000000010.json"),
        slow(["evaluate", "tiny"], "results/evaluation.csv"),
        slow(["evaluate", "tiny"], "figures/evaluation.png"),
        slow(["analyse", "tiny", "--what", "embeddings"], "results/embeddings.csv"),
        (["report", "tiny"], "report.html"),
    ],
    ids=["part", "table", "figure", "analysis", "report"],
)
def test_a_full_disk_while_results_are_written_keeps_what_there_is(monkeypatch, folder, whole, capsys, words, name):
    shutil.copytree(whole.path, folder.path)
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patched:
        disk = FullDisk(patched, Path(name).name, 1)
        assert main(words) == 1
        assert disk.is_full
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"Cannot write {folder.path / name}: No space left on device" in said
    assert "free space" in said
    assert not (folder.path / name).exists()
    assert not list(folder.path.rglob(".tmp-*"))
    assert all(path.read_bytes() == data for path, data in before.items())
    assert main(words) == 0
    assert (folder.path / name).stat().st_size > 0


@pytest.fixture
def small_disk(tmp_path):
    """Return the folder of a real file system of 256 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(monkeypatch, small_disk, whole, capsys, no_figures):
    """Another program fills the disk while the run trains. Once there is room again, the run continues."""
    monkeypatch.setenv("LOCAL_ROOT", str(small_disk))
    folder, ballast = RunFolder(small_disk / "tiny"), small_disk / "ballast"

    def fill(run: RunFolder) -> None:
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"0" * 4096)

    with monkeypatch.context() as patched:
        at_step(patched, 20, fill)
        assert main(COMMAND) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device. Earlier saves are intact" in said
    assert state(folder) == "failed"
    assert not list(folder.path.rglob(".tmp-*"))
    ballast.unlink()
    assert main(COMMAND) == 0
    assert_same(folder, whole)


def test_temporary_files_of_a_killed_run_are_removed_at_the_next_start(folder, whole, no_figures):
    folders = (folder.path, folder.checkpoints.root, folder.moments.root, folder.results, folder.figures)
    for one in folders:
        one.mkdir(parents=True, exist_ok=True)
        (one / ".tmp-0123-left").write_bytes(b"half")
    assert main(COMMAND) == 0
    assert_same(folder, whole)


def test_a_row_that_the_disk_does_not_take_is_named(monkeypatch, tmp_path):
    rows = MetricsFile(tmp_path / "metrics.csv", ["step", "train/loss"])
    rows.begin()
    FullDisk(monkeypatch, "metrics.csv", 1)
    with pytest.raises(StorageError, match=r"metrics\.csv: No space left on device"):
        rows.append({"step": 1, "train/loss": 0.5})


def test_the_error_of_a_lost_folder_is_no_loss_that_became_nan(monkeypatch, folder):
    at_step(monkeypatch, 20, lambda run: shutil.rmtree(run.path))
    with pytest.raises(RunError) as refusal:
        train(CONFIG, folder=folder.path)
    assert type(refusal.value) is RunError

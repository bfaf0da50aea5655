"""File systems without locks, hard links or flushing: `icl` runs on them, and warns once about the risks."""

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest
from tiny_runs import TINY, as_arguments, change

from icl.cli import main
from icl.files import system as file_system
from icl.files.system import LockedError, lock_file
from icl.files.writing import StorageError, write_atomically
from icl.runs.folder import RunError, RunFolder, local_root
from icl.store.base import LocalStore
from icl.sweeps.attempts import claim, is_alive, last_attempt

NO_LOCKS = [errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EIO, errno.EPERM]
NO_LINKS = [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EACCES]
NO_SYNC = [errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EROFS]
SHORT = change(TINY, trainer={"max_steps": 4}, evaluation={"every": None}, checkpoints={"every": 2, "num_log": 0})


def refuse(number: int):
    def act(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return act


def refuse_folders(number: int):
    """Return an `os.fsync` that accepts only files."""
    plain = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        plain(descriptor)

    return fsync


@pytest.fixture(autouse=True)
def _unwarned(monkeypatch):
    monkeypatch.setattr(file_system, "_WARNED", set())


@pytest.mark.parametrize("number", NO_LOCKS, ids=errno.errorcode.get)
def test_a_run_is_trained_where_there_are_no_locks(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    for _ in range(2):
        with RunFolder(tmp_path / "a").lock():
            pass
    said = capsys.readouterr().err
    assert said.count("\n") == said.count("warning") == 1
    assert "does not support file locks" in said
    assert os.strerror(number) in said
    assert "Another process" not in said


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES], ids=errno.errorcode.get)
def test_a_lock_that_is_held_is_said_to_be(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    with pytest.raises(RunError, match="Another process is training"), RunFolder(tmp_path / "a").lock():
        pass


def test_a_lock_is_let_go_of_with_its_file(tmp_path):
    path = tmp_path / "lock"
    with path.open("w") as first, path.open() as second:
        assert lock_file(first.fileno(), tmp_path)
        with pytest.raises(LockedError):
            lock_file(second.fileno(), tmp_path, shared=True)
        first.close()
        assert lock_file(second.fileno(), tmp_path, shared=True)


@pytest.mark.parametrize("number", NO_LINKS, ids=errno.errorcode.get)
def test_a_place_is_taken_once_where_there_are_no_hard_links(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(Path, "hardlink_to", refuse(number))
    store = LocalStore(tmp_path)
    assert store.create("id", b"first")
    assert not store.create("id", b"second")
    assert store.read("id") == b"first"
    assert list(tmp_path.iterdir()) == [tmp_path / "id"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "does not support hard links" in said


def test_a_place_that_cannot_be_filled_stays_free(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "hardlink_to", refuse(errno.EPERM))
    store = LocalStore(tmp_path)
    plain, calls = os.fsync, iter(range(9))
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: refuse(errno.ENOSPC)() if next(calls) == 2 else plain(descriptor)
    )
    with pytest.raises(StorageError, match="No space left"):
        store.create("id", b"first")
    assert store.keys() == []


@pytest.mark.parametrize("number", NO_SYNC, ids=errno.errorcode.get)
def test_files_are_written_where_folders_cannot_be_flushed(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(os, "fsync", refuse_folders(number))
    for _ in range(2):
        write_atomically(tmp_path / "a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "a power cut may undo the last save" in said


def test_a_folder_that_cannot_be_opened_is_not_flushed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "open", refuse(errno.EACCES))
    write_atomically(tmp_path / "a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_disk_that_fails_is_an_error(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", refuse(number))
    with pytest.raises(StorageError, match="Cannot write"):
        write_atomically(tmp_path / "a", b"1")


def test_a_file_system_with_none_of_them_costs_one_warning_and_trains(monkeypatch, capsys, tmp_path, no_figures):
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOSYS))
    monkeypatch.setattr(Path, "hardlink_to", refuse(errno.EPERM))
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    config = change(SHORT, checkpoints={"store": str(tmp_path / "copy")})
    assert main(["train", *as_arguments(config)]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    for word in ("file locks", "hard links", "flushing to disk", "start each run once"):
        assert word in warnings[0]
    status = RunFolder(local_root() / "tiny").read_status()
    assert status is not None
    assert status.state == "finished"


@pytest.mark.parametrize("number", NO_LOCKS, ids=errno.errorcode.get)
def test_an_attempt_at_a_point_of_a_sweep_lives_by_its_time_where_there_are_no_locks(tmp_path, monkeypatch, number):
    mine = claim(tmp_path, "job", number=1)
    assert mine is not None
    assert mine.attempt.locked
    monkeypatch.setattr(fcntl, "flock", refuse(number))  # the lock was made, and cannot be asked for now
    attempt = last_attempt(tmp_path)
    assert attempt is not None
    assert is_alive(tmp_path, attempt)
    os.utime(mine.path, (0, 0))
    assert not is_alive(tmp_path, attempt)
    second = claim(tmp_path, "job", number=2)
    assert second is not None
    assert not second.attempt.locked


def test_a_lock_held_over_a_network_keeps_a_point(tmp_path, monkeypatch):
    mine = claim(tmp_path, "job", number=1)
    assert mine is not None
    os.utime(mine.path, (0, 0))
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EACCES))
    assert is_alive(tmp_path, mine.attempt)

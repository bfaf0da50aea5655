"""The copy in the store at every moment: a run whose machine is lost resumes from the copy, with its best checkpoint."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import TINY, change

from icl.files.writing import StorageError
from icl.runs.checkpoints import checkpoint_name, list_steps
from icl.runs.claims import claim
from icl.runs.delivery import UploadError, send_results
from icl.runs.folder import RunFolder
from icl.runs.mirror import Mirror, open_mirror
from icl.runs.resume_file import pack, parse_resume
from icl.runs.status import Status, parse_status
from icl.store.base import LocalStore
from icl.training import sender, upload
from icl.training.sender import Sender
from icl.training.upload import Uploader

CONFIG = change(
    TINY,
    trainer={"max_steps": 100},
    evaluation={"every": 1},
    early_stopping={"patience": 50},
    checkpoints={"every": 100, "num_log": 0},
)


@functools.cache
def resume_file(step: int, best: int | None) -> bytes:
    member = {"extra_step": best}
    return pack({"global_step": step, "configs": [CONFIG.to_dict()], "members": [member], "state_dict": {}})


def save(run: RunFolder, step: int, *, best: int | None = None) -> None:
    """Write the files of a save in the order of training: the best checkpoint, `last.ckpt`, and then delete the former best checkpoint."""
    if best is not None:
        run.checkpoints.write(checkpoint_name(best), b"a checkpoint")
    run.store.write("last.ckpt", resume_file(step, best))
    for former in list_steps(run.checkpoints):
        if former not in (0, 100, best):
            run.checkpoints.delete(checkpoint_name(former))
    state = "finished" if step == 100 else "running"
    run.write_status(Status(state=state, step=step, max_steps=100, best_step=best))


@pytest.fixture(autouse=True)
def _unchecked_checkpoints(monkeypatch):
    """Accept any bytes as a checkpoint."""
    monkeypatch.setattr(sender, "require_whole", lambda *_: None)
    monkeypatch.setattr(upload, "PATIENCE", 0.0)


@pytest.fixture
def mirror(tmp_path) -> Mirror:
    """Return a run with its copy in a store, both at step 10."""
    run = RunFolder(tmp_path / "tiny")
    run.write_config(change(CONFIG, checkpoints={"store": str(tmp_path / "store")}))
    mirror = open_mirror(run, str(tmp_path / "store"), "tiny")
    claim(mirror.here, mirror.there, CONFIG)
    save(run, 10, best=7)
    assert Sender(mirror, CONFIG).send(lambda: False)
    return mirror


def after_reading(monkeypatch, name: str, act: Callable[[], None], *, root: Path) -> None:
    """Call a function once, right after the file `name` in `root` was read for the first time."""
    read, done = LocalStore.read, []

    def read_and_act(store: LocalStore, key: str, **options) -> bytes:
        data = read(store, key, **options)
        if key == name and store.root == root and not done:
            done.append(True)
            act()
        return data

    monkeypatch.setattr(LocalStore, "read", read_and_act)


def assert_resumable(mirror: Mirror) -> int:
    """Check that the copy can be resumed. Return the step of its `last.ckpt`."""
    resume, status = parse_resume(mirror.there.read("last.ckpt"), ""), parse_status(mirror.there.read("status.json"))
    assert status is not None
    assert status.state == "running" or status.step == resume.step
    assert resume.member["extra_step"] in (None, *list_steps(mirror.checkpoints))
    return resume.step


@pytest.mark.parametrize("name", ["last.ckpt", "status.json"])
@pytest.mark.parametrize("num_files", [1, 50])
def test_a_run_that_ends_while_it_is_sent_is_never_ended_in_the_store_without_its_last_save(
    mirror, monkeypatch, name, num_files
):
    monkeypatch.setattr(LocalStore, "files_per_write", num_files)
    save(mirror.run, 20, best=7)
    after_reading(monkeypatch, name, lambda: save(mirror.run, 100), root=mirror.run.path)
    sender = Sender(mirror, CONFIG)
    assert sender.send(lambda: False)
    assert_resumable(mirror)
    assert sender.send(lambda: False)
    assert assert_resumable(mirror) == 100


@pytest.mark.parametrize("name", ["last.ckpt", "status.json"])
@pytest.mark.parametrize("num_files", [1, 50])
def test_the_best_checkpoint_that_the_copy_names_is_in_the_copy(mirror, monkeypatch, name, num_files):
    monkeypatch.setattr(LocalStore, "files_per_write", num_files)
    save(mirror.run, 20, best=17)
    after_reading(monkeypatch, name, lambda: save(mirror.run, 30, best=27), root=mirror.run.path)
    sender = Sender(mirror, CONFIG)
    sender.send(lambda: False)
    assert_resumable(mirror)
    sender.send(lambda: False)
    assert assert_resumable(mirror) == 30
    assert list_steps(mirror.checkpoints) == [27]


def test_a_former_best_checkpoint_stays_until_the_later_save_has_arrived(mirror, monkeypatch):
    save(mirror.run, 20, best=17)
    write = LocalStore.write

    def fail(store: LocalStore, key: str, data: bytes) -> None:
        if key == "last.ckpt":
            raise StorageError("The network is down.")
        write(store, key, data)

    sender = Sender(mirror, CONFIG)
    with monkeypatch.context() as patched:
        patched.setattr(LocalStore, "write", fail)
        assert not sender.send(lambda: False)
    assert assert_resumable(mirror) == 10
    assert sender.send(lambda: False)
    assert assert_resumable(mirror) == 20
    assert list_steps(mirror.checkpoints) == [17]


def test_a_store_that_is_unmounted_gets_no_part_of_a_copy(mirror, tmp_path):
    """Without the check, the later files would be written below the mount point, and the copy would count as complete."""
    uploader = Uploader(mirror, CONFIG)
    assert uploader.sender.send(lambda: False)
    (tmp_path / "store").rename(tmp_path / "unmounted")
    (tmp_path / "store").mkdir()
    save(mirror.run, 100)
    uploader.start()
    with pytest.raises(UploadError, match=r"last\.ckpt, status\.json.*Perhaps the store was unmounted"):
        uploader.finish()
    assert not list((tmp_path / "store").iterdir())
    (tmp_path / "store").rmdir()
    shutil.move(tmp_path / "unmounted", tmp_path / "store")
    assert uploader.sender.send(lambda: False)
    assert assert_resumable(mirror) == 100


def test_a_file_that_is_rewritten_at_the_end_of_the_upload_is_sent_again(mirror, monkeypatch):
    save(mirror.run, 100)
    mirror.run.write_result("llc.csv", "old\n")
    changed = Sender.changed

    def rewrite(sender: Sender) -> list[str]:
        names = changed(sender)
        if not names:
            mirror.run.write_result("llc.csv", "new\n")
        return names

    uploader = Uploader(mirror, mirror.run.read_config())
    uploader.start()
    monkeypatch.setattr(Sender, "changed", rewrite)
    uploader.finish()
    monkeypatch.setattr(Sender, "changed", changed)
    assert mirror.there.read("results/llc.csv") == b"old\n"
    assert send_results(mirror.run) == ["results/llc.csv"]
    assert mirror.there.read("results/llc.csv") == b"new\n"

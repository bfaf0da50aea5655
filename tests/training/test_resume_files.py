"""Damaged resume files: every altered byte is detected, the previous save is used, and the result keeps the same bits."""

import hashlib
import io
import random
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY, change

from icl.runs import resume_file
from icl.runs.checkpoints import list_steps, load_step
from icl.runs.environment import environments_of
from icl.runs.folder import RunFolder, local_root
from icl.runs.resume_file import ResumeFileError, pack, parse_resume
from icl.training import saving
from icl.training.members import Member
from icl.training.rounding import describe_changes
from icl.training.run import train, train_population

CONFIG = change(TINY, trainer={"max_steps": 40}, checkpoints={"every": 10, "num_log": 0, "resume_seconds": 0.0})
MEMBERS = [change(CONFIG, seeds={"model": seed}) for seed in (0, 1)]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Return two runs whose population was interrupted at step 30, and two uninterrupted runs."""
    root = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DEVICE", "cpu")
        train_population(MEMBERS, folders=[root / "whole" / name for name in "ab"])
        save = saving.save_checkpoint

        def stop_at_thirty(store, step, config, params):
            save(store, step, config, params)
            if step == 30:
                raise KeyboardInterrupt

        patched.setattr(saving, "save_checkpoint", stop_at_thirty)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train_population(MEMBERS, folders=[root / name for name in "ab"])
    return root


@pytest.fixture
def place(root) -> Path:
    return Path(shutil.copytree(root, local_root(), dirs_exist_ok=True))


def damage(file: Path, seed: int, num_bytes: int = 16) -> None:
    """Flip neighbouring bytes, as a bad sector or a bad cable would."""
    data, chance = bytearray(file.read_bytes()), random.Random(seed)
    start = chance.randrange(len(data) - num_bytes)
    for place in range(start, start + num_bytes):
        data[place] ^= chance.randrange(1, 256)
    file.write_bytes(data)


def warnings_in(errors: str) -> list[str]:
    """Return the text on standard error, without lines of progress."""
    return [line.removeprefix("icl: ") for line in errors.splitlines() if line.startswith("icl: ")]


def assert_same(folder: RunFolder, expected: RunFolder) -> None:
    assert folder.metrics_file.read_bytes() == expected.metrics_file.read_bytes()
    assert list_steps(folder.checkpoints) == list_steps(expected.checkpoints)
    for step in list_steps(expected.checkpoints):
        assert load_step(folder.checkpoints, step).digest == load_step(expected.checkpoints, step).digest, step
    assert parse_resume(folder.resume_file.read_bytes(), "").step == 40
    assert not list(folder.path.rglob(".tmp-*"))


def test_every_altered_byte_is_found(place):
    data = RunFolder(place / "a").resume_file.read_bytes()
    chance = random.Random(0)
    for position in [*range(40), *range(len(data) - 120, len(data)), *chance.sample(range(len(data)), 200)]:
        altered = bytearray(data)
        altered[position] ^= 1 << chance.randrange(8)
        with pytest.raises(ResumeFileError):
            parse_resume(bytes(altered), "it")
    for length in (0, 1, 30, len(data) // 2, len(data) - 64, len(data) - 1):
        with pytest.raises(ResumeFileError):
            parse_resume(data[:length], "it")
    with pytest.raises(ResumeFileError):
        parse_resume(data + b"\0", "it")


def test_an_altered_weight_of_an_older_file_is_found(place, tmp_path):
    """Files of version 0.1.0 have no digest, but have the zip format's checksums."""
    content = torch.load(RunFolder(place / "a").resume_file, weights_only=True)
    torch.save(content, tmp_path / "old.ckpt")
    data = (tmp_path / "old.ckpt").read_bytes()
    assert parse_resume(data, "it").step == content["global_step"]
    weights = content["state_dict"]["rows"].numpy().tobytes()
    start = data.index(weights)
    for position in range(start, start + len(weights), 97):
        altered = bytearray(data)
        altered[position] ^= 16
        with pytest.raises(ResumeFileError):
            parse_resume(bytes(altered), "it")


class Buffer:
    """Object whose pickle calls `bytearray`."""

    def __reduce__(self):
        return bytearray, (400_000_000,)


def sealed(data: bytes) -> bytes:
    """Return an archive with the digest of a resume file."""
    data = data[:-2] + resume_file._NUM_SEAL_BYTES.to_bytes(2, "little") + resume_file._SEAL
    return data + hashlib.sha256(data).hexdigest().encode()


@pytest.mark.parametrize(
    ("trick", "message"),
    [
        ("deflated", "it claims to contain 400,"),
        ("called", "it contains the Python object `builtins.bytearray`"),
        ("repeated", r"a tensor of shape \(1099511627776,\) is larger than the file"),
        ("large", "the limit is 100"),
    ],
)
def test_a_small_file_does_not_fill_the_memory(tmp_path, monkeypatch, trick, message):
    if trick == "large":
        monkeypatch.setattr(resume_file, "MAX_FILE", 100)
    data = {"called": pack({"x": Buffer()}), "repeated": pack({"x": torch.zeros(1).expand(2**40)})}.get(trick, pack({}))
    if trick == "deflated":
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
            new.writestr(f"{name.partition('/')[0]}/data/0", bytes(400_000_000))
        data = sealed(buffer.getvalue())
    assert len(data) < 10**6
    tracemalloc.start()
    with pytest.raises(ResumeFileError, match=message):
        parse_resume(data, "it")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_resume_file_is_read_by_torch_as_before(place):
    content = torch.load(RunFolder(place / "a").resume_file, weights_only=True)
    assert parse_resume(pack(content), "it").member == content["members"][0]


@pytest.mark.parametrize(
    "kind",
    [
        "flipped",
        "gone",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("cut short", "empty", "another file")),
    ],
)
def test_the_save_before_takes_over_bit_identically(place, root, kind, capsys):
    folder = RunFolder(place / "a")
    last = parse_resume(folder.resume_file.read_bytes(), "").step
    previous = parse_resume(folder.previous_file.read_bytes(), "").step
    assert previous < last
    if kind == "flipped":
        damage(folder.resume_file, seed=1)
    elif kind == "gone":
        folder.resume_file.unlink()
    else:
        whole = folder.resume_file.read_bytes()
        data = {"cut short": whole[:700], "empty": b"", "another file": pack({"epoch": 3})}[kind]
        folder.resume_file.write_bytes(data)
    train(MEMBERS[0], folder=folder.path)
    said = capsys.readouterr()
    assert f"Resuming {folder.path} from step {previous:,}." in said.out
    (told,) = warnings_in(said.err)
    assert str(folder.resume_file) in told
    assert told.endswith(f"the run continues from an earlier save, at step {previous}.")
    assert told in folder.log_file.read_text()
    assert_same(folder, RunFolder(root / "whole" / "a"))


def test_a_member_whose_file_is_damaged_catches_up_with_the_others(place, root, capsys):
    folders = [RunFolder(place / name) for name in "ab"]
    damage(folders[1].resume_file, seed=2)
    results = train_population(MEMBERS, folders=[folder.path for folder in folders])
    assert [result.status.state for result in results] == ["finished", "finished"]
    assert capsys.readouterr().err.count("the run continues from an earlier save") == 1
    for folder in folders:
        assert_same(folder, RunFolder(root / "whole" / folder.path.name))


def test_two_damaged_files_are_one_error_that_says_what_to_do(place, root, capsys):
    folder = RunFolder(place / "a")
    damage(folder.resume_file, seed=3)
    damage(folder.previous_file, seed=4)
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    with pytest.raises(
        ResumeFileError, match=r"last.ckpt is damaged.*previous.ckpt is damaged.*pull --force.*delete last"
    ) as found:
        train(MEMBERS[0], folder=folder.path)
    assert "\n" not in str(found.value)
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before
    folder.resume_file.unlink()
    folder.previous_file.unlink()
    train(MEMBERS[0], folder=folder.path)
    assert_same(folder, RunFolder(root / "whole" / "a"))


@pytest.mark.slow
def test_a_kill_between_the_two_renames_is_one_save_lost(place, root):
    folder = RunFolder(place / "a")
    folder.resume_file.replace(folder.previous_file)
    train(MEMBERS[0], folder=folder.path)
    assert_same(folder, RunFolder(root / "whole" / "a"))


def test_a_damaged_file_never_takes_the_place_of_the_whole_one(place):
    folder = RunFolder(place / "a")
    whole = folder.previous_file.read_bytes()
    damage(folder.resume_file, seed=5)
    member = Member(MEMBERS[0], folder)
    step = saving.read_resume_file(member)
    assert folder.resume_file.read_bytes() == folder.previous_file.read_bytes() == whole
    assert step == parse_resume(whole, "it").step
    assert saving.read_resume_file(member) == step
    assert len(member.notes) == 1


# Other conditions than before


@pytest.fixture
def other_threads():
    """Train on one thread if the runs of `place` began on two threads, or the other way round."""
    num = torch.get_num_threads()
    torch.set_num_threads(3 - num)
    yield
    torch.set_num_threads(num)


@pytest.mark.usefixtures("other_threads")
def test_another_number_of_threads_is_one_sentence_and_in_the_log(place, capsys):
    now = torch.get_num_threads()
    folders = [RunFolder(place / name) for name in "ab"]
    train_population(MEMBERS, folders=[folder.path for folder in folders])
    assert warnings_in(capsys.readouterr().err) == [
        f"Conditions have changed: threads {now} (before: {3 - now}). Results may differ by rounding from those of an uninterrupted run."
    ]
    for folder in folders:
        log = folder.log_file.read_text()
        assert f"Conditions have changed: threads {now} (before: {3 - now})" in log
        assert [about["threads"] for _, about in environments_of(log)] == [str(3 - now), str(now)]


def test_every_condition_of_rounding_is_compared(place, capsys):
    folder = RunFolder(place / "a")
    content = torch.load(folder.resume_file, weights_only=True)
    now = content["members"][0]["conditions"]
    before = {name: f"other {name}" for name in now}
    content["members"][0]["conditions"] = before
    folder.resume_file.write_bytes(pack(content))
    assert {"threads", "compiled step", "torch", "device", "attention", "processes"} <= now.keys()
    train(MEMBERS[0], folder=folder.path)
    (said,) = warnings_in(capsys.readouterr().err)
    assert all(f"{name} {now[name]} (before: other {name})" in said for name in now)


def test_the_same_conditions_are_not_worth_a_word(place, capsys):
    train(MEMBERS[0], folder=place / "a")
    assert warnings_in(capsys.readouterr().err) == []


def test_conditions_that_one_device_does_not_have_are_not_compared():
    before = {"device": "cpu", "threads": "2", "torch": "2.6"}
    told = describe_changes(before, {"device": "NVIDIA H200", "torch": "2.6"})
    assert str(told).startswith("Conditions have changed: device NVIDIA H200 (before: cpu). ")
    assert describe_changes({}, before) is None

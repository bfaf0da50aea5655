"""The command `icl checkpoints`: listing of steps, interrupted copies, and detection of damage in the folder and in the store."""

import dataclasses
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from s3_server import S3Server, use_server
from tiny_runs import TINY, as_arguments, change

from icl.cli import main
from icl.files.writing import StorageError
from icl.runs.checkpoints import checkpoint_name, load_checkpoint_file, save_checkpoint
from icl.runs.copied_files import copied_names
from icl.runs.folder import RunFolder, local_root
from icl.runs.mirror import open_mirror, push
from icl.store import waiting
from icl.store.base import LocalStore
from icl.store.opening import open_store
from icl.training.run import train

SHORT = change(TINY, trainer={"max_steps": 20}, evaluation={"every": None}, checkpoints={"every": 5, "num_log": 0})
STEP = f"checkpoints/{checkpoint_name(10)}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train(SHORT, folder=tmp_path_factory.mktemp("trained") / "tiny").folder.path


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, s3_endpoint, trained) -> tuple[Path, str]:
    """Return a finished run that was pushed, and the bucket with its copy."""
    with pytest.MonkeyPatch.context() as environment:
        use_server(environment, s3_endpoint)
        s3 = S3Server(s3_endpoint)
        run = RunFolder(shutil.copytree(trained, tmp_path_factory.mktemp("pushed") / "tiny"))
        push(open_mirror(run, s3.url, "tiny"))
    return run.path, s3.bucket


@pytest.fixture
def run(s3, monkeypatch, pushed) -> RunFolder:
    """Return a finished run and its copy."""
    monkeypatch.setenv("AWS_BUCKET_NAME", s3.bucket)
    folder, bucket = pushed
    s3.copy_of(bucket)
    return RunFolder(shutil.copytree(folder, local_root() / "tiny"))


def assert_same(run: RunFolder, url: str) -> None:
    here, there = LocalStore(run.path), open_store(url)
    assert copied_names(here) == copied_names(there)
    assert all(here.read(name) == there.read(name) for name in copied_names(here))


def test_ls_says_what_is_where_in_numeric_order(s3, run, capsys):
    (run.path / STEP).unlink()
    s3.fill([f"tiny/checkpoints/{checkpoint_name(10**9)}"])
    s3.client.delete_object(Bucket=s3.bucket, Key=f"tiny/checkpoints/{checkpoint_name(5)}")
    assert main(["checkpoints", "tiny", "ls"]) == 0
    lines = [line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert lines == [
        ["0", "here", "store"],
        ["5", "here", "-"],
        ["10", "-", "store"],
        ["15", "here", "store"],
        ["20", "here", "store"],
        ["1,000,000,000", "-", "store"],
    ]


@pytest.mark.parametrize(
    "name", ["status.json", *(pytest.param(name, marks=pytest.mark.slow) for name in ("config.yaml", "metrics.csv"))]
)
def test_a_small_file_of_five_gigabytes_is_told_and_not_read(name, run, capsys):
    path = run.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(5 * 2**30)  # sparse: takes no room on the disk
    tracemalloc.start()
    assert main(["checkpoints", "tiny", "verify"]) in (1, 2)
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()
    said = "".join(capsys.readouterr())
    assert name in said
    assert "it has 5,368,709,120 bytes" in said


def test_pull_fetches_a_run_by_its_name_to_another_machine(s3, run, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path / "elsewhere"))
    assert main(["checkpoints", "tiny", "pull"]) == 0
    copy = RunFolder(tmp_path / "elsewhere" / "tiny")
    assert_same(copy, f"{s3.url}/tiny")
    assert copy.read_config() == run.read_config()
    capsys.readouterr()
    assert main(["checkpoints", str(copy.path), "pull"]) == 0
    assert "Fetched 0 files" in capsys.readouterr().out


def test_a_pull_that_breaks_off_is_no_run_and_goes_on(s3, run, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path / "elsewhere"))
    write = LocalStore.write

    def dies(self, key: str, data: bytes) -> None:
        if key == "last.ckpt":
            raise StorageError("the plug was pulled")
        write(self, key, data)

    monkeypatch.setattr(LocalStore, "write", dies)
    assert main(["checkpoints", "tiny", "pull"]) == 1
    copy = RunFolder(tmp_path / "elsewhere" / "tiny")
    assert not copy.config_file.exists()
    monkeypatch.setattr(LocalStore, "write", write)
    capsys.readouterr()
    assert main(["checkpoints", "tiny", "pull"]) == 0
    assert "Fetched 3 files" in capsys.readouterr().out
    assert_same(copy, f"{s3.url}/tiny")


def test_push_sends_what_is_missing_or_different_to_any_store(run, tmp_path, capsys):
    words = ["checkpoints", str(run.path), "push", "--store", f"file://{tmp_path}"]
    assert main(words) == 0
    assert_same(run, str(tmp_path / "tiny"))
    (tmp_path / "tiny" / STEP).unlink()
    (tmp_path / "tiny" / "metrics.csv").write_text("other")
    capsys.readouterr()
    assert main(words) == 0
    assert "Sent 2 files" in capsys.readouterr().out
    assert_same(run, str(tmp_path / "tiny"))


def test_verify_is_content_with_whole_copies(run, capsys):
    assert main(["checkpoints", "tiny", "verify"]) == 0
    assert "There are no faults" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(STEP, lambda data: data[: len(data) // 2], id="cut short", marks=pytest.mark.slow),
        pytest.param(STEP, lambda data: data[:-1] + b"\xff", id="altered"),
        pytest.param("last.ckpt", lambda data: data[:-1], id="last.ckpt"),
        pytest.param("metrics.csv", lambda data: data + b"1", id="metrics.csv", marks=pytest.mark.slow),
    ],
)
def test_verify_names_a_damaged_object_and_a_forced_push_mends_it(s3, run, capsys, name, damage):
    s3.corrupt(f"tiny/{name}", damage)
    assert main(["checkpoints", "tiny", "verify"]) == 1
    said = capsys.readouterr()
    assert f"{s3.url}/tiny/{name} is damaged" in said.out
    assert "push --force" in said.err
    assert main(["checkpoints", "tiny", "push", "--force"]) == 0
    assert main(["checkpoints", "tiny", "verify"]) == 0


def test_verify_finds_an_object_that_was_lost_or_is_another_steps(s3, run, capsys):
    s3.client.delete_object(Bucket=s3.bucket, Key=f"tiny/{STEP}")
    other = f"checkpoints/{checkpoint_name(15)}"
    s3.client.put_object(Bucket=s3.bucket, Key=f"tiny/{other}", Body=s3.get(f"tiny/checkpoints/{checkpoint_name(20)}"))
    assert main(["checkpoints", "tiny", "verify"]) == 1
    said = capsys.readouterr().out
    assert f"There is no {s3.url}/tiny/{STEP}" in said
    assert f"{other} is damaged: it contains step 20" in said
    assert main(["checkpoints", "tiny", "push"]) == 0
    assert main(["checkpoints", "tiny", "verify"]) == 0


def test_a_damaged_checkpoint_here_is_found_is_not_pushed_and_is_fetched_again(s3, run, capsys):
    good = (run.path / STEP).read_bytes()
    (run.path / STEP).write_bytes(good[:-9])
    assert main(["checkpoints", "tiny", "verify"]) == 1
    assert f"{run.path}/{STEP} is damaged" in capsys.readouterr().out
    assert main(["checkpoints", "tiny", "push"]) == 1
    assert s3.get(f"tiny/{STEP}") == good
    assert main(["checkpoints", "tiny", "pull"]) == 0
    assert (run.path / STEP).read_bytes() == good


@pytest.mark.slow
def test_damage_without_a_store_is_told_with_the_way_to_make_all_again(trained, capsys):
    run = RunFolder(shutil.copytree(trained, local_root() / "tiny"))
    (run.path / STEP).write_bytes((run.path / STEP).read_bytes()[:-9])
    assert main(["evaluate", "tiny"]) == 1
    assert f"`icl checkpoints {run.path} verify` lists all damaged files." in capsys.readouterr().err
    assert main(["checkpoints", "tiny", "verify"]) == 1
    told = capsys.readouterr()
    assert f"{STEP} is damaged" in told.out
    assert "which has no store to fetch from" in told.err
    assert "delete its last.ckpt, previous.ckpt and status.json" in told.err
    assert "--force" not in told.err
    (run.path / STEP).unlink()
    assert main(["checkpoints", "tiny", "verify"]) == 1
    assert f"{run.path} lacks the checkpoint of step 10." in capsys.readouterr().out
    assert main(["evaluate", "tiny"]) == 0
    assert main(["train", *as_arguments(SHORT)]) == 0
    assert "lacks the checkpoint of step 10." in capsys.readouterr().err


def test_another_runs_place_is_neither_pushed_to_nor_pulled_over(s3, run, trained, monkeypatch, tmp_path, capsys):
    before = {key: s3.get(key) for key in s3.names()}
    monkeypatch.delenv("AWS_BUCKET_NAME")
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path))
    shutil.copytree(trained, tmp_path / "tiny")
    for action in ("push", "pull"):
        assert main(["checkpoints", "tiny", action, "--store", s3.url, "--force"]) == 1
        assert "another run" in capsys.readouterr().err
    assert {key: s3.get(key) for key in s3.names()} == before


def test_what_is_not_there_is_one_sentence(s3, trained, capsys):
    for words in (["no-such-run", "ls"], ["no-such-run", "pull", "--store", s3.url]):
        assert main(["checkpoints", *words]) in (1, 2)
        said = capsys.readouterr().err
        assert said.startswith("icl: There is no run")
        assert said.count("\n") == 1
    assert main(["checkpoints", str(trained), "pull"]) == 2
    assert "--store URL" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["checkpoints", "--help"])
    assert "example:\n  icl checkpoints runs/quickstart verify" in capsys.readouterr().out


def test_what_belongs_to_a_copy_ends_with_what_vouches_for_it(tmp_path):
    store = LocalStore(tmp_path)
    for name in (".lock", "checkpoints/a", "config.yaml", "last.ckpt", "status.json", "wandb/x", "metrics.csv"):
        store.write(name, b"")
    assert copied_names(store) == ["checkpoints/a", "metrics.csv", "last.ckpt", "status.json", "config.yaml"]


@pytest.mark.parametrize("action", ["ls", "verify", "pull", "push"])
def test_a_run_that_is_nowhere_is_one_sentence(s3, monkeypatch, capsys, action):
    monkeypatch.setattr(waiting, "NOTICE_SECONDS", 30.0)  # other programs may keep this machine busy
    monkeypatch.setenv("AWS_BUCKET_NAME", s3.bucket)
    assert main(["checkpoints", "nope", action]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("icl: There is no run")
    assert said.err.count("\n") == 1


# What `verify` covers, here and in the store


def flip(data: bytes) -> bytes:
    """Alter sixteen bytes in the middle."""
    middle = len(data) // 2
    return data[: middle - 8] + bytes(byte ^ 0x5A for byte in data[middle - 8 : middle + 8]) + data[middle + 8 :]


def another_digit(data: bytes) -> bytes:
    """Change the last digit of the row in the middle."""
    place = data.index(b"\n", len(data) // 2) - 1
    assert data[place : place + 1].isdigit()
    return data[:place] + (b"1" if data[place : place + 1] != b"1" else b"2") + data[place + 1 :]


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    """Return a finished run with moments, results and a figure, and the copy in its store."""
    root = tmp_path_factory.mktemp("complete")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LOCAL_ROOT", str(root))
        patched.setenv("DEVICE", "cpu")
        config = change(
            SHORT,
            checkpoints={"moments": True, "resume_seconds": 0.0, "store": str(root / "store")},
            trainer={"log_every": 5},
        )
        assert main(["train", *as_arguments(config)]) == 0
    run = RunFolder(root / "tiny")  # as if it had been evaluated, which takes seconds
    rows = "".join(f"{step},abc,pretrain,loss,mean,{1 / (step + 3):.6f},0.01\n" for step in range(0, 20, 5))
    run.write_result("evaluation.csv", "step,checkpoint_hash,distribution,quantity,position,value,stderr\n" + rows)
    (run.results / "evaluation").mkdir()
    np.savez(run.results / "evaluation" / "step-000000010.npz", values=np.arange(50.0))
    return root


@pytest.fixture
def there_too(complete, monkeypatch) -> RunFolder:
    shutil.copytree(complete, local_root(), dirs_exist_ok=True)
    run = RunFolder(local_root() / "tiny")
    run.write_config(change(run.read_config(), checkpoints={"store": str(local_root() / "store")}))
    push(open_mirror(run, str(local_root() / "store"), "tiny"))
    return run


FILES = (
    STEP,
    f"checkpoints/moments/{checkpoint_name(10)}",
    "last.ckpt",
    "previous.ckpt",
    "metrics.csv",
    "status.json",
    "config.yaml",
    "results/losses.csv",
    "results/evaluation.csv",
    f"results/evaluation/{Path(checkpoint_name(10)).stem}.npz",
    "figures/training.png",
)


def test_verify_finds_nothing_in_a_whole_run_and_its_copy(there_too, capsys):
    assert main(["checkpoints", "tiny", "verify"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(flip, id="altered", marks=pytest.mark.slow),
        pytest.param(lambda data: data[: len(data) // 2], id="cut short", marks=pytest.mark.slow),
        pytest.param(lambda data: b"", id="empty", marks=pytest.mark.slow),
    ],
)
def test_verify_names_every_file_that_is_damaged_here_or_in_the_store(there_too, damage, capsys):
    copy = RunFolder(local_root() / "store" / "tiny")
    assert not copy.previous_file.exists()
    for run, name in ((run, name) for run in (there_too, copy) for name in FILES if (run.path / name).exists()):
        file = run.path / name
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
        assert main(["checkpoints", str(there_too.path), "verify"]) in (1, 2), file
        said = capsys.readouterr()
        told = said.out + said.err
        assert str(file) in told or (name == "config.yaml" and f"The config.yaml of {run.path} cannot be used" in told)
        assert "Traceback" not in said.err
        file.write_bytes(whole)


def test_one_other_digit_in_the_rows_is_found(there_too, capsys):
    for run in (there_too, RunFolder(local_root() / "store" / "tiny")):
        whole = run.metrics_file.read_bytes()
        run.metrics_file.write_bytes(another_digit(whole))
        assert main(["checkpoints", "tiny", "verify"]) == 1
        assert f"{run.metrics_file} is damaged: its rows differ from the saved rows." in capsys.readouterr().out
        run.metrics_file.write_bytes(whole)


def test_verify_finds_a_whole_checkpoint_in_a_place_that_is_not_its_own(there_too, capsys):
    weights, moments = (there_too.path / name for name in FILES[:2])
    other = load_checkpoint_file(weights)
    for file, reason, act in (
        (weights, "it contains weights in the folder of Adam's moments", lambda: shutil.copy(moments, weights)),
        (moments, "it contains weights in the folder of Adam's moments", lambda: shutil.copy(weights, moments)),
        (
            weights,
            "its settings differ from those in config.yaml: `seeds.model` was 0 and is now 7",
            lambda: save_checkpoint(
                there_too.checkpoints, 10, change(other.config, seeds={"model": 7}), dict(other.params)
            ),
        ),
    ):
        whole = file.read_bytes()
        act()
        assert main(["checkpoints", "tiny", "verify"]) == 1
        assert f"{file} is damaged: {reason}" in capsys.readouterr().out
        file.write_bytes(whole)


@pytest.mark.parametrize("is_folder", [False, True])
def test_verify_names_a_resume_file_that_an_unfinished_run_has_lost(there_too, is_folder, capsys):
    status = there_too.read_status()
    there_too.write_status(dataclasses.replace(status, state="running"))
    assert main(["checkpoints", "tiny", "push", "--force"]) == 0
    there_too.resume_file.unlink()
    if is_folder:
        there_too.resume_file.mkdir()
    assert main(["checkpoints", "tiny", "verify"]) == 1
    assert f"There is no {there_too.resume_file}." in capsys.readouterr().out


def test_verify_of_a_run_that_lost_its_settings_names_them(there_too, monkeypatch, capsys):
    monkeypatch.delenv("AWS_BUCKET_NAME", raising=False)
    there_too.config_file.unlink()
    assert main(["checkpoints", "tiny", "verify"]) == 1
    assert f"There is no {there_too.config_file}." in capsys.readouterr().out


@pytest.mark.parametrize("name", [STEP, "last.ckpt", "results/losses.csv"])
def test_verify_names_what_the_store_lacks(there_too, name, capsys):
    copy = RunFolder(local_root() / "store" / "tiny")
    (copy.path / name).unlink()
    assert main(["checkpoints", "tiny", "verify"]) == 1
    assert f"There is no file {copy.path}/{name}." in capsys.readouterr().out
    assert main(["checkpoints", "tiny", "push"]) == 0
    assert main(["checkpoints", "tiny", "verify"]) == 0


@pytest.mark.parametrize("name", [STEP, "metrics.csv"])
def test_verify_names_what_is_missing_here_and_pull_brings_it_back(there_too, name, capsys):
    (there_too.path / name).unlink()
    assert main(["checkpoints", "tiny", "verify"]) == 1
    told = capsys.readouterr().out
    assert ("lacks the checkpoint of step 10." if name == STEP else f"There is no {there_too.path / name}.") in told
    assert main(["checkpoints", "tiny", "pull"]) == 0
    assert main(["checkpoints", "tiny", "verify"]) == 0


def test_a_pull_fetches_all_that_is_whole_and_names_the_rest(s3, run, monkeypatch, tmp_path, capsys):
    s3.corrupt(f"tiny/{STEP}", flip)
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path / "elsewhere"))
    assert main(["checkpoints", "tiny", "pull"]) == 1
    assert f"{s3.url}/tiny/{STEP} is damaged" in capsys.readouterr().err
    copy = RunFolder(tmp_path / "elsewhere" / "tiny")
    assert set(copied_names(LocalStore(run.path))) - set(copied_names(LocalStore(copy.path))) == {STEP}


def test_a_damaged_resume_file_is_not_pushed(s3, run, capsys):
    good = s3.get("tiny/last.ckpt")
    run.resume_file.write_bytes(flip(good))
    assert main(["checkpoints", "tiny", "push"]) == 1
    assert "last.ckpt is damaged" in capsys.readouterr().err
    assert s3.get("tiny/last.ckpt") == good


def test_a_run_that_is_in_the_store_alone_is_verified_there(there_too, capsys):
    copy = RunFolder(local_root() / "store" / "tiny")
    shutil.rmtree(there_too.path)
    words = ["checkpoints", "tiny", "verify", "--store", str(local_root() / "store")]
    assert main(words) == 0
    (copy.path / STEP).unlink()
    assert main(words) == 1
    assert f"{copy.path} lacks the checkpoint of step 10." in capsys.readouterr().out
    assert not there_too.path.exists()

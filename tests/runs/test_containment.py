"""Names from a store, a folder or a config never lead out of the run's folder, and links out of the folder are not followed."""

import errno
import itertools
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from tiny_runs import TINY, as_arguments, change

from icl.cli import main
from icl.config import RunConfig
from icl.config.validation import ConfigError
from icl.files.writing import StorageError
from icl.report.facts import read_run
from icl.runs.copied_files import copied_names
from icl.runs.folder import RunFolder, local_root
from icl.runs.mirror import open_mirror, pull, push
from icl.store.base import LocalStore
from icl.store.s3 import S3Store
from icl.training import saving
from icl.training.run import train
from icl.training.wandb.log import _run_id

SHORT = change(TINY, trainer={"max_steps": 2}, evaluation={"every": None}, checkpoints={"every": None, "num_log": 0})
HOSTILE = [
    "results/../../../planted",
    "results/../config.yaml",
    "checkpoints/./planted",
    "figures//tmp/planted",
    "results/..\\..\\planted",
    "results/line\nbreak",
    "results/bell\x07",
    "figures/..",
]
NO_KEYS = [*HOSTILE, "", "/tmp/planted", "..", "C:\\planted", "c:planted", "a/\x00", "a/\udcff", "a/"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train(SHORT, folder=tmp_path_factory.mktemp("trained") / "tiny").folder.path


@pytest.fixture
def run(trained) -> RunFolder:
    run = RunFolder(shutil.copytree(trained, local_root() / "tiny"))
    LocalStore(run.path).write("run-id", b"tiny")
    return run


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def refusal(capsys) -> str:
    said = capsys.readouterr().err.splitlines()
    refusals = [
        line for line in said if not line.startswith("icl: waiting for ")
    ]  # the server of a busy machine is slow
    assert len(refusals) == 1
    assert refusals[0].startswith("icl: ")
    return refusals[0]


# Keys


def test_no_store_takes_a_key_that_could_lead_out_of_it(tmp_path):
    for store in (LocalStore(tmp_path / "store"), S3Store("bucket", "prefix")):
        acts = (store.read, store.digest, store.delete, partial(store.write, data=b""), partial(store.create, data=b""))
        for key, act in itertools.product(NO_KEYS, acts):
            with pytest.raises(StorageError, match="could lead out of the store"):
                act(key)
    assert everything(tmp_path) == set()


def test_a_folder_is_not_left_through_a_link_below_it(tmp_path):
    outside, store = tmp_path / "outside", LocalStore(tmp_path / "store")
    outside.mkdir()
    (outside / "secret").write_text("secret")
    store.write("kept/file", b"kept")
    (store.root / "folder").symlink_to(outside)
    (store.root / "file").symlink_to(outside / "secret")
    (store.root / "loop").symlink_to("loop")
    (store.root / "within").symlink_to("kept")
    for act in (
        lambda: store.read("folder/secret"),
        lambda: store.read("file"),
        lambda: store.write("folder/planted", b""),
        lambda: store.create("folder/planted", b""),
        lambda: store.delete("folder/secret"),
        lambda: store.write("loop/planted", b""),
    ):
        with pytest.raises(StorageError, match="leads out of"):
            act()
    assert store.keys() == ["kept/file"]
    assert store.keys("folder") == []
    assert store.links_out() == ["file", "folder", "loop"]
    store.write("file", b"own")  # the link gives way to the file
    store.write("within/file", b"own")
    assert store.read("kept/file") == b"own"
    assert (outside / "secret").read_text() == "secret"
    assert everything(outside) == {"secret"}


def test_the_folder_itself_may_be_reached_by_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to("disk")
    store = LocalStore(tmp_path / "runs" / "tiny")
    store.write("results/a.csv", b"1")
    assert store.keys() == ["results/a.csv"]
    assert (tmp_path / "disk" / "tiny" / "results" / "a.csv").read_bytes() == b"1"
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "tiny")
    assert LocalStore(tmp_path / "link").read("results/a.csv") == b"1"


@pytest.mark.parametrize("key", ["a" * 300, "a/" * 3000 + "a"], ids=["name", "path"])
def test_a_name_that_no_file_system_takes_is_one_sentence(key, tmp_path):
    store = LocalStore(tmp_path)
    for act in (partial(store.write, data=b""), partial(store.create, data=b"")):
        with pytest.raises(StorageError, match="File name too long"):
            act(key)
    with pytest.raises(StorageError):
        store.read(key)
    assert store.keys() == []


# Copies


def test_an_object_whose_name_leads_out_is_not_pulled(s3, run, tmp_path, monkeypatch, capsys):
    for name in ("run-id", "config.yaml", "status.json"):
        s3.client.put_object(Bucket=s3.bucket, Key=f"tiny/{name}", Body=run.path.joinpath(name).read_bytes())
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path / "a" / "b"))
    monkeypatch.setenv("AWS_BUCKET_NAME", s3.bucket)
    for name in HOSTILE:
        with s3.holding(f"tiny/{name}"):
            assert main(["checkpoints", "tiny", "pull"]) == 1
            assert repr(name) in refusal(capsys)
    with s3.holding(f"tiny/{HOSTILE[0]}"):
        assert main(["train", *as_arguments(SHORT)]) == 1
        assert repr(HOSTILE[0]) in refusal(capsys)
    assert everything(tmp_path) == {"a", "a/b", "a/b/tiny", "a/b/tiny/.lock"}


def test_a_server_that_lists_what_was_not_asked_for_is_not_believed(s3, proxy):
    keys = "".join(f"<Contents><Key>{key}</Key></Contents>" for key in ("others/config.yaml", "tiny/config.yaml"))
    listing = f"<?xml version='1.0'?><ListBucketResult><IsTruncated>false</IsTruncated>{keys}</ListBucketResult>"
    proxy.answer = lambda method, path: listing.encode() if "list-type=2" in path else None
    assert S3Store(s3.bucket, "tiny").keys() == ["config.yaml"]


@pytest.mark.parametrize("link", ["results", "results/stolen.csv", "checkpoints", "run.log", "figures/deep"])
def test_push_and_pull_follow_no_link_out_of_the_run(link, run, tmp_path, capsys):
    push(open_mirror(run, str(tmp_path / "store"), "tiny"))
    outside, there = tmp_path / "outside", tmp_path / "store" / "tiny"
    (outside / "secret").mkdir(parents=True)
    (outside / "secret" / "key").write_text("secret")
    before = everything(tmp_path)
    capsys.readouterr()
    place = run.path / link
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(outside / "secret" / "key" if "." in link else outside)
    for action in ("push", "pull"):
        for force in ([], ["--force"]):
            assert main(["checkpoints", "tiny", action, "--store", str(tmp_path / "store"), *force]) == 1
            assert f"{run.path}/{link} is a symbolic link out of the run's folder" in refusal(capsys)
    assert everything(tmp_path) == before
    assert (outside / "secret" / "key").read_text() == "secret"
    assert not any("secret" in path for path in everything(there))


def test_a_link_in_a_store_is_not_followed_either(run, tmp_path, capsys):
    push(open_mirror(run, str(tmp_path / "store"), "tiny"))
    (tmp_path / "store" / "tiny" / "results").symlink_to("/etc")
    capsys.readouterr()
    assert main(["checkpoints", "tiny", "pull", "--store", str(tmp_path / "store")]) == 1
    assert "is a symbolic link out of the run's folder" in refusal(capsys)


def test_links_to_the_run_and_within_it_are_the_users_own(run, tmp_path, monkeypatch):
    (tmp_path / "runs").symlink_to(local_root())
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path / "runs"))
    run.results.mkdir(exist_ok=True)
    (run.results / "same.yaml").symlink_to("../config.yaml")
    assert main(["checkpoints", "tiny", "push", "--store", str(tmp_path / "store")]) == 0
    assert "results/same.yaml" in copied_names(LocalStore(tmp_path / "store" / "tiny"))


@pytest.mark.parametrize("link", ["results", "figures", "results/llc", "run.log"])
def test_no_command_writes_through_a_link_out_of_a_run(link, run, tmp_path, capsys):
    outside, place = tmp_path / "outside", run.path / link
    outside.mkdir()
    (outside / "kept").write_text("kept")
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(outside / "kept" if "." in link else outside)
    small = ["--steps", "last", "--sampler.num_draws", "2", "--sampler.num_chains", "2"]
    for words in (
        ["evaluate", "tiny"],
        ["analyse", "tiny", "--what", "hessian"],
        ["llc", "tiny", *small],
        ["llc", "tiny", "--calibrate"],
        ["train", *as_arguments(SHORT)],
    ):
        assert main(words) == 1
        assert f"{link} is a symbolic link out of the run's folder, so nothing is written" in capsys.readouterr().err
    assert everything(outside) == {"kept"}
    assert (outside / "kept").read_text() == "kept"


def test_a_report_shows_nothing_from_behind_a_link(run, tmp_path):
    (tmp_path / "secret.csv").write_text("step,value\n1,123456789\n")
    run.results.mkdir(exist_ok=True)
    (run.results / "secret.csv").symlink_to(tmp_path / "secret.csv")
    facts = read_run("tiny", run)
    assert "secret" not in facts.tables
    assert any("results/secret.csv" in problem for problem in facts.problems)


@pytest.mark.parametrize("name", ["config.yaml", "status.json", "last.ckpt", "metrics.csv", "run.log"])
def test_a_pipe_in_the_place_of_a_file_holds_no_command(name, run, tmp_path, capsys):
    push(open_mirror(run, str(tmp_path / "store"), "tiny"))
    capsys.readouterr()
    for folder in (run.path, tmp_path / "store" / "tiny"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    assert main(["train", *as_arguments(SHORT)]) in (1, 2)
    assert ("not a regular file" if name == "config.yaml" else "neither a file nor a folder") in refusal(capsys)
    for action in ("push", "pull", "verify"):
        main(["checkpoints", "tiny", action, "--store", str(tmp_path / "store"), *(["--force"][: action != "verify"])])
    assert not run.path.joinpath(name).is_file()


@pytest.mark.parametrize("name", ["results", "results/a.csv/b", "checkpoints/step-000000002.safetensors/x"])
def test_a_name_that_is_a_file_and_a_folder_at_once_is_refused(name, s3, run, tmp_path, monkeypatch, capsys):
    LocalStore(run.path).write("results/a.csv", b"step\n1\n")
    push(open_mirror(run, s3.url, "tiny"))
    capsys.readouterr()
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path / "there"))
    monkeypatch.setenv("AWS_BUCKET_NAME", s3.bucket)
    s3.client.put_object(Bucket=s3.bucket, Key=f"tiny/{name}", Body=b"x")
    assert main(["checkpoints", "tiny", "pull"]) == 1
    assert "Remove either " in refusal(capsys)


def test_what_an_interrupted_write_left_in_a_store_is_not_fetched(s3, run, tmp_path):
    push(open_mirror(run, s3.url, "tiny"))
    s3.client.put_object(Bucket=s3.bucket, Key="tiny/results/.tmp-12345678-a.csv", Body=b"x")
    other = RunFolder(tmp_path / "there" / "tiny")
    pull(open_mirror(other, s3.url, "tiny"))
    assert not list(other.results.glob(".tmp-*"))


@pytest.mark.parametrize(
    ("number", "repair"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EACCES, "the right to write in its folder"),
        (errno.ENAMETOOLONG, "shorter names"),
        (errno.EIO, "check the disk"),
    ],
)
def test_a_write_that_fails_is_advised_by_its_reason(number, repair, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(StorageError, match=repair):
        LocalStore(tmp_path).write("a", b"")
    assert everything(tmp_path) == set()
    with pytest.raises(StorageError, match=repair):
        saving._replace_all([RunFolder(tmp_path)], [{}])
    assert everything(tmp_path) == set()


# Names


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/../../x", "a//b", "a/", ".", "..", "a\\b", "a\nb", "a/.", "\x00"]
)
def test_a_runs_name_stays_below_the_folder_of_all_runs(name, capsys):
    with pytest.raises(ConfigError, match="must be a folder below"):
        RunConfig.from_dict({"run_name": name})
    assert main(["train", "--run_name", name]) == 2
    refusal(capsys)


@pytest.mark.parametrize("word", ["../../x", "/nowhere/x", "a/../../x"])
def test_no_copy_is_fetched_to_a_place_outside(word, tmp_path, capsys):
    assert main(["checkpoints", word, "pull", "--store", str(tmp_path / "store")]) == 1
    assert "There is no run" in refusal(capsys)


@pytest.mark.parametrize("content", [b"../../x", b"", b"a/b", b"\xff", b"a b", b"a" * 65])
def test_a_wandb_id_that_came_along_is_no_path(content, tmp_path):
    run = RunFolder(tmp_path)
    LocalStore(tmp_path).write("wandb-id", content)
    drawn = _run_id(run)
    assert drawn.isalnum()
    assert _run_id(run) == drawn

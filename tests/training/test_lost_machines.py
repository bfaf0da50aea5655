"""Lost machines, and stores that lose files: another machine can take over the run, which resumes from the undamaged files."""

import contextlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny_runs import TINY, as_arguments, change

from icl.cli import main
from icl.config import RunConfig
from icl.runs.checkpoints import checkpoint_name, list_steps, load_step
from icl.runs.claims import claim
from icl.runs.copied_files import copied_names
from icl.runs.folder import RunError, RunFolder, local_root
from icl.runs.mirror import open_mirror, push
from icl.runs.status import Status
from icl.store.base import LocalStore
from icl.store.opening import open_store
from icl.training import saving, upload
from icl.training.run import train

SHORT = change(TINY, trainer={"max_steps": 20}, evaluation={"every": None}, checkpoints={"every": 5, "num_log": 0})
OTHER = change(SHORT, seeds={"data": 7})
STEP = f"checkpoints/{checkpoint_name(5)}"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch, no_figures):
    monkeypatch.setattr(upload, "PATIENCE", 0.0)
    monkeypatch.setattr(upload, "SECONDS", 0.02)


@pytest.fixture
def url(tmp_path) -> str:
    return str(tmp_path / "store")


def stored(config: RunConfig, url: str) -> RunConfig:
    return change(config, checkpoints={"store": url})


def lost_machine(url: str, config: RunConfig, tmp_path: Path) -> bytes:
    """Claim a run's copy in a store, as a machine that is lost right afterwards. Return the id."""
    there = open_store(f"{url}/tiny")
    claim(LocalStore(tmp_path / "lost" / "tiny"), there, config)
    return there.read("run-id")


def assert_copied(run: RunFolder, url: str) -> None:
    here, there = LocalStore(run.path), open_store(f"{url}/tiny")
    assert copied_names(there) == copied_names(here)
    assert all(there.read(name) == here.read(name) for name in copied_names(here))


# The first machine was lost before anything but its claim arrived


def test_the_same_settings_take_over_the_place_of_a_lost_machine(url, tmp_path):
    config = stored(SHORT, url)
    claimed = lost_machine(url, config, tmp_path)
    result = train(config)
    assert result.status.state == "finished"
    assert (result.folder.path / "run-id").read_bytes() == claimed
    assert_copied(result.folder, url)


@pytest.mark.slow
def test_the_place_is_taken_over_in_a_bucket_too(s3, tmp_path):
    config = stored(SHORT, s3.url)
    claimed = lost_machine(s3.url, config, tmp_path)
    assert main(["train", *as_arguments(config)]) == 0
    assert s3.get("tiny/run-id") == claimed
    assert_copied(RunFolder(local_root() / "tiny"), s3.url)


def test_a_run_that_began_without_the_store_takes_over_the_place_by_push(url, tmp_path, capsys):
    claimed = lost_machine(url, stored(SHORT, url), tmp_path)
    run = train(SHORT).folder
    assert main(["checkpoints", "tiny", "push", "--store", url]) == 0
    assert (run.path / "run-id").read_bytes() == claimed
    assert_copied(run, url)


@pytest.mark.parametrize("has_settings", [True, False], ids=["now", "0.1.0"])
def test_other_settings_never_take_it_over_and_are_told_what_to_do(url, tmp_path, has_settings, capsys):
    claimed = lost_machine(url, stored(OTHER, url), tmp_path)
    place = Path(url) / "tiny" / "run-id"
    if not has_settings:
        claimed = claimed.partition(b"\n")[0]
        place.write_bytes(claimed)
    assert main(["train", *as_arguments(stored(SHORT, url))]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"If the machine of that run was lost, delete {place} and run the same command again" in said
    assert place.read_bytes() == claimed
    place.unlink()
    assert main(["train", *as_arguments(stored(SHORT, url))]) == 0


def test_a_claim_of_0_1_0_is_known_by_the_checkpoints_beside_it(url, tmp_path):
    config = stored(SHORT, url)
    earlier = train(SHORT, folder=tmp_path / "earlier").folder
    there = open_store(f"{url}/tiny")
    there.write("run-id", b"0123456789abcdef")
    there.write(STEP, (earlier.path / STEP).read_bytes())
    with pytest.raises(RunError, match="was taken by another run"):
        train(stored(OTHER, url))
    result = train(config)
    assert result.status.state == "finished"
    assert there.read("run-id") == b"0123456789abcdef"
    assert_copied(result.folder, url)


def test_a_push_that_broke_off_before_the_settings_is_resumed_elsewhere(url, tmp_path, capsys):
    """All files arrived except `config.yaml`, which is sent last. Nothing is trained again."""
    config = stored(SHORT, url)
    first = train(config, folder=tmp_path / "first" / "tiny").folder
    open_store(f"{url}/tiny").delete("config.yaml")
    capsys.readouterr()
    result = train(config)
    assert "Fetched step 20" in capsys.readouterr().out
    assert result.folder.metrics_file.read_bytes() == first.metrics_file.read_bytes()
    assert_copied(result.folder, url)


def test_machines_that_take_one_place_at_once_agree_on_whose_it_is(url, tmp_path):
    config = stored(SHORT, url)

    def take(number: int) -> bytes:
        run = RunFolder(tmp_path / str(number) / "tiny")
        claim(LocalStore(run.path), open_store(f"{url}/tiny"), config)
        return (run.path / "run-id").read_bytes()

    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(take, range(8)))
    assert ids == {open_store(f"{url}/tiny").read("run-id")}


# Damage in the store


@pytest.fixture
def interrupted(s3, monkeypatch) -> RunConfig:
    """Return a run whose machine was lost after step 10 had arrived in the store."""
    config = stored(SHORT, s3.url)
    save = saving.save_checkpoint

    def stop_at_ten(store, step, config, params):
        save(store, step, config, params)
        if step == 15:
            raise KeyboardInterrupt

    often = change(config, checkpoints={"resume_seconds": 0.0})
    with monkeypatch.context() as patched:
        patched.setattr(saving, "save_checkpoint", stop_at_ten)
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            train(often)
    push(open_mirror(RunFolder(local_root() / "tiny"), s3.url, "tiny"))
    assert json.loads(s3.get("tiny/status.json"))["state"] == "preempted"
    return config


def elsewhere(monkeypatch, tmp_path_factory) -> RunFolder:
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path_factory.mktemp("elsewhere")))
    return RunFolder(local_root() / "tiny")


def test_a_damaged_old_checkpoint_does_not_keep_a_run_from_going_on(
    s3, interrupted, monkeypatch, tmp_path_factory, capsys
):
    good = s3.get(f"tiny/{STEP}")
    first = RunFolder(local_root() / "tiny")
    s3.corrupt(f"tiny/{STEP}", lambda data: data[:-9])
    run = elsewhere(monkeypatch, tmp_path_factory)
    capsys.readouterr()
    assert main(["train", *as_arguments(interrupted)]) == 0
    said = capsys.readouterr()
    told = [line for line in said.err.splitlines() if line.startswith("icl:") and "waiting for" not in line]
    assert len(told) == 2
    assert f"{s3.url}/tiny/{STEP} is damaged" in told[0]
    assert f"{run.path} lacks the checkpoint of step 5." in told[1]
    assert f"Resuming {run.path} from step 1" in said.out
    assert list_steps(run.checkpoints) == [0, 10, 15, 20]
    expected = train(SHORT, folder=run.path.parent / "expected").folder
    assert run.metrics_file.read_bytes() == expected.metrics_file.read_bytes()
    assert load_step(run.checkpoints, 20).digest == load_step(expected.checkpoints, 20).digest
    assert main(["checkpoints", "tiny", "verify"]) == 1
    assert f"{s3.url}/tiny/{STEP} is damaged" in capsys.readouterr().out
    assert (first.path / STEP).read_bytes() == good
    open_store(f"{s3.url}/tiny").write(STEP, good)  # what a forced push of the first machine would do
    assert main(["checkpoints", "tiny", "pull"]) == 0
    assert main(["checkpoints", "tiny", "verify"]) == 0


def test_a_checkpoint_that_is_damaged_here_is_not_sent_and_is_named(s3, interrupted, capsys):
    good, run = s3.get(f"tiny/{STEP}"), RunFolder(local_root() / "tiny")
    (run.path / STEP).write_bytes(good[:-9])
    assert main(["train", *as_arguments(interrupted)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"1 file of {run.path} did not reach" in said
    assert f"{STEP} is damaged" in said
    assert s3.get(f"tiny/{STEP}") == good
    assert json.loads(s3.get("tiny/status.json"))["state"] == "finished"


def test_a_removed_folder_takes_nothing_away_from_the_store(s3, interrupted, monkeypatch, capsys):
    save, run = saving.save_checkpoint, RunFolder(local_root() / "tiny")

    def remove(store, step, config, params):
        save(store, step, config, params)
        shutil.rmtree(run.path)

    before = set(s3.names())
    monkeypatch.setattr(saving, "save_checkpoint", remove)
    assert main(["train", *as_arguments(interrupted)]) == 1
    assert not run.path.exists()
    assert before <= set(s3.names())


@pytest.mark.slow
def test_a_damaged_resume_file_in_the_store_is_told_with_what_to_do(
    s3, interrupted, monkeypatch, tmp_path_factory, capsys
):
    s3.corrupt("tiny/last.ckpt", lambda data: data[:-9])
    run = elsewhere(monkeypatch, tmp_path_factory)
    capsys.readouterr()
    assert main(["train", *as_arguments(interrupted)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"icl: {s3.url}/tiny/last.ckpt is damaged")
    assert f"delete last.ckpt, metrics.csv and status.json at {s3.url}/tiny" in said
    assert not run.config_file.exists()
    for name in ("last.ckpt", "metrics.csv", "status.json"):
        open_store(f"{s3.url}/tiny").delete(name)
    assert main(["train", *as_arguments(interrupted)]) == 0
    assert list_steps(run.checkpoints) == [0, 5, 10, 15, 20]
    assert_copied(run, s3.url)


def test_a_folder_that_is_behind_a_damaged_copy_goes_on_by_itself(s3, interrupted, capsys):
    s3.corrupt("tiny/last.ckpt", lambda data: data[:-9])
    run = RunFolder(local_root() / "tiny")
    shutil.copy(run.previous_file, run.resume_file)  # an earlier save
    run.write_status(Status(state="preempted", step=1, max_steps=20))
    capsys.readouterr()
    assert main(["train", *as_arguments(interrupted)]) == 0
    said = capsys.readouterr().err
    assert f"{s3.url}/tiny/last.ckpt is damaged" in said
    assert f"The run continues from the files in {run.path}." in said
    assert_copied(run, s3.url)

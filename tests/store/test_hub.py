"""`hf://`: runs on the Hugging Face Hub, with its real client, against a stand-in that refuses, throttles and breaks off."""

import builtins
import dataclasses
import sys
import time

import pytest
import torch
from hub_server import TOKEN, HubServer
from tiny_runs import TINY, as_arguments, change

from icl.api import load_checkpoint, load_model
from icl.build import build_model
from icl.cli import main
from icl.config import RunConfig
from icl.config.validation import ConfigError, require_store
from icl.files.writing import StorageError
from icl.runs.checkpoints import CheckpointError, checkpoint_name, save_checkpoint
from icl.runs.claims import claim
from icl.runs.folder import RunFolder, local_root
from icl.runs.mirror import open_mirror
from icl.runs.status import Status
from icl.store.opening import open_store
from icl.training.sender import Sender

module = pytest.importorskip("icl.store.hub", reason="needs the extra `hub`")
REPO = "user/models"
URL = f"hf://{REPO}"


def make_run(num_steps: int = 4, name: str = "tiny") -> RunFolder:
    """A finished run with checkpoints of different weights, a table and a figure."""
    grid = {"every": 1, "num_log": 0, "num_linear": 0}
    config = change(TINY, trainer={"max_steps": max(1, num_steps - 1)}, checkpoints=grid, evaluation={"every": None})
    config = dataclasses.replace(config, run_name=name)
    run = RunFolder(local_root() / name)
    for step in range(num_steps):
        seeds = dataclasses.replace(config.seeds, model=step)
        model = build_model(dataclasses.replace(config, seeds=seeds))
        save_checkpoint(run.checkpoints, step, config, dict(model.named_parameters()))
    run.write_config(config)
    run.write_result("losses.csv", "position,model,ridge\n1,2.5,2.25\nmean,1.5,1.2345678\n")
    run.figures.mkdir()
    (run.figures / "training.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    run.write_status(Status(state="finished", step=num_steps - 1, max_steps=num_steps - 1))
    return run


def push(name: str = "tiny", *more: str) -> int:
    return main(["checkpoints", name, "push", "--store", URL, *more])


@pytest.mark.slow
def test_a_push_is_a_few_commits_with_all_files_and_a_card(hub: HubServer, capsys):
    run = make_run(num_steps=120)
    assert push() == 0
    commits = hub.commits(REPO)
    assert len(commits) <= 6
    assert max(len(commit.changed) for commit in commits) <= module.FILES_PER_COMMIT
    files = hub.files(REPO)
    assert sum(name.startswith("tiny/checkpoints/step-") for name in files) == 120
    assert files["tiny/checkpoints/step-000000007.safetensors"] == run.checkpoints.read(checkpoint_name(7))
    assert commits[-2].changed[-1] == "tiny/status.json"  # what describes the other files comes with or after them
    card = files["README.md"].decode()
    for words in ("M = 16", "1.235", "tiny/figures/training.png", f'load_model("{URL}/tiny")', "120 checkpoints"):
        assert words in card
    assert hub.private[REPO]
    num_commits = len(commits)
    assert push() == 0
    assert "Sent 0 files" in capsys.readouterr().out
    assert len(hub.commits(REPO)) == num_commits


@pytest.mark.slow
def test_a_run_is_fetched_listed_and_verified(hub: HubServer, capsys, monkeypatch, tmp_path):
    run = make_run()
    assert push() == 0
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path / "elsewhere"))
    assert main(["checkpoints", "tiny", "pull", "--store", URL]) == 0
    there = RunFolder(tmp_path / "elsewhere" / "tiny")
    assert there.checkpoints.read(checkpoint_name(2)) == run.checkpoints.read(checkpoint_name(2))
    assert main(["checkpoints", "tiny", "ls", "--store", URL]) == 0
    assert "4 steps: 4 here, 4 in the store" in capsys.readouterr().out
    hub.commit(REPO, {"tiny/checkpoints/step-000000001.safetensors": b"damaged"}, "a stranger's commit")
    module._REPOSITORIES.clear()
    assert main(["checkpoints", "tiny", "verify", "--store", URL]) == 1
    assert "step-000000001.safetensors is damaged" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_is_loaded_by_run_step_and_revision(hub: HubServer, capsys, tmp_path):
    run = make_run()
    assert push() == 0
    old = hub.commits(REPO)[-1].oid
    hub.commit(REPO, {"tiny/checkpoints/step-000000003.safetensors": None}, "remove the last step")
    module._REPOSITORIES.clear()
    expected = {step: load_model(run.checkpoints.root / checkpoint_name(step)).state_dict() for step in range(4)}
    cases = {(URL, None): 2, (f"{URL}/tiny", 1): 1, (f"{URL}@{old}", None): 3, (f"{URL}@{old}/tiny", 0): 0}
    cases[(f"{URL}/tiny/checkpoints/{checkpoint_name(1)}", None)] = 1
    for (address, step), number in cases.items():
        model, info = load_checkpoint(address, step=step)
        assert info["step"] == number
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected[number].items())
    (tmp_path / "prompt.csv").write_text("x1,x2,y\n1,0,0.5\n0,1,\n")
    assert main(["predict", URL, "--step", "0", "--prompt", str(tmp_path / "prompt.csv")]) == 0
    assert f"{URL}/tiny/checkpoints/{checkpoint_name(0)} (step 0)" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; it has 3 steps from 0 to 2"):
        load_model(URL, step=3)
    make_run(name="other")
    assert push("other") == 0
    with pytest.raises(CheckpointError, match="has 2 runs: other, tiny"):
        load_model(URL)
    with pytest.raises(StorageError, match="no such revision"):
        load_model(f"{URL}@nothing")


@pytest.mark.slow
def test_the_card_keeps_what_the_user_wrote_and_one_section_per_run(hub: HubServer):
    hub.create(REPO, private=False)
    hub.commit(REPO, {"README.md": b"---\nlicense: mit\n---\n\n# My paper\n"}, "card")
    make_run()
    make_run(name="other")
    assert push() == 0
    assert push("other") == 0
    assert push("tiny", "--force") == 0
    card = hub.files(REPO)["README.md"].decode()
    assert card.startswith("---\nlicense: mit\n---\n\n# My paper\n")
    assert [card.count(f"<!-- icl run {name} -->") for name in ("tiny", "other")] == [1, 1]


# A Hub that refuses, throttles and breaks off


@pytest.mark.slow
def test_a_short_throttle_is_waited_for(hub: HubServer):
    make_run()
    left = [2]

    def refuse(method: str, path: str) -> tuple[int, dict[str, str]] | None:
        if method == "POST" and "/commit/" in path and left[0]:
            left[0] -= 1
            return 429, {"Retry-After": "1"}
        return None

    hub.refuse = refuse
    assert push() == 0
    assert left == [0]
    assert "tiny/config.yaml" in hub.files(REPO)


@pytest.mark.slow
def test_a_long_throttle_ends_the_command_and_the_next_one_sends_the_rest(hub: HubServer, capsys):
    make_run(num_steps=120)
    commits = [0]

    def refuse(method: str, path: str) -> tuple[int, dict[str, str]] | None:
        if method == "POST" and "/commit/" in path:
            commits[0] += 1
            return (429, {"Retry-After": "3000"}) if commits[0] > 2 else None
        return None

    hub.refuse = refuse
    began = time.monotonic()
    assert push() == 1
    assert time.monotonic() - began < 60
    assert "no more requests from this user for 50 minutes (429)" in capsys.readouterr().err
    num_uploads = len(hub.uploads)
    hub.refuse = lambda method, path: None
    assert push() == 0
    assert len(hub.uploads) < num_uploads + 121  # what arrived was not sent again
    assert sum(name.startswith("tiny/checkpoints/step-") for name in hub.files(REPO)) == 120


def test_a_throttle_during_which_the_client_itself_waits_ends_too(hub: HubServer, capsys, monkeypatch):
    """The client waits as long as the Hub asks for, even an hour."""
    make_run()
    monkeypatch.setattr("icl.store.hub_repository.CALL_SECONDS", 1.0)
    hub.refuse = lambda method, path: (429, {"Retry-After": "3000"}) if "/preupload/" in path else None
    assert push() == 1
    said = capsys.readouterr().err
    assert "Files that have arrived stay; run the same command again later" in said
    assert "tiny/config.yaml" not in hub.files(REPO)


@pytest.mark.slow
def test_an_upload_that_breaks_off_is_resumed(hub: HubServer):
    run = make_run()
    hub.breaks = 2
    assert push() == 0
    assert hub.breaks == 0
    stored = hub.files(REPO)
    assert all(stored[f"tiny/{name}"] == run.store.read(name) for name in list(run.store.keys()) if name != ".lock")


@pytest.mark.slow
def test_an_upload_that_always_breaks_off_names_the_server_and_leaves_no_half_run(hub: HubServer, capsys, monkeypatch):
    make_run()
    monkeypatch.setattr("icl.store.hub_repository._MAX_RETRIES", 1)
    hub.refuse = lambda method, path: (503, {}) if method == "PUT" else None
    import huggingface_hub.utils._http as client

    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    assert push() == 1
    said = capsys.readouterr().err
    assert hub.endpoint in said or "503" in said
    assert "tiny/config.yaml" not in hub.files(REPO)
    hub.refuse = lambda method, path: None
    assert push() == 0


@pytest.mark.slow
def test_another_program_in_another_folder_does_no_harm(hub: HubServer):
    make_run()
    others = iter(range(2))

    def commit() -> None:
        number = next(others, None)
        if number is not None:
            hub.commit(REPO, {f"other-run/{number}": b"x"}, "another program")

    hub.before_commit = commit
    assert push() == 0
    assert {"other-run/0", "other-run/1", "tiny/config.yaml", "README.md"} <= set(hub.files(REPO))


def test_another_program_in_the_same_run_is_told_apart(hub: HubServer):
    store = open_store(f"{URL}/tiny")
    store.write("a", b"1")
    done: list[int] = []

    def commit() -> None:
        if not done:
            done.append(1)
            hub.commit(REPO, {"tiny/b": b"theirs"}, "another program")

    hub.before_commit = commit
    with pytest.raises(StorageError, match=r"Another program changed tiny/b in .* at the same time"):
        store.write("a", b"2")
    assert hub.files(REPO) == {"tiny/a": b"1", "tiny/b": b"theirs"}


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_without_a_right_token_a_sentence_says_what_to_do(hub: HubServer, capsys, monkeypatch, token, tmp_path):
    make_run()
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    assert push() == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "Set HF_TOKEN to a token with write access" in said
    assert hub.repositories == {}


def test_no_token_is_printed_logged_or_saved(hub: HubServer, capsys):
    run = make_run()
    assert push() == 0
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err
    assert not [file for file in run.path.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
    assert not [name for name, data in hub.files(REPO).items() if TOKEN.encode() in data]


def test_a_missing_package_is_named(monkeypatch):
    real = builtins.__import__

    def find(name, *arguments, **options):
        if name.startswith("huggingface_hub"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="huggingface_hub")
        return real(name, *arguments, **options)

    for name in [name for name in sys.modules if name.startswith(("icl.store.hub", "huggingface_hub"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", find)
    with pytest.raises(StorageError, match=r"pip install 'icl\[hub\]'"):
        open_store(URL)


@pytest.mark.parametrize(
    "url", ["hf://user", "hf://", "hf://hf_secret@user/models", "hf://user/models?x=1", "hf:user/models"]
)
def test_wrong_addresses_are_refused(url):
    with pytest.raises(ConfigError) as refusal:
        require_store(url)
    assert "hf://USER/REPO" in str(refusal.value)
    assert "hf_secret" not in str(refusal.value)


# Training


def test_while_a_run_trains_ten_minutes_pass_between_two_commits(hub: HubServer, monkeypatch):
    run = make_run()
    config = run.read_config()
    mirror = open_mirror(run, URL, "tiny")
    claim(mirror.here, mirror.there, config)  # a commit
    sender = Sender(mirror, config)
    assert sender.send(lambda: False)
    assert len(hub.commits(REPO)) == 1
    assert "config.yaml" in sender.changed()
    (repository,) = module._REPOSITORIES.values()
    monkeypatch.setattr(repository, "committed_at", repository.committed_at - 601)
    assert sender.send(lambda: False)
    assert len(hub.commits(REPO)) == 2
    assert sum("step-" in name for name in hub.files(REPO)) == 4


@pytest.mark.slow
def test_training_commits_at_most_every_ten_minutes_and_all_files_arrive(hub: HubServer, capsys, monkeypatch, tmp_path):
    config: RunConfig = change(TINY, checkpoints={"store": URL, "resume_seconds": 0.2})
    assert main(["train", *as_arguments(config)]) == 0
    said = capsys.readouterr()
    assert "Uploaded to hf://user/models/tiny" in said.out
    # run-id; all files at the end; results and figures; the card
    assert len(hub.commits(REPO)) <= 5
    assert main(["checkpoints", "tiny", "verify", "--store", URL]) == 0
    assert "training.png" in hub.files(REPO)["README.md"].decode()
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path / "another machine"))
    assert main(["checkpoints", "tiny", "pull", "--store", URL]) == 0
    assert main(["train", *as_arguments(config)]) == 0
    assert "finished" in capsys.readouterr().out

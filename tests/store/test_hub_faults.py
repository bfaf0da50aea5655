"""`hf://` against a Hub that answers with odd errors or hostile names, and against a user's mistakes."""

import logging
import os
import signal
import subprocess
import sys
import time

import pytest
from hub_server import HubServer, _Answer
from test_hub import REPO, URL, make_run, push

from icl.api import load_model
from icl.cli import main
from icl.config.validation import ConfigError
from icl.files.writing import StorageError
from icl.presets import preset
from icl.runs.card import card_text
from icl.runs.checkpoints import CheckpointError
from icl.runs.folder import RunFolder
from icl.store.opening import open_store

module = pytest.importorskip("icl.store.hub", reason="needs the extra `hub`")
FILE = "checkpoints/step-000000001.safetensors"


@pytest.mark.parametrize("status", [400, 403, 409, 412, 416])
@pytest.mark.parametrize(("request_", "verb"), [("/tree/", "list"), ("/revision/", "list"), ("/resolve/", "read")])
def test_an_error_while_reading_is_a_sentence_with_its_status(hub: HubServer, status, request_, verb):
    hub.create(REPO, private=False)
    hub.commit(REPO, {f"tiny/{FILE}": b"x"}, "a run")
    hub.refuse = lambda method, path: (status, {}) if request_ in path else None
    with pytest.raises(StorageError, match=rf"^Cannot {verb} {URL}[^ ]*: .*\({status}\)") as refusal:
        load_model(URL)
    assert (f"{URL}/tiny/{FILE}" in str(refusal.value)) == (verb == "read")


def test_an_upload_that_is_refused_is_a_sentence_with_its_status(hub: HubServer, capsys):
    make_run()
    hub.refuse = lambda method, path: (400, {}) if method == "PUT" else None
    assert push() == 1
    assert "answered with an error (400)" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["..", "/tmp/evil", "a/../../b", "\x1b[2J", "a\\..\\b", "a//b"])
def test_a_hostile_name_is_neither_read_nor_printed_as_it_is(hub: HubServer, folder):
    hub.create(REPO, private=False)
    hub.commit(REPO, {f"{folder}/{FILE}": b"x"}, "a stranger's commit")
    with pytest.raises(StorageError, match="could lead out of the store") as refusal:
        load_model(URL)
    assert "\x1b" not in str(refusal.value)
    assert not any("/resolve/" in path for _, path in hub.requests)


@pytest.mark.parametrize(
    "address", ["hf://user/..", "hf://../models", "hf://user/models/../other", "hf://user/models/./a"]
)
def test_an_address_stays_in_its_repository(address):
    with pytest.raises(ConfigError, match="must be hf://USER/REPO"):
        load_model(address)
    with pytest.raises(StorageError, match="must be hf://USER/REPO"):
        open_store(address)


def test_wrong_names_and_revisions_are_told_apart(hub: HubServer, capsys):
    hub.create(REPO, private=False)
    with pytest.raises(StorageError, match=r"cannot be the name of a repository: .*\.git"):
        load_model(f"{URL}.git")
    with pytest.raises(CheckpointError, match="Check the address; a private store needs its owner's token"):
        load_model("hf://user/modles")
    assert main(["checkpoints", "tiny", "ls", "--store", f"{URL}@v9"]) == 1
    assert f"Cannot list {URL}@v9: the Hub has no such revision" in capsys.readouterr().err
    assert main(["evaluate", URL]) == 1
    assert "first fetch it with `icl checkpoints NAME pull" in capsys.readouterr().err


def test_a_token_with_an_odd_character_is_named(hub: HubServer, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_t\N{LATIN SMALL LETTER O WITH DIAERESIS}k")
    with pytest.raises(StorageError, match=r"the token contains a character .* Correct HF_TOKEN"):
        load_model(URL)


def test_retries_of_the_client_are_not_printed(hub: HubServer, monkeypatch, caplog):
    hub.create(REPO, private=False)
    client = pytest.importorskip("huggingface_hub.utils._http")
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    monkeypatch.setattr("icl.store.hub_repository._MAX_RETRIES", 1)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    hub.refuse = lambda method, path: (503, {}) if "/tree/" in path else None
    with pytest.raises(StorageError, match=r"\(503\)"):
        load_model(URL)
    assert len([path for _, path in hub.requests if "/tree/" in path]) > 1
    assert caplog.records == []


def test_a_card_that_is_no_text_or_has_half_a_mark_is_not_damaged(hub: HubServer, capsys):
    run = make_run()
    hub.create(REPO, private=False)
    hub.commit(REPO, {"README.md": b"\xff\xfe"}, "card")
    assert push() == 1
    assert "README.md is not text in UTF-8" in capsys.readouterr().err
    assert hub.files(REPO)["README.md"] == b"\xff\xfe"
    assert "tiny/config.yaml" in hub.files(REPO)
    card = "<!-- icl run tiny -->\nmy text\n"
    for _ in range(2):
        card = card_text(card, run, "tiny", URL)
    assert "my text" in card
    assert card.count("<!-- end of icl run tiny -->") == 1


def test_the_card_of_a_language_run_speaks_of_text(tmp_path):
    run = RunFolder(tmp_path)
    run.write_config(preset("language-quickstart"))
    card = card_text("", run, "words", URL)
    assert "rows of" in card
    assert " rows, " in card
    assert "regression" not in card
    assert "prompts" not in card


@pytest.mark.slow
def test_an_interrupted_push_ends_although_the_server_does_not_answer(hub: HubServer, monkeypatch):
    """The client sends files in threads for which Python would wait."""
    make_run()
    is_asked: list[str] = []

    def hang(method: str, path: str) -> None:
        if method == "PUT":
            is_asked.append(path)
            time.sleep(30)

    hub.refuse = hang
    words = [sys.executable, "-m", "icl", "checkpoints", "tiny", "push", "--store", URL]
    with subprocess.Popen(words, env=dict(os.environ), stderr=subprocess.PIPE, text=True) as process:
        while not is_asked and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted" in said


def test_a_file_is_read_from_the_commit_whose_listing_describes_it(hub: HubServer, monkeypatch):
    """Another program commits between the listing and the download."""
    store = open_store(f"{URL}/tiny")
    store.write("a", b"old")
    ask = module.Repository.ask

    def commit_before_reading(repository, verb, act, **options):
        if verb == "read":
            monkeypatch.setattr(module.Repository, "ask", ask)
            hub.commit(REPO, {"tiny/a": b"a longer value"}, "another program")
        return ask(repository, verb, act, **options)

    monkeypatch.setattr("icl.store.hub_repository.LISTING_SECONDS", 0.0)
    monkeypatch.setattr(module.Repository, "ask", commit_before_reading)
    assert store.read("a") == b"old"
    assert store.read("a") == b"a longer value"


def test_a_commit_whose_answer_was_lost_is_no_commit_of_another_program(hub: HubServer):
    store = open_store(f"{URL}/tiny")
    store.write("a", b"1")
    commit = hub.commit

    def lose_the_first_answer(*arguments) -> str:
        commit(*arguments)
        hub.commit = commit
        raise _Answer(503, {"error": "busy"})

    hub.commit = lose_the_first_answer
    store.write_many({"b": b"2", FILE: b"large"}, delete=["a"])
    assert hub.files(REPO) == {"tiny/b": b"2", f"tiny/{FILE}": b"large"}
    assert len(hub.commits(REPO)) == 2

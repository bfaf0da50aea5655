"""No password or key is in a run's folder, in its copy, or in printed text."""

import json
from pathlib import Path

import pytest
from tiny_runs import TINY, as_arguments, change

from icl.cli import main
from icl.cli.entry import _complain
from icl.files.redaction import redact
from icl.files.writing import StorageError
from icl.runs.environment import environment_line
from icl.runs.folder import RunFolder, local_root
from icl.runs.status import Status
from icl.store.opening import open_store

SHORT = change(TINY, trainer={"max_steps": 2}, evaluation={"every": None}, checkpoints={"every": None, "num_log": 0})
PASSWORD = "pass/w@rd:of-mine"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("https://me:word@host:9000/a b@c", "https://host:9000/a b@c"),
        ("'http://me:wo@rd@host'", "'http://host'"),
        ("s3://key:sec/ret@bucket/prefix", "s3://bucket/prefix"),
        ("https://token@host", "https://host"),
        ("'hf://user/models@v1/tiny'", "'hf://user/models@v1/tiny'"),  # a revision
        ("hf://hf_token@user/models", "hf://user/models"),
        ("hf://user:hf_token@host/models@v1", "hf://v1"),
        ("https://me:word@host,hf://user/models@v1", "https://v1"),
        ("https://host/a, me@example.org", "https://host/a, me@example.org"),
        ("a folder me@uni/runs", "a folder me@uni/runs"),
        ("/usr/bin/env WANDB_API_KEY=0123abcd icl train", "/usr/bin/env WANDB_API_KEY=*** icl train"),
        ('{"command": "aws_secret_access_key=a/b+c", "x": 1}', '{"command": "aws_secret_access_key=***", "x": 1}'),
        ("https://host/a?token=abc&part=1", "https://host/a?token=***&part=1"),
        ("num_tokens=5 --optim.lr=1", "num_tokens=5 --optim.lr=1"),
        ("tool --api-key=X --secret-key=X -v", "tool --api-key=*** --secret-key=*** -v"),
        ("tool --token X --a.api-key 'X Y' file", "tool --token *** --a.api-key *** file"),
        ("tool --token --lr 1 --tokens 5", "tool --token --lr 1 --tokens 5"),
        ('HF_TOKEN="X Y" icl', "HF_TOKEN=*** icl"),
        ("env 'HF_TOKEN=a b' icl train 'x y'", "env 'HF_TOKEN=***' icl train 'x y'"),
        (r'{"command": "HF_TOKEN=\"X Y\" icl", "x": 1}', '{"command": "HF_TOKEN=***", "x": 1}'),
        ("HF_TOKEN='no end", "HF_TOKEN=***"),
    ],
)
def test_credentials_in_addresses_and_commands_are_left_out(text, left):
    assert redact(text, {}) == left


def test_secrets_of_the_environment_are_hidden_wherever_they_stand():
    environment = {
        "AWS_SECRET_ACCESS_KEY": "the-secret-key",
        "WANDB_API_KEY": "0123456789",
        "HTTPS_PROXY": "http://me:hidden-word@proxy",
        "TOKENIZERS_PARALLELISM": "parallel",
        "HF_TOKEN": "x",
    }
    text = "the-secret-key 0123456789 hidden-word parallel x"
    assert redact(text, environment) == "*** *** *** parallel x"


@pytest.mark.parametrize("mode", ["disabled", pytest.param("offline", marks=pytest.mark.slow)])
def test_a_password_in_the_endpoint_is_saved_nowhere(s3, monkeypatch, no_figures, capfd, mode):
    with_password = s3.endpoint.replace("://", "://me:hidden-word@")
    monkeypatch.setenv("AWS_ENDPOINT_URL", with_password)
    monkeypatch.setenv("AWS_BUCKET_NAME", s3.bucket)
    monkeypatch.setenv("WANDB_MODE", mode)
    assert main(["train", *as_arguments(SHORT)]) == 0
    (local_root() / "tiny" / "results").mkdir()
    (local_root() / "tiny" / "results" / "a.csv").write_text("1")
    assert main(["checkpoints", "tiny", "push"]) == 0
    said = capfd.readouterr()
    everything = [path.read_bytes() for path in local_root().rglob("*") if path.is_file()]
    everything += [s3.get(key) for key in s3.names()] + [said.out.encode(), said.err.encode()]
    assert len(everything) > 10
    assert not [data[:200] for data in everything if b"hidden-word" in data]


def test_a_server_that_does_not_answer_is_named_without_its_password(monkeypatch, s3, capsys):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:{PASSWORD}@127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert main(["train", *as_arguments(SHORT), "--checkpoints.store", s3.url]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert not {"pass", "w@rd", "of-mine"} & set(said.replace("/", " ").replace(":", " ").split())


@pytest.mark.parametrize(
    "store", ["s3://key:hidden-word@bucket/p", "https://me:hidden-word@host", "s3://hidden-word@bucket"]
)
def test_a_store_with_credentials_is_refused_without_repeating_them(store, capsys):
    with pytest.raises(StorageError) as refusal:
        open_store(store)
    assert "hidden-word" not in str(refusal.value)
    for words in (["train", "--checkpoints.store", store], ["checkpoints", "tiny", "pull", "--store", store]):
        assert main(words) in (1, 2)
        said = capsys.readouterr().err
        assert said.startswith("icl: ")
        assert "hidden-word" not in said
    assert not list(local_root().iterdir())


def test_logs_statuses_and_messages_pass_through_the_same_function(tmp_path, monkeypatch, capsys):
    run, secret = RunFolder(tmp_path), "https://me:hidden-word@host"
    monkeypatch.setattr("sys.argv", ["icl", "train", secret])
    run.log(f"failed at {secret}")
    run.log(environment_line())
    run.write_status(Status(state="failed", reason=f"no answer from {secret}"))
    _complain(f"no answer from {secret}", 1)
    told = "".join(Path(file).read_text() for file in (run.log_file, run.status_file)) + capsys.readouterr().err
    assert told.count("https://host") == 4
    assert "hidden-word" not in told
    assert json.loads(run.status_file.read_text())["reason"] == "no answer from https://host"

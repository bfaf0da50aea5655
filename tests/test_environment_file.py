"""`.env-template` is complete and harmless as it is, and `.env` reaches the command line and nothing else."""

import io
import re
from pathlib import Path

import pytest
from dotenv import dotenv_values
from tiny_runs import TINY, as_arguments, change

from icl.cli import main

TEMPLATE = (Path(__file__).parents[1] / ".env-template").read_text(encoding="utf-8")
NAMES = (
    "LOCAL_ROOT",
    "AWS_BUCKET_NAME",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ENDPOINT_URL",
    "WANDB_ENTITY",
    "DEVICE",
)
SHORT = change(TINY, trainer={"max_steps": 2}, evaluation={"every": None}, checkpoints={"num_log": 0})


def test_the_template_has_every_variable_with_one_comment_and_sets_none():
    for name in NAMES:
        assert re.search(rf"^# [^\n]+\n# {name}=", TEMPLATE, re.M), name
    assert dotenv_values(stream=io.StringIO(TEMPLATE)) == {}


def test_every_variable_can_be_uncommented_and_read():
    filled = re.sub(r"^# ([A-Z_]+)=.*$", r"\1=value-of-\1", TEMPLATE, flags=re.M)
    assert dotenv_values(stream=io.StringIO(filled)) == {name: f"value-of-{name}" for name in NAMES}


@pytest.fixture
def folder(tmp_path, monkeypatch, no_figures) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what `.env` sets is undone after the test
        monkeypatch.delenv(name)
    return tmp_path


def test_a_copied_template_trains_as_without(folder):
    (folder / ".env").write_text(TEMPLATE)
    assert main(["train", *as_arguments(SHORT)]) == 0
    assert (folder / "runs" / "tiny" / "status.json").is_file()


def test_what_stands_in_env_reaches_the_command_line(folder, capsys):
    (folder / ".env").write_text("LOCAL_ROOT=from-env\nDEVICE=cpu\nAWS_BUCKET_NAME=no-such-bucket\n")
    assert main(["train", *as_arguments(change(SHORT, checkpoints={"store": "copies"}))]) == 0
    assert (folder / "from-env" / "tiny" / "status.json").is_file()
    assert (folder / "copies" / "tiny" / "status.json").is_file()


def test_the_bucket_of_env_is_the_store(folder, s3, capsys):
    (folder / ".env").write_text(f"AWS_BUCKET_NAME={s3.bucket}\n")
    assert main(["train", *as_arguments(SHORT)]) == 0
    assert "tiny/status.json" in s3.names()

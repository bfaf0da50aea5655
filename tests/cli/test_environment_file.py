"""`.env-template` is complete and changes nothing as shipped, and only the command line reads `.env`."""

import contextlib
import io
import os
import pwd
import re
import time
import tracemalloc
from pathlib import Path

import pytest
from dotenv import dotenv_values
from tiny_runs import TINY, as_arguments, change

from icl.cli import env_file, main
from icl.cli.env_file import load_env_file
from icl.config.validation import ConfigError

TEMPLATE = (Path(__file__).parents[2] / ".env-template").read_text(encoding="utf-8")
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


# The closed list


TAKEN = [
    *NAMES,
    *("AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3", "HF_TOKEN", "HF_ENDPOINT"),
    *("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_RUN_GROUP", "WANDB_TAGS", "WANDB_DIR"),
]
LEFT_OUT = [
    *(
        "LD_PRELOAD",
        "LD_LIBRARY_PATH",
        "PATH",
        "PYTHONPATH",
        "PYTHONSTARTUP",
        "PYTHONHOME",
        "BASH_ENV",
        "GIT_SSH_COMMAND",
    ),
    *("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CA_BUNDLE", "AWS_PROFILE"),
    *("AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_DATA_PATH", "BOTO_CONFIG", "HF_HOME", "NETRC", "HTTPS_PROXY", "CXX"),
    *("WANDB__EXECUTABLE", "WANDB_X_EXECUTABLE", "WANDB_CONFIG_DIR", "WANDB_CONFIG_PATHS", "WANDB_SETTINGS_SYSTEM"),
    *(
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_CREDENTIALS_FILE",
        "WANDB_SWEEP_PARAM_PATH",
        "WANDB_PROGRAM",
        "WANDB_SERVICE",
    ),
    *(
        "WANDB_CODE_DIR",
        "WANDB_GIT_ROOT",
        "WANDB_DOCKER",
        "WANDB_HTTPS_PROXY",
        "ICL_SWEEP_POINT",
        "TORCHINDUCTOR_CACHE_DIR",
    ),
    *(
        "aws_bucket_name",
        "wandb_mode",
        "AWS_",
        "WANDB_",
        "HF_TOKEN_PATH",
        "HOME",
        "TMPDIR",
        "XDG_CACHE_HOME",
        "MPLBACKEND",
    ),
]


@pytest.fixture
def clean(folder, monkeypatch) -> Path:
    """Unset all variables of the lists, and undo after the test whatever `.env` sets."""
    for name in (*TAKEN, *LEFT_OUT):
        if name not in ("PATH", "HOME"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
    return folder


def test_only_names_of_the_closed_list_are_taken_and_the_others_are_named(clean, capsys):
    before = dict(os.environ)
    for name in LEFT_OUT:
        (clean / ".env").write_text(f"export {name}='/tmp/planted'\n")
        load_env_file()
        assert dict(os.environ) == before
        told = capsys.readouterr().err
        assert (
            told
            == f"icl: .env sets {name}, which `icl` ignores in this file; to set a variable anyway, export it in the shell.\n"
        )
    (clean / ".env").write_text("".join(f"{name}=value-of-{name}\n" for name in TAKEN))
    load_env_file()
    assert dict(os.environ) == before | {name: f"value-of-{name}" for name in TAKEN}
    assert capsys.readouterr().err == ""


def test_many_names_that_are_left_out_are_one_line(clean, capsys):
    (clean / ".env").write_text("".join(f"{name}=1\n" for name in LEFT_OUT) + "'odd\x1bname'=1\nLOCAL_ROOT=here\n")
    load_env_file()
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "\x1b" not in told
    assert "and " in told
    assert os.environ["LOCAL_ROOT"] == "here"


def test_what_the_environment_has_stays_and_values_refer_only_to_the_same_file(clean, monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")
    (clean / ".env").write_text("BASE=/data\nDEVICE=cuda\nLOCAL_ROOT=${BASE}/${DEVICE}/${NOWHERE:-runs}\n")
    load_env_file()
    assert os.environ["DEVICE"] == "cpu"
    assert os.environ["LOCAL_ROOT"] == "/data/cuda/runs"
    assert "BASE" not in os.environ


# Secrets of the user


@pytest.mark.parametrize(
    "line",
    [
        "HF_ENDPOINT=https://evil/${AWS_SECRET_ACCESS_KEY}",
        "WANDB_NOTES=${HF_TOKEN}",
        "LOCAL_ROOT=/tmp/${AWS_SECRET_ACCESS_KEY}",
        "OTHER=${HF_TOKEN}\nWANDB_NOTES=a${OTHER}\nLOCAL_ROOT=${OTHER:-b}",
        "WANDB_NOTES=${HF_TOKEN:-none}",
        "HF_TOKEN=mine\nWANDB_NOTES=${HF_TOKEN}",
    ],
)
def test_no_value_gets_a_secret_of_the_environment(clean, monkeypatch, line, capsys):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
    monkeypatch.setenv("HF_TOKEN", "the-secret")
    (clean / ".env").write_text(f"{line}\n")
    with contextlib.suppress(ConfigError):
        load_env_file()
    secret = [name for name, value in os.environ.items() if "the-secret" in value]
    assert sorted(secret) == ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN"]
    assert "the-secret" not in capsys.readouterr().err


def test_a_value_that_would_need_the_environment_is_one_sentence(clean, monkeypatch, capsys):
    monkeypatch.setenv("SCRATCH", "/scratch")
    (clean / ".env").write_text("LOCAL_ROOT=${SCRATCH}/runs\n")
    assert main(["runs"]) == 2
    told = capsys.readouterr().err
    assert "sets LOCAL_ROOT to a value with ${SCRATCH}, but no line above sets SCRATCH; " in told
    assert "export LOCAL_ROOT in the shell" in told


KEYS = {
    "WANDB_BASE_URL": ("WANDB_API_KEY",),
    "HF_ENDPOINT": ("HF_TOKEN",),
    "AWS_ENDPOINT_URL": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    "AWS_ENDPOINT_URL_S3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
}


@pytest.mark.parametrize("endpoint", KEYS)
@pytest.mark.parametrize("keys_in_file", ["none", "equal", "different"])
def test_an_exported_key_is_used_only_at_addresses_that_are_exported_too(
    clean, monkeypatch, capsys, endpoint, keys_in_file
):
    for key in KEYS[endpoint]:
        monkeypatch.setenv(key, "exported")
    value = {"none": None, "equal": "exported", "different": "other"}[keys_in_file]
    lines = [f"{key}={value}" for key in KEYS[endpoint] if value]
    (clean / ".env").write_text("\n".join([f"{endpoint}=https://host", *lines]))
    load_env_file()
    told = capsys.readouterr().err
    if keys_in_file == "equal":
        assert (os.environ[endpoint], told) == ("https://host", "")
        return
    assert endpoint not in os.environ
    assert told == (
        f"icl: .env sets {endpoint}. `icl` ignores this address, because it would use a key there that is not from this file; "
        f"if you trust the address, export {endpoint} in the shell.\n"
    )


def test_a_login_of_the_hub_is_not_sent_to_an_address_of_the_file(clean, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(clean))
    for token in ("", "HF_TOKEN=' '\n", "HUGGING_FACE_HUB_TOKEN=a\n", "HF_TOKEN=mine\n"):
        for name in ("HF_ENDPOINT", "HF_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        (clean / "token").write_text("of the login")
        (clean / ".env").write_text(f"{token}HF_ENDPOINT=https://host\n")
        load_env_file()
        assert ("HF_ENDPOINT" in os.environ) == ("mine" in token), token
    (clean / "token").unlink()
    for name in ("HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    (clean / ".env").write_text("HF_ENDPOINT=https://mirror\n")  # a mirror, used without a token
    load_env_file()
    assert os.environ["HF_ENDPOINT"] == "https://mirror"


@pytest.mark.parametrize(
    "content",
    [
        b"LOCAL_ROOT=\xff\xfe",
        "LOCAL_ROOT=runs\n".encode("utf-16"),
        "LOCAL_ROOT=l\u00e4ufe".encode("latin-1"),
        b"DEVICE=a\0b",
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(clean, capsys, content):
    (clean / ".env").write_bytes(content)
    assert main(["runs"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"icl: {clean / '.env'} ")
    assert told.count("\n") == 1


def test_a_mark_at_the_beginning_does_no_harm(clean):
    (clean / ".env").write_text("LOCAL_ROOT=here\n", encoding="utf-8-sig")
    load_env_file()
    assert os.environ["LOCAL_ROOT"] == "here"


# Home folders


def test_a_tilde_is_the_home_folder_wherever_no_shell_replaces_it(clean, monkeypatch, capsys):
    home, work = clean / "home", clean / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    (work / ".env").write_text("LOCAL_ROOT=~/runs\n")
    (home / "run.yaml").write_text("checkpoints: {store: ~/copies}\n")
    words = as_arguments(SHORT)
    place = words.index("--checkpoints.store")
    assert main(["train", "--config=~/run.yaml", *words[:place], *words[place + 2 :]]) == 0
    assert main(["checkpoints", "tiny", "push", "--store", "file://~/more"]) == 0
    assert main(["checkpoints", "tiny", "push", "--store=~/again"]) == 0
    for place in ("runs", "copies", "more", "again"):
        assert (home / place / "tiny" / "status.json").is_file(), place
    assert [path.name for path in work.iterdir() if path.name.startswith(("~", "file:"))] == []


@pytest.mark.parametrize("value", ["~/runs", "~nobody-of-this-name/runs"])
def test_a_home_folder_that_nobody_knows_is_one_sentence(clean, monkeypatch, capsys, value):
    def unknown(_: object) -> None:
        raise KeyError("no such user")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)
    for words in (["runs"], ["train", *as_arguments(SHORT)]):
        monkeypatch.setenv("LOCAL_ROOT", value)
        assert main(words) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"icl: The home folder in '{value}' is not known")
        assert told.count("\n") == 1


@pytest.mark.parametrize("mode", ["offline", None])
def test_a_user_id_that_nobody_knows_trains_all_the_same(clean, monkeypatch, capsys, mode):
    def unknown(_: object) -> None:
        raise KeyError("no such user")

    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    assert main(["train", *as_arguments(SHORT)]) == 0
    assert (clean / "runs" / "tiny" / "last.ckpt").is_file()
    assert ("W&B is not used" in capsys.readouterr().err) == bool(mode)


def test_the_bucket_of_env_is_the_store(folder, s3, capsys):
    (folder / ".env").write_text(f"AWS_BUCKET_NAME={s3.bucket}\n")
    assert main(["train", *as_arguments(SHORT)]) == 0
    assert "tiny/status.json" in s3.names()


def test_the_home_folder_may_be_written_as_a_variable(clean, monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_ROOT", raising=False)
    monkeypatch.setenv("HOME", str(clean / "home"))
    (clean / ".env").write_text("LOCAL_ROOT=$HOME/kept\n")
    assert main(["runs"]) == 0
    assert f"There are no runs in {clean / 'home' / 'kept'}" in capsys.readouterr().out


def test_a_file_of_gigabytes_is_not_read(clean, capsys):
    with (clean / ".env").open("wb") as file:
        file.truncate(2**33)
    assert main(["runs"]) == 2
    assert "at most 1,048,576 are read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("A0=aa\n" + "".join(f"A{i}=${{A{i - 1}}}${{A{i - 1}}}\n" for i in range(1, 21)), "characters together"),
        ("A=" + "x" * 2**19 + "".join(f"\nB{i}=x${{A}}" for i in range(9)), "characters together"),
        ("A=" + "${" * 20_000, r"more than 100 `\${` in a value"),
        ("A=x" + " " * 20_000 + "y", "200 spaces in a row"),
    ],
)
def test_a_small_file_needs_little_time_and_memory(clean, content, message):
    (clean / ".env").write_text(content)
    tracemalloc.start()
    with pytest.raises(ConfigError, match=message):
        load_env_file()
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


def test_many_variables_need_little_time(clean, capsys):
    (clean / ".env").write_text("".join(f"a{i}=\n" for i in range(20_000)))
    start = time.process_time()
    load_env_file()
    assert time.process_time() - start < 3  # with a new dict for each variable, about a minute
    assert "and 19992 more" in capsys.readouterr().err


def test_a_file_without_permission_is_one_sentence(clean, monkeypatch, capsys):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    (clean / ".env").write_text("DEVICE=cpu\n")
    monkeypatch.setattr(env_file, "read_bytes", refuse)
    assert main(["runs"]) == 2
    assert (
        capsys.readouterr().err
        == f"icl: {clean / '.env'} cannot be read: Permission denied; check its permissions, or remove it.\n"
    )


@pytest.mark.parametrize("endpoint", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_keys_that_boto3_finds_elsewhere_are_not_used_at_an_address_of_the_file(clean, endpoint):
    """boto3 also takes keys from ~/.aws/credentials, from a profile, and from the machine's role."""
    for keys in ("", "AWS_ACCESS_KEY_ID=a\n", "AWS_SECRET_ACCESS_KEY=b\n"):
        (clean / ".env").write_text(f"{keys}{endpoint}=https://host\nAWS_BUCKET_NAME=bucket\n")
        load_env_file()
        assert endpoint not in os.environ
    (clean / ".env").write_text(f"AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=b\n{endpoint}=https://host\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        os.environ.pop(name, None)
    load_env_file()
    assert os.environ[endpoint] == "https://host"

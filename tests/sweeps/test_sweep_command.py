"""The macros of W&B in a sweep's command are filled in as W&B's own client does."""

import os
import sys
from pathlib import Path

import pytest

from icl.config.validation import ConfigError
from icl.runs.environment import OWN_PROGRAM
from icl.sweeps.command import (
    child_environment,
    fill_macros,
    own_command,
    refuse_missing_program,
    refuse_unused_macros,
    with_own_icl,
)

SETTINGS = {"optim.lr": 1e-05, "flag": True, "off": False, "none": None, "model": {"act": "relu", "hidden": 8}}


def fill(*words, settings=SETTINGS):
    return fill_macros(words, settings, program="train.py", json_file="/tmp/point.json")


def test_the_default_command():
    assert fill("${env}", "${interpreter}", "${program}") == ["/usr/bin/env", sys.executable, "train.py"]


@pytest.mark.parametrize(
    "macro",
    [
        "args",
        "args_no_hyphens",
        "args_no_boolean_flags",
        "args_no_equals",
        "args_json",
        "args_append_hydra",
        "args_override_hydra",
    ],
)
def test_arguments_are_spelt_as_by_the_wandb_client(macro):
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    announced = {"args": {key: {"value": value} for key, value in sorted(SETTINGS.items())}}
    assert fill(f"${{{macro}}}") == utils.create_sweep_command_args(announced)[macro]


def test_a_nested_group_is_one_word():
    assert "--model={'act': 'relu', 'hidden': 8}" in fill("${args}")


def test_the_json_file_and_plain_words():
    assert fill("icl", "--config", "${args_json_file}") == ["icl", "--config", "/tmp/point.json"]
    assert fill("echo", "$HOME", "${args}x") == ["echo", "$HOME", "${args}x"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--config=${args_json_file}", "Write `--config` and `${args_json_file}` as two words"),
        ("--x=${args}", "Write `${args}` as a separate word"),
        ("icl train ${args_no_hyphens}", "contains `${args_no_hyphens}`"),
        ("${env}/${program}", "contains `${env}`"),
        ("${env}${args}", "contains `${env}`"),
        ("${program}:main", "contains `${program}`"),
        ("${interpreter}3", "contains `${interpreter}`"),
        ("${envvar:ICL_TEST_GPU}${args}", "contains `${args}`"),
        ("{'a': '${args_json}'}", "contains `${args_json}`"),
        ("--gpu=${envvar:gpu}", "capital letters"),
        ("${envvar:gpu}", "capital letters"),
        ("${HOME}", "A variable is written `${envvar:NAME}`"),
        ("${HOME}/${USER}", "no macro"),
        ("${arg}", "Did you mean `${args}`?"),
        ("${args_dict}", "no macro `${args_dict}`"),
        ("${}", "no macro"),
    ],
)
def test_a_macro_that_wandb_would_drop_or_pass_on_is_refused(word, said):
    with pytest.raises(ConfigError) as error:
        refuse_unused_macros(["${env}", "icl", word])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_words_that_are_no_macros_of_wandb_pass():
    macros = ["env", "interpreter", "program", "args", "args_no_equals", "args_no_hyphens", "args_no_boolean_flags"]
    macros += ["args_append_hydra", "args_override_hydra", "args_json", "args_json_file"]
    refuse_unused_macros([f"${{{name}}}" for name in macros])
    refuse_unused_macros(
        ["${envvar:A}", "${envvar:A}${envvar:B}", "--x=${envvar:NAME}", "a ${HOME} b", "$HOME", "${", "}"]
    )


def test_variables_are_filled_in_as_by_the_wandb_client(monkeypatch):
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    monkeypatch.setenv("ICL_TEST_GPU", "3")
    words = ["--x=${envvar:ICL_TEST_GPU}", "${envvar:ICL_TEST_GPU}/${envvar:ICL_TEST_ABSENT}", "${envvar:ICL_TEST_GPU}"]
    assert fill(*words) == utils.create_sweep_command(list(words))


@pytest.mark.parametrize(
    "command",
    [
        ["${env}", "icl", "train"],
        ["icl", "llc"],
        ["${env}", "A=b", "no-such-program"],  # what `env` itself makes of its words is not for us to say
        ["${env}", "-u", "A", "no-such-program"],
        ["${interpreter}", "-m", "icl", "train", "${args}"],
        ["${interpreter}", "-c", "print(1)"],
        ["${interpreter}", "-u", "-W", "ignore", "${program}", "${args}"],
        ["${env}", "${interpreter}", "${program}", "${args}"],
        ["sh", "-c", "true"],
    ],
)
def test_what_can_be_started_passes(command):
    refuse_missing_program(command, str(Path(__file__)), {})


def test_environment_variables(monkeypatch):
    monkeypatch.setenv("ICL_TEST_GPU", "3")
    assert fill("a=${envvar:ICL_TEST_GPU}", "${envvar:ICL_TEST_ABSENT}") == ["a=3", "ICL_TEST_ABSENT"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/usr/bin/env", "icl", "train", "--preset", "L2H4"], ["--preset", "L2H4"]),
        (["/opt/bin/icl", "train"], []),
        (["python", "-m", "icl", "train", "x"], ["x"]),
        (["/usr/bin/env", "icl", "evaluate"], None),
        (["train"], None),
    ],
)
def test_our_own_training_is_recognised(words, expected):
    assert own_command(words) == (None if expected is None else ("train", expected))


def test_icl_is_the_one_of_this_environment():
    own = [*OWN_PROGRAM, "train"]
    assert with_own_icl(["icl", "train"]) == own
    assert with_own_icl(["/usr/bin/env", "icl", "train"]) == ["/usr/bin/env", *own]
    assert with_own_icl(["/usr/bin/env", sys.executable, "-m", "icl", "train"]) == ["/usr/bin/env", *own]
    for python in ("python", "python3", sys.executable):  # as people write it, the working folder would be searched
        assert with_own_icl(["/usr/bin/env", python, "-m", "icl", "train"]) == ["/usr/bin/env", *own]
        assert with_own_icl([python, "-u", "-m", "icl", "train"]) == [own[0], "-u", *own[1:]]
    for other in (["/usr/bin/python-of-another", "-m", "icl"], ["python", "-m", "icl.other"], ["python", "icl"]):
        assert with_own_icl(other) == other
    assert with_own_icl(["echo", "icl"]) == ["echo", "icl"]
    assert with_own_icl([]) == []


def test_a_program_gets_its_point_and_its_share_of_the_cores_but_no_wandb_sweep(tmp_path, monkeypatch):
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environment = child_environment(tmp_path / "point.json", tmp_path, num_workers=10_000)
    assert environment["ICL_SWEEP_POINT"] == str(tmp_path / "point.json")
    assert environment["LOCAL_ROOT"] == str(tmp_path)
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["WANDB_MODE"] == "offline"
    assert Path(environment["PATH"].split(os.pathsep)[0]) == Path(sys.executable).parent
    assert not {"WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"} & set(environment)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert child_environment(tmp_path, tmp_path, num_workers=1)["OMP_NUM_THREADS"] == "7"

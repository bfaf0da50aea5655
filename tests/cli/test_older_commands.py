"""For each command line of the two older code bases, the error gives the modern spelling listed in `docs/older-commands.md`."""

import re
from pathlib import Path

import pytest

from icl.cli import COMMANDS, main
from icl.cli.diversity import _parser
from icl.command_line import train_parser
from icl.config.older import OLDER_COMMANDS, OLDER_SETTINGS
from icl.config.validation import ConfigError
from icl.config.values import known_keys
from icl.resolve import resolve

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "older-commands.md").read_text(encoding="utf-8")
ROWS = [
    (re.sub(r"\\\|", "|", row[0]), row[1])
    for line in PAGE.splitlines()
    if line.startswith("| `")
    for row in [re.split(r"(?<!\\) \| ", line.strip("|"))]
]
SCRIPTS = [
    (word, here)
    for there, here in ROWS
    for word in re.findall(r"[\w/-]+\.(?:py|sh|ipynb)\b|icl\.regression\.train", there)
]


def expand(text: str) -> list[str]:
    """Return `a.b` and `a.c` for `a.{b,c}`."""
    found = re.fullmatch(r"([^{]*)\{(.*)\}", text)
    return [found[1] + part for part in found[2].split(",")] if found else [text]


def settings_rows() -> list[tuple[str, str]]:
    """Return each older setting with the table cell that gives its modern spelling."""
    pairs = []
    for there, here in ROWS:
        keys = [key for span in re.findall(r"`([^`]*)`", there) for key in expand(span.partition(":")[0])]
        if all(re.fullmatch(r"(--)?[\w.]+", key) for key in keys) and re.search(r"`[a-z_]+(\.[a-z_{*]|`)", here):
            pairs += [(key.removeprefix("--"), here) for key in keys if key != "null"]
    return pairs


def told(words: list[str], capsys) -> str:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(("word", "here"), SCRIPTS, ids=[word for word, _ in SCRIPTS])
def test_every_script_of_the_page_has_its_modern_command(word, here, capsys):
    for words in ([word], ["python", word], ["python", "-m", word.removesuffix(".py")], [f"./{word}", "--x", "1"]):
        command = re.search(r"its new name is `((?:icl|wandb) [\w-]+)", told(words, capsys))
        assert command is not None
        assert command[1] in here or ("[" in here and "icl, train" in here) or "from icl import" in here


@pytest.mark.parametrize(("name", "command"), OLDER_COMMANDS.items())
def test_every_modern_command_exists(name, command):
    program, verb, *_ = command.split()
    assert (program, verb) == ("wandb", "agent") or verb in COMMANDS
    assert name == name.lower().replace("-", "_")


PAIRS = settings_rows()


def test_the_page_has_the_settings():
    assert len(PAIRS) >= 45
    assert {"M", "learning_rate", "task_config.mlp_size", "noise_scale", "num_steps"} <= {key for key, _ in PAIRS}


@pytest.mark.parametrize(("key", "here"), sorted(set(PAIRS)))
def test_every_setting_of_the_page_has_its_modern_name(key, here):
    with pytest.raises(ConfigError) as error:
        train_parser().parse_args([f"--{key}=1"])
    modern = re.findall(r"`([^`]*)`", str(error.value))[1]
    assert modern in known_keys()
    section, _, leaf = modern.rpartition(".")
    assert modern in here or f"{section}.*" in here or re.search(rf"`{section}\.{{[^`]*\b{leaf}\b", here)
    with pytest.raises(ConfigError, match=modern):
        resolve({key: 1})


def test_every_older_setting_is_a_setting_here_and_on_the_page():
    on_page = {key.rpartition(".")[2].lower() for key, _ in PAIRS}
    for name, modern in OLDER_SETTINGS.items():
        assert modern in known_keys() or name == "max_m"
        assert name in on_page | {"max_m", "epsilon", "gamma", "scheduler_type", "elasticity", "restoring_force"}, name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run_m_diversity_experiment.py", "--max_power", "20"], "`icl diversity`"),
        (["regression_analysis"], "`icl analyse --what diversity --input_file FILE`"),
        (["evaluate_models"], "`icl evaluate RUN`"),
        (["nohup", "python3", "Compute-Gradients.py"], "`icl analyse RUN --what gradients`"),
        (["wandb", "agent", "x"], "`wandb agent ID`"),
        (
            ["--learning_rate", "1e-3"],
            "`--learning_rate` must follow a command, such as `icl train`. Its new name is `optim.lr`.",
        ),
        (["--M=64"], "Its new name is `task.num_tasks`."),
        (["-x"], "`-x` must follow a command"),
        (["train", "--learning_rate", "1e-3"], "no setting `learning_rate`. Its new name is `optim.lr`."),
        (["train", "--learning-rate=1e-3"], "Its new name is `optim.lr`."),
        (["train", "--M", "64"], "Its new name is `task.num_tasks`."),
        (["train", "--num_steps", "5"], "Its new name is `trainer.max_steps`."),
        (["train", "--batch_size", "5"], "Its new name is `trainer.batch_size`."),
        (["train", "--max_M", "5"], "leave it out"),
        (["train", "--trainer.device", "cpu"], "Did you mean `trainer.devices`?"),
        (["llc", "RUN", "--num_burn_in", "5"], "Its new name is `sampler.num_burnin_steps`."),
        (["diversity", "--n_layers", "5"], "Its new name is `model.num_layers`."),
        (["evaluate", "RUN", "--sigma2", "5"], "Its new name is `task.noise_variance`."),
    ],
)
def test_examples(words, said, capsys):
    assert said in told(words, capsys)


def test_the_experiments_command_takes_its_older_options():
    (line,) = re.findall(r"icl diversity (--max_power [^`]*)\.\.\.`", PAGE)
    assert set(re.findall(r"--(\w+)", line)) <= set(vars(_parser().parse_args([])))


def test_pip_can_install_from_the_requirements_file():
    assert (ROOT / "requirements.txt").read_text() == "-e .\n"

"""The commands in the README and in docs/ work, and their claims agree with the code."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from icl.build import build_architecture
from icl.cli import main
from icl.command_line import train_parser
from icl.config.tree import PRESETS_OF_WORLDS
from icl.presets import PRESETS
from icl.resolve import resolve

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("commands", "sweeps", "llc", "stores", "devices")
]
"""Pages whose commands can be typed one after the other; the tutorial has a test of its own."""


def shell_lines() -> list[str]:
    blocks = [block for page in (README, *PAGES) for block in re.findall(r"```sh\n(.*?)```", page, re.S)]
    return [line.partition("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def icl_commands() -> list[list[str]]:
    return [shlex.split(line)[1:] for line in shell_lines() if line.startswith("icl ")]


def test_the_first_screen_has_the_two_commands():
    screen = README.splitlines()[:60]
    text = "\n".join(screen)
    assert "pip install -e . && .venv/bin/icl train" in text
    assert "pip install -e '.[dev]' && .venv/bin/pytest" in "\n".join(README.splitlines()[:75])


@pytest.mark.parametrize("words", [words for words in icl_commands() if words[0] == "train"], ids=" ".join)
def test_every_train_command_is_a_valid_configuration(words):
    resolve(train_parser().parse_args(words[1:]).settings)


@pytest.mark.slow
def test_the_commands_run_one_after_the_other_on_a_tiny_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_ROOT", "runs")
    example = re.search(r"prompt\.json\s+# (\{.*\})", README)
    assert example is not None
    (tmp_path / "prompt.json").write_text(example[1])
    tiny = ["--trainer.max_steps", "10", "--model.embed_size", "8", "--evaluation.num_prompts", "8"]
    assert main(["train", "--run_name", "quickstart", *tiny]) == 0
    assert main(["train", "--run_name", "transience", "--population.seeds", "0,1", *tiny]) == 0
    diversity = ["diversity", "--preset", "quickstart", "--max_power", "4", "--num_steps", "2", *tiny[2:]]
    assert main([*diversity, "--evaluation.every", "1"]) == 0
    for words in icl_commands():
        if words[-1] == "all" or any(
            "hf://" in word for word in words
        ):  # tested in test_analysis_run.py and test_hub.py
            continue
        if words[0] == "sweep":
            words = ["sweep", str(ROOT / words[1]), *words[2:], "--dry-run"]
        if words[0] == "evaluate":
            for name in ("--n_prompts", "--n_ood_samples"):
                if name in words:  # of the older command
                    words = [*words[: words.index(name)], *words[words.index(name) + 2 :]]
            words = [*words, "--num_prompts", "8", "--num_ood_prompts", "8"]
        if words[0] == "llc" and words[1] != "--self-test":  # which has a test of its own
            short = ("--sampler.num_draws", "4", "--sampler.num_burnin_steps", "1", "--sampler.num_init_batches", "4")
            assert main([*words, *short]) in (0, 1)  # of ten steps' training something usable may come, or nothing
            assert (tmp_path / words[1] / "results" / "llc.csv").exists()
        elif words[0] not in ("train", "diversity", "llc"):
            assert main(words) == 0, words


def test_parameter_counts_are_the_models():
    rows = re.findall(r"^\| (`[^|]*`) \|[^|]*\| ([\d,; ]+) \|$", README, re.M)
    counts = {
        name: count for names, counts in rows for name, count in zip(names.split(", "), counts.split("; "), strict=True)
    }
    named = {
        name: preset for name, preset in PRESETS.items() if name not in PRESETS_OF_WORLDS
    }  # docs/priors.md lists the others
    assert set(counts) == {f"`{name}`" for name in named}
    for name, preset in named.items():
        num = sum(parameter.numel() for parameter in build_architecture(preset).parameters())
        assert counts[f"`{name}`"] == f"{num:,}"


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_every_file_that_the_readme_names_exists():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target
    for name in ("CONTRIBUTING.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", ".ci/run"):
        assert (ROOT / name).is_file(), name


@pytest.mark.slow
def test_the_python_block_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(*shape, generator=generator) for shape in ((5, 4), (5,), (3, 4))]
    names = dict(zip(("x_context", "y_context", "x_query"), draws, strict=True))
    exec(compile(block, "README", "exec"), names)
    assert names["y_pred"].shape == (3,)

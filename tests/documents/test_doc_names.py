"""Every name in backticks in README, CONTRIBUTING, docs and notebooks exists: commands, options, paths, Python names and columns."""

import ast
import contextlib
import dataclasses
import fnmatch
import importlib
import io
import json
import keyword
import re
from functools import cache
from pathlib import Path

import pytest

from icl.analysis import ANALYSES
from icl.cli import COMMANDS, main
from icl.config import RunConfig
from icl.config.values import known_keys
from icl.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
MARKDOWN = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "data" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PAGES = [*MARKDOWN, *sorted((ROOT / "notebooks").glob("*.ipynb"))]
SUFFIXES = "py|md|yaml|yml|csv|json|png|pdf|toml|ipynb|sh|log|ckpt|safetensors|html|txt|cpp"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PATH = re.compile(
    rf"(?<![\w./-])(?:[\w.*/-]+\.(?:{SUFFIXES})\b(?![\w(])|(?:icl|docs|tests|tools|data|notebooks|sweeps|benchmarks)/[\w./*-]*)"
)
OLDER = ROOT / "docs" / "older-commands.md"

VARIABLE = re.compile(r"(ATEN|AWS|GOMP|HF|OMP|SBATCH|SLURM|TORCH|TORCHINDUCTOR|WANDB|XDG)_")
"""Environment variables of other programs, by how they begin."""
ELSEWHERE = {
    *("srun", "Infinity", "ic_regression.py", "LD_PRELOAD", "PYTHONPATH"),  # other programs'
    *("random.py", "pandas.py"),  # what a stranger may have put into a folder
    *("--array", "--exclude", "--job-name", "--no-requeue", "--open-mode", "--output", "--signal"),  # options of sbatch
    *("scancel", "scontrol", "JobRequeue"),
    "utils.py",  # which we do not have
    "my.yaml",  # a user's own
    "members.params",  # of a variable that has the name of a module
    "b1h2",  # a head, by its numbers
    "data/benchmarks/cuda.json",  # made where there is a GPU
}
"""Every name in backticks that is no name of ours."""


def text_of(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    if page == OLDER:  # its first column is what things were called elsewhere
        text = re.sub(r"^\|.*?(?<!\\)\|", "|", text, flags=re.MULTILINE)
    return text


def spans_of(page: Path) -> list[str]:
    """Return the texts in backticks outside of code blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text_of(page)))


def commands_of(page: Path) -> list[str]:
    """Return the command lines of `icl`, in backticks or in blocks of shell commands."""
    blocks = "\n".join(text for language, text in FENCE.findall(text_of(page)) if language in ("sh", ""))
    lines = re.sub(r"\\\n\s*", " ", blocks).splitlines()
    found = [span for span in spans_of(page) if span.startswith("icl ")]
    return found + [line.partition("#")[0].strip() for line in lines if line.lstrip().startswith("icl ")]


@cache
def vocabulary() -> frozenset[str]:
    """Return every name and every one-word text in our source: functions, arguments, attributes, columns and file names."""
    words = set(COMMANDS) | set(ANALYSES) | set(PRESETS)
    for key in known_keys():
        words |= {key, *key.split(".")}
    paths = [path for folder in ("icl", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    for path in paths:
        words |= set(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = (getattr(node, field, None) for field in ("name", "id", "attr", "arg", "value"))
            words |= {name for name in named if isinstance(name, str) and not re.search(r"\s", name)}
    for path in (ROOT / "tests").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        words |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    words |= {path.stem for folder in ("sweeps", "notebooks") for path in (ROOT / folder).rglob("*.*")}
    return frozenset(words | set(keyword.kwlist))


@cache
def files() -> frozenset[str]:
    """Return the names of files that are in the repository, or that `icl` writes."""
    folders = ("icl", "data", "docs", "tests", "tools", "sweeps", "notebooks", "figures", "benchmarks")
    ours = {path.name for folder in folders for path in (ROOT / folder).rglob("*.*")}
    made = {f"{analysis}.{suffix}" for analysis in ANALYSES for suffix in ("csv", "png")} | {
        "llc.png",
        "step-1.safetensors",
    }
    return frozenset(ours | made | vocabulary())


@cache
def functions() -> dict[str, list[set[str]]]:
    """Return the arguments of every function and class of `icl`, by name."""
    found: dict[str, list[set[str]]] = {}
    for path in (ROOT / "icl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                found.setdefault(node.name, []).append({argument.arg for argument in arguments})
    return found


@cache
def options(command: str, what: str = "") -> frozenset[str]:
    """Return the options that a command's help lists."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([command, *(["--what", what] if what else []), "--help"])
    found = set(re.findall(r"--[\w.-]*\w", said.getvalue()))
    if command in ("train", "diversity", "llc"):
        found |= {f"--{key}" for key in known_keys()} | {f"--{key.partition('.')[0]}" for key in known_keys()}
    return frozenset(found | {"--help"})


@cache
def all_options() -> frozenset[str]:
    return frozenset().union(
        *(options(command) for command in COMMANDS), *(options("analyse", name) for name in ANALYSES)
    )


def resolves(dotted: str) -> bool:
    """Return whether a dotted Python name can be imported."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for name in parts[end:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


def is_key(word: str) -> bool:
    """Return whether a dotted word is a setting, a section such as `section.*`, or a column such as `train/loss`."""
    sections = {key.partition(".")[0] for key in known_keys()}
    return word in known_keys() or word.removesuffix(".*").removesuffix(".key") in sections


def exists(path: str, page: Path) -> bool:
    """Return whether a path is in the repository, or ends with the name of a file that `icl` writes. NAME stands for any word."""
    if any(folder.joinpath(path).exists() for folder in (ROOT, page.parent, ROOT / "icl")):
        return True
    folder, _, name = re.sub(r"NAME|\d{3,}", "*", path).rpartition("/")
    is_ours = (ROOT / folder.partition("/")[0]).is_dir() and folder.partition("/")[0] not in ("", "figures", "runs")
    if is_ours and not any(ROOT.glob(f"{folder}/{name}" if name else folder)):
        return False
    return not name or bool(fnmatch.filter(files(), name))


def unknown(span: str, page: Path) -> list[str]:
    """Return the parts of a text in backticks that are not names of anything."""
    if span in ELSEWHERE:
        return []
    wrong: list[str] = []
    rest = span
    for path in re.findall(PATH, rest):
        is_users = span.startswith("icl ") and not path.startswith("sweeps/")
        wrong += [] if is_users or exists(path, page) else [path]
        rest = rest.replace(path, " ")
    for option in re.findall(r"(?<![\w-])--[\w.-]*\w", rest):
        if span.startswith(("--", "icl ")):
            wrong += [] if option in all_options() else [option]
        rest = rest.replace(option, " ")
    for name, arguments in re.findall(r"([A-Za-z_][\w.]*)\(([^()]*)\)", rest):
        wrong += call_problems(name, arguments)
        rest = rest.replace(f"{name}({arguments})", " ")
    for dotted in re.findall(r"(?<![\w./:$@-])[A-Za-z_]\w*(?:\.[A-Za-z_*]\w*)+", rest):
        wrong += [] if is_key(dotted) or is_attribute(dotted) or any(map(resolves, spelt_out(dotted))) else [dotted]
        rest = rest.replace(dotted, " ")
    words = re.findall(r"(?<![\w./:$@{-])[A-Za-z]\w*_\w*|(?<!\w)_[a-z]\w*", rest)
    if re.fullmatch(r"[A-Za-z][\w-]*", span):
        words = [span]
    return wrong + [word for word in words if word not in vocabulary() and not VARIABLE.match(word)]


def spelt_out(dotted: str) -> list[str]:
    """Return the full names for which a dotted name may be short."""
    return [
        f"{prefix}{dotted}" for prefix in ("", "icl.", "icl.analysis.", "icl.plotting.", "torch.", "torch.utils.data.")
    ]


def is_attribute(dotted: str) -> bool:
    """Return whether our source has a variable and an attribute of these names. A name in a module must be importable instead."""
    first, *others = dotted.split(".")
    modules = {path.stem for path in (ROOT / "icl").rglob("*.py")} | {
        field.name for field in dataclasses.fields(RunConfig)
    }
    return first not in modules | {"icl"} and {first, *others} <= vocabulary()


def call_problems(name: str, arguments: str) -> list[str]:
    leaf = name.rpartition(".")[2]
    known = functions().get(leaf)
    if known is None:
        return [] if leaf in vocabulary() or any(map(resolves, spelt_out(name))) else [f"{name}()"]
    keywords = set(re.findall(r"(\w+)=", arguments))
    return [] if any(keywords <= names for names in known) else [f"{name}({arguments})"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_in_backticks_exists(page):
    wrong = {span: set(unknown(span, page)) - ELSEWHERE for span in spans_of(page)}
    assert {span: names for span, names in wrong.items() if names} == {}


@pytest.mark.parametrize(
    "span",
    [
        *(
            "gap_to_ridge",
            "populations(files)",
            "sample_prompts(wrong=3)",
            "icl.model.transformer.Missing",
            "measure.missing",
        ),
        *(
            "task.num_taks",
            "docs/absent.md",
            "icl/absent.py",
            "tests/absent.py",
            "results/absent.csv",
            "data/*.absent.csv",
        ),
        *("--absent_option", "_missing_function", "torch.func.absent", "sweeps/absent.yaml", "absent.yaml"),
    ],
)
def test_a_name_of_nothing_would_be_found(span):
    assert unknown(span, ROOT / "README.md")


@pytest.mark.parametrize(
    "span",
    [
        *(
            "delta_ridge",
            "sample_prompts(config, stream=...)",
            "icl.model.transformer.Transformer",
            "Cache.stored_array",
        ),
        *(
            "task.num_tasks",
            "task.*",
            "docs/tutorial.md",
            "results/llc.csv",
            "status.json",
            "--preset",
            "figures/training.png",
        ),
        *("checkpoints/step-000001465.safetensors", "results/NAME*.csv", "sweeps/training-runs/quickstart.yaml"),
    ],
)
def test_a_name_that_exists_is_accepted(span):
    assert unknown(span, ROOT / "README.md") == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_has_the_options_that_a_page_gives_it(page):
    for line in commands_of(page):
        command = line.split()[1] if len(line.split()) > 1 else ""
        if not re.fullmatch(r"[a-z]+", command):
            continue
        assert command in COMMANDS, line
        what = re.search(r"--what ([a-z-]+)", line)
        named = what is not None and what[1] != "all"
        known = options(command, what[1] if named else "")
        given = set(re.findall(r"(?<![\w-])--[\w.-]*\w", line.partition("; `")[0]))
        assert {option for option in given if option not in known} == set(), line

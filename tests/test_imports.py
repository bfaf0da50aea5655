"""Modules import only from layers below their own, and importing a module has no side effects.

The table of layers is that of DESIGN.md, lowest first. A name in it stands for a module, or for a whole package. If both occur, the
module's own entry counts. A module may import from all earlier lines, and from earlier names on its own line. The modules of
one package may import each other. `training`, `sampling` and `analysis` are on the same line and never import each other.
"""

import ast
import builtins
import os
import re
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "icl"

LAYERS = (
    ("config.validation", "config"),
    ("files",),
    ("config.values", "config.older", "presets", "run_names", "resolve", "command_line"),
    ("compute.devices", "compute.task_sums", "arrays", "rng", "signals", "progress"),
    ("tasks.laws", "tasks.pools", "tasks.priors", "tasks.prompts", "tasks.shifts", "tasks"),
    ("tasks.corpus", "tasks.rows", "tasks.streams"),
    ("baselines", "evidence", "bayes", "metrics"),
    ("compute",),
    ("model.heads", "model.transformer", "model.attention", "model.stacked", "model.flat", "model"),
    ("compute.linalg", "compute.step"),
    (
        "store.base",
        "store.waiting",
        "store.s3_errors",
        "store.s3_client",
        "store.s3_requests",
        "store.s3",
        "store.hub_errors",
        "store.hub_repository",
        "store.hub",
        "store.opening",
        "store",
    ),
    (
        "runs.environment",
        "runs.status",
        "runs.tasks_file",
        "runs.folder",
        "runs.listing",
        "runs.checkpoints",
        "runs.measure",
        "runs.metrics_file",
        "runs.resume_file",
        "runs.contents",
        "runs.claims",
        "runs.copied_files",
        "runs.card",
        "runs.stored",
        "runs.transfer",
        "runs.mirror",
        "runs.verification",
        "runs.delivery",
        "runs",
    ),
    ("evaluation",),
    ("build",),
    ("importing",),
    ("training", "sampling", "analysis"),
    ("plotting", "report"),
    ("whole_runs", "api", "sweeps", "diversity"),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
SIBLINGS = ("training", "sampling", "analysis")


def module_name(path):
    """Return a module's name, such as `tasks.priors` for icl/tasks/priors.py, `tasks` for its package, or `__init__` for the root."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def test_every_folder_is_a_package_that_is_installed_and_that_git_keeps():
    """Once `.gitignore` hid icl/runs. Then the linters skipped this folder, and its `__init__.py` was never committed."""
    folders = {path.parent for path in MODULES.values()}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []
    listing = ["git", "-C", str(ROOT.parent), "ls-files", "--others", "--cached", "--exclude-standard", "icl"]
    if (ROOT.parent / ".git").exists():
        ignored = subprocess.run([*listing, "--ignored"], capture_output=True, text=True, check=True).stdout
        assert [name for name in ignored.split() if name.endswith((".py", ".cpp", ".html", ".css"))] == []


@cache
def tree_of(name):
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


@cache
def imports(name):
    """Return the dotted names that a module imports anywhere, even inside functions, as `package.module`."""
    found = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            (text,) = (part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant))
            found.add(f"{text}.")  # of an f-string its beginning, which names a package
    return found


def own_imports(name):
    """Return the modules of `icl` that a module imports. An imported name counts as its module."""
    targets = set()
    for dotted in imports(name):
        package, _, rest = dotted.partition(".")
        if package == "icl":
            while rest and rest not in MODULES:
                rest = rest.rpartition(".")[0]
            targets.add(rest or "__init__")
    return targets - {name}


def entry_of(name, table):
    """Return the most specific entry of a table for a module, or None."""
    fitting = [entry for entry in table if name == entry or name.startswith(f"{entry}.")]
    return max(fitting, key=len, default=None)


PLACES = {entry: (line, column) for line, entries in enumerate(LAYERS) for column, entry in enumerate(entries)}


def may_import(name, target):
    """Return whether the table lets one module of `icl` import another."""
    importer, imported = entry_of(name, PLACES), entry_of(target, PLACES)
    if importer == imported or name.startswith(f"{target}."):
        return True
    if {importer, imported} <= set(SIBLINGS):
        return False
    return PLACES[imported] < PLACES[importer]


def test_every_module_has_a_place_in_the_table():
    without = [name for name in MODULES if not entry_of(name, PLACES)]
    assert without == [], "Give these modules a line in LAYERS, and in DESIGN.md."


def test_the_table_of_contributing_is_this_one():
    """CONTRIBUTING.md lists the names of every line in the same order, packages with a slash."""
    text = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"## Where things go\n.*?```\n(.*?)```", text, re.DOTALL)
    told = [[word.strip("/") for word in re.split(r"   +", line)[0].split()] for line in table.splitlines()]
    names = [[name for name in line if "." not in name and not name.startswith("__")] for line in LAYERS]
    assert told == [line for line in names if line]


def test_modules_import_only_what_lies_below_them():
    forbidden = {(name, target) for name in MODULES for target in own_imports(name) if not may_import(name, target)}
    assert forbidden == set(), "These modules import from a line that is not below their own."


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_siblings_never_import_each_other(sibling):
    others = set(SIBLINGS) - {sibling}
    reached = {target for name in MODULES if entry_of(name, [sibling]) for target in own_imports(name)}
    assert not {target for target in reached if entry_of(target, others)}


@pytest.mark.parametrize(
    ("name", "target", "allowed"),
    [
        ("presets", "config", True),
        ("config", "presets", False),
        ("tasks.prompts", "tasks.priors", True),
        ("tasks.priors", "tasks.prompts", False),
        ("rng", "model.transformer", False),
        ("sampling.llc", "sampling.kernels", True),
        ("sampling.kernels", "sampling.llc", True),
        ("sampling.llc", "training.run", False),
        ("analysis.run", "sampling.llc", False),
        ("plotting.llc", "sampling.llc", True),
        ("sampling.llc", "plotting.llc", False),
        ("cli", "api", True),
        ("api", "cli", False),
        ("api", "__init__", False),
        ("__main__", "cli", True),
    ],
)
def test_the_table_means_what_it_says(name, target, allowed):
    assert may_import(name, target) is allowed


def test_imports_are_found_wherever_they_stand():
    assert {"jsonargparse", "re", "icl.config.RunConfig", "icl.resolve.refuse_unknown"} <= imports("command_line")
    assert {"config", "resolve"} <= own_imports("command_line")


def test_lightning_is_imported_in_training_only():
    lightning = {"lightning", "pytorch_lightning", "lightning_fabric"}
    importers = [name for name in MODULES if lightning & {dotted.partition(".")[0] for dotted in imports(name)}]
    assert importers
    assert [name for name in importers if not entry_of(name, ["training"])] == []


def test_annotations_stay_visible_to_the_shape_checks():
    assert [name for name in MODULES if "__future__.annotations" in imports(name)] == []


def unbound_names(tree):
    """Return names that code reads but its module never binds. Ruff's F821 finds these too, but mistakes jaxtyping's shapes for names."""
    bound = set(dir(builtins)) | {"__file__", "__name__", "__doc__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            bound.add(node.name)
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - bound


def test_every_name_is_bound():
    unbound = {name: unbound_names(tree_of(name)) for name in MODULES}
    assert {name: names for name, names in unbound.items() if names} == {}


def test_a_lost_import_is_found():
    kept, lost = "from a.b import c as d\nimport e.f\n", "def g(h: d):\n    return c, e, h, len(i)\n"
    assert unbound_names(ast.parse(kept + lost)) == {"c", "i"}


def test_imports_are_absolute_and_name_what_they_take():
    for name in MODULES:
        nodes = [node for node in ast.walk(tree_of(name)) if isinstance(node, ast.ImportFrom)]
        assert all(node.level == 0 for node in nodes), name
        assert not any(alias.name == "*" for node in nodes for alias in node.names), name


# Importing does nothing


def run_python(code, folder):
    """Return the words that a new interpreter prints, started in an empty folder."""
    command = [sys.executable, "-B", "-c", textwrap.dedent(code)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_importing_the_configuration_does_not_import_torch(tmp_path):
    code = """
        import sys
        import icl, icl.config, icl.presets, icl.resolve
        print("torch" in sys.modules, "lightning" in sys.modules)
    """
    assert run_python(code, tmp_path) == ["False", "False"]


def test_importing_every_module_makes_no_file_reads_no_secret_and_draws_no_number(tmp_path, monkeypatch):
    """In a folder with a `.env`, no file is made, `.env` is not read, and the global generators do not change."""
    (tmp_path / ".env").write_text("ICL_TEST_SECRET=1\n")
    monkeypatch.setenv("LOCAL_ROOT", "runs")
    code = f"""
        import importlib, os, random
        import lightning, numpy, torch  # lightning itself draws from Python's generator
        torch.manual_seed(1), numpy.random.seed(1), random.seed(1)
        modules = {sorted(f"icl.{name}" for name in MODULES if name not in ("__init__", "__main__"))}
        for module in modules:
            importlib.import_module(module)
        state = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
        torch.manual_seed(1), numpy.random.seed(1), random.seed(1)
        fresh = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
        print(torch.equal(state[0], fresh[0]), state[1:] == fresh[1:])
        print("ICL_TEST_SECRET" in os.environ, torch.cuda.is_initialized(), *os.listdir())
    """
    assert run_python(code, tmp_path) == ["True", "True", "False", "False", ".env"]

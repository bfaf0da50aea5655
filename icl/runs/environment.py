"""Describe the environment in which a run is trained: versions, machine and command.

Each start of a run adds a line with the environment to `run.log`. So a reader can tell years later how the run was made.
`icl report` shows these lines.
"""

import json
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from icl.files.reading import ContentError, parse_json
from icl.files.redaction import redact

PACKAGES = ("icl", "torch", "lightning", "numpy")
OWN_PROGRAM = (sys.executable, str(Path(__file__).parents[1] / "__main__.py"))
"""Command that starts this installation of `icl` in another process.

Unlike `python -m icl`, the command imports nothing from the working folder.
"""
COMMANDS = (
    "train",
    "sweep",
    "diversity",
    "evaluate",
    "llc",
    "analyse",
    "report",
    "predict",
    "runs",
    "checkpoints",
    "import",
)
"""Commands of `icl`, in the order in which `icl --help` lists them."""
_MARK = " environment "


def describe_environment() -> dict[str, str]:
    """Return a dict with the versions, the machine and the command of this process."""
    program, *words = sys.argv or [""]
    return {
        "command": redact(shlex.join([Path(program).name, *words])),
        "machine": f"{platform.node()}, {os.cpu_count()} processors",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect the results of training."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def environment_line(more: dict[str, str] | None = None) -> str:
    """Return a line for `run.log` with this process's environment and the entries of `more`. Use `environments_of` to read such lines."""
    return f"{_MARK.strip()} {json.dumps(describe_environment() | (more or {}))}"


def environments_of(log: str) -> list[tuple[str, dict[str, str]]]:
    """Return the time and the environment of every start in a `run.log`. Lines that cannot be read are left out."""
    environments = []
    for line in log.splitlines():
        time, mark, text = line.partition(_MARK)
        try:
            about = parse_json(text) if mark else None
        except ContentError:
            about = None
        if isinstance(about, dict):
            environments.append((time, {str(key): str(value) for key, value in about.items()}))
    return environments


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"

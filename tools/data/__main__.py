"""Make the shipped data from scratch: `python -m tools.data small|published-run|full [--list] [--only WORD] [--tables]`, or `make data [SIZE=…]`.

The phases of `tools/data/<size>.sh` run one after the other, and the time of each phase is printed. Then `tools/data/tables.py` makes
the tables of `data/<size>/`. A finished phase does not run again, and an interrupted phase continues where it stopped. Times, versions
and hardware are recorded in `phases.json` in the folder of the runs ($LOCAL_ROOT, or `runs`).
"""

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from icl.files.writing import write_atomically
from icl.runs.folder import local_root
from tools.data.schema import LABELS

FOLDER = Path(__file__).resolve().parent


class Phase(NamedTuple):
    """A part of a script, from one line that begins with `##` to the next."""

    name: str
    beginning: str
    """Part of the script before the first phase. This part runs again before every phase."""
    body: str

    @property
    def commands(self) -> str:
        """The commands of the phase, without comments."""
        return "\n".join(line for line in self.body.splitlines() if not line.startswith("#"))


def main() -> int:
    """Run the phases that are not done, then make the tables; return the exit status of the phase that failed, or 0."""
    parser = argparse.ArgumentParser(prog="python -m tools.data", description=__doc__.partition("\n")[0])
    parser.add_argument("size", choices=list(LABELS))
    parser.add_argument("--list", action="store_true", help="only list the phases, and mark those that are done")
    parser.add_argument("--only", metavar="WORD", help="only run the phases with this word in their name")
    parser.add_argument("--tables", action="store_true", help="only make the tables, from the results that exist")
    options = parser.parse_args()
    chosen = [phase for phase in read_phases(options.size) if not options.only or options.only in phase.name]
    if options.list:
        print("\n".join(f"{'done' if is_done(phase) else '    '}  {phase.name}" for phase in chosen))
        return 0
    for number, phase in enumerate([] if options.tables else chosen, start=1):
        status = run_phase(phase, f"[{number}/{len(chosen)}] {phase.name}")
        if status:
            print(
                f"The phase failed with status {status}. To continue, correct the cause and run the same command again.",
                file=sys.stderr,
            )
            return status
    from tools.data.tables import write_tables

    for line in write_tables(options.size, local_root(), read_record()):
        print(line)
    return 0


def read_phases(size: str) -> list[Phase]:
    """Return the phases of `tools/data/<size>.sh`, in order."""
    script = (FOLDER / f"{size}.sh").read_text(encoding="utf-8")
    beginning, *parts = re.split(r"^## ", script, flags=re.MULTILINE)
    split = [part.partition("\n") for part in parts]
    return [Phase(name.strip(), beginning, body.strip()) for name, _, body in split]


def run_phase(phase: Phase, title: str) -> int:
    """Run a phase unless it is done, record its time, and return its exit status."""
    if is_done(phase):
        print(f"== {title}: done before, in {_duration(read_record()[phase.name]['seconds'])}", flush=True)
        return 0
    print(f"== {title}", flush=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # our `icl` comes first
    start, before = time.time(), _cpu_seconds()
    status = subprocess.run(
        ["bash", "-c", f"{phase.beginning}\n{phase.body}"], env={**os.environ, "PATH": path}, check=False
    ).returncode
    seconds = time.time() - start
    _keep(phase, seconds=seconds, cpu_seconds=_cpu_seconds() - before, is_done=status == 0)
    print(f"== {phase.name}: {_duration(seconds)}", flush=True)
    return status


def is_done(phase: Phase) -> bool:
    """Return whether the phase has finished with exactly these commands."""
    known = read_record().get(phase.name, {})
    return bool(known.get("is_done")) and known["commands"] == phase.commands


def read_record() -> dict[str, dict[str, Any]]:
    """Return the record of every phase that was started. The keys are the names of the phases."""
    try:
        record: dict[str, dict[str, Any]] = json.loads(_record_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record


def environment() -> dict[str, str]:
    """Return the date, versions and hardware of this process."""
    import torch

    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores, {_processor()}"
    )
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "hardware": device,
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
    }


def _keep(phase: Phase, *, seconds: float, cpu_seconds: float, is_done: bool) -> None:
    """Add an attempt to the record. The times of several attempts with the same commands are summed."""
    record = read_record()
    known = record.get(phase.name, {})
    if known.get("commands") != phase.commands:
        known = {}
    record[phase.name] = {
        "commands": phase.commands,
        "seconds": round(known.get("seconds", 0) + seconds, 1),
        "cpu_seconds": round(known.get("cpu_seconds", 0) + cpu_seconds, 1),
        "is_done": is_done,
        **environment(),
    }
    write_atomically(_record_file(), (json.dumps(record, indent=1) + "\n").encode())


def _record_file() -> Path:
    return local_root() / "phases.json"


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _commit() -> str:
    """Return the commit of the source, with a `+` if files of `icl` differ from the commit; empty outside a repository."""
    git = ["git", "-C", str(FOLDER.parents[1])]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changes = subprocess.run([*git, "status", "--porcelain", "--", "icl"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _processor() -> str:
    """Return the name of the CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    match = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return match[1] if match else platform.processor()


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())

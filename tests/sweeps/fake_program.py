"""A fast stand-in for `icl train`. It records its events in a file, the ledger. The variable $FAKE determines its behavior.

$FAKE is JSON with three keys: `seconds` is the duration of the work, `fail` lists the values of M whose points fail, and `deaf` lists
the values of M whose points ignore SIGTERM.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

point = json.loads(Path(os.environ["ICL_SWEEP_POINT"]).read_text())
plan = json.loads(os.environ.get("FAKE", "{}"))
num_tasks = point["task.num_tasks"]


def note(event: str) -> None:
    """Add a line to the ledger, with one atomic write."""
    line = f"{num_tasks} {event} {time.time()}\n"
    descriptor = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def stop(number: int, frame: object) -> None:
    """Pretend to save, and exit."""
    note("stopped")
    sys.exit(143)


signal.signal(signal.SIGTERM, signal.SIG_IGN if num_tasks in plan.get("deaf", []) else stop)
note("started")
time.sleep(plan.get("seconds", 0))
if num_tasks in plan.get("fail", []):
    print("one line\nthe loss is not a number\n")
    sys.exit(3)
note("ended")

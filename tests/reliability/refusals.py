"""Push, verify and pull a run through stand-ins for S3-compatible servers, and print the results.

    python -m tests.reliability.refusals

Each stand-in (`stand_ins.py`) refuses, drops or changes one thing. The run has a file of 17 MiB, which is uploaded in parts.
"""

import contextlib
import io
import logging
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from moto.server import ThreadedMotoServer

from icl.cli import main as icl
from icl.store import waiting
from icl.store.base import LocalStore
from icl.training.run import train
from tests.reliability.stand_ins import StandIn, stand_ins, start
from tests.s3_server import SECRET, S3Server
from tests.tiny_runs import TINY, change

RUN = change(TINY, trainer={"max_steps": 4}, evaluation={"every": None}, checkpoints={"every": 2, "num_log": 0})
LARGE = 17 * 2**20


def try_stand_in(stand_in: StandIn, endpoint: str, run: Path, folder: Path) -> list[str]:
    """Return the row of one server: whether each command succeeded, whether every byte came back, and the messages of `icl`."""
    server = S3Server(endpoint)
    proxy, environment = start(stand_in, endpoint, folder)
    os.environ |= environment | {"LOCAL_ROOT": str(folder / "elsewhere")}
    outcomes, said = [], io.StringIO()
    for words in (
        ["checkpoints", str(run), "push"],
        ["checkpoints", str(run), "verify"],
        ["checkpoints", run.name, "pull"],
    ):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            outcomes.append("yes" if icl([*words, "--store", server.url]) == 0 else "NO")
    proxy.close()
    here, there = LocalStore(run), LocalStore(folder / "elsewhere" / run.name)
    names = [name for name in sorted(here.keys()) if not name.startswith(".")]
    is_same = set(names) <= set(there.keys()) and all(here.read(name) == there.read(name) for name in names)
    told = [line.removeprefix("icl: ") for line in said.getvalue().splitlines() if line.startswith("icl: ")]
    assert SECRET not in said.getvalue()
    return [stand_in.name, *outcomes, "yes" if is_same else "NO", " ".join(told) or "nothing"]


def main() -> int:
    """Try every stand-in. Return 1 if a command failed or a byte was lost."""
    waiting.NOTICE_SECONDS = 30.0  # moto is slow on a busy machine
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    endpoint = "http://{}:{}".format(*moto.get_host_and_port())
    account = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= account | {"WANDB_MODE": "disabled", "DEVICE": "cpu", "AWS_EC2_METADATA_DISABLED": "true"}
    os.environ.pop("AWS_BUCKET_NAME", None)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.redirect_stdout(io.StringIO()):
            run = train(RUN, folder=folder / "tiny").folder.path
        LocalStore(run).write("results/large.bin", os.urandom(LARGE))
        for number, stand_in in enumerate(stand_ins()):
            began = time.monotonic()
            (folder / str(number)).mkdir()
            rows.append(try_stand_in(stand_in, endpoint, run, folder / str(number)))
            print(f"{stand_in.name}: {time.monotonic() - began:.1f} s", file=sys.stderr)
    moto.stop()
    print("| The server | push | verify | pull | every byte came back | what `icl` said |\n|---|---|---|---|---|---|")
    for row in rows:
        print("| " + re.sub(r"the store's server 127.0.0.1:\d+ ", "", " | ".join(row)) + " |")
    num_good = sum("NO" not in row for row in rows)
    print(f"\n{num_good} of {len(rows)} servers keep a run whole.")
    return 0 if num_good == len(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())

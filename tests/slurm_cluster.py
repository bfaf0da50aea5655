"""A real Slurm on this machine for tests: slurmctld, munged, and one slurmd for each node, all on 127.0.0.1.

It needs Debian's packages `slurm-wlm` and `munge`, but no configuration. Without these packages, the tests that use it are skipped.
"""

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol", "scancel", "srun")
_HOST = socket.gethostname().partition(".")[0]


class SlurmCluster:
    """A running Slurm. Close it to end all of its processes.

    Args:
        folder: An empty folder for its files. The path must be short, because it contains a socket.
        num_nodes: Number of nodes, named n1, n2 and so on, all of them on this machine.
        options: Further lines of `slurm.conf`, which replace ours.
    """

    def __init__(self, folder: Path, *, num_nodes: int = 2, **options: str | int) -> None:
        self.folder, self.num_nodes = folder, num_nodes
        self.conf = folder / "slurm.conf"
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        self.environment = {**environment, "SLURM_CONF": str(self.conf), "WANDB_MODE": "disabled", "DEVICE": "cpu"}
        for name in ("spool", "state", "log"):
            (folder / name).mkdir()
        folder.chmod(0o755)
        self._ports = _free_ports(num_nodes + 1)
        self.conf.write_text(self._configuration(options))
        self._daemons: dict[str, subprocess.Popen] = {}
        self._start_munge()
        self._start("slurmctld", "-D", "-f", str(self.conf))
        wait_for(lambda: "UP" in self.run("scontrol", "ping", check=False), "slurmctld answers")
        for number in range(1, num_nodes + 1):
            self.start_node(f"n{number}")
        wait_for(lambda: self.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * num_nodes, "nodes are idle")

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node."""
        self._start(f"slurmd-{name}", "-D", "-N", name, "-f", str(self.conf))

    def kill_node(self, name: str, *, leaves_orphans: bool = False) -> None:
        """Kill the slurmd of a node, its slurmstepd and the processes of its jobs, all with SIGKILL, as a power cut does.

        With `leaves_orphans`, the processes of the jobs go on, as if only the daemons had crashed.
        """
        daemon = self._daemons.pop(f"slurmd-{name}")
        own = {"SLURMD_NODENAME": name, "SLURM_CONF": str(self.conf)}
        tasks = [pid for pid in _pids() if own.items() <= _environment(pid).items()]
        steps = {parent for pid in tasks if _words(parent := _parent(pid)).startswith("slurmstepd")}
        for pid in (daemon.pid, *steps, *(() if leaves_orphans else tasks)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def run(self, *words: str, check: bool = True, **options: object) -> str:
        """Run one of Slurm's commands, and return its output."""
        done = subprocess.run(
            words,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            **options,  # type: ignore[call-overload]
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def jobs(self) -> dict[str, str]:
        """Return the state of every job that is waiting or running, by its identifier such as `12_0`."""
        lines = self.run("squeue", "-h", "-r", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def close(self) -> None:
        """Cancel all jobs, and end the daemons."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.run("scancel", "--full", "--signal=KILL", *self.jobs(), check=False)
            self.run("scancel", *self.jobs(), check=False)
            wait_for(lambda: not self.jobs(), "jobs end", seconds=20)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        wait_for(lambda: all(daemon.poll() is not None for daemon in self._daemons.values()), "daemons end")

    def _start(self, name: str, *words: str) -> None:
        program = name.partition("-")[0]
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [_program(program), *words], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        words = [f"--{option}={self.folder / file}" for option, file in files.items()]
        self._start("munged", "--foreground", "--force", f"--log-file={self.folder}/log/munge.log", *words)
        wait_for((self.folder / "munge.sock").exists, "munged listens")

    def _configuration(self, options: dict[str, str | int]) -> str:
        user = pwd.getpwuid(os.getuid()).pw_name
        settings: dict[str, str | int] = {
            "ClusterName": "loopback",
            "SlurmctldHost": f"{_HOST}(127.0.0.1)",
            "SlurmUser": user,
            "SlurmdUser": user,
            "AuthType": "auth/munge",
            # A job that is queued again waits for as long as a credential lasts, by default two minutes.
            "AuthInfo": f"socket={self.folder}/munge.sock,cred_expire=10",
            "SlurmctldPort": self._ports[0],
            "StateSaveLocation": f"{self.folder}/state",
            "SlurmdSpoolDir": f"{self.folder}/spool/%n",
            "SlurmctldPidFile": f"{self.folder}/ctld.pid",
            "SlurmdPidFile": f"{self.folder}/%n.pid",
            "SlurmctldLogFile": f"{self.folder}/log/ctld.log",
            "SlurmdLogFile": f"{self.folder}/log/%n.log",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SelectType": "select/cons_tres",
            "ReturnToService": 2,
            "MpiDefault": "none",
            "KillWait": 10,
            "SlurmdTimeout": 10,
            "InactiveLimit": 0,
            **options,
        }
        nodes = [
            f"NodeName=n{number} NodeHostname={_HOST} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000 State=UNKNOWN"
            for number, port in enumerate(self._ports[1:], start=1)
        ]
        partition = f"PartitionName=all Nodes=n[1-{self.num_nodes}] Default=YES MaxTime=INFINITE State=UP"
        return "\n".join([*(f"{key}={value}" for key, value in settings.items()), *nodes, partition, ""])


def wait_for(condition: Callable[[], object], what: str, *, seconds: float = 60.0) -> None:
    """Wait until a condition holds. Fail the test if it does not hold in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain until {what}"
        time.sleep(0.2)


def missing_programs() -> list[str]:
    """Return the programs of Slurm that are not installed here."""
    return [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]


@pytest.fixture(scope="session")
def start_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., SlurmCluster]]:
    """Start Slurm with the given options, see `SlurmCluster`. It ends with the session, or when another one is started."""
    if missing := missing_programs():
        pytest.skip(f"needs Slurm ({', '.join(missing)} not found): apt-get install slurm-wlm munge")
    clusters: list[SlurmCluster] = []

    def start(**options: str | int) -> SlurmCluster:
        for cluster in clusters:
            cluster.close()
        clusters[:] = [SlurmCluster(tmp_path_factory.mktemp("slurm"), **options)]  # type: ignore[arg-type]
        return clusters[0]

    yield start
    for cluster in clusters:
        cluster.close()


_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _program(name: str) -> str:
    return shutil.which(name, path=_PATH) or name


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _words(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def _environment(pid: int) -> dict[str, str]:
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        return dict(pair.split("=", 1) for pair in text.split("\0") if "=" in pair)
    return {}


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]

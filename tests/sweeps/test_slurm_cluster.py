"""Sweeps on a real Slurm with two nodes that are interrupted at bad moments have the same bits as uninterrupted runs."""

import contextlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from slurm_cluster import SlurmCluster, wait_for

from icl.runs.folder import RunFolder

pytestmark = pytest.mark.slow

SETTINGS = {
    "task.task_size": 2,
    "task.max_examples": 4,
    "trainer.batch_size": 8,
    "trainer.max_steps": 800,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.embed_size": 8,
    "model.mlp_size": 8,
    "evaluation.every": 400,
    "checkpoints.every": 100,
    "checkpoints.num_log": 0,
    "checkpoints.num_linear": 0,
}
WORK = """
import json, os, pathlib, sys, time
point = json.loads(pathlib.Path(os.environ["ICL_SWEEP_POINT"]).read_text())["task.num_tasks"]
with open("ledger.txt", "a") as ledger:
    ledger.write(f"{point}\\n")
time.sleep(float(os.environ.get("SECONDS_OF_WORK", "0")))
sys.exit(3 if point == 2 else 0)
"""


@pytest.fixture(scope="module")
def cluster(start_slurm) -> SlurmCluster:
    return start_slurm(num_nodes=2)


class Work:
    """A folder from which sweeps are submitted, with runs of its own."""

    def __init__(self, folder: Path, cluster: SlurmCluster) -> None:
        self.folder, self.cluster, self.root = folder, cluster, folder / "runs"
        self.environment = {**cluster.environment, "LOCAL_ROOT": str(self.root), "OMP_NUM_THREADS": "1"}
        (folder / "work.py").write_text(WORK)

    def icl(self, *words: str, status: int | None = 0) -> str:
        """Run a command of `icl`, and return all of its output."""
        command = [sys.executable, "-m", "icl", *words]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, cwd=self.folder, env=self.environment, timeout=300, **output)  # type: ignore[call-overload]
        assert status is None or done.returncode == status, done.stdout
        return done.stdout

    def submit(self, *words: str) -> str:
        """Submit a sweep, and return the number of its array."""
        said = self.icl("sweep", "sweep.yaml", "--slurm", *words)
        match = re.search(r"Submitted job (\d+), an array", said)
        assert match, said
        return match[1]

    def sweep(self, values: list, **settings: object) -> None:
        """Write a sweep of `icl train`, or of the fast script if there are no settings."""
        program = {"command": ["${env}", "icl", "train"]} if settings else {"program": "work.py"}
        parameters = {"task.num_tasks": {"values": values}, **{key: {"value": v} for key, v in settings.items()}}
        (self.folder / "sweep.yaml").write_text(yaml.safe_dump({"method": "grid", "parameters": parameters, **program}))

    def steps(self) -> list[int]:
        """Return the step of each run."""
        statuses = [RunFolder(file.parent).read_status() for file in sorted(self.root.glob("*/status.json"))]
        return [status.step for status in statuses if status is not None]

    def logs(self) -> str:
        """Return the output of all jobs."""
        return "".join(file.read_text() for file in sorted(self.root.glob(".slurm/*/*/*.log")))

    def wait_until_over(self, seconds: float = 400) -> None:
        """Wait until no job is left in the queue."""
        wait_for(lambda: not self.cluster.jobs(), f"jobs end: {self.logs()}", seconds=seconds)


@pytest.fixture
def work(tmp_path, cluster):
    yield Work(tmp_path, cluster)
    with contextlib.suppress(AssertionError):
        if cluster.jobs():
            cluster.run("scancel", *cluster.jobs(), check=False)


def files_of(root: Path) -> dict[str, bytes]:
    """Return the content of all checkpoints and metrics."""
    files = [*root.glob("*/checkpoints/*.safetensors"), *root.glob("*/metrics.csv")]
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


def test_requeued_warned_and_killed_jobs_end_with_the_bits_of_undisturbed_runs(work, cluster):
    work.sweep([1, 8, "inf"], **SETTINGS)
    array = work.submit("--jobs", "2", "--sbatch", "--time=1:00:00")
    wait_for(lambda: len(steps := work.steps()) == 2 and min(steps) > 50, "two runs train", seconds=120)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{array}_0")  # as Slurm does before the time limit
    cluster.run("scontrol", "requeue", f"{array}_1")
    wait_for(lambda: set(cluster.jobs().values()) == {"PENDING"}, f"both wait again: {work.logs()}")
    shown = work.icl("sweep", "sweep.yaml", "--status", status=1)
    assert shown.count("it will resume") == 2
    assert re.search(rf"waiting +job {array}_0: in the queue .*goes on after its time limit", shown)
    before = work.steps()
    wait_for(lambda: sum(work.steps()) > sum(before) + 100, "they train again", seconds=180)
    cluster.kill_node("n1")
    wait_for(lambda: "down" in cluster.run("sinfo", "-h", "-n", "n1", "-o", "%T"), "the node is down", seconds=90)
    cluster.start_node("n1")
    work.wait_until_over()
    shown = work.icl("sweep", "sweep.yaml", "--status")
    assert "3 points: 3 done." in shown
    disturbed = files_of(work.root)
    shutil.rmtree(work.root)
    work.icl("sweep", "sweep.yaml")
    undisturbed = files_of(work.root)
    assert len(undisturbed) == 3 * 10
    assert disturbed == undisturbed


def test_a_job_without_progress_is_not_queued_for_ever_and_a_forbidden_requeue_has_a_successor(
    work, cluster, monkeypatch
):
    work.environment["SECONDS_OF_WORK"] = "500"
    work.sweep([1])
    work.submit("--sbatch", "--time=1 --no-requeue")
    work.wait_until_over(300)
    log = work.logs()
    assert "successor of job" in log
    assert log.count("started  ") == 2
    assert "2 times in succession without progress" in log
    assert re.search(
        r"failed +job \S+: reached its time limit 2 times", work.icl("sweep", "sweep.yaml", "--status", status=1)
    )


def test_a_successor_finishes_what_a_job_has_begun(work, cluster):
    work.sweep([1], **SETTINGS)
    array = work.submit("--sbatch", "--no-requeue --time=1:00:00")
    wait_for(lambda: len(steps := work.steps()) == 1 and min(steps) > 50, "the run trains", seconds=120)
    cluster.run("scancel", "--batch", "--signal=USR1", array)
    work.wait_until_over()
    assert "successor of job" in work.logs()
    assert "1 points: 1 done." in work.icl("sweep", "sweep.yaml", "--status")


def test_a_failed_point_is_told_and_tried_once_and_two_submissions_share_the_points(work, cluster):
    work.environment["SECONDS_OF_WORK"] = "1"
    work.sweep([1, 2, 4, 8, 16])
    # No job begins before both are submitted: a later submission may try again what has failed before it.
    held = ("--jobs", "2", "--sbatch", "--hold")
    first, second = work.submit(*held), work.submit(*held, "--workers", "2")
    assert first != second
    cluster.run("scontrol", "release", first, second)
    work.wait_until_over()
    tried = sorted((work.folder / "ledger.txt").read_text().split(), key=int)
    assert tried == ["1", "2", "4", "8", "16"]
    assert len(re.findall(r"\] failed ", work.logs())) == 1
    shown = work.icl("sweep", "sweep.yaml", "--status", status=1)
    assert "5 points: 4 done, 1 failed." in shown
    assert shown.count("exit status 3") == 1


def test_a_cancelled_array_stays_cancelled_and_the_same_command_continues(work, cluster):
    work.environment["SECONDS_OF_WORK"] = "100"
    work.sweep([1, 4])
    array = work.submit("--jobs", "1")
    wait_for((work.folder / "ledger.txt").exists, "the first point runs")
    cluster.run("scancel", array)
    work.wait_until_over(60)
    assert "stopped by SIGTERM" in work.icl("sweep", "sweep.yaml", "--status", status=1)
    work.environment["SECONDS_OF_WORK"] = "0"
    work.submit()
    work.wait_until_over()
    assert "2 points: 2 done." in work.icl("sweep", "sweep.yaml", "--status")


def test_the_task_diversity_experiment(work):
    tiny = [word for key, value in SETTINGS.items() for word in (f"--{key}", str(value))]
    words = [
        "diversity",
        "--preset",
        "quickstart",
        "--max_power",
        "1",
        *tiny,
        "--num_steps",
        "20",
        "--eval_every",
        "10",
    ]
    words = [word for word in words if word not in ("--trainer.max_steps", "800", "--evaluation.every", "400")]
    assert "--array=0-1" in work.icl(*words, "--slurm", "--dry-run")
    work.icl(*words, "--slurm", "--sbatch", "--time=10")
    work.wait_until_over()
    assert "done      M = inf: finished at step 20" in work.icl(*words, "--status")
    assert (work.folder / "plots" / "diversity.png").exists()
    assert "task diversity, finished" in work.icl("runs", "checkpoints")
    assert "2 runs: 2 done" in work.icl(*words)  # the same experiment, without Slurm


def test_srun_starts_the_processes_of_one_run_on_two_nodes(work, cluster):
    words = [word for key, value in SETTINGS.items() for word in (f"--{key}", str(value))]
    words += ["--trainer.max_steps", "20", "--trainer.devices", "1", "--trainer.num_nodes", "2", "--run_name", "both"]
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-m", "icl", "train", *words]
    environment = {**work.environment, "MASTER_ADDR": "127.0.0.1"}  # the names of our nodes have no addresses
    done = subprocess.run(srun, cwd=work.folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Training ") == 1
    status = RunFolder(work.root / "both").read_status()
    assert status is not None
    assert (status.state, status.step) == ("finished", 20)

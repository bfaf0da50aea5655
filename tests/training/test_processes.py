"""The processes of a run: Slurm's variables alone change nothing, and torchrun determines the number of processes."""

import dataclasses
import os
import subprocess
import sys
import types
import warnings

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from tiny_runs import TINY, as_arguments, as_population, change

from icl.cli import main
from icl.config.validation import ConfigError
from icl.runs.folder import RunError, RunFolder, is_child_rank, local_root
from icl.training.processes import SameSteps, cluster_environment, join_processes
from icl.training.run import train
from icl.training.saving import ScheduledCheckpoints
from icl.training.trainer import make_trainer

SHORT = change(TINY, trainer={"max_steps": 4}, evaluation={"every": None}, checkpoints={"every": 2, "num_log": 0})
SHELL = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "node[03-07]",
}
"""What `sbatch --ntasks-per-node=2` sets in its script."""
STEP = SHELL | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
"""What `srun` sets in the second of two tasks."""
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}


@pytest.fixture
def started(monkeypatch):
    """Set the variables that the starter of this process would set, and undo what `icl` adds to them."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)

    def start(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return start


@pytest.mark.parametrize(
    "variables",
    [
        SHELL,
        STEP,
        SHELL | {"SLURM_NTASKS": "1"},
        {name: value for name, value in SHELL.items() if name != "SLURM_NTASKS_PER_NODE"},
        {"SLURM_NTASKS": "3", "SLURM_NNODES": "3", "SLURM_JOB_NAME": "bash"},
        {"SLURM_NTASKS": "2"},
        {
            "LSB_JOBID": "1",
            "LSB_DJOB_RANKFILE": "/nonexistent",
            "JSM_NAMESPACE_LOCAL_RANK": "1",
            "JSM_NAMESPACE_SIZE": "2",
        },
    ],
    ids=["sbatch", "srun", "one task", "ntasks", "salloc", "only a count", "LSF"],
)
def test_the_variables_of_a_cluster_leave_a_run_of_one_process_as_it_is(started, variables):
    started(variables)
    config = join_processes(SHORT)
    assert config == SHORT
    assert not is_child_rank()
    trainer = make_trainer(config)
    assert isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment)
    assert (trainer.world_size, trainer.global_rank) == (1, 0)


def test_a_run_in_the_shell_of_a_job_trains_to_its_end(started, no_figures, capsys):
    started(SHELL | {"SLURM_PROCID": "0"})
    assert main(["train", *as_arguments(SHORT)]) == 0
    status = RunFolder(local_root() / "tiny").read_status()
    assert status is not None
    assert (status.state, status.step) == ("finished", 4)


def test_where_slurm_is_installed_nothing_is_said_of_srun(started, tmp_path, monkeypatch):
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer(SHORT)
        make_trainer(change(SHORT, trainer={"devices": 2}))
        train(SHORT, folder=tmp_path / "run")


def test_a_checkpoint_of_lightnings_own_requeueing_is_left_alone(started, tmp_path, monkeypatch):
    started(SHELL)
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"of another program")
    monkeypatch.chdir(tmp_path)
    assert train(SHORT, folder=tmp_path / "run").status.step == 4


def test_in_the_shell_of_a_job_lightning_starts_the_processes_of_a_run_itself(started):
    started(SHELL)
    config = join_processes(change(SHORT, trainer={"devices": 2}))
    assert not is_child_rank()
    environment = cluster_environment(config.trainer)
    assert isinstance(environment, LightningEnvironment)
    assert not environment.creates_processes_externally


def test_the_tasks_of_srun_are_the_processes_of_a_run_that_is_meant_to_have_several(started):
    started(STEP)
    config = join_processes(change(SHORT, trainer={"devices": 2}))
    assert is_child_rank()
    environment = make_trainer(config)._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue  # the job belongs to its owner
    assert (environment.world_size(), environment.global_rank()) == (2, 1)
    assert environment.creates_processes_externally
    assert (environment.local_rank(), environment.node_rank()) == (1, 0)
    assert (environment.main_address, environment.main_port) == ("node03", 19_567)


def test_other_numbers_of_tasks_than_processes_are_refused(started):
    started(STEP)
    with pytest.raises(ConfigError, match=r"srun started 2 tasks, but .* is 4; make them equal"):
        join_processes(change(SHORT, trainer={"devices": 4}))


def test_other_numbers_of_nodes_are_refused(started):
    started(STEP | {"SLURM_STEP_NUM_TASKS": "4"})
    with pytest.raises(
        ConfigError, match=r"srun started tasks on 1 nodes, but .* is 2; .*--nodes 2 --ntasks-per-node 2"
    ):
        join_processes(change(SHORT, trainer={"devices": 2, "num_nodes": 2}))


@pytest.mark.parametrize("mark", ["WANDB_SWEEP_ID", "ICL_SWEEP_POINT"])
def test_points_of_sweeps_whose_workers_srun_started_are_on_their_own(started, monkeypatch, mark):
    started(STEP)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv(mark, "a")
    join_processes(change(SHORT, trainer={"devices": 2}))
    assert not is_child_rank()


@pytest.mark.parametrize("asked", [{}, {"devices": 2}])
def test_the_number_of_processes_is_torchruns(started, asked):
    started(TORCHRUN)
    config = join_processes(change(SHORT, trainer=asked))
    assert (config.trainer.devices, config.trainer.num_nodes) == (2, 1)
    trainer = make_trainer(config)
    assert isinstance(trainer._accelerator_connector.cluster_environment, TorchElasticEnvironment)
    assert (trainer.world_size, trainer.global_rank) == (2, 1)


def test_torchrun_on_several_machines_is_understood(started):
    started(TORCHRUN | {"WORLD_SIZE": "4", "RANK": "3", "GROUP_RANK": "1"})
    trainer = join_processes(SHORT).trainer
    assert (trainer.devices, trainer.num_nodes) == (2, 2)


@pytest.mark.parametrize(
    "asked", [{"devices": 4}, {"num_nodes": 2}, {"devices": 2, "num_nodes": 2}], ids=["devices", "nodes", "both"]
)
def test_other_numbers_of_processes_than_torchruns_are_refused(started, asked):
    started(TORCHRUN)
    with pytest.raises(ConfigError, match="torchrun started 2 processes") as refusal:
        join_processes(change(SHORT, trainer=asked))
    assert "\n" not in str(refusal.value)


def test_a_batch_that_the_processes_cannot_share_is_refused(started):
    started(TORCHRUN | {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"})
    with pytest.raises(ConfigError, match="multiple of the number of processes"):
        join_processes(SHORT)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "NODE_RANK"])
def test_a_rank_that_was_left_in_the_environment_is_named(started, name, capsys):
    started({name: "1"})
    assert main(["train", *as_arguments(SHORT)]) == 2
    assert f"According to {name}=1, this is one of several processes" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"])
@pytest.mark.parametrize("value", ["banana", "-1", "1.0", "", " "])
def test_a_rank_that_is_no_number_is_one_sentence_before_lightning_meets_it(name, value, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    assert main(["runs"]) == (2 if value.strip() else 0)
    assert (f"{name} must be the rank of a process" in capsys.readouterr().err) == bool(value.strip())
    assert (name in os.environ) == bool(value.strip())


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_would_train_from_different_steps_raise_the_same_error(rank, monkeypatch):
    plans = [(("tiny",), 1000, 2000), (("tiny",), 0, 2000)]

    def gather(gathered, plan):
        assert plan == plans[rank]
        gathered[:] = plans

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    names, step, until = plans[rank]
    said = r"rank 0 would train tiny from step 1,000 to 2,000, but rank 1 would train tiny from step 0 to 2,000\. .* same command again"
    with pytest.raises(RunError, match=said):
        SameSteps(names, step, until).setup(types.SimpleNamespace(world_size=2))


RANK_READS_EARLY = """
import os, sys
import icl.training.run as run
if os.environ["RANK"] == "1":
    run.read_resume_file = lambda member: 0
    run.has_ended = lambda member: False
    run.num_fitting = lambda configs, device: 1
from icl.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""Rank 1 reads the folders before rank 0 fetches the runs from their store, and its machine has little memory."""


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a program in two processes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run([*start, *words], capture_output=True, text=True, timeout=300)


def stop_at(step: int):
    """Return a method of a callback that raises an error at a step."""
    original = ScheduledCheckpoints.on_train_batch_end

    def on_train_batch_end(self, trainer, module, *rest):
        if trainer.global_step == step:
            raise RuntimeError("stop here")
        original(self, trainer, module, *rest)

    return on_train_batch_end


@pytest.mark.slow
def test_a_rank_that_reads_its_folders_too_early_trains_what_rank_0_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(ScheduledCheckpoints, "on_train_batch_end", stop_at(4))
        with pytest.raises(RuntimeError, match="stop here"):
            train(change(SHORT, checkpoints={"resume_seconds": 0.0}))
    (tmp_path / "early.py").write_text(RANK_READS_EARLY)
    done = torchrun(str(tmp_path / "early.py"), "train", *as_arguments(SHORT))
    assert done.returncode == 0, done.stderr
    assert "from step 2" in done.stdout
    assert RunFolder(tmp_path / "tiny").read_status().state == "finished"


@pytest.mark.slow
def test_the_memory_of_rank_0_decides_how_many_members_are_trained_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path))
    (tmp_path / "early.py").write_text(RANK_READS_EARLY)
    done = torchrun(str(tmp_path / "early.py"), "train", *as_population(SHORT), "--population.seeds", "0,1")
    assert done.returncode == 0, done.stderr
    assert sum(RunFolder(file.parent).read_status().state == "finished" for file in tmp_path.rglob("status.json")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("state", ["finished", "running"])
def test_a_run_that_has_ended_ends_all_processes_at_once(tmp_path, monkeypatch, state):
    """The run is finished, or it was killed after its last save and before its last status."""
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path))
    run = train(SHORT).folder
    run.write_status(dataclasses.replace(run.read_status(), state=state))
    done = torchrun("-m", "icl", "train", *as_arguments(SHORT))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert run.read_status().state == "finished"


@pytest.mark.slow
def test_the_error_of_rank_0_ends_the_other_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path))
    with RunFolder(tmp_path / "tiny").lock():
        done = torchrun("-m", "icl", "train", *as_arguments(SHORT))
    assert done.returncode != 0
    assert "Another process is training" in done.stderr


@pytest.mark.slow
def test_two_processes_of_torchrun_train_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path))
    done = torchrun("-m", "icl", "train", *as_arguments(SHORT))
    assert done.returncode == 0, done.stderr
    assert "IndexError" not in done.stderr
    status = RunFolder(tmp_path / "tiny").read_status()
    assert status is not None
    assert (status.state, status.step) == ("finished", 4)


REMOVES_ITS_FOLDER = """
import shutil, sys
from icl.runs.folder import is_child_rank, local_root
from icl.training import callbacks
write = callbacks.MetricsLog.on_train_batch_end
def write_and_remove(self, trainer, *rest):
    write(self, trainer, *rest)
    if not is_child_rank() and (local_root() / "tiny").exists():
        shutil.rmtree(local_root() / "tiny")
callbacks.MetricsLog.on_train_batch_end = write_and_remove
from icl.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_removed_folder_ends_all_processes(tmp_path, monkeypatch):
    """Only rank 0 sees the folder. If the others went on, they would wait for rank 0 in the next step."""
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path))
    (tmp_path / "removes.py").write_text(REMOVES_ITS_FOLDER)
    words = as_arguments(change(SHORT, trainer={"max_steps": 60, "devices": 2}))
    command = [sys.executable, str(tmp_path / "removes.py"), "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "was moved or removed while the run was trained" in done.stderr
    assert "Traceback" not in done.stderr

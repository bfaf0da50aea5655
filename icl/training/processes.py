"""Find out how many processes train a run together, and which program started them: Lightning, torchrun or Slurm's srun.

Lightning itself starts only the processes on the machine on which it runs. torchrun and srun start the processes on all machines. Slurm
sets its environment variables even in the shell of a job, and in a program that runs as a single process. So we use these variables only
if srun started several tasks and the settings ask for several processes. In this case, Lightning's support for Slurm reads the variables.
We do not use Lightning's detection of Slurm, because this detection refuses or requeues runs that were started without srun.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from icl.config import RunConfig, TrainerConfig
from icl.config.validation import ConfigError, UserError
from icl.resolve import POINT_VARIABLE
from icl.runs.folder import RANK_VARIABLES, RunError, is_child_rank
from icl.training.wandb.agent import in_sweep

_PLAN_VARIABLE = "ICL_TRAINING_PLAN"
"""Environment variable through which rank 0 passes its `Plan` to the processes that Lightning starts."""
_ONE_PER_PROCESS = "`trainer.devices` times `trainer.num_nodes`"


def cluster_environment(settings: TrainerConfig) -> ClusterEnvironment:
    """Return the object from which Lightning gets the rank of this process.

    If torchrun or srun started several processes, the object reads their variables. Otherwise it reads Lightning's own variables.
    """
    if settings.num_processes > 1 and TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if _is_of_srun(settings.num_processes):
        return SrunEnvironment()
    return LightningEnvironment()


class SrunEnvironment(SLURMEnvironment):
    """Lightning's support for Slurm, changed for the tasks of one `srun`.

    By default, Lightning puts the job back in the queue itself. We turn this off, because only the owner of the job knows what else the
    job does. Lightning also refuses `srun --ntasks`, and it refuses settings that fit this `srun` but not the whole job. This class
    accepts both.
    """

    def __init__(self) -> None:
        super().__init__(auto_requeue=False)

    def world_size(self) -> int:
        """Return the number of tasks that this `srun` started."""
        return _num_tasks()

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Accept the settings, which `join_processes` has compared with the tasks of this `srun`."""

    @staticmethod
    def _validate_srun_variables() -> None:
        """Accept `srun --ntasks`."""


class Plan(NamedTuple):
    """Decision of rank 0 about what is trained.

    The other processes follow the plan. They do not decide themselves, because their folders and their memory may differ.
    """

    steps: Sequence[int | None]
    """Step from which each member continues; None for a member that is not trained."""
    num_at_once: int = 1
    """Largest number of members that are trained at once."""
    failure: str | None = None
    """Reason why rank 0 trains nothing, if it failed."""


class PlanSharing:
    """Means by which rank 0 gives its plan to the other processes of a run.

    torchrun and srun start all processes at once. In this case, rank 0 broadcasts the plan after it has fetched the runs from their store.
    Lightning starts the other processes of a machine only after rank 0 has made its plan. In this case, the other processes read the plan
    from an environment variable.

    Args:
        trainer: Lightning's Trainer of this process.
        is_shared: Whether the run uses several processes that can exchange objects.
    """

    def __init__(self, trainer: pl.Trainer, *, is_shared: bool) -> None:
        environment = getattr(trainer.strategy, "cluster_environment", None)
        self.trainer, self.was_shared = trainer, not is_shared
        self._is_broadcast = is_shared and not isinstance(environment, LightningEnvironment)

    def share(self, plan: Plan) -> None:
        """Send the plan of rank 0 to the other processes."""
        if self.was_shared:
            return
        self.was_shared = True
        if self._is_broadcast:
            self.trainer.strategy.setup_environment()
            self.trainer.strategy.broadcast(tuple(plan))
        else:
            os.environ[_PLAN_VARIABLE] = json.dumps(plan)

    def receive(self) -> Plan | None:
        """Return the plan of rank 0; None if this process must make its own plan.

        Raises:
            RunError: If rank 0 has failed.
        """
        if self._is_broadcast:
            self.trainer.strategy.setup_environment()
            fields: Any = self.trainer.strategy.broadcast(None)
            plan = Plan(*fields)
        elif not self.was_shared and os.environ.get("LOCAL_RANK", "0") != "0" and _PLAN_VARIABLE in os.environ:
            plan = Plan(*json.loads(os.environ[_PLAN_VARIABLE]))
        else:
            return None
        if plan.failure is not None:
            raise RunError(f"Rank 0 of this run has failed: {plan.failure}")
        return plan

    @contextlib.contextmanager
    def leading(self, num_members: int) -> Iterator[None]:
        """If the body of the `with` statement fails before it shares a plan, send the reason to the other processes.

        The other processes wait for the plan.
        """
        try:
            yield
        except UserError as error:
            self.share(Plan([None] * num_members, failure=str(error)))
            raise


class SameSteps(pl.Callback):
    """Check that all processes train the same runs from the same step, before they load weights.

    Processes on other machines that were started by hand, without torchrun or srun, read the runs' folders themselves. A process may do so
    before rank 0 has fetched a later save from the store, and would then start at an earlier step. Without this check, nobody would notice
    the difference.

    Args:
        names: Names of the folders of the runs that this process trains.
        step: Step from which this process continues.
        until: Step at which this process stops.
    """

    def __init__(self, names: Sequence[str], step: int, until: int) -> None:
        self.plan = tuple(names), step, until

    def setup(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Compare the runs and steps of all processes. If they differ, every process raises the same error.

        Raises:
            RunError: If the processes differ in their runs or steps.
        """
        if trainer.world_size == 1 or not torch.distributed.is_initialized():
            return
        plans: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(plans, self.plan)
        rank = next((rank for rank, plan in enumerate(plans) if plan != plans[0]), None)
        if rank is not None:
            raise RunError(
                f"The processes of this run do not agree: {_describe_plan(0, plans[0])}, but {_describe_plan(rank, plans[rank])}. They "
                "may have started before rank 0 had fetched the run from its store. Nothing was trained; start the same command again."
            )


def join_processes(config: RunConfig) -> RunConfig:
    """Return the settings of a run. If they ask for one process but torchrun started several, use torchrun's number of processes.

    If srun started the processes, copy the rank of this process to the variables that `is_child_rank` reads.

    Raises:
        ConfigError: If the number of processes started differs from the settings.
    """
    settings = config.trainer
    num_processes = settings.num_processes
    if TorchElasticEnvironment.detect():
        started, local = _number("WORLD_SIZE", 1), _number("LOCAL_WORLD_SIZE", 1)
        if num_processes == 1 and started > 1 and started % local == 0:
            trainer = dataclasses.replace(settings, devices=local, num_nodes=started // local)
            return dataclasses.replace(config, trainer=trainer)
        if started != num_processes or settings.devices != local:
            raise ConfigError(
                f"torchrun started {started} processes, {local} on this machine, but `trainer.devices` is {settings.devices} and "
                f"`trainer.num_nodes` is {settings.num_nodes}; leave both out, or make them equal to torchrun's --nproc_per_node "
                "and --nnodes."
            )
    elif _is_of_srun(num_processes):
        _join_srun(settings)
    elif num_processes == 1 and is_child_rank():
        ranks = ", ".join(f"{name}={os.environ[name]}" for name in RANK_VARIABLES if os.environ.get(name, "0") != "0")
        raise ConfigError(
            f"According to {ranks}, this is one of several processes of a run, but {_ONE_PER_PROCESS} is 1. Set these "
            "settings so that their product is the number of processes, or unset the environment variable."
        )
    return config


def _is_of_srun(num_processes: int) -> bool:
    """Return whether srun started this process as one of several processes of a run."""
    return num_processes > 1 and _num_tasks() > 1 and not _is_point()


def _join_srun(settings: TrainerConfig) -> None:
    """Check the numbers of tasks and nodes. Copy the rank of this task from srun's variables to the variables that `is_child_rank` reads."""
    num_nodes = _number("SLURM_STEP_NUM_NODES", _number("SLURM_NNODES", 1))
    if _num_tasks() != settings.num_processes:
        raise ConfigError(
            f"srun started {_num_tasks()} tasks, but {_ONE_PER_PROCESS} is {settings.num_processes}; make them equal, or start the "
            "command once, without srun."
        )
    if num_nodes != settings.num_nodes:
        raise ConfigError(
            f"srun started tasks on {num_nodes} nodes, but `trainer.num_nodes` is {settings.num_nodes}; make them equal, for example "
            f"by `srun --nodes {settings.num_nodes} --ntasks-per-node {settings.devices}`."
        )
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST") or "127.0.0.1"
    job = str(_number("SLURM_JOB_ID", 0))
    os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    os.environ.setdefault("MASTER_PORT", str(15_000 + int(job[-4:])))
    for name, source in {"LOCAL_RANK": "SLURM_LOCALID", "NODE_RANK": "SLURM_NODEID", "RANK": "SLURM_PROCID"}.items():
        os.environ.setdefault(name, str(_number(source, 0)))


def _num_tasks() -> int:
    """Return how many processes srun started, including this one. If srun did not start this process, return 1."""
    is_step = "SLURM_STEP_ID" in os.environ or "SLURM_STEPID" in os.environ
    return _number("SLURM_STEP_NUM_TASKS", _number("SLURM_NTASKS", 1) if is_step else 1)


def _is_point() -> bool:
    """Return whether this process trains a point of a sweep, that is, one combination of the sweep's settings.

    A point trains in one process, even if srun started several processes of `icl sweep`.
    """
    return in_sweep() or POINT_VARIABLE in os.environ


def _describe_plan(rank: int, plan: tuple[Sequence[str], int, int]) -> str:
    names, step, until = plan
    return f"rank {rank} would train {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} from step {step:,} to {until:,}"


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default

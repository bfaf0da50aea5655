"""The parts of `icl diversity` for Slurm: submit jobs, train runs inside a job, and show the states of runs and jobs."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from icl.cli.slurm import Submittable, print_jobs, submit_jobs
from icl.diversity.jobs import experiment_states, run_job, shared_settings
from icl.diversity.runs import ExperimentRun, require_same_settings
from icl.sweeps.slurm.job import SlurmJob
from icl.sweeps.slurm.submission import submissions_folder

_COPY = "settings.yaml"


def submit(runs: list[ExperimentRun], options: argparse.Namespace) -> int:
    """Submit the jobs of the experiment to Slurm. The jobs read the experiment's settings from a copy."""
    base = options.base_checkpoint_dir
    require_same_settings(runs, base)
    states = experiment_states(runs, base).values()
    num_left = sum(
        state.state != "done" and (options.retry or state.state != "failed" or not state.is_final) for state in states
    )

    def words(folder: Path) -> list[str]:
        paths = ["--base_checkpoint_dir", str(base), "--plots_dir", str(options.plots_dir)]
        parts = ["--in-job", str(folder), "--config", str(folder / _COPY), "--max_power", str(options.max_power)]
        return ["diversity", *parts, *paths, *["--retry"] * options.retry]

    work = Submittable(
        name="diversity",
        submissions=_submissions(base),
        words=words,
        num_programs=num_left,
        copy=(_COPY, yaml.safe_dump(shared_settings(runs[0]), sort_keys=False).encode()),
    )
    return submit_jobs(work, options)


def run_in_job(runs: list[ExperimentRun], options: argparse.Namespace, draw: Callable[[Sequence[str]], None]) -> int:
    """Train runs in one of the Slurm jobs of an experiment. If every run is then done or has failed, draw the figure."""
    base, job = options.base_checkpoint_dir, SlurmJob(options.in_job)
    require_same_settings(runs, base)
    result, metadata = run_job(runs, base=base, max_power=options.max_power, retry=options.retry, job=job)
    status = job.end(result)
    if result.is_over:
        done = [entry["num_tasks"] for entry in metadata.entries() if metadata.is_done(entry["num_tasks"])]
        draw(done)
    return status


def show_states(runs: list[ExperimentRun], base: Path) -> int:
    """Print the state of every run and job. Return 0 only if all runs are done."""
    states = experiment_states(runs, base)
    for label, state in states.items():
        print(f"{state.state:9s} M = {label}: {state.reason}")
    print_jobs(_submissions(base))
    return 0 if all(state.state == "done" for state in states.values()) else 1


def _submissions(base: Path) -> Path:
    return submissions_folder(base, "diversity", base)

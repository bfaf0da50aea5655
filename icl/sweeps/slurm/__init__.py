"""Run a sweep on a Slurm cluster, as a job array. Only Slurm's own commands are needed.

The jobs of the array share the points of the sweep. A point is one combination of the sweep's settings.

- `commands.py` calls sbatch, squeue and scontrol.
- `submission.py` writes the script of the array, and submits it.
- `job.py` runs inside a job: it ends the work before the time limit, and puts the job back in the queue.
- `records.py` reads and writes the records in which jobs describe themselves, and lists all jobs of a sweep.

We do not use the package submitit. It pickles a Python function and its arguments for each job, and restarts the job from
this pickle. Our jobs need no arguments, because each job reads from the runs' folders which points are left. Two commands
are enough, `sbatch --array` and `scontrol requeue`.
"""

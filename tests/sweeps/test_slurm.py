"""The parts of `--slurm` that need no Slurm: the script, refusals, records, and a folder that is out of reach for a moment.

`test_slurm_cluster.py` tests sweeps on a real Slurm.
"""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from icl.cli import main
from icl.files.writing import StorageError
from icl.runs.folder import local_root
from icl.sweeps import engine
from icl.sweeps.engine import SweepResult
from icl.sweeps.points import sweep_points
from icl.sweeps.schema import read_sweep_file
from icl.sweeps.slurm import commands, submission
from icl.sweeps.slurm.commands import parse_duration, seconds_left
from icl.sweeps.slurm.job import SlurmJob
from icl.sweeps.slurm.records import (
    JobRecord,
    Submission,
    describe_jobs,
    read_record,
    read_submission,
    write_record,
    write_submission,
)
from icl.sweeps.slurm.submission import job_script, limited_jobs, new_submission, parse_sbatch
from icl.sweeps.state import PointState

SLOW = "import time; open('started', 'a').write('x'); time.sleep(1.5)"


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Write the file of a sweep whose program is a script, and return its path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work.py").write_text(SLOW)
    tree = {"method": "grid", "program": "work.py", "parameters": {"task.num_tasks": {"values": [1, 2, 4]}}}
    (tmp_path / "my sweep.yaml").write_text(yaml.safe_dump(tree))
    return "my sweep.yaml"


@pytest.fixture
def no_slurm(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


def test_a_dry_run_prints_a_script_that_bash_accepts_and_submits_nothing(sweep, no_slurm, capsys):
    assert main(["sweep", sweep, "--slurm", "--jobs", "2", "--sbatch", "--time=4:00:00", "--dry-run"]) == 0
    said = capsys.readouterr().out
    script = said[said.index("#!/bin/bash") :]
    assert subprocess.run(["/bin/bash", "-n"], input=script, text=True).returncode == 0
    directives = dict(re.findall(r"^#SBATCH '?--([\w-]+)=(.*?)'?$", script, re.MULTILINE))
    assert {"job-name": "icl-my-sweep", "array": "0-1", "time": "4:00:00"}.items() <= directives.items()
    assert directives["output"].startswith(str(local_root() / ".slurm"))
    assert f"export LOCAL_ROOT={local_root()}" in script
    assert said.count("would run") == 3
    assert not (local_root() / ".slurm").exists()


def test_options_of_the_sweep_reach_its_jobs(sweep, no_slurm, capsys):
    words = ["--slurm", "--workers", "2", "--count", "2", "--retry", "--dry-run"]
    assert main(["sweep", sweep, *words]) == 0
    script = capsys.readouterr().out
    assert "--array=0-0" in script  # two points, two at a time
    assert re.search(r"--in-job \S+ --workers 2 --count 2 --retry$", script, re.MULTILINE)


def test_without_slurm_one_sentence_and_nothing_is_left(sweep, no_slurm, capsys):
    assert main(["sweep", sweep, "--slurm"]) == 1
    assert "There is no program `sbatch` here" in capsys.readouterr().err
    assert list((local_root() / ".slurm").glob("*/*")) == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--slurm", "--sbatch", "--array=0-3"], "`--array`: use `--jobs N`"),
        (["--slurm", "--sbatch", "-a 0-3 --time=1"], "`-a`: use `--jobs N`"),
        (["--slurm", "--sbatch", "--time=1 --signal=B:TERM@60"], "watch their time limit themselves"),
        (["--slurm", "--sbatch", "--wrap=ls"], "cannot contain `--wrap`"),
        (["--slurm", "--sbatch", "--arr=0-3"], "`--array`: use `--jobs N`"),
        (["--slurm", "--sbatch", "-Qa0-3"], "`-a`: use `--jobs N`"),
        (["--slurm", "--sbatch", "--sig=TERM"], "watch their time limit themselves"),
        (["--slurm", "--sbatch", "-vW"], "cannot contain `-W`"),
        (["--slurm", "--sbatch", "gpu"], "takes options of sbatch"),
        (["--slurm", "--sbatch", "--comment='a"], "No closing quotation"),
        (["--slurm", "--sbatch"], "`--sbatch` needs a value"),
        (["--slurm", "--jobs", "0"], "must be a whole number from 1"),
        (["--jobs", "2"], "only with `--slurm`"),
        (["--sbatch", "--time=1"], "only with `--slurm`"),
        (["--in-job", "."], "works only in the script that `--slurm` submits"),
        (["--slurm", "--in-job", "."], "cannot be given together"),
    ],
)
def test_wrong_options_are_one_sentence(sweep, capsys, words, reason):
    assert main(["sweep", sweep, *words]) == 2
    errors = capsys.readouterr().err
    assert reason in errors
    assert len(errors.splitlines()) == 1


def test_options_of_sbatch_are_split_as_a_shell_would():
    assert parse_sbatch("--time=1:00 -p long --comment='two words'") == [
        "--time=1:00",
        "-p",
        "long",
        "--comment=two words",
    ]
    assert parse_sbatch("") == []
    assert parse_sbatch("--export=NONE -vp long --wait-all-nodes=1")[0] == "--export=NONE"


def test_never_more_jobs_than_work(no_slurm):
    assert limited_jobs(None, 7) == (7, "")
    assert limited_jobs(3, 7) == (3, "")
    number, sentence = limited_jobs(9, 7)
    assert number == 7
    assert "7 of 9 jobs" in sentence


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3:04", 184), ("02:03:04", 7384), ("1-02:03:04", 93784), ("UNLIMITED", None), ("INVALID", None), ("", None)],
)
def test_slurms_durations(text, seconds):
    assert parse_duration(text) == seconds


def test_records_come_back_and_damaged_ones_count_as_missing(tmp_path):
    write_submission(tmp_path, Submission(submitted=1.5, num_jobs=2, array="12"))
    write_record(tmp_path, JobRecord(task=1, job="12_1", state="ended", reason="no point is left to do", num_starts=3))
    assert read_submission(tmp_path) == Submission(submitted=1.5, num_jobs=2, array="12")
    record = read_record(tmp_path, 1)
    assert record is not None
    assert (record.job, record.num_starts) == ("12_1", 3)
    (tmp_path / "jobs" / "1.json").write_text("{")
    (tmp_path / "submission.json").write_text('{"num_jobs": "two"}')
    assert read_record(tmp_path, 1) is None
    assert read_submission(tmp_path) is None


def test_where_squeue_is_missing_jobs_are_shown_as_they_said_themselves(tmp_path, no_slurm):
    write_submission(tmp_path, Submission(submitted=1.5, num_jobs=4, array="12"))
    failed = JobRecord(task=3, job="12_3", state="failed", reason="2 points failed", host="n7", updated=time.time())
    write_record(tmp_path, failed)
    write_record(tmp_path, JobRecord(task=1, job="12_1", state="ended", reason="no point is left", updated=time.time()))
    write_record(tmp_path, JobRecord(task=2, job="12_2", state="running", host="n7", updated=time.time() - 7200))
    assert describe_jobs([tmp_path]) == [
        "squeue does not answer here, so each job is shown with its last recorded state.",
        "waiting   job 12_0: submitted",
        "ended     job 12_1: no point is left (0 min ago)",
        "running   job 12_2: on n7 (2.0 h ago)",
        "failed    job 12_3: 2 points failed (on n7, 0 min ago)",
    ]


@pytest.fixture
def program_of_slurm(tmp_path, monkeypatch):
    """Return a function that writes a program of Slurm, which comes before the real one on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def write(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return write


def test_notices_that_a_site_prints_are_not_read_as_jobs(sweep, program_of_slurm, capsys):
    program_of_slurm("sbatch", "echo 'Maintenance on Monday'; echo '12;loopback'; echo 'Thank you'")
    program_of_slurm("squeue", r"echo 'Budget: 3|4'; printf 'M\303\344rz \377\n12_0|RUNNING|n|1|0:07\n'")
    assert main(["sweep", sweep, "--slurm", "--jobs", "1"]) == 0
    assert "Submitted job 12," in capsys.readouterr().out
    assert main(["sweep", sweep, "--status"]) == 1
    assert "running   job 12_0: on n|1 for 0:07\n" in capsys.readouterr().out


def test_a_limit_of_the_account_suggests_fewer_jobs(sweep, program_of_slurm, capsys):
    """The message is that of a real Slurm whose QOS allows three jobs of a user."""
    refusal = "sbatch: error: QOSMaxSubmitJobPerUserLimit; sbatch: error: Batch job submission failed"
    program_of_slurm("sbatch", f"echo '{refusal}' >&2; exit 1")
    assert main(["sweep", sweep, "--slurm"]) == 1
    assert "give a smaller `--jobs`" in capsys.readouterr().err
    assert main(["sweep", sweep, "--slurm", "--jobs", "1"]) == 1
    assert "--jobs" not in capsys.readouterr().err


def test_a_job_waits_only_briefly_for_the_time_that_it_has_left(program_of_slurm, monkeypatch):
    program_of_slurm("squeue", "echo 'Maintenance at 10:30 on Monday'; echo '  1:02:03'")
    assert seconds_left("12_0") == 3723
    monkeypatch.setattr(commands, "_JOB_TIMEOUT_SECONDS", 0.2)
    program_of_slurm("squeue", "sleep 5")
    started = time.monotonic()
    assert seconds_left("12_0") is None
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("script", ["echo 'Maintenance on Monday'", "exit 3", "echo 'no more jobs' >&2; exit 1"])
def test_a_submission_that_fails_leaves_nothing(sweep, program_of_slurm, capsys, script):
    program_of_slurm("sbatch", script)
    assert main(["sweep", sweep, "--slurm", "--jobs", "1"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list((local_root() / ".slurm").glob("*/*")) == []


def test_a_program_of_slurm_that_cannot_be_started_is_one_sentence(sweep, no_slurm, tmp_path, capsys):
    (tmp_path / "empty" / "sbatch").write_text("not a program")
    (tmp_path / "empty" / "sbatch").chmod(0o755)
    assert main(["sweep", sweep, "--slurm", "--jobs", "1"]) == 1
    assert "`sbatch` cannot be started: Exec format error" in capsys.readouterr().err


def test_jobs_that_slurm_has_accepted_are_named_even_if_the_disk_is_full(sweep, program_of_slurm, monkeypatch, capsys):
    program_of_slurm("sbatch", "echo 12")
    program_of_slurm("squeue", "exit 0")

    def write(folder, submission):
        if submission.array:
            raise StorageError("No space left on device.")
        write_submission(folder, submission)

    monkeypatch.setattr(submission, "write_submission", write)
    assert main(["sweep", sweep, "--slurm", "--jobs", "1"]) == 0
    said = capsys.readouterr()
    assert "Submitted job 12," in said.out
    assert "array 12 only after they have started. No space left on device." in said.err
    assert main(["sweep", sweep, "--status"]) == 1
    assert "job _0" not in capsys.readouterr().out


def test_submissions_of_the_same_second_have_different_folders(tmp_path):
    assert new_submission(tmp_path) != new_submission(tmp_path)


def test_a_job_that_ended_before_icl_could_work_shows_the_end_of_its_log(tmp_path, program_of_slurm):
    program_of_slurm("squeue", "exit 0")
    write_submission(tmp_path, Submission(submitted=1.5, num_jobs=2, array="12"))
    (tmp_path / "12_1.log").write_text("line 12: /nowhere/python: No such file or directory\n\n")
    never, broken = describe_jobs([tmp_path])
    assert never == "ended     job 12_0: never started: cancelled, or refused by Slurm"
    assert broken.startswith("failed    job 12_1: ended before `icl` could work; the last line of ")
    assert broken.endswith("12_1.log is: line 12: /nowhere/python: No such file or directory")


def test_no_text_of_the_user_becomes_a_line_of_the_script(tmp_path):
    script = job_script(
        tmp_path, ["sweep"], name="a\nb", num_jobs=1, options=["--comment=a\\b"], said="icl sweep 'a\nrm b'"
    )
    assert "# Written by: icl sweep 'a rm b'\n" in script
    assert "#SBATCH '--comment=a\\\\b'\n" in script  # Slurm removes one of two backslashes between quotes
    assert "#SBATCH --job-name=icl-a-b\n" in script


@pytest.mark.parametrize("queued_by_slurm", [True, False])
def test_a_preempted_job_goes_on_whether_or_not_the_site_queues_it_again(
    tmp_path, program_of_slurm, monkeypatch, capsys, queued_by_slurm
):
    """The answers are those of a real Slurm with PreemptMode=REQUEUE, which queues the job itself, and with PreemptMode=CANCEL."""
    answer = "echo '12_0: Job is pending execution' >&2; exit 1" if queued_by_slurm else "echo queued >> queue"
    shown = "echo 'JobState=COMPLETING Reason=None'; echo 'PreemptTime=2026-11-30T15:05:16'"
    program_of_slurm("scontrol", f'if [ "$1" = show ]; then {shown}; else {answer}; fi')
    program_of_slurm("squeue", "echo 1:02:03")
    program_of_slurm("sbatch", "echo 13")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    write_submission(tmp_path, Submission(submitted=1.5, num_jobs=1, array="12"))
    states = {0: PointState("waiting", "")}
    for _ in range(3):  # a job that is preempted again and again before it progresses is not given up
        job = SlurmJob(tmp_path)
        assert job.end(SweepResult(states, received=signal.SIGTERM)) == 0
    record = read_record(tmp_path, 0)
    assert record is not None
    assert (record.job, record.state, record.reason) == ("12_0", "waiting", "goes on after its preemption")
    assert (tmp_path / "queue").exists() is not queued_by_slurm


@pytest.fixture
def job(tmp_path, program_of_slurm, monkeypatch):
    """Return the only job of a submission."""
    program_of_slurm("squeue", "echo 1:02:03")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    write_submission(tmp_path, Submission(submitted=1.5, num_jobs=1, array="12"))
    return SlurmJob(tmp_path)


def test_a_job_fails_if_it_cannot_write_the_folder_of_a_run(tmp_path, job, sweep, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(engine, "claim", refuse)
    file, lines = read_sweep_file(sweep), []
    result = engine.run_sweep(file, sweep_points(file, count=1), local_root(), job=job, say=lines.append)
    assert lines == ["[1/1] failed   quickstart,num_tasks=1: cannot write its folder (Disk quota exceeded)"]
    assert job.end(result) == 1
    assert read_record(tmp_path, 0).reason == "1 of its points failed"


@pytest.mark.slow
def test_a_folder_that_vanishes_for_a_moment_costs_nothing_and_is_not_made_again(tmp_path, sweep, monkeypatch):
    """Nothing is written while the folder is away. So it can come back under its name, and every point is done afterwards."""
    root, away = tmp_path / "shared", tmp_path / "away"
    monkeypatch.setenv("LOCAL_ROOT", str(root))
    command = [sys.executable, "-m", "icl", "sweep", sweep]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as engine:
        while not (tmp_path / "started").exists():
            assert engine.poll() is None
            time.sleep(0.02)
        root.rename(away)
        time.sleep(3)
        assert not root.exists()
        away.rename(root)
        said, _ = engine.communicate(timeout=60)
    assert engine.returncode == 0, said
    assert said.count("cannot be reached") == said.count("can be reached again after") == 1
    assert len(re.findall(r"\] done ", said)) == 3
    assert main(["sweep", sweep, "--status"]) == 0
    shutil.rmtree(root)

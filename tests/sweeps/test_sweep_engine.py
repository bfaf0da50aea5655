"""The sweep engine with a fast stand-in for training: alone, in parallel, killed, and twice at once; then with two tiny real runs."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from tiny_runs import TINY, change

from icl.cli import main
from icl.config import flatten
from icl.files.writing import StorageError, write_atomically
from icl.runs.environment import environment_line
from icl.runs.folder import RunFolder, fails_again, local_root
from icl.runs.status import Status
from icl.store.base import LocalStore
from icl.sweeps import attempts
from icl.sweeps.attempts import Attempt, last_attempt
from icl.sweeps.engine import run_sweep
from icl.sweeps.points import sweep_points
from icl.sweeps.program import Program
from icl.sweeps.schema import read_sweep_file
from icl.sweeps.state import point_state
from icl.training.callbacks import _describe_bad_step

PROGRAM = Path(__file__).with_name("fake_program.py")
LONG = 60


class Ledger:
    """The events that the stand-ins recorded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[tuple[int, str, float]]:
        """Return M, event and time of every line."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [(int(m), event, float(when)) for m, event, when in map(str.split, lines)]

    def count(self, event: str) -> Counter:
        """Return how often each M has an event."""
        return Counter(m for m, what, _ in self.rows() if what == event)

    def wait_for(self, event: str, num: int) -> None:
        """Wait until an event has occurred a given number of times."""
        deadline = time.monotonic() + 30
        while self.count(event).total() < num:
            assert time.monotonic() < deadline, self.rows()
            time.sleep(0.02)


@pytest.fixture
def ledger(tmp_path, monkeypatch) -> Ledger:
    monkeypatch.setenv("LEDGER", str(tmp_path / "ledger.txt"))
    return Ledger(tmp_path / "ledger.txt")


@pytest.fixture
def behave(monkeypatch):
    """Set the behavior of the stand-ins."""
    return lambda **plan: monkeypatch.setenv("FAKE", json.dumps(plan))


def write(tmp_path, values, **keys) -> str:
    path = tmp_path / "sweep.yaml"
    command = ["${env}", "${interpreter}", "-S", "${program}"]
    tree = {"method": "grid", "program": str(PROGRAM), "command": command}
    path.write_text(yaml.safe_dump(tree | {"parameters": {"task.num_tasks": {"values": values}}} | keys))
    return str(path)


def start_engine(file, *words) -> subprocess.Popen:
    command = [sys.executable, "-m", "icl", "sweep", file, *words]
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # `pytest &` would hand on that it is ignored
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--help"])
    assert stop.value.code == 0
    assert "example:\n  icl sweep sweeps/training-runs/quickstart.yaml" in capsys.readouterr().out


def test_every_point_runs_once_and_the_same_command_finds_nothing_to_do(tmp_path, ledger, capsys):
    file = write(tmp_path, [1, 2, 3])
    assert main(["sweep", file, "--status"]) == 1
    assert "3 points: 3 waiting." in capsys.readouterr().out
    assert main(["sweep", file]) == 0
    assert main(["sweep", file]) == 0
    assert ledger.count("started") == ledger.count("ended") == {1: 1, 2: 1, 3: 1}
    assert "3 points: 3 done." in capsys.readouterr().out
    assert main(["sweep", file, "--status"]) == 0
    point = json.loads((local_root() / "quickstart,num_tasks=2" / "point.json").read_text())
    assert point == {"task.num_tasks": 2}


def test_a_dry_run_lists_names_and_starts_nothing(tmp_path, ledger, capsys):
    assert main(["sweep", write(tmp_path, [1, "inf"]), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "would run quickstart,num_tasks=1: not started" in said
    assert "would run quickstart,num_tasks=inf" in said
    assert not ledger.path.exists()
    assert list(local_root().iterdir()) == []


def test_points_run_side_by_side_but_no_more_than_asked(tmp_path, ledger, behave):
    behave(seconds=0.5)
    assert main(["sweep", write(tmp_path, [1, 2, 3, 4, 5, 6]), "--workers", "3"]) == 0
    steps = sorted((when, 1 if event == "started" else -1) for _, event, when in ledger.rows())
    running = [sum(step for _, step in steps[: k + 1]) for k in range(len(steps))]
    assert 2 <= max(running) <= 3


def test_a_point_that_fails_fails_alone_and_is_tried_again_by_the_next_command(tmp_path, ledger, behave, capsys):
    file = write(tmp_path, [1, 2, 3])
    behave(fail=[2])
    assert main(["sweep", file]) == 1
    said = capsys.readouterr().out
    assert "failed   quickstart,num_tasks=2: exit status 3: the loss is not a number" in said
    assert "sweep.log" in said
    assert main(["sweep", file, "--status"]) == 1
    assert "3 points: 2 done, 1 failed." in capsys.readouterr().out
    behave()
    assert main(["sweep", file]) == 0
    assert ledger.count("started") == {1: 1, 2: 2, 3: 1}


def test_a_program_that_cannot_be_started_is_a_failure_with_its_reason(tmp_path):
    program = tmp_path / "program"
    program.write_text("no program")
    program.chmod(0o755)
    sweep = read_sweep_file(write(tmp_path, [1], command=[str(program)]))
    result = run_sweep(sweep, sweep_points(sweep), local_root(), say=lambda line: None)
    assert result.states[1].reason == f"cannot start `{program}`: Exec format error"


def test_a_setting_that_cannot_be_an_argument_is_a_failure_with_its_reason(tmp_path):
    parameters = {"early_stopping.monitor": {"value": "a\0b"}}
    sweep = read_sweep_file(write(tmp_path, [], command=["true", "${args}"], parameters=parameters))
    result = run_sweep(sweep, sweep_points(sweep), local_root(), say=lambda line: None)
    assert result.states[1].reason == "cannot start `true`: embedded null byte"


def test_a_program_killed_by_a_signal_without_a_name_fails_alone(tmp_path):
    command = ["bash", "-c", "test $(grep -c 1 $ICL_SWEEP_POINT) = 0 || kill -40 $$"]
    sweep = read_sweep_file(write(tmp_path, [1, 2], command=command))
    result = run_sweep(sweep, sweep_points(sweep), local_root(), say=lambda line: None)
    assert [state.state for state in result.states.values()] == ["failed", "done"]
    assert result.states[1].reason == "killed by signal 40"


def test_runs_may_be_in_the_working_folder(tmp_path, ledger, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_ROOT", ".")
    assert main(["sweep", write(tmp_path, [1])]) == 0
    assert ledger.count("ended") == {1: 1}


def test_a_program_that_does_not_wait_for_its_run_has_not_trained_it(tmp_path, capsys):
    """For example, the command `sbatch job.sh icl train` ends at once, with exit status 0."""
    file = write(tmp_path, [1], command=["echo", "icl", "train"], program=None)
    assert main(["sweep", file]) == 1
    assert "failed   quickstart,num_tasks=1: exit status 0, but the run has not ended" in capsys.readouterr().out
    assert main(["sweep", file, "--status"]) == 1


def test_a_run_is_trained_again_after_its_status_was_deleted(tmp_path):
    """`icl checkpoints RUN verify` gives this advice for a run with damaged files."""
    point = sweep_points(read_sweep_file(write(tmp_path, [1], command=["icl", "train"], program=None)))[0]
    run = RunFolder(local_root() / point.name)
    run.write_config(point.config)
    attempts.claim(run.path, point.job, number=1).finish("done", exit_status=0)
    assert point_state(point, local_root()).state == "waiting"


def test_a_command_that_asks_for_help_is_refused(tmp_path, capsys):
    assert main(["sweep", write(tmp_path, [1], command=["icl", "train", "--help"], program=None)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "only prints a help text; leave out `--help`" in captured.err


@pytest.mark.parametrize("words", [["--dry-run"], [], ["--pack"]])
@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"program": "icl", "command": None},
            "`python icl` (W&B's command for a file without `command`) needs a script",
        ),
        ({"program": "absent.py", "command": None}, "`python absent.py` (W&B"),
        ({"program": "icl", "command": ["${interpreter}", "-u", "${program}", "train"]}, "`python icl` needs a script"),
        ({"command": ["/no/such/program", "${args}"]}, "no program `/no/such/program` on this machine"),
        ({"command": ["${env}", "no-such-program"]}, "no program `no-such-program` on this machine"),
        ({"program": "icl", "command": ["${env}", "${program}"]}, "`icl` in the command needs a subcommand"),
        ({"command": ["${env}", "icl", "--preset", "L2H4"]}, "`icl` in the command needs a subcommand"),
    ],
)
def test_what_cannot_be_started_is_refused_by_a_dry_run_and_by_the_run_alike(tmp_path, capsys, keys, said, words):
    assert main(["sweep", write(tmp_path, [1, 2], **keys), *words]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert said in captured.err or ("--pack" in words and "needs `command" in captured.err)
    assert ("For `icl` write" in captured.err) == ("`python icl`" in captured.err)
    assert list(local_root().iterdir()) == []


def test_an_invalid_point_fails_alone_and_is_told_once(tmp_path, ledger, capsys):
    file = write(tmp_path, [1, 0, 2, "many"])
    assert main(["sweep", file, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:4]] == [
        "would run quickstart,num_tasks=1",
        "would fail point 2 (task.num_tasks=0)",
        "would run quickstart,num_tasks=2",
        "would fail point 4 (task.num_tasks=many)",
    ]
    assert lines[4] == "4 points: 2 failed, 2 waiting."
    for _ in range(2):
        assert main(["sweep", file]) == 1
        said = capsys.readouterr().out
        assert said.count("point 2 (task.num_tasks=0): The number of tasks M must be") == said.count("point 2") == 1
        assert "4 points: 2 done, 2 failed." in said
        assert "the same command" not in said
    assert ledger.count("started") == ledger.count("ended") == {1: 1, 2: 1}
    assert main(["sweep", file, "--status"]) == 1
    assert "failed    point 4 (task.num_tasks=many): " in capsys.readouterr().out
    assert main(["sweep", file, "--count", "1", "--status"]) == 0


def test_without_any_valid_point_the_file_is_refused(tmp_path, capsys):
    assert main(["sweep", write(tmp_path, [0, -1])]) == 2
    assert "sweep.yaml: point 1 (task.num_tasks=0): The number" in capsys.readouterr().err


def test_another_command_for_the_same_run_is_another_job(tmp_path, ledger):
    assert main(["sweep", write(tmp_path, [1])]) == 0
    assert main(["sweep", write(tmp_path, [1], command=["${interpreter}", "${program}"])]) == 0
    assert ledger.count("ended") == {1: 2}


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_is_passed_on_and_the_same_command_does_only_what_is_missing(tmp_path, ledger, behave, capsys, number):
    file = write(tmp_path, [1, 2, 3])
    assert main(["sweep", file, "--count", "1"]) == 0
    behave(seconds=LONG)
    engine = start_engine(file, "--workers", "2")
    ledger.wait_for("started", 3)
    engine.send_signal(number)
    said, _ = engine.communicate(timeout=30)
    assert engine.returncode == 128 + number
    assert "stopped" in said
    assert ledger.count("stopped") == {2: 1, 3: 1}
    capsys.readouterr()
    assert main(["sweep", file, "--status"]) == 1
    assert f"stopped by {number.name}; it will resume" in capsys.readouterr().out
    behave()
    assert main(["sweep", file]) == 0
    assert ledger.count("started") == {1: 1, 2: 2, 3: 2}


@pytest.mark.slow
def test_a_second_signal_ends_programs_that_do_not_listen(tmp_path, ledger, behave):
    behave(seconds=LONG, deaf=[1])
    engine = start_engine(write(tmp_path, [1]))
    ledger.wait_for("started", 1)
    engine.send_signal(signal.SIGTERM)
    assert "Send the signal again to kill" in "".join(engine.stdout.readline() for _ in range(3))
    engine.send_signal(signal.SIGTERM)
    engine.communicate(timeout=30)
    assert engine.returncode == 143


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent-death signal")
def test_a_killed_engine_leaves_no_orphans_and_loses_nothing(tmp_path, ledger, behave):
    file = write(tmp_path, [1, 2, 3])
    behave(seconds=LONG)
    engine = start_engine(file, "--workers", "2")
    ledger.wait_for("started", 2)
    engine.kill()
    engine.communicate()
    ledger.wait_for("stopped", 2)
    behave()
    assert main(["sweep", file, "--workers", "2"]) == 0
    assert ledger.count("started") == {1: 2, 2: 2, 3: 1}
    assert ledger.count("ended") == {1: 1, 2: 1, 3: 1}


@pytest.mark.slow
def test_an_orphan_that_will_not_end_keeps_its_point(tmp_path, ledger, behave):
    file = write(tmp_path, [1])
    behave(seconds=2, deaf=[1])
    engine = start_engine(file)
    ledger.wait_for("started", 1)
    engine.kill()
    engine.wait()
    behave()
    assert main(["sweep", file]) == 0
    assert [event for _, event, _ in ledger.rows()] == ["started", "ended", "started", "ended"]


@pytest.mark.slow
def test_two_engines_on_one_folder_never_do_a_point_twice(tmp_path, ledger, behave):
    behave(seconds=0.2, fail=[4])
    file = write(tmp_path, list(range(1, 11)))
    engines = [start_engine(file, "--workers", "2") for _ in range(2)]
    outputs = [engine.communicate(timeout=60)[0] for engine in engines]
    assert [engine.returncode for engine in engines] == [1, 1]
    assert ledger.count("started") == dict.fromkeys(range(1, 11), 1)
    assert all("10 points: 9 done, 1 failed." in output for output in outputs)


def other_engines_attempt(point, *, number=1, **fields) -> Path:
    """Write the file of another machine's attempt, which is alive if it is running."""
    path = local_root() / point.name / "attempts" / f"{number:06d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    attempt = Attempt(number=number, job=point.job, host="far", kernel="far:boot", **fields)
    path.write_text(json.dumps(asdict(attempt)))
    return path


@pytest.mark.parametrize("retry", [False, True])
def test_an_engine_that_joins_others_does_not_repeat_what_has_just_failed_there(tmp_path, ledger, retry, monkeypatch):
    """Other engines have made four attempts. Two failed while a third ran, and the fourth failed an hour ago.

    Without `retry`, the engine of this test runs only the point that failed an hour ago, and a fifth point.
    """
    monkeypatch.setattr(attempts, "STALE_SECONDS", 20.0)
    sweep = read_sweep_file(write(tmp_path, [1, 2, 3, 4, 5]))
    first, second, running, earlier, _ = points = sweep_points(sweep)
    now = time.time()
    other_engines_attempt(first, outcome="failed", reason="no device", started=now - 100, ended=now - 60)
    other_engines_attempt(second, outcome="failed", reason="no device", started=now - 59, ended=now - 20)
    other_engines_attempt(earlier, outcome="failed", reason="no device", started=now - 3700, ended=now - 3600)
    path = other_engines_attempt(running, started=now - 40)

    def end_there():
        ledger.wait_for("ended", 4 if retry else 2)
        write_atomically(path, path.read_bytes().replace(b'"running"', b'"failed"'))

    thread = threading.Thread(target=end_there)
    thread.start()
    said: list[str] = []
    run_sweep(sweep, points, local_root(), retry=retry, say=said.append)
    thread.join()
    assert ledger.count("started") == dict.fromkeys([1, 2, 4, 5] if retry else [4, 5], 1)
    assert sum("failed   quickstart,num_tasks=1: no device" in line for line in said) == (not retry)
    assert sum("failed   quickstart,num_tasks=3: no reason" in line for line in said) == 1
    assert run_sweep(sweep, points, local_root(), say=said.append).is_done  # the next command tries what failed
    assert ledger.count("started") == dict.fromkeys(range(1, 6), 1)


@pytest.mark.slow
def test_a_second_engine_joins_a_real_one(tmp_path, ledger, behave, capsys):
    behave(seconds=3, fail=[1])
    file = write(tmp_path, [1, 2, 3])
    engine = start_engine(file)
    ledger.wait_for("started", 2)
    assert main(["sweep", file]) == 1
    assert engine.wait(timeout=60) == 1
    assert ledger.count("started") == {1: 1, 2: 1, 3: 1}
    assert "3 points: 2 done, 1 failed." in capsys.readouterr().out


def test_a_point_taken_over_by_another_machine_is_given_up(tmp_path, ledger, behave, monkeypatch):
    monkeypatch.setattr(attempts, "STALE_SECONDS", 2.0)
    behave(seconds=LONG)
    sweep = read_sweep_file(write(tmp_path, [1]))
    (point,) = points = sweep_points(sweep)
    path = local_root() / point.name / "attempts" / "000002.json"
    other = Attempt(number=2, job=point.job, host="far", kernel="far:boot")

    def be_the_other_machine():
        ledger.wait_for("started", 1)
        path.write_text(json.dumps(asdict(other)))
        ledger.wait_for("stopped", 1)
        path.write_text(json.dumps(asdict(replace(other, outcome="done"))))

    thread = threading.Thread(target=be_the_other_machine)
    thread.start()
    said: list[str] = []
    result = run_sweep(sweep, points, local_root(), say=said.append)
    thread.join()
    assert result.is_done
    assert any("lost " in line for line in said)
    assert ledger.count("started") == {1: 1}


def test_a_dead_machines_point_is_taken_over(tmp_path, ledger, monkeypatch):
    monkeypatch.setattr(attempts, "STALE_SECONDS", 1.0)
    sweep = read_sweep_file(write(tmp_path, [1]))
    (point,) = points = sweep_points(sweep)
    path = local_root() / point.name / "attempts" / "000001.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(asdict(Attempt(number=1, job=point.job, host="far", kernel="far:boot"))))
    begun = time.monotonic()
    assert run_sweep(sweep, points, local_root(), say=lambda line: None).is_done
    assert 0.5 < time.monotonic() - begun < 20
    assert last_attempt(local_root() / point.name).number == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--workers", "0"], "whole number from 1"),
        (["--seed", "1"], "no effect on a grid"),
        (["--status", "--dry-run"], "cannot be given together"),
    ],
)
def test_options_that_make_no_sense(tmp_path, capsys, words, sentence):
    try:
        status = main(["sweep", write(tmp_path, [1]), *words])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert sentence in capsys.readouterr().err


# Real runs


def real_sweep(tmp_path, steps: int) -> str:
    settings = flatten(change(TINY, trainer={"max_steps": steps, "log_every": 1}).to_dict())
    swept = {key: {"value": value} for key, value in settings.items() if key != "run_name"}
    swept["task.num_tasks"] = {"values": [4, "inf"]}
    return write(tmp_path, [], command=["${env}", "icl", "train"], parameters=swept)


@pytest.mark.slow
def test_two_tiny_runs_from_file_to_finished(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = real_sweep(tmp_path, 2)
    assert main(["sweep", file, "--workers", "2"]) == 0
    for point in sweep_points(read_sweep_file(file)):
        run = RunFolder(local_root() / point.name)
        assert run.read_config() == point.config
        assert (run.read_status().state, run.read_status().step) == ("finished", 2)
        assert "Training" in (run.path / "sweep.log").read_text()
    capsys.readouterr()
    assert main(["sweep", file]) == 0
    assert "done     quickstart" in capsys.readouterr().out
    assert {last_attempt(path.parent).number for path in local_root().glob("*/attempts")} == {1}


@pytest.mark.slow
def test_packed_points_are_trained_by_one_program_and_each_has_its_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = real_sweep(tmp_path, 2)
    assert main(["sweep", file, "--pack"]) == 0
    first, second = sweep_points(read_sweep_file(file))
    for point in (first, second):
        run = RunFolder(local_root() / point.name)
        assert run.read_config() == point.config
        assert (run.read_status().state, run.read_status().step) == ("finished", 2)
        assert last_attempt(run.path).outcome == "done"
    assert "Training 2 runs as one population" in (local_root() / first.name / "sweep.log").read_text()
    assert f"{first.name}/sweep.log" in (local_root() / second.name / "sweep.log").read_text()
    assert "started" in capsys.readouterr().out
    assert main(["sweep", file, "--pack"]) == 0
    assert "started" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_packed_point_that_fails_fails_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = real_sweep(tmp_path, 2)
    first, second = sweep_points(read_sweep_file(file))
    (local_root() / second.name).mkdir(parents=True)
    RunFolder(local_root() / second.name).write_config(change(second.config, optim={"lr": 0.5}))
    assert main(["sweep", file, "--pack", "8"]) == 1
    assert f"failed   {second.name}: exit status 1: The run" in (told := capsys.readouterr().out)
    assert "was begun with other settings" in told
    assert RunFolder(local_root() / first.name).read_status().state == "finished"


@pytest.mark.slow
def test_a_packed_point_whose_resume_file_is_damaged_fails_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = real_sweep(tmp_path, 2)
    first, second = sweep_points(read_sweep_file(file))
    damaged = RunFolder(local_root() / first.name)
    damaged.write_config(first.config)
    damaged.resume_file.write_bytes(b"half a file")
    assert main(["sweep", file, "--pack"]) == 1
    told = capsys.readouterr().out
    assert f"failed   {first.name}: {damaged.resume_file.resolve()} is damaged" in told
    assert RunFolder(local_root() / second.name).read_status().state == "finished"
    assert (local_root() / second.name / "figures" / "training.png").is_file()
    damaged.resume_file.unlink()
    assert main(["sweep", file, "--pack"]) == 0


def test_only_programs_that_read_their_points_from_a_file_can_be_packed(tmp_path, capsys):
    assert main(["sweep", write(tmp_path, [1, 2]), "--pack"]) == 2
    assert "needs `command:" in capsys.readouterr().err


def test_a_run_trained_by_hand_is_done_and_one_that_failed_says_why(tmp_path, capsys):
    file = real_sweep(tmp_path, 2)
    first, second = sweep_points(read_sweep_file(file))
    for point, status in ((first, Status(state="finished", step=2)), (second, Status(state="failed", reason="NaN"))):
        run = RunFolder(local_root() / point.name)
        run.write_config(point.config)
        run.write_status(status)
    assert main(["sweep", file, "--status"]) == 1
    said = capsys.readouterr().out
    assert f"done      {first.name}: finished at step 2" in said
    assert f"failed    {second.name}: NaN" in said
    RunFolder(local_root() / first.name).write_config(second.config)
    assert main(["sweep", file, "--status"]) == 1
    assert "was begun with other settings: `task.num_tasks`" in capsys.readouterr().out


def make_fail(point, versions: dict[str, str]) -> RunFolder:
    """Write a run whose loss became NaN under the given versions of packages."""
    run = RunFolder(local_root() / point.name)
    run.write_config(point.config)
    run.write_status(Status(state="failed", step=2, max_steps=2, reason=_describe_bad_step(2)))
    run.log(environment_line(versions))
    return run


def test_a_failure_that_would_repeat_is_not_tried_again_by_the_same_versions(tmp_path, capsys):
    file = real_sweep(tmp_path, 2)
    first, second = sweep_points(read_sweep_file(file))
    run, other = make_fail(first, {}), make_fail(second, {"torch": "1.0"})
    assert fails_again(run, run.read_status())
    assert not fails_again(other, other.read_status())
    other.log(environment_line())  # the last start counts
    assert main(["sweep", file]) == 1
    said = capsys.readouterr().out
    assert said.count("failed   quickstart") == 2
    assert "the same settings would fail again" in said
    assert "This run is not tried again; use --retry to try it again." in said
    assert "the same command" not in said
    assert not list(local_root().glob("*/attempts"))
    for words, told in ((["--status"], "failed"), (["--dry-run"], "failed"), (["--dry-run", "--retry"], "would run")):
        main(["sweep", file, *words])
        lines = capsys.readouterr().out.splitlines()
        assert [line.startswith(told) for line in lines[:2]] == [True, True]
    other.log(environment_line({"torch": "1.0"}))
    main(["sweep", file, "--dry-run"])
    assert [line[:9] for line in capsys.readouterr().out.splitlines()[:2]] == ["failed   ", "would run"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--pack"]], ids=["alone", "packed"])
def test_a_point_that_fails_with_nan_is_tried_again_only_when_asked_for(tmp_path, monkeypatch, capsys, how):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tree = yaml.safe_load(Path(real_sweep(tmp_path, 4)).read_text())
    tree["parameters"] |= {"optim.lr": {"value": 1e30}, "optim.grad_clip": {"value": None}}
    file = write(tmp_path, [], command=tree["command"], parameters=tree["parameters"])
    for words, number in (([], 1), ([], 1), (["--retry"], 2)):
        assert main(["sweep", file, *how, *words]) == 1
        assert "the same settings would fail again" in capsys.readouterr().out
        assert {last_attempt(path.parent).number for path in local_root().glob("*/attempts")} == {number}


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--workers", "2"], ["--pack"]], ids=["workers", "packed"])
def test_a_killed_sweep_of_real_runs_ends_as_an_undisturbed_one(tmp_path, monkeypatch, how):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = real_sweep(tmp_path, 400)
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path / "undisturbed"))
    assert main(["sweep", file, *how]) == 0
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path / "killed"))
    for number in (signal.SIGTERM, signal.SIGKILL):
        before = max((len(path.read_text()) for path in (tmp_path / "killed").glob("*/metrics.csv")), default=0)
        engine = start_engine(file, *how)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            sizes = [len(path.read_text()) for path in (tmp_path / "killed").glob("*/metrics.csv")]
            if max(sizes, default=0) > before + 200:
                break
            time.sleep(0.05)
        os.kill(engine.pid, number)
        engine.communicate(timeout=60)
    assert main(["sweep", file, *how]) == 0
    for path in (tmp_path / "undisturbed").glob("*/metrics.csv"):
        assert path.read_text() == (tmp_path / "killed" / path.parent.name / "metrics.csv").read_text()


# Claims are given up, whatever happens to the files


class Ended:
    """A process that has ended."""

    returncode, pid = 3, 0

    def poll(self) -> int:
        """Return the exit status."""
        return self.returncode


@pytest.mark.parametrize("trouble", ["log deleted", "log unreadable", "first outcome not written"])
def test_every_claim_of_a_pack_is_given_up(tmp_path, monkeypatch, trouble):
    points = sweep_points(read_sweep_file(Path(write(tmp_path, [1, 2]))))
    root = local_root()
    claims = [attempts.claim(root / point.name, point.job, number=1) for point in points]
    log = root / points[0].name / "sweep.log"
    if trouble == "log unreadable":
        log.mkdir()
    if trouble == "first outcome not written":
        log.write_text("last line")

        def fail(path: Path, data: bytes) -> None:
            if points[0].name in str(path):
                raise StorageError("no space")
            write_atomically(path, data)

        monkeypatch.setattr(attempts, "write_atomically", fail)
    program = Program(list(zip(points, claims, strict=True)), log, Ended())
    with contextlib.suppress(StorageError):
        program.record(stopping=None)
    states = [point_state(point, root) for point in points]
    assert states[1].state == "failed"
    assert states[0].state == ("waiting" if trouble == "first outcome not written" else "failed")
    assert states[1].reason.startswith("exit status 3")
    for claim in claims:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(claim.descriptor)


@pytest.mark.parametrize(("ahead", "state"), [(-10, "running"), (10, "running"), (3600, "waiting"), (-3600, "waiting")])
def test_a_run_whose_clock_is_far_ahead_does_not_run_for_ever(tmp_path, ahead, state):
    point = sweep_points(read_sweep_file(Path(write(tmp_path, [1], command=["icl", "train"], program=None))))[0]
    run = RunFolder(local_root() / point.name)
    run.write_config(point.config)
    LocalStore(run.path).write(
        "status.json", json.dumps(asdict(Status(state="running", updated=time.time() + ahead))).encode()
    )
    assert point_state(point, local_root()).state == state

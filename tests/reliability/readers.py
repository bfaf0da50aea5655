"""The files that `icl` reads back, a tiny run that has all of them, and the commands and functions that read each file."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import pandas as pd
import torch
from sampling.llc_runs import write_older_estimate

from icl import whole_runs as run_evaluation
from icl.analysis.run import analyse
from icl.api import load_model
from icl.cli import main
from icl.cli.env_file import load_env_file
from icl.compute import compile_cache
from icl.config import RunConfig, SamplerConfig
from icl.diversity.metadata import Metadata
from icl.diversity.runs import experiment_runs, find_runs
from icl.diversity.tables import evaluate_experiment, save_tables
from icl.plotting.training import draw_run, drawn_losses
from icl.resolve import read_config_file, read_points, resolve
from icl.runs.checkpoints import checkpoint_files, load_checkpoint_file, stored_tensors
from icl.runs.copied_files import copied_names
from icl.runs.delivery import is_delivered, note_delivered
from icl.runs.folder import RunFolder, fails_again
from icl.runs.measure import Cache
from icl.runs.metrics_file import MetricsFile, metric_columns
from icl.runs.mirror import open_mirror, push, take_up
from icl.runs.resume_file import parse_resume
from icl.runs.status import FAILS_AGAIN, Status
from icl.sampling.prompt_loss import prompt_target
from icl.sampling.result import LLCResult
from icl.sampling.run import estimate_grid, estimate_run
from icl.sampling.stored_results import StoredResults
from icl.store.base import LocalStore, sha256
from icl.sweeps.attempts import claim
from icl.sweeps.points import sweep_points
from icl.sweeps.program import Program
from icl.sweeps.schema import read_sweep_file
from icl.training.members import Member
from icl.training.run import train
from icl.training.saving import read_resume_file
from icl.training.wandb.agent import _swept_names as read_swept_names
from icl.training.wandb.agent import replay
from icl.training.wandb.log import _run_id
from tests.reliability.older_files import import_from, make_older_files
from tests.tiny_runs import TINY, change

Content = Callable[[Path, Path], str | None]
Use = Callable[[Path, Path], Any]
"""Function that reads the damaged file, given the folder of all files and the file. It may return an exit status."""

_SAMPLER = SamplerConfig(
    lr=1e-5,
    nbeta=100.0,
    localization=100.0,
    num_samples=64,
    batch_size=16,
    num_chains=2,
    num_draws=2,
    num_burnin_steps=1,
    num_init_batches=2,
    steps="8",
)
CONFIG = change(
    dataclasses.replace(TINY, sampler=_SAMPLER),
    trainer={"max_steps": 8, "log_every": 2},
    evaluation={"every": 4, "num_prompts": 8},
    checkpoints={"every": 2, "num_log": 0, "moments": True, "resume_seconds": 0.0},
)
SWEEP = """\
method: grid
parameters:
  task.num_tasks: {values: [2, 16]}
  optim.lr: {value: 0.01}
  seeds.model: {values: [0, 1]}
command: ["${env}", icl, train, "${args}"]
"""
STAGES = "quantity,start,end,value,verdict,reasons\nloss,0,4,0.5,ok,\nloss,4,8,0.4,suspect,few points\n"
ENVIRONMENT = "# ours\nLOCAL_ROOT=runs\nAWS_REGION='eu-west-1'\nexport WANDB_MODE=disabled\nHF_TOKEN=${WANDB_MODE}\n"
PROMPT = {"x_context": [[0.1, 0.2], [0.3, -0.4]], "y_context": [0.3, -0.1], "x_query": [[1.0, 2.0]]}


class Reader(NamedTuple):
    """A file, and the functions that read it."""

    name: str
    file: str
    """Pattern of paths below the folder of all files. One of the files that match is damaged."""
    kind: str
    """Kind of the file, a key of `MUTATIONS`."""
    uses: tuple[Use, ...]
    content: Content | None = None
    """Function that returns the content of a file with a digest, as text. It returns None or raises an error if the file is
    refused. Files without a digest have no such function."""
    told_by: tuple[Use, ...] = ()
    """Uses that must report that the file has been changed since it was saved."""


def make_files(base: Path) -> None:
    """Train, evaluate, sample and analyse a tiny run, and make a store, a sweep and an experiment from it."""
    run = base / "runs" / "tiny"
    train(CONFIG, folder=run)
    numbers, baselines = run_evaluation.evaluate_run(run)
    run_evaluation.save_evaluation(run, numbers, baselines)
    more = pd.concat([numbers, numbers.assign(step=numbers["step"] + 1)])  # stages need at least eight steps
    RunFolder(run).write_result("evaluation.csv", more.sort_values("step", kind="stable").to_csv(index=False))
    (record, *_) = estimate_run(run).records
    write_older_estimate(RunFolder(run), record)
    (component,) = estimate_run(run, component="L0H0").records
    assert component.susceptibilities.size
    _store_result(run)
    RunFolder(run).write_result("embeddings.csv", analyse("embeddings", run).table.to_csv(index=False))
    RunFolder(run).write_result("stages.csv", STAGES)
    analyse("essential-dynamics", run)
    (run / "wandb-id").write_text("0123456789ab")
    mirror = open_mirror(RunFolder(run), str(base / "store"), "tiny")
    push(mirror)
    note_delivered(RunFolder(run), _stored(base, CONFIG), copied_names(LocalStore(run)))
    (base / "sweep.yaml").write_text(SWEEP)
    point = sweep_points(read_sweep_file(base / "sweep.yaml"))[0]
    attempt = claim(base / "runs" / point.name, point.job, number=1)
    assert attempt is not None
    attempt.finish("failed", exit_status=1, reason="out of luck")
    (base / ".env").write_text(ENVIRONMENT)
    (base / "params.yaml").write_text("wandb_version: 1\noptim.lr: {value: 0.01}\nseeds: {value: {model: 1}}\n")
    (base / "sampler.yaml").write_text("sampler: {lr: 1.0e-05, nbeta: 100.0, num_draws: 2}\n")
    (base / "runs" / "tiny" / "sweep.log").write_text(
        "--- 2026-01-01 icl train\nTraining.\nicl: runs/tiny failed: out of luck\n"
    )
    cache = base / "cache"
    cache.mkdir(mode=0o700)
    (cache / "program.so").write_bytes(bytes(range(256)))
    compile_cache._write_digests(cache, {"program.so": compile_cache._digest(cache / "program.so")})
    (base / "point.json").write_text(json.dumps(point.settings))
    (base / "settings.yaml").write_text((run / "config.yaml").read_text())
    (base / "prompt.json").write_text(json.dumps(PROMPT))
    (base / "prompt.csv").write_text("x1,x2,y\n0.1,0.2,0.3\n0.3,-0.4,-0.1\n1.0,2.0,\n")
    _make_experiment(base / "checkpoints", run)
    make_older_files(base)


def _store_result(run: Path) -> None:
    """Store a whole result, as a calibration does for each of its settings."""
    checkpoint = load_checkpoint_file(checkpoint_files(run)[-1])
    target = prompt_target(CONFIG, _SAMPLER)
    ((result,),) = estimate_grid(
        [checkpoint], [_SAMPLER], target, device=torch.device("cpu"), advance=lambda moves: None
    )
    stored = StoredResults(run / "results" / "llc-calibration")
    stored.write(checkpoint, _SAMPLER, result)
    assert stored.read(checkpoint, _SAMPLER) is not None


def _read_stored_result(base: Path, file: Path) -> LLCResult | None:
    run = base / "runs" / "tiny"
    return StoredResults(run / "results" / "llc-calibration").read(
        load_checkpoint_file(checkpoint_files(run)[-1]), _SAMPLER
    )


def _judge_stored_result(base: Path, file: Path) -> None:
    result = _read_stored_result(base, file)
    if result is not None:
        assert result.row()["verdict"] in ("ok", "suspect", "invalid")


def _content_of_stored_result(base: Path, file: Path) -> str | None:
    result = _read_stored_result(base, file)
    return None if result is None else str((result.row(), result.loss_trace.tolist()))


def _make_experiment(base: Path, run: Path) -> None:
    for label in ("2", "4", "8", "16", "inf"):
        shutil.copytree(run, base / f"checkpoints_M{label}", ignore=shutil.ignore_patterns("results", "figures"))
    Metadata(base, experiment_runs(CONFIG, max_power=2, base=base), about={}).write()
    save_tables(evaluate_experiment(find_runs(base)).table, base / "diversity.json")


def _stored(base: Path, config: RunConfig = CONFIG) -> RunConfig:
    return change(config, checkpoints={"store": str(base / "store")})


def _run(base: Path) -> Path:
    return base / "runs" / "tiny"


def _command(*words: str) -> Use:
    """Return the use of a command with these words. RUN, STORE, FILE and similar words are replaced by paths."""

    def use(base: Path, file: Path) -> int:
        places = {"RUN": _run(base), "STORE": base / "store", "FILE": file} | {
            "SWEEP": base / "sweep.yaml",
            "PROMPT": base / "prompt.json",
            "EXPERIMENT": base / "checkpoints",
            "OUT": base / "fit.csv",
            "SAMPLER": base / "sampler.yaml",
        }
        return main([str(places.get(word, word)) for word in words])

    return use


def _member(base: Path) -> Member:
    return Member(CONFIG, RunFolder(_run(base)), is_packed=False)


def _environment(base: Path, file: Path) -> None:
    """Read a `.env`, and restore the environment of this process."""
    with mock.patch.dict(os.environ):
        load_env_file(file)


def _swept_names(base: Path, file: Path) -> None:
    """Read the file in which W&B's agent names the swept keys."""
    with mock.patch.dict(os.environ, {"WANDB_SWEEP_PARAM_PATH": str(file)}):
        read_swept_names()


def _last_line(base: Path, file: Path) -> None:
    """Search a program's output for the reason of its failure."""
    program = Program([], file, "not started")
    program._begun_at = 0
    program._last_line("icl: runs/tiny failed: ")


def _failed_before(base: Path, file: Path) -> None:
    """Check in a run's log whether it failed with the present versions."""
    fails_again(RunFolder(_run(base)), Status(state="failed", reason=FAILS_AGAIN))


def _clean_cache(base: Path, file: Path) -> None:
    """Remove damaged files from the compiler's cache."""
    compile_cache._remove_damaged(base / "cache")


def _cached_program(base: Path, file: Path) -> str | None:
    """Return the compiled program that would be run, or None if the cache is damaged."""
    return None if compile_cache.damaged(base / "cache") else (base / "cache" / "program.so").read_bytes().hex()


def _checkpoint(base: Path, file: Path) -> str:
    """Return the step, the settings, the hash of the weights, and their names."""
    checkpoint = load_checkpoint_file(file)
    return json.dumps([checkpoint.step, checkpoint.config.to_dict(), checkpoint.digest, sorted(checkpoint.params)])


def _resume(base: Path, file: Path) -> str:
    """Return the digest of the content of a resume file."""
    return sha256(parse_resume(file.read_bytes(), file.name).data)


def _entry(base: Path, file: Path) -> str | None:
    """Return the stored rows and arrays of a step."""
    entry = Cache(file.parent).read(int(file.stem.removeprefix("step-")))
    if entry is None:
        return None
    arrays = {name: array.tobytes().hex() for name, array in entry.arrays.items()}
    return json.dumps([entry.step, entry.checkpoint_hash, entry.rows, arrays])


class _WandbRun:
    """The part of a W&B run that `replay` uses."""

    summary: ClassVar[dict[str, Any]] = {}

    def log(self, row: dict[str, Any]) -> None:
        """Send nothing."""


REPORT = _command("report", "RUN")
LLC = _command("llc", "RUN")
VERIFY = _command("checkpoints", "RUN", "verify", "--store", "STORE")
LIST = _command("checkpoints", "RUN", "ls", "--store", "STORE")
PULL = _command("checkpoints", "RUN", "pull", "--store", "STORE", "--force")
PUSH = _command("checkpoints", "RUN", "push", "--store", "STORE")
EVALUATE = _command("evaluate", "RUN")
PREDICT = _command("predict", "RUN", "--prompt", "FILE")
STATUS = _command("sweep", "SWEEP", "--dry-run")
TRAIN: Use = lambda base, file: train(CONFIG, folder=_run(base))  # noqa: E731
TAKE_UP: Use = lambda base, file: take_up(open_mirror(RunFolder(_run(base)), str(base / "store"), "tiny"), CONFIG)  # noqa: E731
_LOAD: Use = lambda base, file: load_model(file)  # noqa: E731
_ESTIMATE: Use = lambda base, file: estimate_run(_run(base))  # noqa: E731


def _resume_previous(base: Path, file: Path) -> int:
    """Resume a run whose `last.ckpt` is lost."""
    (_run(base) / "last.ckpt").unlink()
    return read_resume_file(_member(base)) and 0


TIMAEUS = import_from("timaeus", *["--task.noise_variance", "0.1", "--task.num_tasks", "inf", "--model.num_heads", "2"])
RAVENTOS = import_from("raventos", "--tasks", "TASKS")
READERS = (
    Reader("config.yaml", "runs/tiny/config.yaml", "yaml", (REPORT, LIST, LLC, VERIFY, TRAIN)),
    Reader("config.yaml in a store", "store/tiny/config.yaml", "yaml", (PULL, LIST, VERIFY)),
    Reader(
        "status.json",
        "runs/tiny/status.json",
        "json",
        (
            _command("runs"),
            _command("runs"),
            REPORT,
            PUSH,
            VERIFY,
            TRAIN,
            lambda b, f: is_delivered(RunFolder(_run(b)), _stored(b)),
        ),
    ),
    Reader(
        "status.json in a store",
        "store/tiny/status.json",
        "json",
        (PULL, PUSH, TAKE_UP),
    ),
    Reader(
        "metrics.csv",
        "runs/tiny/metrics.csv",
        "csv",
        (
            REPORT,
            VERIFY,
            TRAIN,
            lambda b, f: (draw_run(RunFolder(_run(b))), drawn_losses(RunFolder(_run(b)))),
            lambda b, f: MetricsFile(f, metric_columns(CONFIG)).begin([2, 4]),
            lambda b, f: replay(_WandbRun(), f, 8),
        ),
        told_by=(REPORT, VERIFY, TRAIN),
    ),
    Reader("run-id", "*/tiny/run-id", "bytes", (PULL, PUSH, VERIFY, TAKE_UP)),
    Reader("wandb-id", "runs/tiny/wandb-id", "text", (lambda b, f: _run_id(RunFolder(_run(b))),)),
    Reader("run.log", "runs/tiny/run.log", "text", (REPORT, _failed_before, _failed_before)),
    Reader(
        ".delivered",
        "runs/tiny/.delivered",
        "json",
        (lambda b, f: is_delivered(RunFolder(_run(b)), _stored(b)),),
    ),
    Reader(
        "last.ckpt",
        "runs/tiny/last.ckpt",
        "bytes",
        (lambda b, f: (read_resume_file(_member(b)),), VERIFY, TRAIN),
        content=_resume,
    ),
    Reader("previous.ckpt", "runs/tiny/previous.ckpt", "bytes", (_resume_previous, VERIFY), content=_resume),
    Reader("last.ckpt in a store", "store/tiny/last.ckpt", "bytes", (PULL, VERIFY), content=_resume),
    Reader("figures", "runs/tiny/figures/*.png", "bytes", (REPORT, VERIFY)),
    Reader(
        "checkpoints",
        "runs/tiny/checkpoints/step-*",
        "safetensors",
        (
            _LOAD,
            _LOAD,
            _command("predict", "FILE", "--prompt", "PROMPT"),
            _command("evaluate", "FILE"),
            _command("llc", "FILE"),
            VERIFY,
            REPORT,
        ),
        content=_checkpoint,
    ),
    Reader(
        "checkpoints in a run",
        "runs/tiny/checkpoints/step-*",
        "safetensors",
        (EVALUATE, LLC, _command("analyse", "RUN", "--what", "embeddings")),
        content=_checkpoint,
    ),
    Reader(
        "checkpoints in a store", "store/tiny/checkpoints/step-*", "safetensors", (PULL, VERIFY), content=_checkpoint
    ),
    Reader(
        "checkpoints/moments",
        "runs/tiny/checkpoints/moments/step-*",
        "safetensors",
        (VERIFY, lambda b, f: stored_tensors(f, "exp_avg/"), lambda b, f: load_checkpoint_file(f)),
        content=_checkpoint,
    ),
    Reader(
        "results/*.csv",
        "runs/tiny/results/*.csv",
        "csv",
        (REPORT, _command("analyse", "RUN", "--what", "stages"), LLC, EVALUATE, VERIFY),
    ),
    Reader(
        "results/llc/",
        "runs/tiny/results/llc/*/step-*.json",
        "json",
        (_ESTIMATE, _ESTIMATE, LLC, VERIFY),
        content=_entry,
    ),
    Reader("parts of the evaluation", "runs/tiny/results/evaluation/step-*.json", "json", (EVALUATE,), content=_entry),
    Reader(
        "parts of an analysis",
        "runs/tiny/results/embeddings/step-*.json",
        "json",
        (_command("analyse", "RUN", "--what", "embeddings"),),
        content=_entry,
    ),
    Reader(
        "traces of estimates", "runs/tiny/results/llc/*/step-*.npy", "npy", (_ESTIMATE, LLC, VERIFY), content=_entry
    ),
    Reader(
        "results of a calibration",
        "runs/tiny/results/llc-calibration/*/step-*.json",
        "json",
        (_judge_stored_result, VERIFY),
        content=_content_of_stored_result,
    ),
    Reader(
        "traces of a calibration",
        "runs/tiny/results/llc-calibration/*/step-*.npy",
        "npy",
        (_judge_stored_result, VERIFY),
        content=_content_of_stored_result,
    ),
    Reader("llc-components.csv", "runs/tiny/results/llc-*s.csv", "csv", (REPORT, VERIFY)),
    Reader("estimates of 0.1.0", "runs/tiny/results/llc/*/step-*.npz", "npz", (LLC, VERIFY)),
    Reader(
        "experiment_metadata.json",
        "checkpoints/experiment_metadata.json",
        "json",
        (
            _command("runs", "EXPERIMENT"),
            lambda b, f: Metadata(
                b / "checkpoints", experiment_runs(CONFIG, max_power=2, base=b / "checkpoints"), about={}
            ),
        ),
    ),
    Reader(
        "table of an experiment, JSON",
        "checkpoints/diversity.json",
        "json",
        (_command("analyse", "FILE", "--what", "diversity", "--out", "OUT"),),
    ),
    Reader(
        "table of an experiment, CSV",
        "checkpoints/diversity.csv",
        "csv",
        (_command("analyse", "FILE", "--what", "diversity", "--out", "OUT"),),
    ),
    Reader("attempts of a sweep", "runs/*/attempts/*.json", "json", (STATUS,)),
    Reader(
        "point of a sweep",
        "point.json",
        "json",
        (lambda b, f: [resolve(point) for point in read_points({"ICL_SWEEP_POINT": str(f)})],),
    ),
    Reader("sweep file", "sweep.yaml", "yaml", (_command("sweep", "FILE", "--dry-run"),)),
    Reader(
        "settings file",
        "settings.yaml",
        "yaml",
        (
            lambda b, f: resolve(read_config_file(f)),
            lambda b, f: resolve({"sampler": read_config_file(f).get("sampler", {})}),
        ),
    ),
    Reader("metrics.csv in a store", "store/tiny/metrics.csv", "csv", (PULL, VERIFY)),
    Reader("results in a store", "store/tiny/results/*.csv", "csv", (PULL, VERIFY)),
    Reader("kept steps in a store", "store/tiny/results/*/step-*.json", "json", (PULL, VERIFY), content=_entry),
    Reader(
        "moments in a store",
        "store/tiny/checkpoints/moments/step-*",
        "safetensors",
        (PULL, VERIFY),
        content=_checkpoint,
    ),
    Reader(
        "arrays of an analysis",
        "runs/tiny/results/trajectory-*/step-*.npy",
        "npy",
        (_command("analyse", "RUN", "--what", "essential-dynamics"), _entry),
        content=_entry,
    ),
    Reader("sampler settings of a calibration", "sampler.yaml", "yaml", (_command("llc", "RUN", "--config", "FILE"),)),
    Reader(".env", ".env", "text", (_environment,)),
    Reader("W&B's names of swept keys", "params.yaml", "yaml", (_swept_names,)),
    Reader("sweep.log", "runs/tiny/sweep.log", "text", (_last_line,)),
    Reader("digests of the compiler's cache", "cache/digests.json", "json", (_clean_cache, _clean_cache)),
    Reader("programs of the compiler's cache", "cache/program.so", "bytes", (_clean_cache,), content=_cached_program),
    Reader("prompt, JSON", "prompt.json", "json", (PREDICT,)),
    Reader("prompt, CSV", "prompt.csv", "csv", (PREDICT,)),
    Reader("older checkpoint, icr", "icr/*.pt", "bytes", (import_from("icr"),)),
    Reader("older checkpoint, timaeus", "timaeus/1.pt", "bytes", (TIMAEUS,)),
    Reader("older checkpoint, raventos", "raventos/checkpoint_500/checkpoint", "bytes", (RAVENTOS,)),
    Reader("older settings, raventos", "raventos/config.json", "json", (RAVENTOS,)),
    Reader("older tasks", "tasks.npy", "npy", (RAVENTOS,)),
    Reader("older language model, format A", "lm-a/checkpoints/*.pth", "bytes", (import_from("lm-a"),)),
    Reader(
        "older language model, format B",
        "lm-b/model.safetensors",
        "foreign safetensors",
        (import_from("lm-b", "--step", "1"),),
    ),
    Reader("older settings, format B", "lm-b/config.json", "json", (import_from("lm-b", "--step", "1"),)),
    Reader("older text, format B", "lm-b/model.yaml", "text", (import_from("lm-b", "--step", "1"),)),
)

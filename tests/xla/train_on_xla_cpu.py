# ruff: noqa: E402
"""Train tiny runs on XLA's CPU backend, and compare them with the same runs without XLA. No TPU is needed.

XLA traces a step into a graph and compiles the graph, on a CPU as on a TPU. So this program can show that `icl`'s step compiles
only once, never waits for the host, draws the same prompts and ends with the same numbers. torch_xla 2.9 needs torch 2.9, so the
program needs a separate environment, with torch's CPU build. It takes a few minutes:

    python3 -m venv xla-env && xla-env/bin/pip install -e '.[tpu]'
    xla-env/bin/python tests/xla/train_on_xla_cpu.py

The program prints one line for each check, and its exit status is 0 if all checks pass. It imports torch_xla first, because torch
looks for devices that support gradients only once, at the first gradient.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(PJRT_DEVICE="CPU", WANDB_MODE="disabled")
os.environ.pop("AWS_BUCKET_NAME", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch_xla

XLA = torch_xla.device()

import lightning.pytorch as pl
import pandas as pd
import torch
from tiny_runs import TINY, change
from torch_xla.core import xla_model
from torch_xla.debug import metrics

from icl import rng
from icl.runs.checkpoints import checkpoint_files, load_checkpoint_file
from icl.tasks.prompts import prompt_source
from icl.training import run as training
from icl.training.data import PromptStream

STEPS, LOG_EVERY, STOP_AT = 160, 20, 90
CONFIG = change(
    TINY,
    trainer={"max_steps": STEPS, "log_every": LOG_EVERY},
    evaluation={"every": 2 * LOG_EVERY},
    checkpoints={"every": 2 * LOG_EVERY, "num_log": 0, "resume_seconds": 3600.0},
)
TOLERANCE = STEPS * torch.finfo(torch.float32).eps
"""Largest relative difference between backends: one rounding in the last place per step."""
COMPILED, READ = "CompileTime", "TransferFromDeviceTime"


class Watch(pl.Callback):
    """Count what XLA compiles and reads in every step, including the work of the callbacks, and stop a run at a given step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.counts: dict[int, dict[str, int]] = {}
        self._last = self._now()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Send SIGTERM, as a pre-empted machine would, so that the run saves after this step."""
        if trainer.global_step + 1 == self.stop_at:
            signal.raise_signal(signal.SIGTERM)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Count this step. First wait for XLA, which works asynchronously."""
        xla_model.wait_device_ops()
        now = self._now()
        self.counts[trainer.global_step] = {name: now[name] - self._last[name] for name in now}
        self._last = now

    def total(self, name: str, steps: Sequence[int]) -> int:
        """Return the sum of a count over some steps."""
        return sum(self.counts[step][name] for step in steps)

    def _now(self) -> dict[str, int]:
        return {name: (metrics.metric_data(name) or (0,))[0] for name in (COMPILED, READ)}


class Check(NamedTuple):
    """One line of the report."""

    what: str
    found: Any
    expected: str
    is_good: bool


def at_most(what: str, found: float, bound: float) -> Check:
    """Return a check that a number is at most its bound."""
    return Check(what, f"{found:.1e}", f"<= {bound:.1e}", found <= bound)


def equal(what: str, found: Any, expected: Any) -> Check:
    """Return a check that a value equals the expected one."""
    return Check(what, found, str(expected), found == expected)


def train(
    place: Path, kind: str, *, seeds: Sequence[int] = (0,), stop_at: int | None = None
) -> tuple[list[Path], Watch]:
    """Train or resume runs through the real entry point. Return their folders, and the callback that watched them."""
    configs = [change(CONFIG, trainer={"accelerator": kind}, seeds={"model": seed, "data": seed}) for seed in seeds]
    folders = [place / f"seed{seed}" for seed in seeds]
    watch, make = Watch(stop_at), training.make_callbacks
    training.make_callbacks = lambda *settings: [*make(*settings), watch]
    try:
        training.train_population(configs, folders=folders)
    finally:
        training.make_callbacks = make
    return folders, watch


def table(folder: Path) -> pd.DataFrame:
    """Return a run's `metrics.csv`."""
    return pd.read_csv(folder / "metrics.csv", index_col="step")


def difference(first: Path, second: Path) -> float:
    """Return the largest relative difference of two runs' losses. It is infinite if their steps differ."""
    columns = ["train/loss", "eval/pretrain/loss", "eval/true/loss"]
    ours, theirs = table(first)[columns], table(second)[columns]
    same = ours.index.equals(theirs.index) and ours.index[-1] == STEPS and ours.isna().equals(theirs.isna())
    return float(((ours - theirs) / theirs).abs().max(axis=None)) if same else float("inf")


def are_identical(first: Path, second: Path) -> bool:
    """Return whether two runs have bit-identical metrics and weights."""
    digests = [[load_checkpoint_file(file).digest for file in checkpoint_files(run)] for run in (first, second)]
    return digests[0] == digests[1] and table(first).equals(table(second))


def check_prompts() -> list[Check]:
    """Check that the counter-based streams give the same numbers as on the CPU."""
    key, steps, indices = rng.stream(3, "xla"), torch.tensor([0, 63, 2**40]), torch.arange(1000)
    here = rng.integers(key, steps, indices, 2**31 - 1)
    there = rng.integers(key, steps.to(XLA), indices.to(XLA), 2**31 - 1).cpu()
    samples = [prompt_source(CONFIG, stream="train").sample(range(64, 72), range(8), device=d) for d in ("cpu", XLA)]
    gap = max(float((one - other.cpu()).abs().max()) for one, other in zip(*samples, strict=True))
    return [
        equal("random integers that differ from the CPU's", int((here != there).sum()), 0),
        at_most("largest difference of a prompt's numbers from the CPU's", gap, 1e-6),
    ]


def check_steps(watch: Watch) -> list[Check]:
    """Check that the steady state compiles nothing, and that the host reads only at steps with a row to write.

    The steady state begins after the start of the second block of prompts, and ends before the last step. XLA compiles the
    numbers 0 and 1 into a graph, and passes all other numbers as arguments. So the first block (from step 0) and the last
    update (with rate 0) have separate graphs.
    """
    block = PromptStream([CONFIG], lambda: 0).block
    steady = range(block + 2, STEPS)
    assert (
        2 * LOG_EVERY < steady[0] < 2 * block + 1 < STEPS
    )  # each kind of step occurs before and after `steady` begins
    quiet = [step for step in range(2, STEPS) if step % LOG_EVERY]
    read = [step for step in range(2, STEPS) if watch.counts[step][READ]]
    return [
        equal(f"graphs compiled in steps {steady[0]} to {STEPS - 1}", watch.total(COMPILED, steady), 0),
        equal(f"reads by the host in the {len(quiet)} steps without a row", watch.total(READ, quiet), 0),
        equal("steps with a row, at which the host reads", len(read), STEPS // LOG_EVERY - 1),
    ]


def run_checks(root: Path) -> list[Check]:
    """Train runs in `root`, and compare them."""
    checks = check_prompts()
    (plain, other), _ = train(root / "cpu", "cpu", seeds=(0, 1))

    (alone,), watch = train(root / "xla", "tpu")
    checks += [at_most(f"losses over {STEPS} steps", difference(alone, plain), TOLERANCE), *check_steps(watch)]

    train(root / "resumed", "tpu", stop_at=STOP_AT)
    (resumed,), _ = train(root / "resumed", "tpu")
    same = are_identical(resumed, alone)
    checks.append(equal(f"stopped at step {STOP_AT} and resumed: the same to the bit", same, True))

    for begins, ends in (("cpu", "tpu"), ("tpu", "cpu")):
        train(root / begins / "begun", begins, stop_at=STOP_AT)
        (moved,), _ = train(root / begins / "begun", ends)
        what = f"begun on {begins}, resumed on {ends} at step {STOP_AT}: losses"
        checks.append(at_most(what, difference(moved, plain), TOLERANCE))

    pair, watch = train(root / "pair", "tpu", seeds=(0, 1))
    gap = max(difference(one, two) for one, two in zip(pair, (plain, other), strict=True))
    return [*checks, at_most("a population of two: losses", gap, TOLERANCE), *check_steps(watch)]


def main() -> int:
    """Run all checks and print the table. Return the exit status."""
    with tempfile.TemporaryDirectory() as scratch:
        checks = run_checks(Path(scratch))
    print(f"\n{'':4}  {'on XLA (cpu: plain torch)':60}  {'found':>8}  expected")
    for check in checks:
        print(f"{'ok' if check.is_good else 'FAIL':4}  {check.what:60}  {check.found!s:>8}  {check.expected}")
    num_failed = sum(not check.is_good for check in checks)
    print(f"{num_failed} of {len(checks)} checks failed." if num_failed else "All checks hold.")
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())

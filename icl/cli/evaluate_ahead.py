"""Estimate the work of `icl evaluate` before it begins: the number of checkpoints, and the time that they take."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from icl.config import RunConfig
from icl.config.validation import UserError

_SHARE = 16
"""Ratio of the number of prompts in a full evaluation to the number in the larger of the two trials (`_seconds`)."""
_MOST = 256
"""Maximum number of prompts per set in the larger trial."""


class _Group(NamedTuple):
    """Runs with the same model and task. Evaluating a checkpoint takes equally long for all runs of a group."""

    config: RunConfig
    file: Path
    """A checkpoint of one of the runs."""
    num_checkpoints: list[int]
    """Number of checkpoints of each run."""


def work_ahead(checkpoints: Iterable[Sequence[Path]], *, num_prompts: int | None, num_ood_prompts: int | None) -> str:
    """Return a sentence with the number of runs, the number of checkpoints, and an estimate of the evaluation time.

    The estimate comes from trials with few prompts. It does not subtract the checkpoints whose results are already stored.

    Args:
        checkpoints: The files to evaluate, for each run. The estimate of the time ignores a run whose first file cannot be read.
        num_prompts: Number of prompts per set; None uses each run's `evaluation.num_prompts`.
        num_ood_prompts: Number of prompts in each set except `pretrain` (the training tasks); None uses `num_prompts`.
    """
    runs = list(checkpoints)
    seconds = sum((_seconds(group, num_prompts, num_ood_prompts) for group in _groups(runs)), start=0.0)
    work = (
        f"{len(runs):,} runs, {sum(map(len, runs)):,} checkpoints: about {_told(seconds)} if no checkpoint is done yet"
    )
    return f"{work}; finished checkpoints are not evaluated again."


def _groups(runs: Sequence[Sequence[Path]]) -> list[_Group]:
    from icl.runs.checkpoints import load_checkpoint_file

    groups: dict[object, _Group] = {}
    for files in runs:
        try:
            config = load_checkpoint_file(files[0]).config if files else None
        except UserError:  # the error is reported when the run is evaluated
            config = None
        if config is not None:
            group = groups.setdefault((config.model, config.task, config.language), _Group(config, files[0], []))
            group.num_checkpoints.append(len(files))
    return list(groups.values())


def _seconds(group: _Group, num_prompts: int | None, num_ood_prompts: int | None) -> float:
    """Return the estimated time for a group, in seconds.

    The time has three parts: the time to sample the prompts once, a constant time per checkpoint, and a time per checkpoint in proportion
    to the number of prompts. Two trials with different numbers of prompts tell the constant time from the proportional time.
    """
    import torch

    from icl.analysis.run import torch_device

    wanted = num_prompts or group.config.evaluation.num_prompts
    least = [2 / wanted, max(2, min(wanted // _SHARE, _MOST)) / wanted]
    try:
        (_, constant), (first, again) = (
            _trial(group.file, share, wanted, num_ood_prompts or wanted) for share in least
        )
    except UserError:  # the error is reported when the run is evaluated
        return 0.0
    side_by_side = torch.get_num_threads() if torch_device().type == "cpu" else 1
    scale = 1 / least[1]
    sets = scale * max(0.0, first - again)
    checkpoint = constant + scale * max(0.0, again - constant) / side_by_side
    return sets + sum(group.num_checkpoints) * checkpoint


def _trial(file: Path, share: float, num_prompts: int, num_ood_prompts: int) -> tuple[float, float]:
    """Evaluate a checkpoint twice with the fraction `share` of the prompts.

    Return the seconds of both evaluations. Only the first evaluation samples the prompts.
    """
    from icl.whole_runs import RunEvaluator

    few = [max(2, round(share * number)) for number in (num_prompts, num_ood_prompts)]
    evaluate = RunEvaluator(num_prompts=few[0], num_ood_prompts=few[1])
    times = [time.perf_counter()]
    for _ in range(2):
        evaluate(file)
        times.append(time.perf_counter())
    return times[1] - times[0], times[2] - times[1]


def _told(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(1, seconds):.0f} s"

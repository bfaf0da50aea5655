"""`icl llc`: local learning coefficients of a run's saved steps; their calibration; the sampler's test on known answers."""

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from icl.commands.llc_ahead import require_rescalable, require_step, work_ahead
from icl.commands.llc_rows import log_rows, shown, verdicts, write_rows
from icl.commands.outputs import require_output_table
from icl.config import RunConfig, SamplerConfig, flatten
from icl.presets import run_name, sampler_name
from icl.reading import is_beyond_floats
from icl.resolve import (
    OPTIONS,
    POINT_VARIABLE,
    read_config_files,
    read_points,
    read_words,
    refuse_conflicts,
    resolve,
    settings_parser,
)
from icl.runs import RunFolder, local_root, require_place, run_of
from icl.validation import ConfigError, UserError, require_number

if TYPE_CHECKING:
    import pandas as pd

HELP = "local learning coefficients with verdicts; --calibrate, --self-test"

_USAGE = """\
usage: icl llc [RUN|CHECKPOINT] [--steps STEPS] [--sampler.key VALUE ...] [--config FILE] [--out FILE]
       icl llc [RUN] --published | --calibrate | --rescale C
       icl llc --self-test [--out FILE]

Estimate the local learning coefficient (LLC) at saved steps of a run, each with standard error, diagnostics and verdict.
What is done is kept: the same command goes on after an interruption. RUN is a folder or a run's name; without it, the
run is the one that `icl train` makes of the same settings. Exits non-zero if every estimate is invalid, except as a point
of a sweep, where that is a result.

  --steps STEPS    all, last, a list 1,2,3 or 1 2 3, a range 0:1000:100 (default: the run's `sampler.steps`)
  --config FILE    settings from a file, such as that of --calibrate; of several files the later wins
  --out FILE       also write the rows to FILE (.csv or .json)
  --published      the sampler settings of Hoogland et al. 2024, and what they measure
  --calibrate      choose lr, nbeta, localization and burn-in by a search over a few checkpoints (or over --steps): some
                   minutes on a CPU, told beforehand; interrupted, it starts over
  --rescale C      a control: also estimate with weights rescaled by C, the function unchanged
  --self-test      run the sampler on losses whose learning coefficient is known, in about a minute; no run needed

examples:
  icl llc runs/quickstart
  icl llc runs/quickstart --steps last --sampler.num_draws 1000
  icl llc runs/quickstart --calibrate
  icl llc runs/quickstart --config runs/quickstart/results/llc-calibration.yaml
  icl llc --self-test

settings (later wins: the run's own < --config files in their order < command line):
"""


class _Job(NamedTuple):
    """What is to be estimated."""

    path: Path
    config: RunConfig
    """With the sampler's settings."""
    mode: str
    rescale: float | None
    out: Path | None


def run(words: list[str]) -> int:
    """Estimate, or calibrate, or test; 1 if nothing usable came out."""
    if "-h" in words or "--help" in words:
        settings = settings_parser("sampler", prog="icl llc").format_help().partition("\n\n")[2]
        print(_USAGE + re.sub(r"  --\w+ CONFIG +Path to a configuration file\.\n", "", settings))
        return 0
    path, flags, given = read_words("llc", words)
    if len(flags) > 1:
        raise ConfigError(f"One of {' and '.join(f'--{flag}' for flag in sorted(flags))} at a time.")
    if "self-test" in flags:
        if path is not None or set(given) - {"out"}:
            raise ConfigError("`--self-test` takes no run and no settings; only --out can be given with it.")
        return _self_test(_table_file(given))
    options = {name: given.pop(name) for name in OPTIONS["llc"] if name in given}
    if "steps" in options:
        if given.get("sampler.steps", options["steps"]) != options["steps"]:
            raise ConfigError(
                "`--steps` and `--sampler.steps` are the same setting and differ here; give one of the two."
            )
        given["sampler.steps"] = options["steps"]
    if os.environ.get("WANDB_SWEEP_ID"):
        from icl.training.wandb_agent import in_sweep

        if in_sweep():
            return _sample_point(path, flags, options, given)
    (swept, *more) = read_points()
    if more:
        raise ConfigError("`icl llc` takes one point of a sweep at a time; leave out --pack.")
    return _work(_job(path, flags, options, swept, given), flags)


def _sample_point(path: str | None, flags: frozenset[str], options: Mapping[str, Any], given: dict[str, str]) -> int:
    """Work on the point that `wandb agent` handed over; however it ends, W&B learns the exit status."""
    from icl.training.wandb_agent import describe_run, join_sweep, swept_settings
    from icl.training.wandb_log import end_run, exit_code_of

    try:
        base = _job(path, flags, options, {}, given).config  # whether its run exists is the point's affair
    except UserError as error:  # such as a point's values that came by `${args}`
        end_run(join_sweep({}), exit_code_of(error))
        raise
    wandb_run = join_sweep(base.to_dict())
    try:
        swept = swept_settings(wandb_run, base)
        job = _job(path, flags, options, swept, given)
        describe_run(wandb_run, job.config)
        wandb_run.name = f"{run_name(job.config)}/llc/{sampler_name(job.config)}"
        status = _work(job, flags, wandb_run)
    except BaseException as error:
        end_run(wandb_run, exit_code_of(error))
        raise
    end_run(wandb_run, status)
    return status


def _job(
    path: str | None,
    flags: frozenset[str],
    options: Mapping[str, Any],
    swept: Mapping[str, Any],
    given: Mapping[str, Any],
) -> _Job:
    """The run and its sampler's settings, from all their sources."""
    filed = read_config_files(options)
    published = _published() if "published" in flags else {}
    refuse_conflicts(swept, given)
    out = _table_file(options, path, *options.get("config", ()))
    if path is None:
        config = resolve(*filed, published, swept, given)
        place = local_root() / run_name(config)
    else:
        for key in [key for layer in (*filed, dict(swept), dict(given)) for key in flatten(layer)]:
            if not key.startswith("sampler."):
                raise ConfigError(
                    f"`{key}` belongs to {path}, which is trained already; only `sampler` settings can be given."
                )
        place = require_place(path)
        config = resolve(_saved_config(place).to_dict(), published, *filed, swept, given)
        if place.is_file() and "sampler.steps" in given:  # the run's own choice is not meant for one file
            require_step(place, config.sampler.steps)
    mode = "" if not published else _published_mode(config.sampler)
    rescale = _number("rescale", options["rescale"]) if "rescale" in options else None
    return _Job(place, config, mode, rescale, out)


def _table_file(options: Mapping[str, Any], *inputs: str | None) -> Path | None:
    """Return the file of --out, which can be written and is none of the files that are read."""
    if "out" not in options:
        return None
    if not options["out"].strip():
        raise ConfigError("`--out` must name a file, got nothing.")
    out = Path(options["out"])
    require_output_table(out, *inputs)
    return out


def _saved_config(place: Path) -> RunConfig:
    """That of the run's folder, or else of its first checkpoint."""
    from icl.sampling.run import run_files

    folder = run_of(place)
    return folder.read_config() if folder.config_file.is_file() else run_files(place)[1]


def _published() -> dict[str, Any]:
    from icl.sampling.settings import PUBLISHED

    own = dataclasses.asdict(PUBLISHED)
    return {f"sampler.{name}": own[name] for name in own if name not in ("steps", "memory", "num_init_batches")}


def _published_mode(sampler: SamplerConfig) -> str:
    """The label of the rows, with what was changed."""
    told = flatten({"sampler": dataclasses.asdict(sampler)})
    changes = [f"{key.partition('.')[2]}={told[key]}" for key, value in _published().items() if told[key] != value]
    return ", ".join(["published", *changes])


def _work(job: _Job, flags: frozenset[str], wandb_run: Any = None) -> int:
    if not job.path.exists():
        raise ConfigError(
            f"There is no run {job.path}; train it by `icl train` with the same settings, or name another: `icl llc RUN`."
        )
    if "calibrate" in flags:
        if job.rescale is not None or job.path.is_file():
            raise ConfigError("`--calibrate` wants a run's folder, and no --rescale.")
        try:
            return _calibrate(job)
        except KeyboardInterrupt:
            print("icl: interrupted; a calibration keeps nothing, so the same command starts over.", file=sys.stderr)
            return 130
    return _estimate(job, wandb_run)


def _estimate(job: _Job, wandb_run: Any) -> int:
    """Estimate, print, draw; 1 if every estimate is invalid."""
    from icl.delivery import send_results
    from icl.sampling.run import estimate_run, measured

    sampler = job.config.sampler
    if job.rescale is not None:
        require_rescalable(job.path, job.rescale)
    print(work_ahead(job.path, sampler, mode=job.mode), file=sys.stderr, flush=True)
    found = estimate_run(job.path, sampler, mode=job.mode)
    print(shown(found.table))
    print(f"\n{verdicts(found.table)}")
    print(f"{'Published settings. ' if job.mode else ''}{measured(found.table, found.trivial_loss)}")
    table = found.table
    if job.rescale is not None:
        table = _control(job, table)
    if job.out is not None:
        print(f"Output  {write_rows(job.out, table)}")
    if wandb_run is not None:
        log_rows(wandb_run, table)
    if not job.path.is_file():
        folder = run_of(job.path)
        print(f"Table   {folder.results / 'llc.csv'} (all settings; these are `{table['settings'].iloc[0]}`)")
        for file in _draw(folder, table["settings"].iloc[0], job, found.trivial_loss):
            print(f"Figure  {file}")
        if folder.config_file.is_file():
            send_results(folder)
    if not found.is_usable:
        print("icl: every estimate is invalid; `--calibrate` looks for settings that are not.", file=sys.stderr)
        in_sweep = wandb_run is not None or POINT_VARIABLE in os.environ
        return 0 if in_sweep else 1  # W&B's agent gives up after a few failures, and a sweep is there to find them
    return 0


def _control(job: _Job, table: "pd.DataFrame") -> "pd.DataFrame":
    """The same with rescaled weights, compared in words."""
    import pandas as pd

    from icl.sampling.rescaling import compare, describe_pair
    from icl.sampling.run import estimate_run

    assert job.rescale is not None
    sampler = job.config.sampler
    print(work_ahead(job.path, sampler, mode=job.mode, rescale=job.rescale), file=sys.stderr, flush=True)
    control = estimate_run(job.path, sampler, mode=job.mode, rescale=job.rescale).table
    print(f"\nControl: {describe_pair(job.config.model)} rescaled by {job.rescale:g}, the function unchanged.\n")
    print(shown(control))
    print("\n" + "\n".join(compare(table, control)))
    return pd.concat([table, control], ignore_index=True)


def _calibrate(job: _Job) -> int:
    """Search, print the table and the choice; 1 if no setting is healthy."""
    from icl.delivery import send_results
    from icl.plotting.llc import plot_calibration
    from icl.plotting.style import save_figure
    from icl.sampling.calibration import calibrate
    from icl.sampling.progress import say

    folder = run_of(job.path)
    folder.require_own_files()
    result = calibrate(job.path, job.config.sampler, say=say)
    print(f"\n{result.summary}")
    print(f"Table   {folder.write_result('llc-calibration.csv', result.table.to_csv(index=False))}")
    figure = plot_calibration(result.table, result.traces, title=f"{folder.path.name}: calibration of the sampler")
    print(f"Figure  {save_figure(figure, folder.figures / 'llc-calibration.png')}")
    if job.out is not None:
        print(f"Output  {write_rows(job.out, result.table)}")
    if result.chosen is not None:
        place = folder.write_result("llc-calibration.yaml", result.as_yaml())
        print(f"Chosen  {place}\n\n  icl llc {job.path} --config {place}")
    if folder.config_file.is_file():
        send_results(folder)
    return 0 if result.chosen is not None else 1


def _draw(folder: RunFolder, settings: str, job: _Job, trivial_loss: float) -> list[Path]:
    """The curve of all that is kept under these settings, and the traces of a few steps.

    The run's own settings and the published ones have a name of their own; figures of others end in their hash.
    """
    from icl.plotting.llc import plot_llc, plot_traces, read_stages
    from icl.plotting.llc_estimate import plot_estimate
    from icl.plotting.style import save_figure
    from icl.sampling.records import as_table, read_all

    records = [record for record in read_all(folder) if record.row["settings"] == settings]
    table = as_table(records)
    own = _saved_config(job.path).sampler == dataclasses.replace(job.config.sampler, steps="all")
    label = "published" if job.mode == "published" else "" if own else settings
    suffix = f"-{label}" if label else ""
    title = f"{folder.path.name}{f'   ({job.mode})' if job.mode else ''}"
    if len(records) == 1:
        curve = plot_estimate(records[0], trivial_loss, title=title)
    else:
        curve = plot_llc(table, trivial_loss, title=title, stages=read_stages(folder))
    return [
        save_figure(curve, folder.figures / f"llc{suffix}.png"),
        save_figure(plot_traces(records, title=title), folder.figures / f"llc-traces{suffix}.png"),
    ]


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ConfigError(f"`--{name}` must be a number, got {text!r}.") from None
    if is_beyond_floats(text, number):
        raise ConfigError(f"`--{name}` is too large or too small for a floating-point number, got {text}.")
    require_number(f"--{name}", number, "positive")
    return number


def _self_test(out: Path | None) -> int:
    """1 if an estimate disagrees with the truth."""
    import pandas as pd

    from icl.sampling.self_test import problems, self_test, truth_table

    total = len(problems())
    rows = self_test(lambda number, name: print(f"{number}/{total} {name}", file=sys.stderr, flush=True))
    print(truth_table(rows))
    if out is not None:
        print(f"Output  {write_rows(out, pd.DataFrame([dataclasses.asdict(row) for row in rows]))}")
    wrong = sum(not row.agrees for row in rows)
    print(f"{len(rows) - wrong} of {len(rows)} estimates agree with the truth.")
    return 1 if wrong else 0

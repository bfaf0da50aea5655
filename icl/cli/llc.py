"""`icl llc`: estimate local learning coefficients, choose the sampler's settings, or test the sampler on known answers."""

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icl.cli.llc_output import (
    compare_rescaled,
    count_verdicts,
    describe_bug,
    describe_rise,
    describe_verdicts,
    describe_work,
    draw_figures,
    format_rows,
    log_rows,
    write_rows,
)
from icl.cli.llc_settings import Job, output_file, read_job, require_rescalable, saved_config
from icl.command_line import llc_parser
from icl.config.validation import ConfigError
from icl.resolve import POINT_VARIABLE, read_points
from icl.run_names import sampler_name
from icl.runs.folder import run_of

if TYPE_CHECKING:
    from icl.sampling.components import Division
    from icl.sampling.run import Estimates

HELP = "estimate local learning coefficients with verdicts; calibrate or test the sampler"


def run(words: list[str]) -> int:
    """Estimate LLCs, calibrate the sampler or test it. Return 1 if there is no usable result."""
    parsed = llc_parser().parse_args(words)
    path, flags, given = parsed.path, frozenset(parsed.flags), parsed.settings
    own = {name: getattr(parsed, name) for name in ("config", "out", "steps", "rescale", "components", "stderr")}
    options = {name: value for name, value in own.items() if value not in (None, [])}
    if len(flags) > 1:
        raise ConfigError(
            f"{' and '.join(f'--{flag}' for flag in sorted(flags))} cannot be combined; give one at a time."
        )
    if "self-test" in flags:
        if path is not None or given or set(options) - {"out"}:
            raise ConfigError("`--self-test` takes no run and no settings, only --out.")
        return _self_test(output_file(options))
    if "steps" in options:
        if given.get("sampler.steps", options["steps"]) != options["steps"]:
            raise ConfigError(
                "`--steps` and `--sampler.steps` are the same setting but have different values; give only one of them."
            )
        given["sampler.steps"] = options["steps"]
    if os.environ.get("WANDB_SWEEP_ID"):
        from icl.training.wandb.agent import in_sweep

        if in_sweep():
            return _sample_point(path, flags, options, given)
    (swept, *more) = read_points()
    if more:
        raise ConfigError("`icl llc` takes one point of a sweep at a time; leave out --pack.")
    return _work(read_job(path, flags, options, swept, given), flags)


def _sample_point(path: str | None, flags: frozenset[str], options: Mapping[str, Any], given: dict[str, str]) -> int:
    """Estimate the LLCs for the sweep point that `wandb agent` assigned to this program."""
    from icl.training.wandb.agent import describe_run, work_at_point

    def work(wandb_run: Any, swept: dict[str, Any]) -> int:
        job = read_job(path, flags, options, swept, given)
        describe_run(wandb_run, job.config, suffix=f"/llc/{sampler_name(job.config)}")
        return _work(job, flags, wandb_run)

    # The first function is called before the settings of the sweep point are known. The run's folder may not exist then. This is no
    # problem, because `read_job` only reads settings.
    return work_at_point(lambda: read_job(path, flags, options, {}, given).config, work)


def _work(job: Job, flags: frozenset[str], wandb_run: Any = None) -> int:
    if not job.path.exists():
        raise ConfigError(
            f"There is no run {job.path}; train it with `icl train` and the same settings, or name another run: `icl llc RUN`."
        )
    if job.components is not None and (job.rescale is not None or "calibrate" in flags):
        raise ConfigError("`--components` cannot be combined with --calibrate or --rescale; give one at a time.")
    if job.components is not None:
        return _estimate_components(job, job.components)
    if "calibrate" not in flags:
        return _estimate(job, wandb_run)
    if job.rescale is not None or job.path.is_file():
        raise ConfigError(
            "`--calibrate` needs a run's folder, not a single checkpoint, and cannot be combined with --rescale."
        )
    try:
        return _calibrate(job)
    except KeyboardInterrupt:
        print(
            "icl: interrupted; the results for finished settings are stored. Run the same command again to continue.",
            file=sys.stderr,
        )
        return 130


def _estimate(job: Job, wandb_run: Any) -> int:
    """Estimate the LLCs, print and draw them. Return 1 if every estimate is invalid and the run is not a point of a sweep, otherwise 0."""
    import pandas as pd

    from icl.sampling.rescaling import describe_pair

    if job.rescale is not None:
        require_rescalable(job.path, job.rescale)
    estimates = _run_sampler(job)
    table = estimates.table
    print(f"{format_rows(table)}\n\n{describe_verdicts(table)}")
    print(f"{'Published settings. ' if job.mode else ''}{describe_rise(table, estimates.trivial_loss)}")
    if bug := describe_bug(table):
        print(bug)
    if job.rescale is not None:
        control = _run_sampler(job, job.rescale).table
        print(
            f"\nControl: {describe_pair(job.config.model)} rescaled by {job.rescale:g}, with the model's function unchanged.\n"
        )
        print(f"{format_rows(control)}\n\n" + "\n".join(compare_rescaled(table, control)))
        table = pd.concat([table, control], ignore_index=True)
    if job.out is not None:
        print(f"Output  {write_rows(job.out, table)}")
    if wandb_run is not None:
        log_rows(wandb_run, table)
    if not job.path.is_file():
        _draw(job, table["settings"].iloc[0], estimates.trivial_loss)
    if not estimates.is_usable:
        print("icl: every estimate is invalid; search for better settings with `--calibrate`.", file=sys.stderr)
        in_sweep = wandb_run is not None or POINT_VARIABLE in os.environ
        # In a sweep over settings, invalid estimates are results too. Also, W&B's agent stops after a few programs have failed.
        return 0 if in_sweep else 1
    return 0


def _estimate_components(job: Job, division: "Division") -> int:
    """Estimate the refined LLC of every component, print and draw the results. Return 1 if every estimate is invalid."""
    import pandas as pd

    from icl.plotting.llc_components import plot_components
    from icl.plotting.style import save_figure
    from icl.runs.delivery import send_results
    from icl.sampling.components import component_names
    from icl.sampling.records import COMPONENT_TABLE, SUSCEPTIBILITY_TABLE, susceptibility_table
    from icl.sampling.run import estimate_run

    names = component_names(saved_config(job.path).model, division)
    print(describe_work(job.path, job.config.sampler, mode=job.mode, components=names), file=sys.stderr, flush=True)
    estimates = [estimate_run(job.path, job.config.sampler, mode=job.mode, component=name) for name in names]
    records = [record for estimate in estimates for record in estimate.records]
    table = pd.concat([estimate.table for estimate in estimates], ignore_index=True)
    last = table[table["step"] == table["step"].max()]
    print(
        f"Step {table['step'].max():,}:\n{format_rows(last, first=('component', 'num_params'))}\n\n{count_verdicts(table)}"
    )
    if job.out is not None:
        print(f"Output  {write_rows(job.out, table)}")
    if not job.path.is_file():
        run = run_of(job.path)
        print(f"Table   {run.results / COMPONENT_TABLE}\nTable   {run.results / SUSCEPTIBILITY_TABLE}")
        figure = plot_components(
            table, susceptibility_table(records), title=f"{run.path.name}: refined LLCs of {division}"
        )
        print(f"Figure  {save_figure(figure, run.figures / f'llc-{division}.png')}")
        if run.config_file.is_file():
            send_results(run)
    return 0 if any(estimate.is_usable for estimate in estimates) else 1


def _run_sampler(job: Job, rescale: float = 1.0) -> "Estimates":
    from icl.sampling.run import estimate_run

    sampler = job.config.sampler
    print(describe_work(job.path, sampler, mode=job.mode, rescale=rescale), file=sys.stderr, flush=True)
    return estimate_run(job.path, sampler, mode=job.mode, rescale=rescale)


def _draw(job: Job, settings: str, trivial_loss: float) -> None:
    """Draw the results of a run, and send them to its store.

    With the sampler settings in the run's `config.yaml`, the names of the figures are `llc.png` and `llc-traces.png`. With the published
    settings, the names end in `-published`. With any other settings, they end in the hash of the settings.
    """
    from icl.runs.delivery import send_results

    run = run_of(job.path)
    print(f"Table   {run.results / 'llc.csv'} (all settings; these are `{settings}`)")
    is_default = saved_config(job.path).sampler == dataclasses.replace(job.config.sampler, steps="all")
    label = "published" if job.mode == "published" else "" if is_default else settings
    title = f"{run.path.name}{f'   ({job.mode})' if job.mode else ''}"
    for file in draw_figures(run, settings, label=label, title=title, trivial_loss=trivial_loss):
        print(f"Figure  {file}")
    if run.config_file.is_file():
        send_results(run)


def _calibrate(job: Job) -> int:
    """Search for settings of the sampler that pass the checks. Print and store the table and the chosen settings.

    Return 1 if no settings pass the checks.
    """
    from icl.plotting.llc import plot_calibration
    from icl.plotting.style import save_figure
    from icl.runs.delivery import send_results
    from icl.sampling.calibration import calibrate

    run = run_of(job.path)
    run.require_own_files()
    result = calibrate(job.path, job.config.sampler, say=_say)
    print(f"\n{result.summary}")
    print(f"Table   {run.write_result('llc-calibration.csv', result.table.to_csv(index=False))}")
    figure = plot_calibration(result.table, result.traces, title=f"{run.path.name}: calibration of the sampler")
    print(f"Figure  {save_figure(figure, run.figures / 'llc-calibration.png')}")
    if job.out is not None:
        print(f"Output  {write_rows(job.out, result.table)}")
    if result.chosen is not None:
        file = run.write_result("llc-calibration.yaml", result.as_yaml())
        print(f"Chosen  {file}\n\n  icl llc {job.path} --config {file}")
    if run.config_file.is_file():
        send_results(run)
    return 0 if result.chosen is not None else 1


def _say(line: str) -> None:
    """Print a line above the progress bar at once, even if the output goes to a pipe."""
    from tqdm import tqdm

    tqdm.write(line)
    sys.stdout.flush()


def _self_test(out: Path | None) -> int:
    """Test the sampler on losses with a known LLC. Return 1 if an estimate disagrees with its known LLC."""
    import pandas as pd

    from icl.sampling.self_test import problems, self_test, truth_table

    total = len(problems())
    rows = self_test(lambda number, name: print(f"{number}/{total} {name}", file=sys.stderr, flush=True))
    print(truth_table(rows))
    if out is not None:
        print(f"Output  {write_rows(out, pd.DataFrame([dataclasses.asdict(row) for row in rows]))}")
    num_wrong = sum(not row.agrees for row in rows)
    print(f"{len(rows) - num_wrong} of {len(rows)} estimates agree with the truth.")
    return 1 if num_wrong else 0

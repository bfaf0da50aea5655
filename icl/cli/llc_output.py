"""The output of `icl llc`: printed lines, figures, files and W&B rows."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icl.config import SamplerConfig
from icl.files.writing import plain_rows, table_format, write_atomically
from icl.runs.folder import RunFolder, run_of

if TYPE_CHECKING:
    import pandas as pd

_SHOWN_COLUMNS = (
    *("step", "llc", "stderr", "bias_bound", "drop_at_mean", "init_loss", "mean_loss", "trivial_loss", "rhat", "ess"),
    *("num_chains_used", "verdict"),
)
_LOGGED_COLUMNS = (
    *("llc", "stderr", "bias_bound", "drop_at_mean", "init_loss", "mean_loss", "rhat", "ess", "num_chains_used"),
    "verdict",
)


def describe_work(
    path: Path, sampler: SamplerConfig, *, mode: str, rescale: float = 1.0, components: Sequence[str] = ("",)
) -> str:
    """Return a sentence that says at how many steps the LLC remains to be estimated, and how many chains and moves this takes.

    Raises:
        ConfigError: If a requested step is not saved.
    """
    from icl.runs.checkpoints import checkpoint_files, checkpoint_name
    from icl.sampling.records import VERSION, EstimateSettings
    from icl.sampling.run import chosen_files

    files, num_finished = checkpoint_files(path), 0
    if not path.is_file():
        files = chosen_files(files, sampler.steps)
        for component in components:
            settings = EstimateSettings(sampler, mode, rescale, component)
            finished = set(map(checkpoint_name, settings.cache(run_of(path)).steps(settings.key, VERSION)))
            num_finished += sum(file.name in finished for file in files)
    num_left = len(files) * len(components) - num_finished
    steps = f"{len(files)} step{'s' if len(files) != 1 else ''}"
    if len(components) > 1:
        steps = f"{steps} x {len(components)} components"
    subject = f"LLC of {path}{'' if rescale == 1 else f', weights rescaled by {rescale:g}'}"
    if not num_left:
        is_one = len(files) * len(components) == 1
        return f"{subject}: nothing to do, {'the step is' if is_one else f'all {steps} are'} stored."
    work = f"{num_left} of {steps} to do" if num_finished else steps
    num_later = sampler.num_moves - sampler.num_burnin_steps
    kernel = f"{sampler.kernel} with lr {sampler.lr:g}"
    chains = f"{sampler.num_chains} chains x ({sampler.num_burnin_steps} + {num_later}) moves of {kernel}"
    if sampler.target_stderr is not None:
        chains = (
            f"{sampler.num_chains} chains until the standard error is {sampler.target_stderr:g}, "
            f"at most {sampler.num_burnin_steps} + {num_later:,} moves of {kernel} each"
        )
    return f"{subject}: {work}, {chains}{'.' if path.is_file() else '; finished steps are stored.'}"


def format_rows(table: "pd.DataFrame", *, first: Sequence[str] = ()) -> str:
    """Return a table as text: the columns in `first`, then the most important other columns. At most 40 rows are shown."""
    is_language = _loss_name(table).endswith("cross_entropy")
    names = {
        "init_loss": "L(w0)",
        "mean_loss": "E[L]",
        "trivial_loss": "uniform's loss" if is_language else "zero's loss",
    }
    rows = table[[*first, *_SHOWN_COLUMNS]].rename(columns=names)
    return rows.to_string(index=False, float_format="{:.4g}".format, max_rows=40, na_rep="-")


def describe_verdicts(table: "pd.DataFrame") -> str:
    """Describe the last estimate, count the verdicts, and give the reasons for the last `suspect` and the last `invalid` verdict."""
    from icl.sampling.result import headline

    last = table.to_dict("records")[-1]
    lines = [f"LLC{'' if len(table) == 1 else ' of the last step'}: {headline(last)}.", count_verdicts(table)]
    for verdict in ("suspect", "invalid"):
        rows = table.loc[table["verdict"] == verdict]
        if len(rows):
            step, reasons = rows["step"].iloc[-1], rows["reasons"].iloc[-1]
            where = "" if step is None or len(table) == 1 else f" at step {step:,}"
            lines += [f"  {verdict}{where}:", *(f"  - {reason}" for reason in reasons.split("; "))]
    return "\n".join(lines)


def count_verdicts(table: "pd.DataFrame") -> str:
    """Return a sentence with the number of estimates that have each verdict."""
    counts = table["verdict"].value_counts()
    return (
        f"Verdicts: {', '.join(f'{counts[name]} {name}' for name in ('ok', 'suspect', 'invalid') if name in counts)}."
    )


def describe_rise(table: "pd.DataFrame", trivial_loss: float) -> str:
    """Return sentences that say whether the estimates measure the geometry of a basin, or only reflect the loss of the checkpoints."""
    import numpy as np

    from icl.sampling.records import trivial_predictor

    rows = table[np.isfinite(table["mean_loss"].astype(float))]
    if rows.empty:
        return "The loss became infinite or NaN in every chain, so there is no estimate."
    low, high = rows["mean_loss"].min(), rows["mean_loss"].max()
    level = (
        f"E[L] is {low:.4g}" if math.isclose(low, high, rel_tol=1e-3) else f"E[L] is between {low:.4g} and {high:.4g}"
    )
    name = _loss_name(rows)
    trivial = f"predicting {trivial_predictor(name)}"
    if name.endswith("nll"):
        level = f"The loss L is the negative log-likelihood in nats. {level}"
    elif name.endswith("cross_entropy"):
        level = f"The loss L is the cross-entropy in nats per token. {level}"
    facts = f"{level}; the loss of {trivial} is {trivial_loss:.4g}."
    num_lower = int((rows["llc"] + 2 * rows["stderr"] < 0).sum())
    if num_lower:
        facts += f" At {num_lower} of {len(rows)} checkpoints the chains found a lower loss, so these checkpoints are not at a minimum."
    share = (rows["mean_loss"] - rows["init_loss"]) / (trivial_loss - rows["init_loss"]).clip(lower=1e-12)
    num_escaped = int((share > 0.5).sum())
    if not num_escaped:
        rise = f"{max(share.max(), 0):.0%} of the difference between the loss of {trivial} and the checkpoint's loss"
        return f"{facts} The loss rose by at most {rise}. This is no sign that chains left a checkpoint's basin."
    where = f"At {num_escaped} of {len(rows)} checkpoints" if len(rows) > 1 else "At this checkpoint"
    facts += (
        f" {where} the chains left the checkpoint's basin. In this case, the estimate nbeta (E[L] - L(w0)) only reflects the loss L(w0) and is "
        "not a learning coefficient."
    )
    if len(rows) > 2 and rows["init_loss"].std() > 0:
        facts += f" (Correlation of the LLC with -L(w0): {np.corrcoef(rows['llc'], -rows['init_loss'])[0, 1]:.4f}.)"
    return facts


def describe_bug(table: "pd.DataFrame") -> str:
    """Return sentences with the estimate that the published code gives for the last step of a language run.

    Return an empty string if the table has no such estimates.
    """
    from icl.sampling.records import WITH_BUG

    if WITH_BUG not in table:
        return ""
    row = table.iloc[-1]
    return (
        f"The published code subtracts a wrong initial loss. For these chains it gives {row[WITH_BUG]:.4g} (column {WITH_BUG} of llc.csv). "
        f"The estimate with the correct initial loss is {row['llc']:.4g}."
    )


def _loss_name(table: "pd.DataFrame") -> str:
    return str(table["loss_name"].iloc[0]) if "loss_name" in table else "mse"


def compare_rescaled(table: "pd.DataFrame", control: "pd.DataFrame") -> list[str]:
    """Compare estimates with the estimates for rescaled weights. Return a line for each step, and a conclusion."""
    both = table.merge(control, on=["step", "checkpoint_hash"], suffixes=("", "_control"))
    lines, num_different, num_unknown = [], 0, 0
    for row in both.to_dict("records"):
        difference = (row["llc_control"] - row["llc"]) / math.hypot(row["stderr"], row["stderr_control"])
        result = "differs" if abs(difference) > 3 else "agrees" if abs(difference) <= 3 else "cannot be compared"
        num_different += result == "differs"
        num_unknown += math.isnan(difference)
        lines.append(
            f"step {row['step']}: {row['llc']:.4g} ± {row['stderr']:.2g}, rescaled {row['llc_control']:.4g} ± "
            f"{row['stderr_control']:.2g}: {result} ({difference:+.1f} standard errors)"
        )
    conclusion = "there is no sign that the estimate measures the size of the weights."
    if num_different:
        conclusion = "the estimate depends on the size of the weights, although the model's function is the same."
    elif num_unknown:
        conclusion = f"{num_unknown} cannot be compared, because an estimate or its standard error is NaN."
    return [*lines, f"{num_different} of {len(both)} differ: {conclusion}"]


def write_rows(out: Path, table: "pd.DataFrame") -> Path:
    """Write a table as CSV or JSON, chosen by the suffix of the file.

    Raises:
        StorageError: If the file cannot be written.
    """
    if table_format(out) == "csv":
        text = table.to_csv(index=False)
    else:
        text = json.dumps(plain_rows(table), indent=1, allow_nan=False) + "\n"
    write_atomically(out, text.encode())
    return out


def log_rows(wandb_run: Any, table: "pd.DataFrame") -> None:
    """Log a row to W&B for each step after the last step that W&B already has. If W&B fails, print a message and continue."""
    from icl.training.wandb.log import WandbLog

    log = WandbLog(wandb_run, is_lent=True)
    for row in table.to_dict("records"):
        log.log({"step": row["step"], **{f"llc/{name}": row[name] for name in _LOGGED_COLUMNS}})


def draw_figures(run: RunFolder, settings: str, *, label: str, title: str, trivial_loss: float) -> list[Path]:
    """Draw the curve of all stored estimates with the given settings, and the traces of the chains at some steps.

    Args:
        run: The run's folder.
        settings: Hash of the sampler's settings.
        label: Suffix of the file names; empty for no suffix.
        title: The title of the figures.
        trivial_loss: The loss of a trivial predictor (`icl.sampling.prompt_loss.trivial_loss`).
    """
    from icl.plotting.llc import plot_llc, read_stages
    from icl.plotting.llc_estimate import plot_estimate, plot_traces
    from icl.plotting.style import save_figure
    from icl.sampling.records import as_table, read_all

    records = [record for record in read_all(run) if record.row["settings"] == settings]
    suffix = f"-{label}" if label else ""
    if len(records) == 1:
        curve = plot_estimate(records[0], trivial_loss, title=title)
    else:
        curve = plot_llc(as_table(records), trivial_loss, title=title, stages=read_stages(run))
    return [
        save_figure(curve, run.figures / f"llc{suffix}.png"),
        save_figure(plot_traces(records, title=title), run.figures / f"llc-traces{suffix}.png"),
    ]

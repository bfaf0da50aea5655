"""Make the shipped tables from the runs: select rows, thin them, round the numbers, and record where they come from.

`write_tables` reads the results of all runs of one size (`small`, `published-run` or `full`). It writes the tables
`data/<size>/<name>.csv`, which `tools/data/schema.py` describes, and `provenance.json` with the commands, dates, versions and hardware
of each table. It also copies a few small models, so that notebooks can show predictions. If the runs of a table are missing, the table
is not changed, and a message says so.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from icl.evaluation.scores import headlines
from icl.files.writing import write_atomically
from icl.presets import PRESETS
from icl.runs.checkpoints import checkpoint_files, load_checkpoint_file
from icl.runs.folder import RunFolder
from tools.data.schema import LABELS, TABLES, Kind, Table

FOLDER = Path(__file__).resolve().parents[2] / "data"
DIGITS = 5
"""Significant digits of every number. Five are enough: even the most precise numbers have a standard error in the third digit."""
RATIO = 1.2
"""Smallest ratio of two consecutive steps in a thinned table. Only the last two steps may have a smaller ratio."""
MODELS = {"quickstart": (0, 531, 1302, 5000), "L2H4/seed=0": (1465, 500_000)}
"""Steps of each run whose weights are shipped. If a step was not saved, the nearest saved step is used."""
_TRACE_POINTS, _TRACE_CHAINS, _LEARNING_ROWS = 150, 2, 1000

Runs = Mapping[str, RunFolder]


def write_tables(size: str, root: Path, record: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Write all tables for which there are runs. Yield a message about each table, with its number of rows.

    Args:
        size: Name of the size, which is the folder below `data/`.
        root: Folder of the runs.
        record: Record of every phase, from `tools.data.__main__.read_record`.
    """
    runs, out = find_runs(root), FOLDER / size
    provenance: dict[str, Any] = {"size": size, "label": LABELS[size], "tables": {}}
    before: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        before = json.loads((out / "provenance.json").read_bytes())["tables"]
    for name, about in TABLES.items():
        table = MAKERS.get(name, _from_results)(name, runs, root, record)
        if table is None or table.empty:
            if (out / f"{name}.csv").is_file() and name in before:
                provenance["tables"][name] = before[name]
                yield f"{name:20s} not changed, because its runs are missing"
            else:
                yield f"{name:20s} not made, because its runs are missing"
            continue
        text = shipped_text(conform(table, about))
        write_atomically(out / f"{name}.csv", text.encode())
        provenance["tables"][name] = {"rows": len(table), **_origin(about, record)}
        yield f"{name:20s} {len(table):6,} rows  {len(text) / 1000:6.0f} kB"
    write_atomically(out / "provenance.json", (json.dumps(provenance, indent=1) + "\n").encode())
    yield from _copy_models(runs, out / "models")


def find_runs(root: Path) -> dict[str, RunFolder]:
    """Return the finished runs that the tables use, in the order in which figures show them. The keys are the runs' names."""
    folders = [root / "quickstart", *sorted(root.glob("L2H4/seed=*")), *root.glob("ladder/num_tasks=*")]
    runs = [RunFolder(path) for path in folders if (path / "config.yaml").is_file()]
    done = [run for run in runs if (status := run.read_status()) is not None and status.state == "finished"]
    done.sort(key=lambda run: float(run.read_config().task.num_tasks) if "ladder" in run.path.parts else 0)
    return {str(run.path.relative_to(root)): run for run in done}


def shipped_text(table: pd.DataFrame) -> str:
    """Return the content of the file of a shipped table, with rounded numbers."""
    return table.to_csv(index=False, float_format=_rounded)


def _rounded(number: float) -> str:
    """Return a number with `DIGITS` significant digits. Larger numbers, such as steps, keep all digits before the point."""
    return f"{number:.0f}" if abs(number) >= 10**DIGITS else f"{number:.{DIGITS}g}"


def conform(table: pd.DataFrame, about: Table) -> pd.DataFrame:
    """Return a table with the columns of the schema, in the schema's order and types. Numbers that are not finite become empty.

    Raises:
        KeyError: If a column is missing.
    """
    kinds: dict[Kind, str] = {"text": "object", "integer": "Int64", "number": "float64"}
    columns: dict[str, Any] = {name: table[name].astype(kinds[column.kind]) for name, column in about.columns.items()}  # type: ignore[call-overload]
    return pd.DataFrame(columns).replace([np.inf, -np.inf], np.nan)


def few_steps(steps: Sequence[int]) -> list[int]:
    """Return the first step, the last step, and steps between them that are at least a factor `RATIO` apart."""
    kept: list[int] = []
    for step in sorted(set(steps)):
        if not kept or step >= RATIO * kept[-1]:
            kept.append(step)
    return sorted({*kept, max(steps)})


def thinned(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows at `few_steps` of each run, and the rows that belong to no step."""
    if table["step"].isna().all():
        return table
    parts = []
    for _, own in table.groupby("run", sort=False):
        kept = few_steps(own["step"].dropna().astype(int).tolist())
        parts.append(own[own["step"].isin(kept) | own["step"].isna()])
    return pd.concat(parts, ignore_index=True)


# How each table is made


def _read(run: RunFolder, file: str) -> pd.DataFrame | None:
    path = run.results / file
    return pd.read_csv(path, dtype={"position": str}) if path.is_file() else None


def _collect(runs: Runs, file: str, choose: Callable[[str, pd.DataFrame], pd.DataFrame]) -> pd.DataFrame | None:
    """Return one table with the rows that `choose` selects from the table of each run."""
    found = {name: table for name, run in runs.items() if (table := _read(run, file)) is not None}
    parts = [choose(name, table).assign(run=name) for name, table in found.items()]
    return pd.concat(parts, ignore_index=True) if parts else None


def _from_results(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame | None:
    """Return the table of an analysis, thinned if the schema says so."""

    def choose(run: str, table: pd.DataFrame) -> pd.DataFrame:
        return thinned(table.assign(run=run)) if TABLES[name].thinned else table

    return _collect(runs, f"{name}.csv", choose)


def _make_runs(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame:
    rows = []
    for path, run in runs.items():
        config, status = run.read_config(), run.read_status()
        weights = load_checkpoint_file(checkpoint_files(run.path)[-1]).params
        rows.append(
            {
                "run": path,
                "preset": config.preset,
                "num_tasks": config.to_dict()["task"]["num_tasks"],
                "seed": config.seeds.model,
                "num_parameters": sum(tensor.numel() for tensor in weights.values()),
                "step": status.step if status else 0,
                "schedule_steps": config.schedule_steps,
                "loss": status.loss if status else None,
            }
        )
    table = pd.DataFrame(rows)
    return table.assign(num_tasks=table["num_tasks"].astype(str)) if len(table) else table


def _make_checkpoints(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame:
    rows = []
    for path, run in runs.items():
        for file in checkpoint_files(run.path):
            saved = load_checkpoint_file(file)
            norm = float(np.sqrt(sum(float(tensor.double().square().sum()) for tensor in saved.params.values())))
            rows.append({"run": path, "step": saved.step, "checkpoint_hash": saved.digest, "weight_norm": norm})
    return pd.DataFrame(rows)


def _make_learning(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame | None:
    """Keep about a thousand rows of each run."""
    parts = [pd.read_csv(run.metrics_file).assign(run=path) for path, run in runs.items()]
    few = [rows[rows["step"] % max(1, int(rows["step"].max()) // _LEARNING_ROWS) == 0] for rows in parts]
    return pd.concat(few, ignore_index=True) if few else None


def _make_positions(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame | None:
    table = _collect(runs, "losses.csv", lambda run, own: own)
    return table if table is None or "dmmse" in table else table.assign(dmmse=None)


def _choose_evaluation(run: str, table: pd.DataFrame) -> pd.DataFrame:
    """Return means and scores, losses at each position on `pretrain`, and the summary numbers of the shifts at a few steps.

    For runs of the ladder, leave out the losses at each position, and keep only the last step of the shifts.
    """
    is_plain = table["distribution"].isin(["pretrain", "true"])
    plain = table[is_plain]
    by_position = plain["position"].str.isdigit()
    wanted = ~by_position | (
        (plain["distribution"] == "pretrain") & (plain["quantity"] == "loss") & ("ladder" not in run)
    )
    shifts = headlines(table[~is_plain & table["quantity"].isin(["loss", "delta_ridge"])])
    steps = few_steps(table["step"].tolist()) if "ladder" not in run else [table["step"].max()]
    chosen = pd.concat([plain[wanted], shifts[shifts["step"].isin(steps)]])
    return chosen.sort_values("step", kind="stable")


def _make_evaluation(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame | None:
    return _collect(runs, "evaluation.csv", _choose_evaluation)


def _choose_baselines(run: str, table: pd.DataFrame) -> pd.DataFrame:
    is_plain = table["distribution"].isin(["pretrain", "true"])
    by_position = table["position"].str.isdigit() & (table["distribution"] == "true")
    shifts = headlines(table[~is_plain & table["quantity"].isin(["ridge", "zero"])])
    return pd.concat([table[is_plain & ~by_position], shifts])


def _make_baselines(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame | None:
    return _collect(runs, "baselines.csv", _choose_baselines)


def _make_traces(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame | None:
    from icl.sampling.records import read_all

    rows: list[pd.DataFrame] = []
    for path, run in runs.items():
        by_settings: dict[str, list] = {}
        for record in read_all(run):
            if not record.row["component"]:
                by_settings.setdefault(record.row["settings"], []).append(record)
        for settings, records in by_settings.items():
            records.sort(key=lambda record: record.row["step"])
            for index in sorted({0, len(records) // 2, len(records) - 1}):
                record = records[index]
                points = np.unique(np.linspace(0, record.traces.shape[1] - 1, _TRACE_POINTS).round().astype(int))
                for chain, losses in enumerate(record.traces[:_TRACE_CHAINS]):
                    trace = pd.DataFrame({"move": record.stride * points, "loss": losses[points]})
                    labels = {"run": path, "settings": settings, "step": record.row["step"], "chain": chain}
                    rows.append(trace.assign(**labels))
    return pd.concat(rows, ignore_index=True) if rows else None


def _make_llc(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame | None:
    return _collect(runs, f"{name}.csv", lambda run, own: own)


def _make_susceptibilities(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame | None:
    """Keep the last step of each run, which is the step that the figure shows."""
    return _collect(runs, f"{name}.csv", lambda run, table: table[table["step"] == table["step"].max()])


def _make_known_answers(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame | None:
    path = root / "known-answers.csv"
    return pd.read_csv(path) if path.is_file() else None


def _make_calibration(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame | None:
    return _collect(runs, "llc-calibration.csv", lambda run, own: own)


def _make_behaviour(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame | None:
    """Leave out single positions, thin the steps, and keep every second scale.

    Rows with a scale exist only at a few steps, so their steps are not thinned.
    """

    def choose(run: str, table: pd.DataFrame) -> pd.DataFrame:
        own = table[~table["position"].astype(str).str.isdigit()]
        scales = sorted(own["scale"].dropna().unique())[::2]
        own = own.assign(run=run)
        return pd.concat([thinned(own[own["scale"].isna()]), own[own["scale"].isin(scales)]], ignore_index=True)

    return _collect(runs, "behaviour.csv", choose)


def _make_attention(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame | None:
    """Keep averages over all queries, and the mean patterns. For the weight on y-tokens, also keep averages over x- and y-queries."""

    def choose(run: str, table: pd.DataFrame) -> pd.DataFrame:
        is_kept = table["queries"].isin(["all"]) | (table["quantity"] == "y_tokens") | (table["quantity"] == "pattern")
        return thinned(table[is_kept].assign(run=run))

    return _collect(runs, "attention.csv", choose)


def _make_hessian(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame | None:
    """Join the tables of whole runs and of single checkpoints (`hessian-<step>.csv`)."""
    files = [(path, file) for path, run in runs.items() for file in sorted(run.results.glob("hessian*.csv"))]
    parts = [pd.read_csv(file).assign(run=path) for path, file in files]
    return pd.concat(parts, ignore_index=True).sort_values(["run", "step"], kind="stable") if parts else None


def _make_dynamics(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame | None:
    """Leave out radii and arc lengths. If several runs share a PCA, also leave out the centres of osculating circles."""

    def choose(run: str, table: pd.DataFrame) -> pd.DataFrame:
        scores = table[table["quantity"] == "score"]
        dropped = ["radius", "arc_length", *(["centre_1", "centre_2"] if scores["run"].nunique() > 1 else [])]
        return table[~table["quantity"].isin(dropped)].rename(columns={"run": "member"})

    return _collect(runs, f"{name}.csv", choose)


def _make_moving_pool(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame | None:
    """Join the losses and gaps of the runs of `sweeps/training-runs/moving-pool.yaml`. The argument `runs` does not contain these runs."""
    folders = [RunFolder(file.parent) for file in root.glob("moving-pool/*/config.yaml")]
    configs = {run.path: run.read_config() for run in folders}

    def order(run: RunFolder) -> tuple[bool, float, int, int]:
        task, seeds = configs[run.path].task, configs[run.path].seeds
        return task.pool_steps is not None, task.num_tasks, -(task.pool_steps or 0), seeds.tasks

    parts = []
    for run in sorted(folders, key=order):
        table, task = _read(run, "evaluation.csv"), configs[run.path].task
        if table is not None:
            is_kept = (table["distribution"] == "pretrain") & (table["position"] == "mean")
            is_kept &= table["quantity"].isin(["loss", "delta_ridge", "delta_dmmse"])
            own = {"num_tasks": task.num_tasks, "pool": task.pool, "pool_steps": task.pool_steps}
            own["seed"] = configs[run.path].seeds.tasks
            parts.append(table[is_kept].assign(**own))
    return pd.concat(parts, ignore_index=True) if parts else None


def _make_worlds(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame | None:
    """Join the gaps on new tasks of the runs of `sweeps/training-runs/worlds.yaml`, and the distances between ridge and the Bayes predictor."""
    from icl.evaluation.sets import evaluation_set
    from icl.metrics import overall_mean

    folders = [RunFolder(file.parent) for file in root.glob("worlds/*/config.yaml")]
    configs = {run.path: run.read_config() for run in folders}
    order = list(PRESETS)
    parts = []
    for run in sorted(folders, key=lambda run: (order.index(configs[run.path].preset), configs[run.path].seeds.model)):
        table, config = _read(run, "evaluation.csv"), configs[run.path]
        if table is None:
            continue
        labels = {"preset": config.preset, "seed": config.seeds.model}
        is_kept = (table["distribution"] == "true") & (table["position"] == "mean")
        is_kept &= table["quantity"].isin(["delta_ridge", "delta_bayes"])
        parts.append(table[is_kept & table["step"].isin(few_steps(table["step"].tolist()))].assign(**labels))
        made = evaluation_set(config, "true", num_prompts=2048, with_bayes=True)
        if "bayes" in made.baselines:
            separation = (made.baselines["bayes"] - made.baselines["ridge"]).double().square()
            numbers = {"separation": separation, "bayes_variance": made.variances["bayes_variance"].double()}
            means = {quantity: overall_mean(values) for quantity, values in numbers.items()}
            rows = [
                {"quantity": key, "value": mean.value.item(), "stderr": mean.stderr.item()}
                for key, mean in means.items()
            ]
            parts.append(pd.DataFrame(rows).assign(**labels))
    return pd.concat(parts, ignore_index=True) if parts else None


def _make_prior_mixture(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame | None:
    """Read the table of mixtures of the ladder `prior-ladder`, and shorten the names of the runs. The table is in the folder of one run."""
    folders = [RunFolder(file.parent) for file in root.glob("prior-ladder/*/config.yaml")]
    found = [table for run in folders if (table := _read(run, "mixture.csv")) is not None]
    if not found:
        return None
    names = {}
    for run in folders:
        config = run.read_config()
        names[run.path.name] = f"M={config.task.num_tasks},seed={config.seeds.model}"
    table = found[0].replace({"run": names})
    table = table[(table["position"] == "mean") & (table["quantity"] != "residual")]
    return table.assign(reasons=table["reasons"].where(table["step"].isna()))


def _make_implicit_prior(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame | None:
    """Join the tables of the implicit priors of the runs of the ladder `prior-ladder`."""
    found = {file.parents[1]: pd.read_csv(file) for file in root.glob("prior-ladder/*/results/prior.csv")}
    parts = [
        table.assign(run=str(path.relative_to(root)), num_tasks=RunFolder(path).read_config().task.num_tasks)
        for path, table in found.items()
    ]
    parts.sort(key=lambda part: part["num_tasks"].iloc[0])
    return pd.concat(parts, ignore_index=True) if parts else None


def _make_transience(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame | None:
    """Join three parts for the preset `transience`: the model's losses for each seed, the losses of the baselines, and the findings over seeds."""
    parts = []
    for file in sorted(root.glob("transience/seed=*/results/behaviour.csv")):
        table = pd.read_csv(file, dtype={"position": str})
        table = table[(table["quantity"] == "loss") & (table["position"] == "mean")]
        is_model = table["predictor"] == "model"
        seed = RunFolder(file.parents[1]).read_config().seeds.model
        parts.append(table[is_model].assign(seed=seed))
        if len(parts) == 1:  # the prompts of all seeds are the same
            parts.append(table[~is_model])
    if not parts:
        return None
    found = pd.read_csv(root / "transience" / "behaviour-seeds.csv")
    found = found[found["quantity"].isin(["critical_step", "rise", "dip"])]
    parts.append(found.assign(distribution=found["labels"], stderr=found["seed_stderr"], predictor="model"))
    return pd.concat(parts, ignore_index=True)


def _make_threshold(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame | None:
    """Join the losses and gaps at the last step of the runs in `threshold/`, which differ only in M and in seeds."""
    folders = [RunFolder(file.parent) for file in root.glob("threshold/*/config.yaml")]
    configs = {run.path: run.read_config() for run in folders}
    folders.sort(key=lambda run: (configs[run.path].task.num_tasks, configs[run.path].seeds.model))
    parts = []
    for run in folders:
        table, config = _read(run, "evaluation.csv"), configs[run.path]
        if table is not None:
            is_kept = (table["step"] == table["step"].max()) & (table["position"] == "mean")
            is_kept &= table["distribution"].isin(["pretrain", "true"])
            is_kept &= table["quantity"].isin(["loss", "delta_ridge", "delta_dmmse"])
            parts.append(table[is_kept].assign(run=f"seed={config.seeds.model}", num_tasks=config.task.num_tasks))
    return pd.concat(parts, ignore_index=True) if parts else None


def _make_phases(name: str, runs: Runs, root: Path, record: Mapping) -> pd.DataFrame:
    rows = [{"phase": phase, **known} for phase, known in record.items() if known["is_done"]]
    return pd.DataFrame(rows)


MAKERS: dict[str, Callable[[str, Runs, Path, Mapping], pd.DataFrame | None]] = {
    "runs": _make_runs,
    "checkpoints": _make_checkpoints,
    "learning": _make_learning,
    "positions": _make_positions,
    "evaluation": _make_evaluation,
    "baselines": _make_baselines,
    "llc": _make_llc,
    "llc-positions": _make_llc,
    "llc-components": _make_llc,
    "llc-susceptibilities": _make_susceptibilities,
    "llc-traces": _make_traces,
    "known-answers": _make_known_answers,
    "calibration": _make_calibration,
    "behaviour": _make_behaviour,
    "attention": _make_attention,
    "hessian": _make_hessian,
    "essential-dynamics": _make_dynamics,
    "moving-pool": _make_moving_pool,
    "worlds": _make_worlds,
    "prior-mixture": _make_prior_mixture,
    "implicit-prior": _make_implicit_prior,
    "transience": _make_transience,
    "threshold": _make_threshold,
    "phases": _make_phases,
}
"""Functions that make the tables. The keys are the names of the tables. Any other table comes from the analysis of the same name."""


def _origin(about: Table, record: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the commands, dates, versions and hardware of the phases that produced a table."""
    phases = {name: known for name, known in record.items() if about.phases in name and known["is_done"]}
    told: dict[str, list[str]] = {
        key: sorted({str(known[key]) for known in phases.values()}) for key in ("date", "torch", "hardware")
    }
    # The record of a phase that ran in several sittings has several commits, separated by commas.
    told["commit"] = sorted({commit for known in phases.values() for commit in str(known["commit"]).split(", ")})
    return {"commands": [known["commands"] for known in phases.values()], **told}


def _copy_models(runs: Runs, out: Path) -> Iterator[str]:
    """Copy the weights of a few models, at the saved steps nearest to the steps in `MODELS`. Yield a message about each model."""
    for name, wanted in MODELS.items():
        if name not in runs:
            continue
        files = checkpoint_files(runs[name].path)
        steps = np.array([int(file.stem.partition("-")[2]) for file in files])
        for place in sorted({int(np.abs(steps - step).argmin()) for step in wanted}):
            target = out / name.replace("/", "-") / files[place].name
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(shutil.SameFileError):
                shutil.copyfile(files[place], target)
            yield f"{'model':20s} {target.relative_to(FOLDER)}"

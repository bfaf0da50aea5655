"""What the shipped tables hold: their columns with types and units, and what was thinned. README and tests are made of this.

Every table is tidy: a row is one number, or one estimate with its diagnostics. `stderr` is a standard error over prompts (or over
chains), and `verdict` is `ok`, `suspect` or `invalid` with the `reasons`. Losses and squared distances are per target, not divided by D.
Step s means after s updates.
"""

from typing import Literal, NamedTuple

Kind = Literal["text", "integer", "number"]


class Column(NamedTuple):
    """One column."""

    kind: Kind
    meaning: str
    may_miss: bool = False
    """Whether a row may have no value here."""


class Table(NamedTuple):
    """One file, `<name>.csv`."""

    about: str
    columns: dict[str, Column]
    phases: str
    """A word in the names of the phases that it comes from."""
    thinned: str = ""
    """What was left out of the runs' own tables, if anything was."""


FEW_STEPS = "of each run step 0, the last, and of the rest those a factor of 1.2 apart"

_RUN = Column("text", "folder of the run below the folder of runs")
_STEP = Column("integer", "updates done")
_VALUE = Column("number", "the number")
_STDERR = Column("number", "its standard error")
_MAY_STDERR = Column("number", "its standard error, where it has one", may_miss=True)
_DISTRIBUTION = Column(
    "text", "prompts: `pretrain` (the run's M tasks), `true` (new tasks) or a shift of `icl evaluate`"
)
_QUANTITY = Column("text", "which number")
_POSITION = Column("text", "position k in the prompt, `mean` over all, or `k1:k2`")
_VERDICT = Column("text", "`ok`, `suspect` or `invalid`")
_REASONS = Column("text", "why it is not `ok`", may_miss=True)
_SETTINGS = Column("text", "a short hash of the sampler's settings")


def _number(meaning: str, *, may_miss: bool = False) -> Column:
    return Column("number", meaning, may_miss)


TABLES: dict[str, Table] = {
    "runs": Table(
        "the trained runs",
        {
            "run": _RUN,
            "preset": Column("text", "settings it started from"),
            "num_tasks": Column("text", "task diversity M, or `inf`"),
            "seed": Column("integer", "seed of the initial weights, the data and the noise"),
            "num_parameters": Column("integer", "weights"),
            "step": Column("integer", "updates done"),
            "schedule_steps": Column("integer", "updates of the whole learning-rate curve"),
            "loss": _number("mean training loss of the last logged interval"),
        },
        "train",
    ),
    "checkpoints": Table(
        "the saved steps",
        {
            "run": _RUN,
            "step": _STEP,
            "checkpoint_hash": Column("text", "hash of weights and configuration"),
            "weight_norm": _number("Euclidean norm of all weights"),
        },
        "train",
    ),
    "learning": Table(
        "learning curves, as `metrics.csv` has them",
        {
            "run": _RUN,
            "step": _STEP,
            "lr": _number("learning rate"),
            "train/loss": _number("mean over the steps since the row before", may_miss=True),
            "eval/pretrain/loss": _number("on fixed prompts of the M tasks", may_miss=True),
            "eval/true/loss": _number("on fixed prompts of new tasks", may_miss=True),
        },
        "train",
    ),
    "positions": Table(
        "losses at the last step by position, beside the baselines",
        {
            "run": _RUN,
            "distribution": _DISTRIBUTION,
            "position": Column("text", "position k, 1..K, or `mean`"),
            **{name: _number(f"loss of {name}") for name in ("model", "ridge")},
            "dmmse": _number("loss of dMMSE; none for M = inf, where it is ridge", may_miss=True),
            **{name: _number(f"loss of {name}") for name in ("ols", "zero")},
        },
        "train",
    ),
    "evaluation": Table(
        "losses, gaps, ICL and prior-task scores at every saved step, in and out of distribution",
        {
            "run": _RUN,
            "step": _STEP,
            "distribution": _DISTRIBUTION,
            "quantity": Column(
                "text",
                "`loss`; `delta_ridge`, `delta_dmmse`: mean squared distance to their predictions; `prior_zero`, "
                "`prior_task_mean`: to predicting 0 and with the mean task; `icl_score`: loss(k2) - loss(k1), negative is good",
            ),
            "position": _POSITION,
            "value": _VALUE,
            "stderr": _STDERR,
        },
        "evaluate",
        "positions are kept of `loss` on `pretrain` only; of shifts the headline `loss` and `delta_ridge` only, at few steps "
        f"({FEW_STEPS}; of the ladder only the last)",
    ),
    "baselines": Table(
        "losses of the baselines on the same prompts",
        {
            "run": _RUN,
            "distribution": _DISTRIBUTION,
            "quantity": Column("text", "the baseline"),
            "position": _POSITION,
            "value": _VALUE,
            "stderr": _STDERR,
        },
        "evaluate",
        "positions are kept of `pretrain` only; of shifts the headline of ridge and zero only",
    ),
    "llc": Table(
        "local learning coefficients with their diagnostics",
        {
            "run": _RUN,
            "settings": _SETTINGS,
            "mode": Column(
                "text", "`published` with what was changed of it, or nothing for the preset's sampler", may_miss=True
            ),
            "rescale": _number("factor of the weights' rescaling; 1 is the run as it is"),
            "step": _STEP,
            "llc": _number("nbeta (E[L] - L(w0))", may_miss=True),
            "stderr": _number("its standard error over chains and draws", may_miss=True),
            "init_loss": _number("L(w0), the checkpoint's loss"),
            "mean_loss": _number("E[L], mean over chains and draws", may_miss=True),
            "trivial_loss": _number("loss of predicting zero"),
            **{name: _number("sampler setting") for name in ("lr", "nbeta", "localization")},
            **{
                name: Column("integer", "sampler setting")
                for name in ("num_samples", "batch_size", "num_chains", "num_draws", "num_burnin_steps")
            },
            "num_chains_used": Column("integer", "chains that stayed finite"),
            "bias_bound": _number("nats by which step size and minibatch noise raise it, at most", may_miss=True),
            "drop_at_mean": _number(
                "nats by which the chains settle below the checkpoint's loss, which it is too low by", may_miss=True
            ),
            "drop_at_mean_stderr": _number("its standard error", may_miss=True),
            "rhat": _number("agreement of the chains; near 1 is good", may_miss=True),
            "ess": _number("effective number of independent draws", may_miss=True),
            "verdict": _VERDICT,
            "reasons": _REASONS,
        },
        "LLCs",
    ),
    "llc-positions": Table(
        "the same by position in the prompt",
        {
            "run": _RUN,
            "settings": _SETTINGS,
            "step": _STEP,
            "position": Column("integer", "position k"),
            "llc": _number("nbeta (E[L_k] - L_k(w0))", may_miss=True),
            "stderr": _number("its standard error", may_miss=True),
        },
        "LLCs",
    ),
    "llc-traces": Table(
        "minibatch losses along the chains",
        {
            "run": _RUN,
            "settings": _SETTINGS,
            "step": _STEP,
            "chain": Column("integer", "number of the chain, from 0"),
            "move": Column("integer", "moves made; the first are burn-in"),
            "loss": _number("minibatch loss", may_miss=True),
        },
        "LLCs",
        "first, middle and last step of each settings; at most two chains and 150 points of each, evenly spaced",
    ),
    "known-answers": Table(
        "the sampler on losses whose learning coefficient is known",
        {
            "problem": Column("text", "the loss"),
            "nbeta": _number("inverse temperature"),
            "asymptotic": _number("learning coefficient"),
            "finite": _number("truth at this nbeta, where it is known", may_miss=True),
            "llc": _number("estimate"),
            "stderr": _STDERR,
            "allowed": _number("how far the estimate may lie off"),
            "verdict": _VERDICT,
            "agrees": Column("text", "`True` or `False`"),
        },
        "known answers",
    ),
    "calibration": Table(
        "the search for the settings of the sampler: all that were tried",
        {
            "run": _RUN,
            "corner": Column("integer", "number of the settings, from 0, as they were tried"),
            "stage": Column(
                "text",
                "`nbeta, localization`: the survey; `lr`: other step sizes; `confirmation`: chains of full length",
            ),
            "step": _STEP,
            **{name: _number("sampler setting") for name in ("lr", "nbeta", "localization")},
            "ratio": _number("localization / nbeta"),
            **{name: Column("integer", "sampler setting") for name in ("num_chains", "num_draws", "num_burnin_steps")},
            "llc": _number("nbeta (E[L] - L(w0))", may_miss=True),
            "stderr": _number("its standard error over chains and draws", may_miss=True),
            "init_loss": _number("L(w0), the checkpoint's loss"),
            "mean_loss": _number("E[L], mean over chains and draws", may_miss=True),
            "trivial_loss": _number("loss of predicting zero"),
            "rhat": _number("agreement of the chains; near 1 is good", may_miss=True),
            "ess": _number("effective number of independent draws", may_miss=True),
            "verdict": _VERDICT,
            "reasons": Column("text", "why it is not `ok`, and notes", may_miss=True),
            "healthy": Column("text", "`True` if nothing but short chains is said against it"),
            "plateau_nbeta": Column(
                "text", "`True` if a neighbouring nbeta of the survey agrees at this ratio and the last step"
            ),
            "lr_searched": Column("text", "`True` for the settings at which step sizes were compared"),
            "chosen": Column("text", "`True` for the settings that were taken"),
        },
        "calibrate",
    ),
    "essential-dynamics": Table(
        "principal components of the trajectories, with random walks beside them",
        {
            "run": _RUN,
            "step": Column("integer", "updates done; none for numbers of the whole run", may_miss=True),
            "quantity": Column("text", "see `icl/analysis/essential_dynamics/`"),
            "item": Column("text", "component or plane", may_miss=True),
            "member": Column("text", "name of the run, or of a reference, within the PCA", may_miss=True),
            "value": _number(
                "score (root of a sum of squares of predictions), share, radius, step or count", may_miss=True
            ),
            "stderr": _MAY_STDERR,
            "verdict": Column("text", "`ok` or `suspect`", may_miss=True),
            "state": Column("text", "what moves: `outputs` are predictions for fixed prompts"),
            "bandwidth": _number("width of the smoothing in ln(step + 1)"),
        },
        "essential",
        "no radii and arc lengths; no curvature where several runs share a PCA",
    ),
    "embeddings": Table(
        "spectra, overlaps and collapse of embeddings, layer norms and unembedding",
        {
            "run": _RUN,
            "step": _STEP,
            "quantity": Column("text", "see `icl/analysis/embeddings.py`"),
            "part": Column("text", "weights, or a pair of them"),
            "component": Column("integer", "number within", may_miss=True),
            "value": _VALUE,
            "threshold": _number("a weight below it is small"),
        },
        "embeddings",
        FEW_STEPS,
    ),
    "attention": Table(
        "what each head attends to; mean patterns at the last step",
        {
            "run": _RUN,
            "step": Column("integer", "updates done; none for uniform attention", may_miss=True),
            "quantity": Column("text", "see `icl/analysis/attention.py`"),
            "part": Column("text", "`b1h2` is head 2 of block 1; `uniform`: equal weights"),
            "queries": Column("text", "`all`, `x` or `y` tokens", may_miss=True),
            "value": _VALUE,
            "stderr": _MAY_STDERR,
            "query_token": Column("integer", "attending token, from 0", may_miss=True),
            "key_token": Column("integer", "token attended to", may_miss=True),
        },
        "attention",
        f"{FEW_STEPS}; averages over all queries, and over x- and y-queries of the weight on y-tokens",
    ),
    "gradients": Table(
        "gradients in the weights and in the data distribution",
        {
            "run": _RUN,
            "step": Column("integer", "updates done", may_miss=True),
            "kind": Column("text", "`weights` or `data`"),
            "quantity": Column("text", "see `icl/analysis/gradients/`"),
            "item": Column("text", "group of weights, parameter of the distribution, or component", may_miss=True),
            "estimator": Column("text", "how a data gradient was estimated", may_miss=True),
            "value": _number("the number", may_miss=True),
            "stderr": _MAY_STDERR,
            "verdict": Column("text", "`ok` or `suspect`", may_miss=True),
        },
        "gradients",
    ),
    "hessian": Table(
        "the Hessian's trace, extreme eigenvalues and spectrum",
        {
            "run": _RUN,
            "step": _STEP,
            "quantity": Column("text", "see `icl/analysis/hessian.py`"),
            "part": Column("text", "which eigenvalue or node", may_miss=True),
            "value": _VALUE,
            "stderr": _MAY_STDERR,
            "verdict": Column("text", "`ok` or `suspect`", may_miss=True),
        },
        "Hessian",
    ),
    "behaviour": Table(
        "task-vector probe, inputs and tasks of any size, turning points",
        {
            "run": _RUN,
            "step": Column("integer", "updates done", may_miss=True),
            "predictor": Column("text", "`model`, or the baseline beside it", may_miss=True),
            "distribution": Column("text", "prompts", may_miss=True),
            "quantity": Column("text", "see `icl/analysis/behaviour/`"),
            "position": Column("text", "position k, `mean`, `sum` or `k1:k2`", may_miss=True),
            "scale": _number("factor of inputs or tasks", may_miss=True),
            "value": _number("the number", may_miss=True),
            "stderr": _MAY_STDERR,
            "lower": _number("saved step before a turning point", may_miss=True),
            "upper": _number("saved step after it", may_miss=True),
            "finding": Column("text", "in words", may_miss=True),
            "verdict": Column("text", "`ok` or `suspect`", may_miss=True),
            "reasons": _REASONS,
        },
        "behaviour",
        f"{FEW_STEPS}; no positions, every second scale",
    ),
    "stages": Table(
        "boundaries between stages and what changes in each, found by several signals",
        {
            "run": _RUN,
            "quantity": Column("text", "see `icl/analysis/stages/`"),
            "signal": Column("text", "loss, score or LLC", may_miss=True),
            "at": _number("step, between saved ones for curves", may_miss=True),
            "value": _number("the number", may_miss=True),
            "stderr": _MAY_STDERR,
            "verdict": Column("text", "`ok`, `suspect` or `invalid`", may_miss=True),
            "reasons": _REASONS,
            "low": _number("two standard errors before a boundary", may_miss=True),
            "high": _number("two standard errors after it", may_miss=True),
            "kind": Column("text", "`turn` or `plateau`", may_miss=True),
            "strength": _number("of a candidate, in standard errors", may_miss=True),
            "stage": Column("integer", "number of the stage", may_miss=True),
            "type": Column("text", "`A`, `B` or `?`", may_miss=True),
            "start": _number("step", may_miss=True),
            "end": _number("step", may_miss=True),
        },
        "stages",
    ),
    "phases": Table(
        "what each phase cost, as measured",
        {
            "phase": Column("text", "its name in the script"),
            "commands": Column("text", "what was typed"),
            "seconds": _number("wall clock; the machine was shared with other work"),
            "cpu_seconds": _number("processor time", may_miss=True),
            "date": Column("text", "day"),
            "commit": Column("text", "of the source; `+`: with changes", may_miss=True),
            "torch": Column("text", "version"),
            "hardware": Column("text", "device"),
            "threads": Column("text", "OMP_NUM_THREADS"),
        },
        "",
    ),
}
"""Every table that may ship; one whose phases have not run is absent."""

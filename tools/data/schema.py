"""Schema of the shipped tables: their columns with types and units, and what was thinned. `data/README.md` is generated from this schema.

Every table is tidy: a row is one number, or one estimate with its diagnostics. `stderr` is a standard error over
prompts (or over chains), and `verdict` is `ok`, `suspect` or `invalid` with the `reasons`. Losses and squared distances
are per target, not divided by D. Step s is the state after s updates.
"""

from typing import Literal, NamedTuple

Kind = Literal["text", "integer", "number"]


LABELS = {
    "small": "reduced: shorter, fewer and smaller runs and chains than published",
    "published-run": "the published run of L2H4, with fewer and shorter LLC chains than published",
    "full": "the published sizes",
}
"""Description of the tables of each size, for captions and pages. Each size is the name of a folder below `data/`."""


class Column(NamedTuple):
    """A column of a table."""

    kind: Kind
    meaning: str
    may_miss: bool = False
    """Whether some rows may have no value."""


class Table(NamedTuple):
    """A shipped table, in the file `<name>.csv`."""

    about: str
    columns: dict[str, Column]
    phases: str
    """Text that occurs in the name of every phase that produces the table. The phases are listed in `phases.csv`."""
    thinned: str = ""
    """Which rows and columns of the runs' own tables are kept, for `data/README.md`; empty if all are kept."""


FEW_STEPS = "the first and the last step of each run, and steps between them that are at least a factor of 1.2 apart"

_RUN = Column("text", "path of the run's folder, relative to the folder of all runs")
_STEP = Column("integer", "number of updates")
_VALUE = Column("number", "value of the quantity")
_STDERR = Column("number", "standard error of the value")
_MAY_STDERR = Column("number", "standard error of the value, if it has one", may_miss=True)
_DISTRIBUTION = Column(
    "text", "prompts: `pretrain` (the run's M tasks), `true` (new tasks) or a shift of `icl evaluate`"
)
_QUANTITY = Column("text", "name of the quantity")
_POSITION = Column("text", "position k in the prompt, `mean` over all positions, or `k1:k2`")
_VERDICT = Column("text", "`ok`, `suspect` or `invalid`")
_REASONS = Column("text", "reasons why the verdict is not `ok`", may_miss=True)
_SETTINGS = Column("text", "short hash of the sampler's settings")


def _number(meaning: str, *, may_miss: bool = False) -> Column:
    return Column("number", meaning, may_miss)


_ESTIMATE = {
    "llc": _number("estimate, nbeta (E[L] - L(w0))", may_miss=True),
    "stderr": _number("standard error of the estimate, over chains and draws", may_miss=True),
    "interval_low": _number(
        "lower end of the 95 % interval, minus `bias_bound` if it exceeds half of `stderr`", may_miss=True
    ),
    "interval_high": _number(
        "upper end of the 95 % interval; rules from version 5 on (shipped rows are older) also add what regions that the chains have not "
        "filled may add to the LLC (`docs/llc.md`)",
        may_miss=True,
    ),
    "init_loss": _number("L(w0), the checkpoint's loss"),
    "mean_loss": _number("E[L], the mean loss over chains and draws", may_miss=True),
}
"""Columns of an LLC and its interval."""
TABLES: dict[str, Table] = {
    "runs": Table(
        "the trained runs (those in the folder `ladder` differ only in M)",
        {
            "run": _RUN,
            "preset": Column("text", "preset of the run's settings"),
            "num_tasks": Column("text", "task diversity M, or `inf`"),
            "seed": Column("integer", "seed of the initial weights, the data and the noise"),
            "num_parameters": Column("integer", "number of weights"),
            "step": Column("integer", "number of updates"),
            "schedule_steps": Column("integer", "number of updates in the whole learning-rate schedule"),
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
        "learning curves, from each run's `metrics.csv`",
        {
            "run": _RUN,
            "step": _STEP,
            "lr": _number("learning rate"),
            "train/loss": _number("mean training loss over the steps since the previous row", may_miss=True),
            "eval/pretrain/loss": _number("loss on fixed prompts of the M training tasks", may_miss=True),
            "eval/true/loss": _number("loss on fixed prompts of new tasks", may_miss=True),
        },
        "train",
        "about a thousand rows of each run",
    ),
    "positions": Table(
        "losses of the model and of the baselines at the last step, by position",
        {
            "run": _RUN,
            "distribution": _DISTRIBUTION,
            "position": Column("text", "position k, 1..K, or `mean`"),
            "model": _number("loss of the model"),
            "ridge": _number("loss of ridge"),
            "dmmse": _number("loss of dMMSE; empty for M = inf, where dMMSE is ridge", may_miss=True),
            "ols": _number("loss of OLS"),
            "zero": _number("loss of predicting zero"),
        },
        "train",
    ),
    "evaluation": Table(
        "losses, gaps, ICL scores and prior-task scores at every saved step, in and out of distribution",
        {
            "run": _RUN,
            "step": _STEP,
            "distribution": _DISTRIBUTION,
            "quantity": Column(
                "text",
                "`loss`; `bayes_excess` (in tables made after version 0.1.0): the model's loss minus the loss of the Bayes predictor, on the same prompts; "
                "`delta_ridge`, `delta_dmmse`: mean squared distance to the predictions of ridge and of dMMSE; "
                "`prior_zero`, `prior_task_mean`: mean squared distance to predicting 0 and to predicting with the mean task; "
                "`icl_score`: loss(k2) - loss(k1), negative is good",
            ),
            "position": _POSITION,
            "value": _VALUE,
            "stderr": _STDERR,
        },
        "evaluate",
        "values at single positions are kept only for the `loss` on `pretrain`, and not for the runs of the ladder; for "
        "shifts, only the means of `loss` and `delta_ridge` over positions are kept (for shifts of the query, the values at "
        f"the query), and only at a few steps ({FEW_STEPS}; for the runs of the ladder, only the last step)",
    ),
    "baselines": Table(
        "losses of the baselines on the same prompts",
        {
            "run": _RUN,
            "distribution": _DISTRIBUTION,
            "quantity": Column("text", "name of the baseline, for its loss"),
            "position": _POSITION,
            "value": _VALUE,
            "stderr": _STDERR,
        },
        "evaluate",
        "values at single positions are kept only for `pretrain`; for shifts, only the mean losses of ridge and zero over "
        "positions are kept (for shifts of the query, the losses at the query)",
    ),
    "llc": Table(
        "local learning coefficients with their diagnostics",
        {
            "run": _RUN,
            "settings": _SETTINGS,
            "mode": Column(
                "text",
                "`published` and the settings that differ from the published ones; empty for other samplers",
                may_miss=True,
            ),
            "rescale": _number("factor by which the weights were rescaled; 1 for the original weights"),
            "step": _STEP,
            **_ESTIMATE,
            "trivial_loss": _number("loss of predicting zero"),
            "kernel": Column("text", "Markov kernel of the chains"),
            **{name: _number("sampler setting") for name in ("lr", "nbeta", "localization")},
            **{
                name: Column("integer", "sampler setting")
                for name in ("num_samples", "batch_size", "num_chains", "num_draws", "num_burnin_steps")
            },
            "num_chains_used": Column("integer", "number of chains that stayed finite"),
            "bias_bound": _number(
                "upper bound on the bias from the step size and minibatch noise, in nats", may_miss=True
            ),
            "sensitivity": _number(
                "decrease of the LLC if the localization grows by a factor e, in nats", may_miss=True
            ),
            "drop_at_mean": _number(
                "nbeta times (the checkpoint's loss minus the loss at the mean of the draws), in nats; if positive, the LLC is "
                "too low by about this amount",
                may_miss=True,
            ),
            "drop_at_mean_stderr": _number("standard error of `drop_at_mean`", may_miss=True),
            "rhat": _number("R-hat: if it is near 1, the chains agree", may_miss=True),
            "ess": _number("effective sample size: number of independent draws of the same precision", may_miss=True),
            "verdict": _VERDICT,
            "reasons": _REASONS,
        },
        "LLCs",
    ),
    "llc-components": Table(
        "refined local learning coefficients: only the weights of one attention head or of one layer may change",
        {
            "run": _RUN,
            "settings": _SETTINGS,
            "component": Column(
                "text", "head or layer; L0H1 is the second head of the first layer (`icl/sampling/components.py`)"
            ),
            "num_params": Column("integer", "number of weights of the component"),
            "step": _STEP,
            **_ESTIMATE,
            **{name: _number("sampler setting") for name in ("lr", "nbeta", "localization")},
            **{
                name: Column("integer", "sampler setting")
                for name in ("num_samples", "batch_size", "num_chains", "num_draws", "num_burnin_steps")
            },
            "bias_bound": _number(
                "upper bound on the bias from the step size and minibatch noise, in nats", may_miss=True
            ),
            "drop_at_mean": _number(
                "nbeta times (the checkpoint's loss minus the loss at the mean of the draws), in nats", may_miss=True
            ),
            "ess": _number("effective sample size: number of independent draws of the same precision", may_miss=True),
            "verdict": _VERDICT,
            "reasons": _REASONS,
        },
        "refined estimates",
    ),
    "llc-susceptibilities": Table(
        "susceptibilities of heads and layers to the loss at each position, from the chains of `llc-components`",
        {
            "run": _RUN,
            "settings": _SETTINGS,
            "component": Column("text", "head or layer"),
            "step": _STEP,
            "distribution": Column("text", "`pretrain` (training tasks) or `true` (new tasks)"),
            "position": Column("integer", "position k"),
            "susceptibility": _number(
                "-Cov(nbeta (L - L0), l_k - L), where l_k is the loss at position k", may_miss=True
            ),
            "stderr": _number("standard error of the susceptibility", may_miss=True),
        },
        "refined estimates",
        "only the last step",
    ),
    "llc-positions": Table(
        "local learning coefficients of the loss at each position in the prompt",
        {
            "run": _RUN,
            "settings": _SETTINGS,
            "step": _STEP,
            "position": Column("integer", "position k"),
            "llc": _number("estimate, nbeta (E[L_k] - L_k(w0))", may_miss=True),
            "stderr": _number("standard error of the estimate", may_miss=True),
        },
        "LLCs",
    ),
    "llc-traces": Table(
        "minibatch losses along the chains",
        {
            "run": _RUN,
            "settings": _SETTINGS,
            "step": _STEP,
            "chain": Column("integer", "index of the chain, from 0"),
            "move": Column("integer", "number of moves made so far, including burn-in"),
            "loss": _number("minibatch loss", may_miss=True),
        },
        "LLCs",
        "for each set of sampler settings, only the first, middle and last step are kept, with at most two chains of at most 150 "
        "evenly spaced points",
    ),
    "known-answers": Table(
        "LLC estimates for losses whose learning coefficient is known",
        {
            "problem": Column("text", "formula or name of the loss"),
            "nbeta": _number("inverse temperature"),
            "asymptotic": _number("learning coefficient, which is the exact value for infinite nbeta"),
            "finite": _number("exact value at this nbeta, if it is known", may_miss=True),
            "llc": _number("estimate"),
            "stderr": _number("standard error of the estimate"),
            "allowed": _number("allowed error of the estimate"),
            "verdict": _VERDICT,
            "agrees": Column("text", "`True` if the estimate is within the allowed error"),
        },
        "known answers",
    ),
    "calibration": Table(
        "all settings that the search for the sampler's settings tried, with their estimates",
        {
            "run": _RUN,
            "corner": Column(
                "integer", "index of the combination of settings, from 0, in the order in which they were tried"
            ),
            "stage": Column(
                "text",
                "stage of the search: `nbeta, localization` (survey of these settings), `lr` (other step sizes) or `confirmation` (chains of full length)",
            ),
            "step": _STEP,
            **{name: _number("sampler setting") for name in ("lr", "nbeta", "localization")},
            "ratio": _number("localization / nbeta"),
            **{name: Column("integer", "sampler setting") for name in ("num_chains", "num_draws", "num_burnin_steps")},
            "llc": _number("estimate, nbeta (E[L] - L(w0))", may_miss=True),
            "stderr": _number("standard error of the estimate, over chains and draws", may_miss=True),
            "init_loss": _number("L(w0), the checkpoint's loss"),
            "mean_loss": _number("E[L], the mean loss over chains and draws", may_miss=True),
            "trivial_loss": _number("loss of predicting zero"),
            "rhat": _number("R-hat: if it is near 1, the chains agree", may_miss=True),
            "ess": _number("effective sample size: number of independent draws of the same precision", may_miss=True),
            "verdict": _VERDICT,
            "reasons": Column("text", "reasons why the verdict is not `ok`, and notes", may_miss=True),
            "healthy": Column(
                "text",
                "`True` if the estimate breaks no rule of the verdict, apart from the rules about the length of the "
                "chains",
            ),
            "plateau_nbeta": Column(
                "text",
                "`True` if, at the last step, the estimate agrees with the estimate for the same ratio and a "
                "neighbouring nbeta",
            ),
            "lr_searched": Column("text", "`True` for the estimates that compare step sizes"),
            "chosen": Column("text", "`True` for the chosen settings"),
        },
        "calibrate",
    ),
    "essential-dynamics": Table(
        "principal components of the trajectories, compared with random walks",
        {
            "run": _RUN,
            "step": Column("integer", "number of updates; empty for numbers about the whole run", may_miss=True),
            "quantity": Column("text", "see `icl/analysis/essential_dynamics/`"),
            "item": Column("text", "component, plane of two components, or kind of shape", may_miss=True),
            "member": Column("text", "name of the run, or of a reference such as ridge", may_miss=True),
            "value": _number(
                "value of the quantity; the unit of scores and coordinates is the square root of a sum of squared predictions",
                may_miss=True,
            ),
            "stderr": _MAY_STDERR,
            "verdict": Column("text", "`ok` or `suspect`", may_miss=True),
            "state": Column(
                "text", "kind of vector that is a point of the trajectory; `outputs`: the predictions for fixed prompts"
            ),
            "bandwidth": _number("smallest width of the smoothing kernel, in units of ln(step + 1)"),
        },
        "essential",
        "radii and arc lengths are left out; if several runs share a PCA, centres of curvature are left out too",
    ),
    "embeddings": Table(
        "spectra, overlaps and collapse of embeddings, layer norms and unembedding",
        {
            "run": _RUN,
            "step": _STEP,
            "quantity": Column("text", "see `icl/analysis/embeddings.py`"),
            "part": Column("text", "name of the weights, or of a pair of subspaces"),
            "component": Column("integer", "index of the singular value, angle or channel, from 1", may_miss=True),
            "value": _VALUE,
            "threshold": _number("absolute value below which a weight counts as small"),
        },
        "embeddings",
        f"these steps are kept: {FEW_STEPS}",
    ),
    "attention": Table(
        "scores of the attention of each head, and mean patterns at the last step",
        {
            "run": _RUN,
            "step": Column("integer", "number of updates; empty for uniform attention", may_miss=True),
            "quantity": Column("text", "see `icl/analysis/attention.py`"),
            "part": Column(
                "text",
                "name of the head (`b1h2` is the second head of the first block), or `uniform` for uniform attention",
            ),
            "queries": Column("text", "attending tokens: `all`, `x` or `y`", may_miss=True),
            "value": _VALUE,
            "stderr": _MAY_STDERR,
            "query_token": Column("integer", "index of the attending token, from 0", may_miss=True),
            "key_token": Column("integer", "index of the token that is attended to, from 0", may_miss=True),
        },
        "attention",
        f"these steps are kept: {FEW_STEPS}; only averages over all queries are kept; for the weight on y-tokens, averages "
        "over x-queries and y-queries are kept too",
    ),
    "gradients": Table(
        "gradients of the loss with respect to the weights and to the parameters of the data distribution",
        {
            "run": _RUN,
            "step": Column("integer", "number of updates", may_miss=True),
            "kind": Column("text", "`weights` or `data`"),
            "quantity": Column("text", "see `icl/analysis/gradients/`"),
            "item": Column("text", "group of weights, parameter of the distribution, or component", may_miss=True),
            "estimator": Column("text", "estimator of a data gradient", may_miss=True),
            "value": _number("value of the quantity", may_miss=True),
            "stderr": _MAY_STDERR,
            "verdict": Column("text", "`ok` or `suspect`", may_miss=True),
        },
        "gradients",
    ),
    "hessian": Table(
        "trace, extreme eigenvalues and spectrum of the Hessian of the loss",
        {
            "run": _RUN,
            "step": _STEP,
            "quantity": Column("text", "see `icl/analysis/hessian.py`"),
            "part": Column("text", "name of the eigenvalue, or of a node of the spectrum", may_miss=True),
            "value": _VALUE,
            "stderr": _MAY_STDERR,
            "verdict": Column("text", "`ok`, `suspect` or `invalid`", may_miss=True),
        },
        "Hessian",
    ),
    "behaviour": Table(
        "losses and scores, losses for scaled inputs and tasks, inferred task vectors, and turning points",
        {
            "run": _RUN,
            "step": Column("integer", "number of updates", may_miss=True),
            "predictor": Column("text", "`model`, or a baseline for comparison", may_miss=True),
            "distribution": Column("text", "distribution of the prompts", may_miss=True),
            "quantity": Column("text", "see `icl/analysis/behaviour/`"),
            "position": Column("text", "position k, `mean`, `sum` or `k1:k2`", may_miss=True),
            "scale": _number("multiplier of inputs or tasks", may_miss=True),
            "value": _number("value of the quantity", may_miss=True),
            "stderr": _MAY_STDERR,
            "lower": _number("saved step before a turning point", may_miss=True),
            "upper": _number("saved step after a turning point", may_miss=True),
            "finding": Column("text", "what was found, in words", may_miss=True),
            "verdict": Column("text", "`ok` or `suspect`", may_miss=True),
            "reasons": _REASONS,
        },
        "behaviour",
        f"these steps are kept: {FEW_STEPS}; values at single positions and every second scale are left out",
    ),
    "stages": Table(
        "boundaries between stages on which several signals agree, and the changes in each stage",
        {
            "run": _RUN,
            "quantity": Column("text", "see `icl/analysis/stages/`"),
            "signal": Column("text", "name of the signal: a loss, a score or the LLC", may_miss=True),
            "at": _number(
                "step to which the value belongs; smoothed curves also have points between saved steps", may_miss=True
            ),
            "value": _number("value of the quantity", may_miss=True),
            "stderr": _MAY_STDERR,
            "verdict": Column("text", "`ok`, `suspect` or `invalid`", may_miss=True),
            "reasons": _REASONS,
            "low": _number("step two standard errors before a boundary", may_miss=True),
            "high": _number("step two standard errors after a boundary", may_miss=True),
            "kind": Column("text", "`turn`, `plateau` or `onset`", may_miss=True),
            "strength": _number("strength of a candidate for a boundary, in standard errors", may_miss=True),
            "stage": Column("integer", "index of the stage, from 1", may_miss=True),
            "type": Column("text", "type of the stage: `A`, `B` or `?`", may_miss=True),
            "start": _number("first step of a stage", may_miss=True),
            "end": _number("last step of a stage", may_miss=True),
        },
        "stages",
    ),
    "moving-pool": Table(
        "runs on pools of tasks that are fixed or change during training (`docs/priors.md`): losses and gaps at every saved step",
        {
            "num_tasks": Column("integer", "task diversity M"),
            "pool": Column("text", "`fixed` or `walk`"),
            "pool_steps": Column("integer", "correlation time of the walk, in steps", may_miss=True),
            "seed": Column("integer", "seed of the tasks, the initial weights, the data and the noise"),
            "step": _STEP,
            "distribution": Column("text", "`pretrain` (the tasks of the last update before the step)"),
            "quantity": Column("text", "`loss`, or the gap `delta_ridge` or `delta_dmmse`"),
            "value": _VALUE,
            "stderr": _STDERR,
        },
        "moving pools",
        "means over positions on training tasks",
    ),
    "worlds": Table(
        "runs whose tasks, noise or inputs are not Gaussian (`docs/priors.md`): gaps to ridge and to the Bayes predictor on new tasks",
        {
            "preset": Column("text", "preset of the run"),
            "seed": Column("integer", "seed of the tasks, the initial weights, the data and the noise"),
            "step": Column("integer", "number of updates; empty for numbers about the predictors", may_miss=True),
            "quantity": Column(
                "text",
                "the gap `delta_ridge` or `delta_bayes`; `separation`: mean squared distance between ridge and the Bayes predictor; "
                "`bayes_variance`: mean squared standard error of the Bayes predictor",
            ),
            "value": _VALUE,
            "stderr": _STDERR,
        },
        "other worlds",
        f"means over positions; these steps are kept: {FEW_STEPS}",
    ),
    "prior-mixture": Table(
        "mixtures of dMMSE and ridge that are closest to the models of a ladder (runs that differ only in M and in "
        "seeds; `docs/priors.md`)",
        {
            "run": Column(
                "text",
                "M and seed of the run; `all` for the whole ladder; or the number of a seed, for the runs with this seed",
            ),
            "num_tasks": _number("task diversity M; empty for the whole ladder", may_miss=True),
            "step": Column("integer", "number of updates; empty for numbers about whole runs", may_miss=True),
            "quantity": Column("text", "see `icl/analysis/mixture/`"),
            "mixture": Column("text", "`fixed` or `bayes`", may_miss=True),
            "distribution": Column("text", "`pretrain` (the run's M tasks) or `true` (new tasks)"),
            "position": Column("text", "`mean`: one mixture for all positions"),
            "value": _number("value of the quantity", may_miss=True),
            "stderr": _MAY_STDERR,
            "lower": _number("saved step before a transition, or lower limit of an interval over seeds", may_miss=True),
            "upper": _number("saved step after a transition, or upper limit of an interval over seeds", may_miss=True),
            "num_seeds": Column("integer", "number of seeds of an exponent", may_miss=True),
            "finding": Column("text", "direction of a transition", may_miss=True),
            "verdict": _VERDICT,
            "reasons": _REASONS,
        },
        "prior ladder",
        "means over positions, without residuals and without the reasons of saved steps",
    ),
    "implicit-prior": Table(
        "energy distances between candidate priors and the tasks behind the prompts that two models of the same "
        "ladder generate (`docs/priors.md`)",
        {
            "run": _RUN,
            "num_tasks": Column("integer", "task diversity M"),
            "step": Column("integer", "number of updates; empty for numbers about the candidates", may_miss=True),
            "quantity": Column("text", "see `icl/analysis/prior/`"),
            "candidate": Column("text", "candidate prior, or `model`", may_miss=True),
            "value": _VALUE,
            "stderr": _STDERR,
            "finding": Column("text", "what was found, in words", may_miss=True),
            "verdict": _VERDICT,
            "reasons": _REASONS,
        },
        "prior ladder",
    ),
    "transience": Table(
        "transient ridge in four runs with different seeds (the preset `transience`): losses at every saved step, and "
        "the findings over seeds",
        {
            "seed": Column(
                "integer", "seed of the run; empty for other predictors and for findings over seeds", may_miss=True
            ),
            "predictor": Column("text", "`model`, `ridge`, `dmmse` or `zero`"),
            "step": Column("integer", "number of updates; empty for other predictors and for findings", may_miss=True),
            "distribution": Column("text", "`pretrain` (the ten training tasks) or `true` (new tasks)"),
            "quantity": Column("text", "`loss`, or a finding over seeds: `critical_step`, `rise` or `dip`"),
            "value": _VALUE,
            "stderr": Column(
                "number", "standard error of the value: over prompts for a loss, over seeds for a finding"
            ),
            "low": _number("lower limit of the 95 % interval over seeds", may_miss=True),
            "high": _number("upper limit of the 95 % interval over seeds", may_miss=True),
            "finding": Column("text", "what was found, in words", may_miss=True),
            "verdict": Column("text", "`ok` or `suspect`", may_miss=True),
        },
        "ridge comes and goes",
        "means over positions",
    ),
    "threshold": Table(
        "runs that differ only in M and in seeds (four seeds for each M), from which the task-diversity threshold is "
        "computed: losses and gaps at the last step",
        {
            "run": Column("text", "the word seed, followed by the seed of the initial weights, the data and the noise"),
            "num_tasks": Column("integer", "task diversity M"),
            "step": _STEP,
            "distribution": Column("text", "`pretrain` (the M training tasks) or `true` (new tasks)"),
            "quantity": Column("text", "`loss`, or the gap `delta_ridge` or `delta_dmmse`"),
            "position": Column("text", "`mean`: the mean over positions"),
            "value": _VALUE,
            "stderr": _STDERR,
        },
        "threshold in M",
        "means over positions, without shifts and earlier steps",
    ),
    "phases": Table(
        "measured time of each phase of the script that computed the tables (`small.sh`, `published-run.sh` or "
        "`full.sh`)",
        {
            "phase": Column("text", "name of the phase in the script"),
            "commands": Column("text", "commands of the phase"),
            "seconds": _number("wall-clock time in seconds; the machine was shared with other work"),
            "cpu_seconds": _number("CPU time in seconds", may_miss=True),
            "date": Column("text", "date on which the phase ended"),
            "commit": Column("text", "commit of the source; `+` means with uncommitted changes", may_miss=True),
            "torch": Column("text", "version of PyTorch"),
            "hardware": Column("text", "device"),
            "threads": Column("text", "value of OMP_NUM_THREADS"),
        },
        "",
    ),
}
"""All tables that can be shipped. A table is absent if its phases have not run."""

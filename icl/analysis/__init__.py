"""Analyses of how models develop. Each analysis turns a run's checkpoints, or a table, into one tidy table.

An analysis is a module or a folder in this package. `essential-dynamics`, for example, is in `essential_dynamics/`. An
analysis consists of:

- `Settings`, a frozen dataclass. Its fields become options of `icl analyse`.
- `analyse(path, settings) -> Result`.
- `plot(table, *, title)`, in the module of the same name in `icl.plotting`.
- One line in `ANALYSES` below.

Analyses of checkpoints call `icl.analysis.run.over_checkpoints`. This function measures many checkpoints at once. It
caches the results, so no checkpoint is measured twice.
"""

from typing import Literal, NamedTuple

from icl.config.validation import ConfigError


class NotApplicableError(ConfigError):
    """Raised if an analysis has no meaning for a run, for example because the analysis needs a finite M.

    `--what all` skips such analyses.
    """


class About(NamedTuple):
    """Description of an analysis in the registry."""

    of: Literal["run", "table"]
    """Input of the analysis: a run's folder (or one checkpoint), or a file with a table."""
    help: str
    module: str | None = None
    """Name of the module in this package and in `icl.plotting`; if None, it is derived from the name of the analysis."""
    needs_finite_tasks: bool = False
    """Whether the analysis needs a run with a finite M."""
    needs_density: bool = False
    """Whether the analysis needs a model with a predictive distribution (`model.output` is `gaussian` or `mixture`)."""
    families: tuple[str, ...] = ("regression",)
    """Values of `model.family` for which the analysis is available."""


ANALYSES: dict[str, About] = {
    "gradients": About(
        "run",
        "gradients of the loss with respect to the weights (norm, noise scale, alignment) and to the data distribution's parameters",
    ),
    "hessian": About(
        "run", "curvature of the loss: largest and smallest eigenvalues, trace and spectrum of the Hessian"
    ),
    "essential-dynamics": About(
        "run",
        "PCA of the trajectory, compared with random walks; evolutes, cusps, vertices and forms of its path",
        families=("regression", "language"),
    ),
    "embeddings": About("run", "spectra and overlap of the embeddings; collapse of layer norms and the unembedding"),
    "attention": About(
        "run",
        "attention of each head: patterns, entropy, variability; weight on the token itself, the previous token, x-tokens and y-tokens",
    ),
    "behaviour": About(
        "run", "losses and scores, gaps to ridge and dMMSE, transience, scaled inputs and tasks, task vectors"
    ),
    "language-behaviour": About(
        "run",
        "for a language run: losses, in-context learning, bigrams and n-grams, attention and composition of heads, position embeddings, norms",
        "language",
        families=("language",),
    ),
    "stages": About(
        "run",
        "boundaries between stages from loss, scores and LLC, and the changes within each stage",
        families=("regression", "language"),
    ),
    "mixture": About(
        "run",
        "the mixtures of dMMSE and ridge that are closest to the model, the steps at which the model changes between dMMSE and ridge, and the effect of M",
        needs_finite_tasks=True,
    ),
    "prior": About(
        "run",
        "the prior over tasks that the model has learned: the model generates prompts, and their tasks are compared with the M training tasks and with N(0, I)",
        needs_density=True,
    ),
    "diversity": About(
        "table",
        "linear, ridge or lasso regression of the OOD error on task diversity and other features",
        "diversity_fit",
    ),
}
"""All analyses. The keys are the names that the option `--what` accepts."""


def analyses_of(family: str) -> list[str]:
    """Return the names of the analyses that are available for runs of one family."""
    return [name for name, about in ANALYSES.items() if about.of == "run" and family in about.families]


def name_for(name: str, family: str) -> str:
    """Return the name of the analysis for runs of a family: for language runs, `behaviour` means `language-behaviour`.

    Raises:
        NotApplicableError: If the analysis is not available for runs of this family. The message names the available analyses.
    """
    if family == "language" and name == "behaviour":
        return "language-behaviour"
    if ANALYSES[name].of == "run" and family not in ANALYSES[name].families:
        known = ", ".join(analyses_of(family))
        raise NotApplicableError(f"The analysis `{name}` is not available for {family} runs; choose one of {known}.")
    return name


def module_name(name: str) -> str:
    """Return the name of an analysis's module, in this package and in `icl.plotting`."""
    return ANALYSES[name].module or name.replace("-", "_")

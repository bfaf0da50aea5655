"""How models develop: each analysis turns a run's checkpoints, or a table, into one tidy table with verdicts.

An analysis is a module here (`essential-dynamics` is `essential_dynamics.py`, unless its line says otherwise) that has `Settings`, a frozen dataclass
whose fields become options of `icl analyse`, and `analyse(path, settings) -> Result`; its figure is `plot(table, *,
title)` in the module of the same name in `icl.plotting`; and it has one line in `ANALYSES`. Work over checkpoints goes
through `icl.analysis.run.over_checkpoints`, which does it as a population and never does a checkpoint twice.
"""

from typing import Literal, NamedTuple


class About(NamedTuple):
    """What the registry says of an analysis."""

    of: Literal["run", "table"]
    """What it is given: a run's folder (or one checkpoint), or a file with a table."""
    help: str
    module: str | None = None
    """Of its name in this package and in `icl.plotting`; left out, the analysis's own."""


ANALYSES: dict[str, About] = {
    "gradients": About("run", "gradients in the weights (norm, noise scale, alignment) and in the data distribution"),
    "hessian": About("run", "curvature: the Hessian's largest and smallest eigenvalues, its trace and its spectrum"),
    "essential-dynamics": About("run", "PCA of the trajectory, beside a random walk's; evolutes, cusps, forms"),
    "embeddings": About("run", "spectra and overlap of the embeddings, layer-norm and unembedding collapse"),
    "attention": About(
        "run", "what each head attends to: patterns, entropy, variability, self, previous, x- and y-tokens"
    ),
    "behaviour": About(
        "run", "losses and scores, distances to ridge and dMMSE, transience, inputs and tasks of any size, task vectors"
    ),
    "stages": About("run", "boundaries between stages by loss, scores and LLC, and what changes in each stage"),
    "diversity": About(
        "table", "OOD error against task diversity and other features: linear, ridge or lasso", "diversity_fit"
    ),
}
"""Every analysis by the name that `--what` takes."""


def module_name(name: str) -> str:
    """The module of an analysis, here and in `icl.plotting`."""
    return ANALYSES[name].module or name.replace("-", "_")
